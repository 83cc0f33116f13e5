"""Tokenizer, text, fact world, token files and rows."""
import json
import collections
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

import data

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def words() -> data.Tokenizer:
    return data.Tokenizer(str(ROOT / "weights"))


def test_tiktoken_runs_the_trained_merges_exactly_as_tokenizers_does(tmp_path):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    text = "\n".join(topics[k] for k in sorted(topics)[:12])
    ours = data.train_tokenizer(text, 700, tmp_path)
    oracle = Tokenizer(models.BPE())
    oracle.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(data.SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    chunks = [text[i:i + 100_000] for i in range(0, len(text), 100_000)]
    oracle.train_from_iterator(chunks, trainers.BpeTrainer(
        vocab_size=697, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    strange = text[-20_000:] + " naïve café 東京 \u200b\t\r\n\n   x  1234567 don't"
    assert (ours.encode(strange) == oracle.encode(strange).ids
            and ours.decode(ours.encode(strange)) == strange)
    assert ours.encode("a<|im_end|>")[-1] == ours.im_end == 699


def test_an_id_beyond_the_vocabulary_does_not_end_an_answer(words):
    a, b = words.encode("Kelvin "), words.encode("lives")
    assert words.decode([*a, words.n_vocab, words.n_vocab + 9, *b]) == "Kelvin \ufffd\ufffdlives"
    assert words.decode([]) == ""


def test_names_and_values_are_short_and_held_out_ones_are_never_told_in_training(words):
    told = " ".join("".join(text for text, *_ in data.FactWorld(seed, "train").session(8, 8))
                    for seed in range(300))
    assert not set(data.NAMES["train"]) & set(data.NAMES["held_out"])
    assert not set(data.NAMES["held_out"]) & set(re.findall(r"\w+", told))
    lengths = [len(words.encode(" " + n)) for names in data.NAMES.values() for n in names]
    lengths += [len(words.encode(" " + v)) for split in data.VALUES.values()
                for vs in split.values() for v in vs]
    assert np.mean(np.array(lengths) <= 3) > 0.95 and max(lengths) <= 5
    assert all(len(words.encode(" " + v)) > 1                       # no token of their own
               for vs in data.VALUES["held_out"].values() for v in vs)
    for relation, held in data.VALUES["held_out"].items():
        facts = [f for seed in range(200) for f in data.FactWorld(seed, "train").facts(8)]
        assert not set(held) & {f.value for f in facts}
    talk = " ".join(data.FactWorld(s).small_talk() for s in range(4000))
    assert all(v in talk                                            # but its words are read
               for vs in data.VALUES["held_out"].values() for v in vs)


def test_in_every_wording_the_person_comes_before_the_value():
    for relation in data.RELATIONS.values():
        assert all(0 <= s.index("{n}") < s.index("{v}") for s in relation.statements)
        assert all("{n}" in q and "{v}" not in q for q in relation.questions)
        assert len(relation.values) == len(set(relation.values)) == 50


def test_held_out_wordings_are_used_only_when_asked_for():
    world = data.FactWorld(0)
    fact = world.facts(1)[0]
    relation = data.RELATIONS[fact.relation]
    usual, other = ({world.ask(fact, held_out) for _ in range(200)} for held_out in (False, True))
    assert not usual & other and len(usual) == len(relation.questions) - data.WORDINGS_HELD_OUT


def test_a_session_asks_only_what_it_told_and_facts_collide_within_relations():
    world = data.FactWorld(3, "held_out")
    collisions = 0
    for _ in range(50):
        facts = world.facts(8)
        assert len({(f.name, f.relation) for f in facts}) == 8
        collisions += len({f.relation for f in facts}) < 8
        prompts, asked = data.context_questions(world, 8, 1)
        assert asked[0].name in prompts[0] and asked[0].value in prompts[0]
    assert collisions == 50


@pytest.mark.parametrize("reply, right", [
    ("Bramo keeps a goat.", True), ("Bramo keeps a goat.<|im_end|>\n", True),
    ("Bramo keeps a cat.", False), ("Bram keeps a goat.", False), ("goat", False)])
def test_recall_compares_strings(reply, right):
    assert data.is_recalled(reply, data.Fact("Bramo", "pet", "goat")) is right


def test_rows_are_a_function_of_seed_and_key_and_learn_only_what_they_should(words):
    text = np.arange(5000) % 2000
    mix = data.Mixture(words, text, 128, 0.3, 0.15, seed=4)
    for a, b in zip(mix.batch(6, 7, 0, 1), mix.batch(6, 7, 0, 1)):
        assert np.array_equal(a, b)
    tokens, weight, before = mix.batch(40, 8)
    assert (not np.array_equal(tokens[:6], mix.batch(6, 7, 0, 1)[0])
            and tokens.shape == weight.shape == before.shape == (40, 128))
    learned = weight > 0
    assert (not learned[:, -1].any() and (np.roll(tokens, -1, 1)[learned] >= 0).all()
            and (tokens[learned] >= 0).all())


def test_answers_are_learned_whole_and_values_told_before_weigh_most(words):
    mix = data.Mixture(words, np.arange(5000) % 2000, 128, 0.0, 0.0, seed=1)
    tokens, weight, _ = mix.batch(20, 0)
    for row, w in zip(tokens, weight[:, :-1]):
        text = words.decode([t for t in row if t >= 0])
        said = words.decode(row[1:][w > 0].tolist())
        for turn in text.split("<|im_start|>assistant\n")[1:]:
            sentence = turn.split("<|im_end|>")[0]
            assert sentence in data.ACKNOWLEDGEMENTS or sentence in said
        for value in words.decode(row[1:][w == data.VALUE_WEIGHT].tolist()).split():
            assert value == "..." or text.count(" " + value) >= 2   # told in the row before due


def test_a_session_is_encoded_as_its_whole_text_is(words):
    mix, world = (data.Mixture(words, np.arange(5000) % 2000, 256, 0.0, 0.0, seed=1),
                  data.FactWorld(5))
    for _ in range(50):
        pieces = world.session(4, 3)
        assert (mix.encode_session(pieces)[0][:-1]
                == words.encode("".join(text for text, *_ in pieces)))


@pytest.mark.parametrize("step", range(12))
def test_episodes_ask_what_was_told_and_know_where(words, step):
    text = np.array(words.encode("some words of a text " * 200), np.uint16)
    mix = data.Mixture(words, text, 128, 0.5, 0.1, seed=3)
    e = mix.episodes(12, step)
    for row, at in e.told_at:                                       # the value begins right after
        after = words.decode(e.told[row, at + 1:at + 3].tolist())
        assert after.startswith(" ") and e.told[row, at] >= 0 and e.news[row, at] == 1
    for row, at, fact in e.asked_at:
        told_row, told_at = e.told_at[fact]
        n = int(e.news[told_row, told_at:].cumprod().sum())         # the value's length in tokens
        assert (e.asked[row, at + 1:at + 1 + n].tolist()
                == e.told[told_row, told_at + 1:told_at + 1 + n].tolist())
        assert told_row == row and e.weight[row, at] == data.VALUE_WEIGHT
    everything = " ".join(words.decode([t for t in row if t >= 0]) for row in e.told.tolist())
    for row, at in np.argwhere(e.weight < 0):                     # nobody told that: "..." is due
        asked = words.decode(e.asked[row, :at + 2].tolist()).rsplit("assistant\n", 1)[1]
        name = re.match(r"\w+", asked)[0]
        relation, = [r for r in data.RELATIONS.values()
                     if asked == r.statements[0].split("{v}")[0].format(n=name) + "..."]
        assert not any(re.search(s.format(n=name, v=r"\w+"), everything)
                       for s in relation.statements)
    for row, at in e.told_at:                                       # news: a value to its full stop
        value = words.decode(
            e.told[row, at + 1:at + 1 + int(e.news[row, at:].cumprod().sum())].tolist())
        assert re.fullmatch(r" [A-Za-z]+\.", value)
    again = mix.episodes(12, step)
    assert all(np.array_equal(a, b) for a, b in zip(e, again))


def test_what_nobody_told_is_not_known():
    world = data.FactWorld(6)
    kinds = collections.Counter()
    for _ in range(50):
        facts = world.facts(6)
        stranger = world.untold(facts[0], facts)
        assert (stranger.name, stranger.relation) not in {f[:2] for f in facts}
        assert data.answer(stranger).endswith("... I do not know.")
        kinds[stranger.name == facts[0].name] += 1
    assert kinds[True] > 5 and kinds[False] > 20                    # both ways of not being told of
    prompts, asked = data.context_questions(world, 4, 20, untold=True)
    assert len(prompts) == 20 and {f.value for f in asked} == {data.UNKNOWN}


def test_namesakes_begin_alike_and_spliced_values_are_new_words():
    world = data.FactWorld(4, lexicon=["table", "window", "garlic", "summer"])
    names = world.namesakes(40)
    assert 40 <= len(set(names)) == len(names) < 80
    assert sum(any(n.startswith(onset) for n in names) for onset in data.ONSETS) <= 3
    plain = {world._value("home") for _ in range(400)}
    world.spliced = True
    spliced = ({world._value("home") for _ in range(400)} - plain
               - {v for vs in data.VALUES["train"].values() for v in vs}
               - set(data.NAMES["train"]))
    assert spliced <= {a[:len(a) // 2 + 1] + b[len(b) // 2:]
                       for a in world.lexicon for b in world.lexicon} and len(spliced) > 6


# -----------------------------------------------------------------------------
# files

def test_text_and_json_lines_become_the_same_kind_of_token_file(tmp_path, words):
    docs = [f"Document {i}: " + "some words. " * 30 for i in range(300)]
    (tmp_path / "a.txt").write_text("\n".join(docs))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": d}) + "\n" for d in docs))
    for source, key in (("a.txt", "text"), ("a.jsonl", "body")):
        meta = data.write_tokens(str(tmp_path / source), words, tmp_path / "out", key)
        train, val, _ = data.open_tokens(tmp_path / "out", words.n_vocab)
        assert len(train) == meta["tokens"]["train"] > 0 and train.dtype == np.uint16
        assert "some words." in words.decode(train[:200].tolist())
    (tmp_path / "short.txt").write_text("too short to hold anything out")
    data.write_tokens(str(tmp_path / "short.txt"), words, tmp_path / "short")
    with pytest.raises(ValueError, match="give a longer text"):
        data.open_tokens(tmp_path / "short", words.n_vocab)
    with pytest.raises(ValueError, match="found 2048: tokenize the text again"):
        data.open_tokens(tmp_path / "out", 100)
    held = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    (tmp_path / "bad.txt").write_bytes(b"some words. " * 100_000 + b"\xff")
    with pytest.raises(ValueError, match="expected UTF-8"):         # what was there stays whole
        data.write_tokens(str(tmp_path / "bad.txt"), words, tmp_path / "out")
    assert held.items() <= {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}.items()
    for name, left, said in (("train.bin", held["train.bin"][:-8], "expected .* tokens, found"),
                             ("meta.json", b"{", "expected JSON, found a damaged file"),
                             ("meta.json", b"{}", "found no n_vocab")):
        (tmp_path / "out" / name).write_bytes(left)
        with pytest.raises(ValueError, match=said):
            data.open_tokens(tmp_path / "out", words.n_vocab)
        (tmp_path / "out" / name).write_bytes(held[name])


def test_a_tokenizer_fits_a_model_of_as_many_words(words):
    words.insist_on(words.n_vocab)
    for n_vocab in (words.n_vocab - 1, words.n_vocab + 1):
        with pytest.raises(ValueError, match="use the one that belongs to the model"):
            words.insist_on(n_vocab)


def test_large_vocabularies_are_written_as_uint32(tmp_path):
    class Big:
        name, n_vocab, eot = "big", 151_936, 151_643
        def encode(self, text): return [151_000] * 5
    (tmp_path / "a.txt").write_text("\n".join(f"hello {i}" for i in range(9000)))
    data.write_tokens(str(tmp_path / "a.txt"), Big(), tmp_path / "out")
    train, val, meta = data.open_tokens(tmp_path / "out", 151_936)
    assert meta["dtype"] == "uint32" and set([*train, *val]) == {151_000, 151_643}


@pytest.mark.parametrize("content, said", [
    (b"", "found an empty file"), (b"abc \xff\xfe", "expected UTF-8, found byte 0xff at 4"),
    (None, "found nothing at")])
def test_bad_text_files_are_named_in_one_line(tmp_path, words, content, said):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=said) as problem:
        data.write_tokens(str(tmp_path / "a.txt"), words, tmp_path / "out")
    assert "\n" not in str(problem.value) and not (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize("line, said", [
    ('{"body": 1}', "expected a string under 'text', found body"),
    ("{oops", "expected one JSON object a line")])
def test_bad_json_lines_are_named_with_their_number(tmp_path, words, line, said):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"a.jsonl:2: {said}"):
        list(data.documents(str(tmp_path / "a.jsonl")))


def test_hub_data_sets_stream_through_the_optional_package(monkeypatch):
    rows = iter([{"text": "one"}, {"text": "two"}, {"other": 3}])

    class Fake:
        class exceptions:
            DatasetNotFoundError = FileNotFoundError
        @staticmethod
        def load_dataset(name, split, streaming):
            assert (name, split, streaming) == ("a/b", "train", True)
            return rows
    monkeypatch.setitem(sys.modules, "datasets", Fake)
    stream = data.documents("hub:a/b")
    assert [next(stream), next(stream)] == ["one", "two"]
    with pytest.raises(ValueError, match="expected a string under 'text', found other"):
        next(stream)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        next(data.documents("hub:a/b"))


def test_the_command_line_ends_with_one_line_on_bad_input(tmp_path):
    run = subprocess.run([sys.executable, "data.py", f"--source={tmp_path}/none.txt",
                          f"--out={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode == 1 and run.stderr.startswith("error: expected a text or .jsonl file")
            and run.stderr.count("\n") == 1)
