"""Tokenizers, text, and the fact world: everything the model ever reads.

Three kinds of reading material, all of them reproducible from a seed:

    tiny text  the documentation that every Python carries (topics and docstrings), read at run time
    fact world   invented people who live, work, eat and play, told and asked in chat form
    real text    a text file, a JSON-lines file or a Hugging Face hub data set, as token files

Left out on purpose: this file knows nothing of the model. It deals in strings, token ids and numpy
arrays.

    python data.py --source=my.txt --tokenizer=Qwen/Qwen3-0.6B --out=data/my
    -> train.bin, val.bin, meta.json
    python data.py --source=hub:roneneldan/TinyStories --text_key=text --limit=100000 \\
        --out=data/stories

Letters: B batch, T tokens, V vocabulary.
"""
import ast
import hashlib
import json
import random
import re
import sysconfig
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

import configurator


# -----------------------------------------------------------------------------
# tokenizers: one small face for our own byte-level BPE and for Qwen's

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Words with their leading space, single digits, punctuation runs, white space: GPT-2's split with
# digits apart.
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer:
    """Encode text to ids and back; special tokens in the text become their single ids.

    `name` is a folder holding a `ranks.json`, or a Hugging Face name. Raises ValueError with one
    line when there is neither.
    """

    def __init__(self, name: str):
        self.name = str(name)
        if (Path(name) / "ranks.json").exists():
            self._core = _tiktoken_from(Path(name) / "ranks.json")
            self._encode = lambda text: self._core.encode(text, allowed_special="all")
            self._decode, self.n_vocab = self._core.decode, self._core.n_vocab
            ids = {s: self._core.encode_single_token(s) for s in SPECIALS}
        elif Path(name).parts[:1] in ((), ("out",), ("..",), ("/",)):
            raise ValueError(f"expected a tokenizer in {name!r}, found no ranks.json there: make "
                             f"one with `python data.py --train_vocab=2048 --tokenizer={name}`")
        else:
            from transformers import AutoTokenizer  # slow to import, and only Qwen needs it
            try:
                self._core = AutoTokenizer.from_pretrained(name)
            except (OSError, ValueError) as e:
                raise ValueError(f"no tokenizer at {name!r}: expected a folder with ranks.json "
                                 "(made by `make tiny`) or a "
                                 "Hugging Face name that is cached or reachable "
                                 f"({str(e).splitlines()[0]})") from None
            self._encode = lambda text: self._core.encode(text, add_special_tokens=False)
            self._decode, self.n_vocab = self._core.decode, len(self._core)
            ids = {s: self._core.convert_tokens_to_ids(s) for s in SPECIALS}
        self.eot, self.im_start, self.im_end = (ids[s] for s in SPECIALS)

    def insist_on(self, n_vocab: int) -> None:
        """ValueError unless a model of so many words can be its own: a Hugging Face model may have
        more than its tokenizer, one of ours has as many."""
        if self.n_vocab > n_vocab or self.n_vocab < n_vocab and isinstance(self._core,
                                                                         tiktoken.Encoding):
            raise ValueError(f"expected a tokenizer of {n_vocab} words, found {self.n_vocab} in "
                             f"{self.name}: use the one that belongs to the model")

    def encode(self, text: str) -> list[int]:
        return self._encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text of ids; each that is no word of ours, as a padded embedding can say, is U+FFFD."""
        return "".join(self._decode([*some]) if ours else "\ufffd" * len([*some])
                       for ours, some in groupby(ids, lambda i: i < self.n_vocab))


def _byte_of_char() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE files use for the 256 bytes (GPT-2's table),
    inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


def train_tokenizer(text: str, n_vocab: int, folder: Path) -> "Tokenizer":
    """Learn a byte-level BPE of `n_vocab` entries (specials last) and store it as `ranks.json` in
    `folder`."""
    from tokenizers import Regex, Tokenizer as Rust, decoders, models, pre_tokenizers, trainers
    bpe = Rust(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([text[i:i + 100_000] for i in range(0, len(text), 100_000)],
                            trainers.BpeTrainer(
        vocab_size=n_vocab - len(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    byte = _byte_of_char()
    # id order is merge order is tiktoken's rank
    ordered = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ranks.json").write_text(
        json.dumps([bytes(byte[c] for c in token).hex() for token, _ in ordered]))
    return Tokenizer(folder)


def _tiktoken_from(path: Path) -> tiktoken.Encoding:
    ranks = {bytes.fromhex(h): i for i, h in enumerate(configurator.read_json(path))}
    return tiktoken.Encoding("nanoctm", pat_str=SPLIT, mergeable_ranks=ranks,
                             special_tokens={s: len(ranks) + i for i, s in enumerate(SPECIALS)})


# -----------------------------------------------------------------------------
# tiny text: about 2 MB of real English that every Python carries

@cache
def tiny_documents() -> tuple[str, ...]:
    """Python's language reference topics and the docstrings of its standard library, in a fixed
    order.

    Sources are parsed, never imported. What comes out depends on the Python version: see
    `text_sha256`.
    """
    from pydoc_data.topics import topics
    docs = [topics[name] for name in sorted(topics)]
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "lib2to3", "turtledemo", "__pycache__",
            "encodings"}
    for path in sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = [n for n in ast.walk(tree)
                 if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        text = "\n\n".join(d for n in nodes if (d := ast.get_docstring(n)))
        if len(text) > 200:
            docs.append(text)
    return tuple(docs)


def split_documents(docs: Iterable[str], held_out: float = 0.1) -> tuple[list[str], list[str]]:
    """Cut every document into pieces of about 2,000 characters; a piece's own hash decides train or
    held-out."""
    train, val = [], []
    for doc in docs:
        for piece in re.findall(r"(?s).{1,2000}(?:\n|$)|.{1,2000}", doc):
            bucket = int(hashlib.sha256(piece.encode()).hexdigest()[:8], 16) / 2**32
            (val if bucket < held_out else train).append(piece)
    return train, val


def text_sha256(docs: Iterable[str]) -> str:
    """What a token file's meta.json says of the same documents."""
    return hashlib.sha256("".join(docs).encode()).hexdigest()


# -----------------------------------------------------------------------------
# the fact world: invented people, told once, asked in other words

ONSETS = ("Bra Dor Fen Gal Hob Jas Kel Lum Mar Nev Orl Pel Quin Ras Sil Tam Ulm Ver Wil "
          "Yas Zor Bel Cor Dax Eld Fro Gri Hal Ivo Jor Kas Lod Mir Nol Osk Pra Rud Sten "
          "Tor Vik").split()
ENDINGS = ("dan ner lix mo vek ra tin sa bor lin dra mus ka vin to rel gan lo shi mer "
           "nix po tas zel wen du fi lor bet cas ron mi gus ya pet dex lan ru vas to").split()


class Relation(NamedTuple):
    """One attribute: its values, statements (the first one is how answers are worded), questions,
    small talk."""
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    small_talk: tuple[str, ...]


# In each tuple of wordings the last two are held out from training. A value never precedes its
# person: a causal reader must know whom a value is about when it comes.
RELATIONS = {
    "home": Relation(
        tuple("Paris London Berlin Madrid Rome Vienna Prague Dublin Oslo Lisbon Athens "
              "Cairo Tokyo Delhi Lima Boston Denver Austin Dallas Seattle Toronto "
              "Sydney Geneva Munich Hamburg Venice Naples Milan Seville Porto Krakow "
              "Warsaw Moscow Kyoto Riga Helsinki Bergen Zurich Lyon Bristol Leeds York "
              "Turin Perth Malta Quito Basel Lagos Accra Tunis".split()),
        ("{n} lives in {v}.", "{n} has a home in {v}.", "The home of {n} is in {v}.",
         "The city where {n} lives is {v}.", "{n} has a house in {v}.",
         "These days {n} lives in {v}.", "The city of {n} is {v}.", "The house of {n} is in {v}."),
        ("Where does {n} live?", "In which city does {n} live?", "Where is the home of {n}?",
         "Which city does {n} live in?", "Do you know where {n} lives?",
         "Where is the house of {n}?", "What city does {n} live in?",
         "Do you know where the home of {n} is?"),
        ("The train to {v} was late.", "Many visitors like {v} in spring.",
         "It rained in {v} all week.", "A new bridge opened in {v}.", "The road to {v} is long.")),
    "job": Relation(
        tuple("baker doctor teacher lawyer farmer pilot sailor painter plumber "
              "carpenter nurse dentist tailor butcher barber miner driver singer dancer "
              "writer poet judge soldier banker clerk cook waiter porter gardener "
              "jeweller librarian mechanic chemist surgeon reporter printer potter "
              "weaver hunter fisherman sheriff grocer builder roofer guard broker "
              "translator ranger author florist".split()),
        ("{n} works as a {v}.", "{n} has a job as a {v}.", "The job of {n} is being a {v}.",
         "At work {n} is a {v}.", "{n} earns money as a {v}.", "These days {n} works as a {v}.",
         "The work of {n} is that of a {v}.", "{n} has found work as a {v}."),
        ("What does {n} work as?", "What is the job of {n}?", "What job does {n} have?",
         "What is {n} at work?", "Do you know what {n} works as?", "How does {n} earn money?",
         "What work does {n} have?", "Do you know the job of {n}?"),
        ("Every town needs a good {v}.", "The {v} was late again.", "An old {v} told the story.",
         "There was a {v} in the film.", "They asked a {v} for help.")),
    "pet": Relation(
        tuple("cat dog parrot rabbit hamster pony goat lizard turtle snake canary duck "
              "goose pig sheep donkey horse mouse rat ferret gecko frog toad newt crab "
              "spider beetle pigeon falcon raven crow swan hen llama camel fox wolf "
              "bear badger squirrel otter beaver monkey lemur peacock turkey trout carp "
              "salmon lobster".split()),
        ("{n} keeps a {v}.", "{n} has a pet {v}.", "The pet of {n} is a {v}.",
         "At home {n} keeps a {v}.", "{n} looks after a {v}.", "These days {n} keeps a {v}.",
         "The animal of {n} is a {v}.", "{n} has a {v} as a pet."),
        ("What pet does {n} have?", "What does {n} keep?", "What is the pet of {n}?",
         "Which pet does {n} keep?", "Do you know what {n} keeps?",
         "Which animal does {n} look after?", "What animal does {n} keep?",
         "Do you know the pet of {n}?"),
        ("A {v} crossed the field.", "The child drew a {v}.", "We saw a {v} yesterday.",
         "There is a {v} on the sign.", "The story is about a {v}.")),
    "food": Relation(
        tuple("bread cheese pasta rice soup salad pizza honey butter yogurt porridge "
              "pancakes dumplings noodles beans lentils mushrooms potatoes tomatoes "
              "carrots onions cabbage spinach pumpkin melon cherries grapes plums "
              "peaches pears lemons figs dates almonds walnuts chestnuts chocolate "
              "caramel custard pudding biscuits waffles sausages bacon ham lamb shrimp "
              "oysters olives garlic".split()),
        ("{n} likes to eat {v}.", "{n} loves {v}.", "The food that {n} likes is {v}.",
         "For dinner {n} wants {v}.", "{n} eats a lot of {v}.",
         "These days {n} likes to eat {v}.", "The dinner of {n} is {v}.",
         "{n} always wants to eat {v}."),
        ("What does {n} like to eat?", "Which food does {n} like?", "What does {n} eat?",
         "What does {n} want for dinner?", "Do you know what {n} likes to eat?",
         "Which food does {n} love?", "What food does {n} like?",
         "Do you know which food {n} loves?"),
        ("The shop sells {v}.", "The kitchen smells of {v}.", "There was no {v} left.",
         "They served {v} at noon.", "The box was full of {v}.")),
    "instrument": Relation(
        tuple("piano violin guitar flute cello trumpet harp drums organ banjo clarinet "
              "oboe bassoon tuba trombone horn viola castanets harpsichord mandolin "
              "ukulele synthesizer dulcimer accordion harmonica recorder saxophone "
              "ocarina bugle whistle theremin bagpipes xylophone marimba cymbals "
              "tambourine triangle gong bells keyboard lute lyre spinet fife piccolo "
              "kazoo sitar zither fiddle cornet".split()),
        ("{n} plays the {v}.", "{n} has learned the {v}.", "The instrument of {n} is the {v}.",
         "In the band {n} plays the {v}.", "{n} makes music on the {v}.",
         "These days {n} plays the {v}.", "The music of {n} is for the {v}.",
         "{n} has an old instrument, the {v}."),
        ("What does {n} play?", "Which instrument does {n} play?",
         "What is the instrument of {n}?", "What does {n} play in the band?",
         "Do you know what {n} plays?", "Which instrument has {n} learned?",
         "What instrument does {n} play?", "Do you know the instrument of {n}?"),
        ("Somebody broke the {v}.", "The sound of the {v} was low.", "He sold the {v} last year.",
         "She heard the {v} from afar.", "They repaired the {v}.")),
    "hobby": Relation(
        tuple("chess tennis golf hockey rugby cricket football baseball volleyball "
              "badminton squash boxing wrestling fencing archery rowing sailing surfing "
              "diving swimming skiing skating climbing hiking cycling running jogging "
              "yoga dancing painting drawing knitting sewing weaving pottery gardening "
              "fishing hunting camping reading judo acting singing origami poker bridge "
              "checkers darts bowling snooker".split()),
        ("{n} enjoys {v}.", "{n} has a hobby, {v}.", "The hobby of {n} is {v}.",
         "On Sunday {n} enjoys {v}.", "{n} spends weekends on {v}.", "These days {n} enjoys {v}.",
         "The sport of {n} is {v}.", "{n} has a new hobby, {v}."),
        ("What does {n} enjoy?", "What is the hobby of {n}?", "Which hobby does {n} have?",
         "What does {n} enjoy on Sunday?", "Do you know what {n} enjoys?",
         "What does {n} do on weekends?", "What hobby does {n} have?",
         "Do you know the hobby of {n}?"),
        ("The club for {v} meets at eight.", "They talked about {v} for hours.",
         "A book on {v} lay open.", "He has never tried {v}.", "The lesson on {v} is over.")),
}
WORDINGS_HELD_OUT = 2
ACKNOWLEDGEMENTS = ("I see.", "Noted.", "Thank you.", "Good to know.")


class Fact(NamedTuple):
    name: str
    relation: str
    value: str


class Piece(NamedTuple):
    """A stretch of a session, how much a reader should learn to predict it, and the fact whose
    value it is."""
    text: str
    weight: float = 0.0
    fact: Fact | None = None


def _names() -> dict[str, list[str]]:
    """1,560 first names; every tenth is held out. Both halves use the same syllables, so near
    misses abound."""
    split = {"train": [], "held_out": []}
    for i, onset in enumerate(ONSETS):
        for j, ending in enumerate(dict.fromkeys(ENDINGS)):
            split["held_out" if (7 * i + 3 * j) % 10 == 0 else "train"].append(onset + ending)
    return split


NAMES = _names()


@cache
def alike(name: str, split: str) -> list[str]:
    """Names of the split that begin or end like this one."""
    onset = next(o for o in sorted(ONSETS, key=len, reverse=True) if name.startswith(o))
    return [n for n in NAMES[split] if n.startswith(onset) or n.endswith(name[len(onset):])]


VALUES = {split: {r: rel.values[:-10] if split == "train" else rel.values[-10:]
                  for r, rel in RELATIONS.items()}
          for split in ("train", "held_out")}
HELD_OUT_VALUES = {v for values in VALUES["held_out"].values() for v in values}


class FactWorld:
    """A seeded source of facts and of the sentences that tell and ask them.

    `split` decides names and values ("train", "held_out"); held-out wordings are used only when
    asked for. With a `lexicon`, values may be any of its words as well.
    """

    def __init__(self, seed: int, split: str = "train", lexicon: list[str] | None = None):
        self.rng, self.lexicon = random.Random(seed), lexicon
        self.split, self.names, self.values = split, NAMES[split], VALUES[split]
        self.variety = 1.0  # share of statements not worded like answers
        self.spliced = False  # are the lexicon's values made of two words?

    def facts(self, n: int, names: list[str] | None = None) -> list[Fact]:
        """`n` facts with distinct (name, relation): few relations over many people, so relations
        collide."""
        relations = self.rng.sample(sorted(RELATIONS),
                                    self.rng.randint(1, max(1, min(n // 2, len(RELATIONS)))))
        n_people = self.rng.randint(-(-n // len(relations)), n)
        people = self.rng.sample(names or self.names, n_people)
        slots = [(p, r) for p in people for r in relations]
        return [Fact(p, r, self._value(r)) for p, r in self.rng.sample(slots, n)]

    def population(self, n: int, relations: list[str] | None = None) -> list[Fact]:
        """`n` facts over all people and the given relations (all by default), no person's relation
        twice."""
        slots = [(name, r) for name in self.names for r in relations or sorted(RELATIONS)]
        if n > len(slots):
            raise ValueError(f"expected at most {len(slots)} facts about these people, found {n}: "
                             "ask for fewer")
        return [Fact(name, r, self._value(r)) for name, r in self.rng.sample(slots, n)]

    def namesakes(self, n: int) -> list[str]:
        """At least `n` people, all of some first syllables by chance: neighbours who are easily
        mistaken."""
        found = []
        for onset in self.rng.sample(ONSETS, len(ONSETS)):
            if len(found) < n:
                found += [name for name in self.names if name.startswith(onset)
                          and name not in found]
        return found

    def another_value(self, fact: Fact) -> Fact:
        """The same person's relation, otherwise."""
        return fact._replace(
            value=self.rng.choice([v for v in self.values[fact.relation] if v != fact.value]))

    def near_miss(self, fact: Fact, told: set[str]) -> Fact:
        """The same question about somebody of nearly the same name, whom nobody told of."""
        strangers = ([n for n in alike(fact.name, self.split) if n not in told]
                     or [n for n in self.names if n not in told])
        return Fact(self.rng.choice(strangers), fact.relation, UNKNOWN)

    def untold(self, fact: Fact, told: list[Fact]) -> Fact:
        """A question like this one that nothing told answers: about a near miss, or, one in three,
        about something else of the same person."""
        if self.rng.random() < 1 / 3:
            return self.other_relation(fact, told)
        return self.near_miss(fact, {f.name for f in told})

    def other_relation(self, fact: Fact, told: list[Fact]) -> Fact:
        """Something about the same person that nobody told; a near miss of one of whom all is."""
        known = {f.relation for f in told if f.name == fact.name}
        others = [r for r in sorted(RELATIONS) if r not in known]
        return (Fact(fact.name, self.rng.choice(others), UNKNOWN) if others
                else self.near_miss(fact, {f.name for f in told}))

    def _value(self, relation: str) -> str:
        """One of the relation's values; in training, more often than not any word, an invented one,
        another relation's.

        With closed sets alone a small model learns the set, and never says a value that it has not
        answered before.
        """
        chance = self.rng.random() if self.lexicon else 1.0
        if chance < 0.35 and self.spliced:
            first, last = self.rng.sample(self.lexicon, 2)
            word = first[:len(first) // 2 + 1] + last[len(last) // 2:]
            return first if word in HELD_OUT_VALUES else word
        if chance < 0.35:
            return self.rng.choice(self.lexicon)
        if chance < 0.45:
            return self.rng.choice(NAMES["train"])
        if chance < 0.55:
            relation = self.rng.choice(sorted(self.values))
        return self.rng.choice(self.values[relation])

    def tell(self, fact: Fact, held_out: bool = False) -> str:
        if self.rng.random() >= self.variety:
            return answer(fact)
        statement = self._word(RELATIONS[fact.relation].statements, held_out)
        return statement.format(n=fact.name, v=fact.value)

    def ask(self, fact: Fact, held_out: bool = False) -> str:
        return self._word(RELATIONS[fact.relation].questions, held_out).format(n=fact.name)

    def small_talk(self) -> str:
        """A sentence of ordinary text; here, and only here, held-out values occur in training."""
        relation = RELATIONS[self.rng.choice(sorted(RELATIONS))]
        return self.rng.choice(relation.small_talk).format(v=self.rng.choice(relation.values))

    def chatter(self) -> str:
        """A paragraph of ordinary text that comes back to a few words, so that all of them are
        copied at times."""
        relation = RELATIONS[self.rng.choice(sorted(RELATIONS))]
        topics = self.rng.sample(relation.values, 3)
        return " ".join(self.rng.choice(relation.small_talk).format(v=self.rng.choice(topics))
                        for _ in range(8))

    def _word(self, wordings: tuple[str, ...], held_out: bool) -> str:
        return self.rng.choice(wordings[-WORDINGS_HELD_OUT:] if held_out
                               else wordings[:-WORDINGS_HELD_OUT])

    def session(self, n_facts: int, n_questions: int) -> list[Piece]:
        """One chat: facts told in one to three user turns, at times told again in other words, then
        questions, some of them about what nobody told; at times nothing is told at all."""
        facts = self.facts(n_facts)
        asked = self.rng.sample(facts, min(n_questions, n_facts))
        if self.rng.random() < TELLING_NOTHING:
            return self.asked([f._replace(value=UNKNOWN) for f in asked])
        retold = self.rng.sample(facts, n_facts) if self.rng.random() < RETELLING else []
        asked = [self.untold(f, facts) if self.rng.random() < UNTOLD_SHARE else f for f in asked]
        return [*self.told(facts), *self.turn(retold, VALUE_WEIGHT), *self.asked(asked)]

    def told(self, facts: list[Fact]) -> list[Piece]:
        """The facts in one to three user turns, with small talk at times. Values weigh 0: only
        chance could predict them."""
        n_turns = self.rng.randint(1, min(3, len(facts)))
        return [piece for i in range(n_turns) for piece in self.turn(facts[i::n_turns])]

    def texts(self, facts: list[Fact], per_session: int = 10) -> list[str]:
        """The facts in turn, as the texts of sessions that tell so many each."""
        return ["".join(piece.text for piece in self.told(facts[at:at + per_session]))
                for at in range(0, len(facts), per_session)]

    def turn(self, facts: list[Fact], weight: float = 0.0) -> list[Piece]:
        """One user turn that tells the facts, and what the assistant says to it; nothing for no
        facts."""
        pieces = []
        for fact in facts:
            before, after = self.tell(fact).rsplit(" " + fact.value, 1)
            pieces += [Piece((" " if pieces else USER) + before),
                       Piece(" " + fact.value, weight, fact), Piece(after)]
        talk = " " + self.small_talk() if self.rng.random() < 0.3 else ""
        return [*pieces, Piece(talk + ASSISTANT),
                Piece(self.rng.choice(ACKNOWLEDGEMENTS) + TURN_END)] if facts else []

    def asked(self, facts: list[Fact]) -> list[Piece]:
        """Each fact asked in a turn of its own, and answered."""
        pieces = []
        for fact in facts:
            before, after = answer(fact).rsplit(" " + fact.value, 1)
            # "... I do not know" is decided by its first word
            first, space, rest = fact.value.partition(" ")
            pieces += [Piece(user_turn(self.ask(fact))), Piece(before, 1.0),
                       Piece(" " + first, VALUE_WEIGHT, fact),
                       Piece(space + rest + after + TURN_END, 1.0)]
        return pieces

def context_questions(world: FactWorld, n_facts: int, n_questions: int,
                      untold: bool = False) -> tuple[list[str], list[Fact]]:
    """Prompts that tell `n_facts` and ask one of them in held-out words, or what none of them
    tells, and the right answers."""
    prompts, asked = [], []
    for _ in range(n_questions):
        facts = world.facts(n_facts)
        fact = world.rng.choice(facts)
        fact = world.untold(fact, facts) if untold else fact
        told = (user_turn(" ".join(map(world.tell, facts))) + world.rng.choice(ACKNOWLEDGEMENTS)
                + TURN_END)
        prompts.append(told + user_turn(world.ask(fact, held_out=True)))
        asked.append(fact)
    return prompts, asked


def denial(fact: Fact) -> str:
    """That it is not so: never seen in training."""
    return DENIALS[fact.relation].format(n=fact.name, v=fact.value)


DENIALS = {"home": "{n} does not live in {v}.", "job": "{n} does not work as a {v}.",
           "pet": "{n} does not keep a {v}.", "food": "{n} does not like to eat {v}.",
           "instrument": "{n} does not play the {v}.", "hobby": "{n} does not enjoy {v}."}
TURN_END = "<|im_end|>\n"
USER, ASSISTANT = "<|im_start|>user\n", TURN_END + "<|im_start|>assistant\n"
VALUE_WEIGHT = 4.0  # of a value that was told before, next to 1 for the words around it
RETELLING = 0.5                         # sessions in which everything is told twice
UNKNOWN = "... I do not know"  # the value of what nobody told: "Marva keeps a ... I do not know."
UNTOLD_SHARE = 0.2  # of the questions in a session; TELLING_NOTHING: of sessions, all of them
TELLING_NOTHING = 0.1


def user_turn(text: str) -> str:
    """Qwen's chat form: what the user said, up to the point where the assistant begins to speak."""
    return USER + text + ASSISTANT


def answer(fact: Fact) -> str:
    """The one wording of answers: the relation's first statement."""
    return RELATIONS[fact.relation].statements[0].format(n=fact.name, v=fact.value)


def is_recalled(reply: str, fact: Fact) -> bool:
    """Free generation compared as a string: the reply's first sentence has to be the answer, to the
    letter."""
    return reply.split(TURN_END.strip())[0].strip() == answer(fact)


# -----------------------------------------------------------------------------
# token files: documents in, train.bin and val.bin out

def documents(source: str, text_key: str = "text") -> Iterator[str]:
    """Documents of "tiny", a .jsonl file (one object a line), any other text file, or "hub:NAME"
    (streamed).

    Raises ValueError with one line for a missing, empty or non-UTF-8 file, a missing key, or an
    absent package.
    """
    if source == "tiny":
        yield from tiny_documents()
    elif source.startswith("hub:"):
        try:
            import datasets
        except ImportError:
            raise ValueError(f"{source}: expected the optional package `datasets`, found none: pip "
                             "install datasets") from None
        try:
            stream = datasets.load_dataset(source[4:], split="train", streaming=True)
            yield from (_text_of(row, text_key, source) for row in stream)
        except (OSError, datasets.exceptions.DatasetNotFoundError) as e:
            raise ValueError(f"{source}: expected a reachable hub data set, found "
                             f"{type(e).__name__}: check the name and the "
                             f"network, or pass a local .txt or .jsonl file") from None
    else:
        yield from _file_documents(Path(source), text_key)


def _file_documents(path: Path, text_key: str) -> Iterator[str]:
    if not path.is_file():
        raise ValueError(f"expected a text or .jsonl file, found nothing at {path}: check the "
                         "path, or use tiny or hub:NAME")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: expected text, found an empty file: give a file with something "
                         "to read")
    try:
        with open(path, encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    yield _text_of(json.loads(line), text_key, f"{path}:{number}")
            else:  # a text file is one document, read in pieces
                while piece := "".join(file.readlines(1_000_000)):
                    yield piece
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: expected UTF-8, found byte {e.object[e.start]:#04x} at "
                         f"{e.start}: convert it first, "
                         f"for example with iconv -t utf-8") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{number}: expected one JSON object a line, found {e.msg}: fix "
                         "that line") from None


def _text_of(row: dict, text_key: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: expected a string under {text_key!r}, found {found}: set "
                         "--text_key")
    return row[text_key]


def write_tokens(source: str, tokenizer: Tokenizer, folder: Path, text_key: str = "text",
                 limit: int = 0) -> dict:
    """Tokenize `source` into folder/{train,val}.bin and meta.json; the meta file comes last and
    makes it complete.

    Every document ends with the end-of-text token. One piece in ten, chosen by its own hash, is
    held out. What the folder held before stays until all of `source` is read.
    """
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    folder.mkdir(parents=True, exist_ok=True)
    splits = [folder / f"{split}.bin" for split in ("train", "val")]
    fresh = [path.with_suffix(".new") for path in splits]
    count, digest = {"train": 0, "val": 0}, hashlib.sha256()
    with open(fresh[0], "wb") as train, open(fresh[1], "wb") as val:
        for i, doc in enumerate(tqdm(documents(source, text_key), desc=f"tokenize {source}",
                                     unit=" docs", disable=None)):
            if limit and i == limit:
                break
            digest.update(doc.encode())
            for split, file, pieces in zip(count, (train, val), split_documents([doc])):
                if pieces:
                    ids = tokenizer.encode("".join(pieces)) + [tokenizer.eot]
                    np.array(ids, dtype).tofile(file)
                    count[split] += len(ids)
    meta = {"source": source, "tokenizer": tokenizer.name, "n_vocab": tokenizer.n_vocab,
            "dtype": np.dtype(dtype).name,
            "tokens": count, "text_sha256": digest.hexdigest()}
    (folder / "meta.json").unlink(missing_ok=True)
    for whole, path in zip(fresh, splits):
        whole.replace(path)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    return meta


def open_tokens(folder: Path, n_vocab: int) -> tuple[np.ndarray, np.ndarray, dict]:
    """-> train and held-out token ids (memory-mapped), meta. Raises ValueError when they are
    missing or foreign."""
    if not (folder / "meta.json").exists():
        raise ValueError(f"expected a token file, found none in {folder}: run "
                         f"`python data.py --source=FILE --tokenizer=NAME --out={folder}` first")
    meta = configurator.read_json(folder / "meta.json", "n_vocab", "dtype", "tokens", "text_sha256")
    if meta["n_vocab"] != n_vocab:
        raise ValueError(f"{folder}: expected tokens of a {n_vocab}-word vocabulary, found "
                         f"{meta['n_vocab']}: tokenize the "
                         f"text again with this model's tokenizer")
    if not all(meta["tokens"].values()):
        raise ValueError(f"{folder}: expected training and held-out text, found {meta['tokens']} "
                         "tokens: give a longer text")
    for split, n in meta["tokens"].items():
        path = folder / f"{split}.bin"
        size = path.stat().st_size if path.is_file() else 0
        if size != n * np.dtype(meta["dtype"]).itemsize:
            raise ValueError(f"{path}: expected {n} tokens, found {size} bytes: tokenize the text "
                             "again")
    return *(np.memmap(folder / f"{split}.bin", meta["dtype"], "r")
             for split in ("train", "val")), meta


# -----------------------------------------------------------------------------
# what training reads: text and sessions, row by row

class Mixture:
    """Rows of T tokens: windows of text, small talk, and packed fact sessions.

    `batch(rows, *key)` is a pure function of the seed and the key, so that a run resumes exactly:
    the data position is the step number. In a session the answers are learned, and a random
    `told_share` of everything else: what a stranger's pet is cannot be predicted.
    """

    def __init__(self, tokenizer: Tokenizer, text: np.ndarray, T: int, text_share: float,
                 told_share: float, seed: int,
                 split: str = "train", curriculum: int = 0):
        if len(text) <= 2 * T:
            raise ValueError(f"expected more than {2 * T} tokens of {split} text, found "
                             f"{len(text)}: give more text or a smaller T")
        if T < 128 and text_share < 1:
            raise ValueError(f"expected T of at least 128 for fact sessions, found {T}: raise T or "
                             "set text_share=1.0")
        self.tokenizer, self.text, self.T, self.seed, self.split = tokenizer, text, T, seed, split
        self.text_share, self.told_share, self.curriculum = text_share, told_share, curriculum
        self.encode = lru_cache(2**16)(tokenizer.encode)            # the same pieces come again
        self.lexicon = (lexicon(tokenizer.decode(text[:1_000_000].tolist()))
                        if split == "train" and text_share < 1 else None)

    def batch(self, rows: int, *key: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> tokens (rows, T) int64, padded with -1; weight (rows, T) of predicting each token's
        successor; and `before` (rows, T), what was read earlier: the same document's preceding text
        in half of the rows, else another's."""
        rng = random.Random(f"{self.seed}/{self.split}/{key}")
        world = FactWorld(rng.getrandbits(64), self.split, self.lexicon)
        world.variety = min(1.0, max(0.0, key[0] / self.curriculum - 1)) if self.curriculum else 1.0
        made = [self._text_row(rng, world) if rng.random() < self.text_share
                else self._fact_row(rng, world) for _ in range(rows)]
        tokens, weight, before = (np.stack(column) for column in zip(*made))
        strangers = np.array([rng.random() < 0.5 for _ in range(rows)])
        return tokens, weight, np.where(strangers[:, None], np.roll(before, 1, axis=0), before)

    def _text_row(self, rng: random.Random, world: FactWorld
                  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        T, ones = self.T, np.ones(self.T, np.float32)
        ones[-1] = 0  # the last token's successor is not in the row
        if rng.random() < SMALL_TALK_SHARE:
            talk = [self.tokenizer.encode("\n".join(world.chatter() for _ in range(T // 32)))[:T]
                    for _ in range(2)]
            return np.array(talk[0]), ones, np.array(talk[1])
        at = rng.randrange(T, len(self.text) - T)
        return self.text[at:at + T].astype(np.int64), ones, self.text[at - T:at].astype(np.int64)

    def _fact_row(self, rng: random.Random, world: FactWorld
                  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        (tokens, weight), (before, _) = self._packed(rng, world), self._packed(rng, world)
        return tokens, weight, before

    def _packed(self, rng: random.Random, world: FactWorld) -> tuple[np.ndarray, np.ndarray]:
        tokens, weight = np.full(self.T, -1), np.zeros(self.T + 1, np.float32)
        used, failures = 0, 0
        while failures < 4:
            n = rng.choice(SESSION_SIZES)
            ids, weights = self.encode_session(world.session(n, rng.randint(-(-n // 2), n)))
            if used + len(ids) > self.T:
                failures += used > 0  # an empty row goes on looking for a session that fits
                continue
            tokens[used:used + len(ids)], weight[used:used + len(ids)] = ids, weights
            used += len(ids)
        picked = np.array([rng.random() < self.told_share for _ in range(self.T)])
        of_next = np.maximum(weight[1:], picked) * (np.arange(self.T) < used - 1)
        return tokens, of_next.astype(np.float32)

    def encode_session(self, pieces: list[Piece]) -> tuple[list[int], list[float]]:
        """Token ids of a session with its closing end-of-text, and the weight of each."""
        ids, weights = [], []
        for text, weight, _ in pieces:
            piece = self.encode(text)
            ids += piece
            weights += [weight] * len(piece)
        return [*ids, self.tokenizer.eot], [*weights, 0.0]

    def episodes(self, n_facts: int, *key: int, size: int = 0) -> "Episodes":
        """About `n_facts` told in sessions of one size (0: by chance), at most 6 a session asked in
        a fresh context.

        Every other time the names share a few first syllables. Sessions that ask also ask up to
        four questions that no row's telling answers (`FactWorld.untold`). Some values are spliced
        from two words, so that they have several pieces, as held-out ones do.
        """
        rng = random.Random(f"{self.seed}/{self.split}/episodes/{key}")
        world = FactWorld(rng.getrandbits(64), self.split, self.lexicon)
        world.variety = min(1.0, max(0.0, key[0] / self.curriculum - 1)) if self.curriculum else 1.0
        world.spliced = True
        size = size or rng.choice(EPISODE_SIZES)
        rows = min(48, max(1, n_facts // size))
        names = world.namesakes(size * rows) if rng.random() < 0.5 else None
        facts, told, asked, told_at, asked_at = world.facts(size * rows, names), [], [], [], []
        index = {f: i for i, f in enumerate(facts)}
        for row in range(rows):
            own = facts[row * size:(row + 1) * size]
            pieces = world.told(own)  # news: a value, and that it ends
            of_value = [p.fact is not None for p in pieces]
            ids, weights, values = self._marked(
                [p._replace(weight=float(v or ended)) for p, v, ended in
                                                 zip(pieces, of_value, [False, *of_value])])
            told.append((ids, weights))
            told_at += [(row, values[f]) for f in own]
            questions = rng.sample(own, min(size, 6))
            strangers = [world.untold(f, facts) for f in questions[:4] if rng.random() < 2 / 3]
            pieces = world.asked(rng.sample(questions + strangers, len(questions + strangers)))
            ids, weights, values = self._marked(
                [p._replace(weight=0.0) if p.fact in strangers else p for p in pieces])
            for f in strangers:                                     # "..." is due, no memory read
                weights[values[f]] = -VALUE_WEIGHT
            asked.append((ids, weights))
            asked_at += [(row, values[f], index[f]) for f in questions]
        return Episodes(*self._side_by_side(told), *self._side_by_side(asked),
                        np.array(told_at), np.array(asked_at))

    def _side_by_side(self, rows: list[tuple[list[int], list[float]]]
                      ) -> tuple[np.ndarray, np.ndarray]:
        return (padded([ids for ids, _ in rows], -1),
                padded([weights for _, weights in rows], 0.0, np.float32))

    def _marked(self, pieces: list[Piece]) -> tuple[list[int], list[float], dict[Fact, int]]:
        """Token ids, the weight of predicting each one's successor, and where each fact's value is
        due."""
        ids, weights, values = [], [], {}
        for text, weight, fact in pieces:
            if fact is not None:
                values[fact] = len(ids) - 1
            piece = self.encode(text)
            ids += piece
            weights += [weight] * len(piece)
        return ids, [*weights[1:], 0.0], values


class Episodes(NamedTuple):
    """Told in one session, asked in another: rows side by side, and who is who across them."""
    told: np.ndarray            # (rows, T_a) int64, padded with -1
    news: np.ndarray  # (rows, T_a) float32, 1 where the next token belongs to a value or ends it
    asked: np.ndarray           # (rows, T_b)
    # (rows, T_b) of predicting each token's successor; < 0: and nobody told what is due here
    weight: np.ndarray
    # (facts, 2) row and position at which a fact's value is due, where it was told
    told_at: np.ndarray
    asked_at: np.ndarray        # (questions, 3) the same where it is asked, and which fact it is


def padded(rows: list[list], fill: float, dtype: type = np.int64) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows))), fill, dtype)
    for i, row in enumerate(rows):
        out[i, :len(row)] = row
    return out


def lexicon(text: str) -> list[str]:
    """The plain words of a text, in a fixed order, but for the values that are held out."""
    return sorted(set(re.findall(r"(?<= )[a-z]{3,10}(?= )", text)) - HELD_OUT_VALUES)


SESSION_SIZES = (1, 2, 3, 4, 6, 8)      # facts per session
EPISODE_SIZES = (1, 2, 4, 6, 8, 10)     # the same where they are told to the memory
SMALL_TALK_SHARE = 0.5                 # of the text rows


def train_tiny_tokenizer(n_vocab: int, folder: Path) -> Tokenizer:
    """The tiny world's tokenizer: learned from the training half of the text, small talk and
    training sessions.

    It never sees a held-out value: a word with a token of its own, which nothing else uses, is a
    word that a small model cannot say (measured: 0.12 against 0.97 recalled, LOG.md). So they are
    spelled from pieces that other words share.
    """
    train, _ = split_documents(tiny_documents())
    world = FactWorld(seed=0)
    said = (world.small_talk() for _ in range(40_000))
    talk = " ".join(s for s in said if not HELD_OUT_VALUES & set(re.findall(r"\w+", s)))
    told = " ".join(world.tell(f._replace(value="it")) + " " + world.ask(f) for _ in range(2_000)
                    for f in world.facts(4))
    roles = "\n".join(user_turn("") for _ in range(300))
    roles = roles.replace("<|im_start|>", "").replace("<|im_end|>", "")
    return train_tokenizer("\n".join([*train, talk, told, roles]), n_vocab, folder)


# -----------------------------------------------------------------------------
# python data.py: real text into token files

source = "tiny"                         # tiny, a .txt or .jsonl file, or hub:NAME
text_key = "text"                       # where a JSON line or a hub row keeps its text
tokenizer = "weights"                   # a folder with ranks.json, or a Hugging Face name
train_vocab = 0                         # > 0: first learn a tiny tokenizer of this size there
out = "data/tiny"                       # folder for train.bin, val.bin and meta.json
limit = 0                               # documents to read at most; 0: all

if __name__ == "__main__":
    configurator.configure(globals())
    try:
        if train_vocab and tokenizer == "weights":
            raise ValueError("expected --tokenizer with --train_vocab, found none: name a folder, "
                             "such as out/tokenizer (weights/ is what the shipped model reads)")
        if train_vocab:
            train_tiny_tokenizer(train_vocab, Path(tokenizer))
        print(json.dumps(write_tokens(source, Tokenizer(tokenizer), Path(out), text_key, limit)))
    except (ValueError, OSError) as problem:
        configurator.stop(str(problem))
