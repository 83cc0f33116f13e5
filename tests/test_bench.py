"""What the bench computes, against simple cases and against the model itself."""
import hashlib
import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import bench
from conftest import randomised, some_tokens

ROOT = Path(__file__).parent.parent


def test_calibration_error_is_zero_when_confidence_is_the_hit_rate_and_the_gap_when_it_is_not():
    sure, right = torch.full((3000,), 0.8), torch.arange(3000) % 5 > 0
    assert bench.calibration_error(sure, right) == pytest.approx(0, abs=1e-3)
    assert (bench.calibration_error(torch.full((3000,), 0.99), right)
            == pytest.approx(0.19, abs=1e-3))


def test_intervals_hold_what_they_should():
    """Of the same share asked 400 times over, 95 % of the intervals hold it."""
    chance = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.5, 0.6])[:, None, None]
    before, after = torch.rand(2, 400, 300, generator=chance) < shares
    won, lost = (after & ~before).float().mean(1), (before & ~after).float().mean(1)
    paired = [bench.difference_interval(*x, 300) for x in zip(won.tolist(), lost.tolist())]
    single = [bench.wilson(float(x), 300) for x in after.float().mean(1)]
    for found, true in ((paired, 0.1), (single, 0.6)):
        assert 0.92 < sum(low < true < high for low, high in found) / 400 < 0.98


def test_an_ablation_is_charged_for_what_it_loses_wins_and_costs_text():
    """Eight windows in which the whole write costs 1 % and the ablation 1 % more, give or take."""
    more = torch.tensor([0.008, 0.012] * 4)
    found = bench.compared("x", ([True, True, False, True], torch.full((8,), 0.01)),
                           ([False, False, True, True], 0.01 + more))
    assert (found["x"], found["x_lost"], found["x_won"]) == (0.5, 0.5, 0.25)
    assert found["x_text"] == pytest.approx(1.02)
    assert found["x_text_change"] == pytest.approx(0.01)
    assert found["x_text_margin"] == pytest.approx(2.36 * 0.002 / 7 ** 0.5, rel=1e-4)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.35, 1.1])
def test_simulated_halting_is_what_the_model_does_when_it_halts(threshold):
    model, tokens = (randomised("more pairs than neurons"),
                     some_tokens(randomised("more pairs than neurons"), 2, 20))
    whole, short = bench.think(model, tokens), bench.think(model, tokens, threshold)
    ticks, nats = bench.halted(bench.of(whole, "certainty"), bench.of(whole, "tick_nats"),
                               threshold)
    assert ticks == pytest.approx(float((bench.of(short, "certainty") > -1).sum(-1).float().mean()))
    assert nats == pytest.approx(float(bench.of(short, "nats").mean()), abs=1e-5)


def test_an_unknown_command_ends_with_one_line():
    run = subprocess.run([sys.executable, "bench.py", "qualty"], cwd=ROOT, capture_output=True,
                         text=True)
    assert (run.returncode == 2 and run.stderr.startswith("error: expected one of quality")
            and run.stderr.count("\n") == 1)


def test_quality_prints_every_figure_as_its_last_line():
    run = subprocess.run([sys.executable, "bench.py", "quality", "--seeds=1", "--first_seed=2",
                          "--rows=2", "--questions=4"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "seed 2: text" in run.stderr and "seed 0" not in run.stderr
    found = json.loads(run.stdout.strip().split("\n")[-1])
    wanted = {"backbone_nats", "ffn_same_tokens_nats", "graft_nats", "ffn_deleted_nats",
              "graft_bits_per_byte", "nats_by_tick", "read_tick_entropy", "halting",
              "calibration_ece", "text_sha256", "in_context_recall", "key_cosine_at_init",
              "trainable", "frozen", "seeds", "commit", "hardware"}
    ticks = json.loads((ROOT / "weights/card.json").read_text())["graft"]["config"]["ticks"]
    assert (wanted <= found.keys() and len(found["nats_by_tick"]) == ticks
            and found["seeds"] == [2]
            and found["key_cosine_at_init"] < 0.5)
    assert (found["ffn_deleted_nats"] > found["graft_nats"] > 0
            and found["ffn_deleted_nats"] > found["thinking_nats"])


def test_a_random_write_and_deranged_facts_recall_nothing_where_the_write_recalls():
    """Invariant 10, on the shipped weights: 20 held-out people, chance is below one in ten."""
    mind, world = bench.Mind(), bench.data.FactWorld(11, "held_out")
    facts = world.population(20)
    written = mind.write(mind.factors(world.texts(facts)))
    noise = torch.randn(written.weight.shape, generator=torch.Generator().manual_seed(0),
                        dtype=torch.float64)
    random = bench.Plastic(noise * written.weight.norm() / noise.norm())
    lies = mind.write(mind.factors(world.texts(bench.deranged(world, facts))))
    assert mind.recall(world, facts, written) >= 0.6
    assert max(mind.recall(world, facts, other) for other in (None, random, lies)) <= 0.1


def test_who_has_the_same_relation_is_not_taken_for_the_same_person_told_anew():
    """Sixty of one relation, told once: hardly a key is superseded, whoever is told otherwise is."""
    mind, world = bench.Mind(), bench.data.FactWorld(2, "held_out")
    facts = world.population(60, ["home"])
    told, anew = (mind.factors(world.texts(people))
                  for people in (facts, [world.another_value(f) for f in facts]))

    def share_gone(sessions: list) -> float:
        gone = bench.superseded([bench.bearings(bench.whitened(mind.ctm, f)) for f in sessions],
                                bench.WriteRule().near)
        return sum(int(g.sum()) for g in gone[:6]) / len(facts)
    assert share_gone(told) < 0.4 and share_gone(told + anew) > 1   # keys of each person, of four


def test_a_carry_is_each_rows_own_and_the_other_rows_where_it_is_shuffled():
    mind = bench.Mind()
    tokens = bench.HeldOut(mind.words).windows(3, apart=True)[:2, :128]
    first, second = tokens.split(64, 1)
    sums = bench.read_session(mind.model, first)[0].sums
    own, other, cold = (bench.session_nats(mind, second, start) for start in (
        sums, bench.Carry(*(x.flip(0) for x in sums)), None))
    found = bench.carry_figures(mind, tokens, tokens)
    for name, nats in (("carry_with", own), ("carry_shuffled", other), ("carry_without", cold),
                       ("warm_cold", cold[:, 32:])):
        assert found[name] == pytest.approx(float(nats.nanmean()), abs=1e-5)
    assert found["session_with"] == found["session_chat_with"] != found["session_without"]


@pytest.fixture(scope="module")
def few() -> bench.Sample:
    """Ten of a seed's facts, told in one session."""
    torch.set_num_threads(1)
    sample = bench.Sample(12)
    sample.facts, sample.left, sample.factors, sample.windows = (
        sample.facts[:10], sample.left[:1], sample.factors[:1], sample.windows[:2])
    sample.texts = {1: sample.texts[1][:10], 10: sample.texts[10][:1]}
    return sample


@pytest.mark.parametrize("learn, setting", [
    (bench.by_writing, None), (bench.by_retrieval, 8), (bench.by_fine_tuning(30), 0.03),
    (bench.by_fine_tuning(30, 0.3), 0.1)], ids=["written", "retrieval", "tuned", "sparse"])
def test_an_opponent_learns_what_it_was_told_and_leaves_the_model_as_it_was(few, learn, setting):
    """A fair opponent is one that can do it: ten facts, of which the model by itself knows none."""
    before = {k: v.clone() for k, v in few.mind.model.state_dict().items()}
    taught = learn(few, list(range(10)), setting)
    with bench.changed(few.mind.model, taught.change):
        right = few.graded(list(range(10)), few.mind.ask(few.questions(list(range(10))),
                                                         taught.plastic, taught.before))
    assert sum(right["direct"] + right["paraphrase"]) >= 10 and taught.flops > 0
    assert all(torch.equal(v, before[k]) for k, v in few.mind.model.state_dict().items())


def test_nothing_runs_beside_what_a_write_costs(monkeypatch):
    running, beside = [], {"cost": [], "other": []}

    def part(name: str, seed: int, file: Path | None) -> dict:
        running.append(name)
        before = len(running)
        time.sleep(0.05)
        beside[name].append(max(before, len(running)))
        running.remove(name)
        return {name: float(seed)}

    monkeypatch.setattr(bench, "one_process_each", lambda tasks: ThreadPoolExecutor(2))
    monkeypatch.setattr(bench, "part_of", part)
    monkeypatch.setattr(bench, "full", False)
    assert bench.measured({"other": None, "cost": None})["other"] == [0.0, 1.0, 2.0]
    assert beside["cost"] == [1, 1, 1] and max(beside["other"]) == 2


def test_twice_as_loud_is_the_memory_twice_and_not_loud_at_all_is_none(few, monkeypatch):
    monkeypatch.setattr(bench, "louder", "0,1")
    found = bench.loudness_figures(few)
    assert found["text_0.0"] == 1 != found["text_1.0"]
    for n in (10, 100):                                             # few: both are of ten facts
        assert found[f"{n}_paraphrase_1.0"] >= 0.6 > 0.1 >= found[f"{n}_paraphrase_0.0"]
    eta, once = few.mind.ctm.log_eta.data, few.whole.weight
    monkeypatch.setattr(few.mind.ctm.log_eta, "data", eta + math.log(2))
    again = few.mind.write(few.mind.factors(few.texts[10])).weight
    assert (again - 2 * once).norm() < 1e-3 * once.norm()


def test_what_is_written_into_the_synapses_is_capped(few):
    (name, change), = bench.synapse_change(few, 0.01).items()
    weight = few.mind.model.state_dict()[name]
    assert change.shape == weight.shape
    assert change.norm() / weight.norm() == pytest.approx(0.01, rel=1e-3)


def test_lora_learns_what_it_was_told_by_heart(few):
    """How much of it answers a question then hangs on rounding (1 to 6 of 10 over four draws of
    its first matrices), so this holds it to its own loss."""
    told = torch.tensor([few.mind.words.encode(few.texts[10][0])])
    taught = bench.by_lora(30)(few, list(range(10)), 0.003)
    with torch.no_grad():
        alone = few.mind.model(told).nats.nanmean()
        with bench.changed(few.mind.model, taught.change):
            assert few.mind.model(told).nats.nanmean() < alone / 10 and taught.flops > 0


def test_an_edit_makes_one_answer_likelier(few):
    """The closed-form edit is a weak opponent here (README),
    but it does move the value that it was told."""
    fact, taught = few.facts[0], bench.by_editing(few, [0], 0.001)
    tokens = torch.tensor([few.mind.words.encode(
        bench.data.user_turn(few.world.ask(fact)) + bench.data.answer(fact))])
    alone = few.mind.model(tokens).nats[0, -4:-1].sum()
    with bench.changed(few.mind.model, taught.change):
        assert few.mind.model(tokens).nats[0, -4:-1].sum() < alone - 1


def test_mqar_asks_every_key_once_and_a_delta_state_holds_orthogonal_pairs():
    told, asked, due = bench.mqar(bench.np.random.default_rng(0), 5, 64, 4)
    assert (told.shape == (5, 8) and asked.shape == due.shape == (5, 56)
            and (due >= 0).sum(1).tolist() == [4] * 5)
    for pairs, query, wanted in zip(told, asked, due):
        assert (dict(zip(query[wanted >= 0].tolist(), wanted[wanted >= 0].tolist()))
                == dict(zip(pairs[::2].tolist(), pairs[1::2].tolist())))
    state = bench.MatrixState(16, 16, delta=True)
    with torch.no_grad():
        state.value.weight.copy_(torch.eye(16))
        state.key.weight.copy_(torch.eye(16))
        state.embed.weight[told[0, ::2]], state.embed.weight[told[0, 1::2]] = (
            torch.eye(16)[:4], 9 * torch.eye(16)[4:8])
        assert (state(told[:1], told[:1, ::2]).argmax(-1) == told[0, 1::2]).all()


# -----------------------------------------------------------------------------
# the store under fire

@pytest.fixture
def fire(tmp_path) -> bench.Fire:
    torch.set_num_threads(1)
    return bench.Fire(tmp_path, sessions=4)


def test_twenty_kills_lose_nothing_and_leave_nothing_by_halves(fire):
    found = bench.killed_at_random(fire, 20, seed=5, within_s=0.6)
    assert found["kills"] == 20 and sum(found["interrupted"].values()) > 5
    assert (not found["died_of_something_else"] and not found["unreadable"]
            and not found["half_written"] and not found["lost_sessions"])


def test_a_store_that_loses_a_session_is_found_out(fire, monkeypatch):
    """The bench itself, against a store that says it has kept what it has not."""
    honest = bench.Store._replace_manifest
    monkeypatch.setattr(bench.Store, "_replace_manifest",
                        lambda store, entries, now: honest(store, entries[:1], now))
    # a child that is killed before it has told twice has nothing to lose: others follow
    assert any(bench.killed_at_random(fire, 3, seed, within_s=3.0)["lost_sessions"]
               for seed in range(5, 10))


def test_no_lie_is_imported_and_a_full_disk_refuses(fire):
    found = bench.bad_imports(fire)
    assert (found["bad_imports"] == 20 and not found["accepted"] and not found["outside_writes"]
            and not found["bad_imports_spoiled_the_store"])
    found = bench.hostile_disk(fire)
    for name, attempts in (("disk_full", 7), ("read_only", 1)):
        assert found[name] == {"refused": attempts, "attempts": attempts, "exit": 0,
                               "as_before": True}
    assert found["second_writer_refused"]


def test_the_shipped_card_is_of_the_weights_beside_it():
    files = json.loads((ROOT / "weights/card.json").read_text())["files"]
    assert files == {name: hashlib.sha256((ROOT / "weights" / name).read_bytes()).hexdigest()
                     for name in files}
    assert files.keys() == {str(p.relative_to(ROOT / "weights"))
                            for p in (ROOT / "weights").rglob("*.*")
                            if p.is_file() and p.suffix != ".svg"} - {"card.json"}


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_card_says_of_every_run_that_led_to_the_weights_how_it_came_about(
        tmp_path, monkeypatch, parts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench.data, "tiny_documents", lambda: ["text"])
    chain = ["tiny_phase2", "tiny_phase3_1", "tiny_phase3_2"][:parts]
    for minutes, run in enumerate(["tiny_phase1", "tiny_ffn", *chain, "tiny_phase3"]):
        last = tmp_path / "out" / run / "last"
        last.mkdir(parents=True)
        for name in ("model.safetensors", "config.json", "graft.safetensors"):
            (last / name).write_text(run)
        came = chain[chain.index(run) - 1] if run in chain else chain[-1]
        (last.parent / "log.jsonl").write_text("\n".join(map(json.dumps, (
            {"run": {"commit": "abc", "config": {"graft": f"out/{came}/last/graft.safetensors"}}},
            {"step": 1, "val": 3.0, "minutes": minutes}))))
    (tmp_path / "out/tokenizer").mkdir()
    (tmp_path / "out/tokenizer/ranks.json").write_text("{}")
    about = bench.card()
    assert about == json.loads((tmp_path / "weights/card.json").read_text())
    assert (tmp_path / "weights/graft.safetensors").read_text() == "tiny_phase3"
    assert about["thinking"]["minutes"] == 2 and about["thinking"]["figures"]["val"] == 3.0
    assert [r["minutes"] for r in (about["graft"], *about["graft_before"])] == [
        parts + 2, *range(parts + 1, 2, -1)]
