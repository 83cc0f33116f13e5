"""Every number that the README claims, measured again.

    python bench.py quality             # the tiny weights, half a minute
    python bench.py quality --full      # and "depth or thinking time?", half an hour
    python bench.py memory              # recall after a restart, against other ways, six minutes
    python bench.py memory --full       # and fair opponents, ablations, two hops, MQAR; kept part
                                        # by part, goes on where it was interrupted
    python bench.py endurance           # the store under fire: kills, flips, lies, four minutes
    python bench.py loudness            # recall and text by how loud the write is, two minutes, for
                                        # who trains: --first_seed=3 --seeds=6 leaves those above be
    python bench.py card                # after `make tiny`: what was trained, into weights/

A table for people, and as the last line of standard output one JSON object with every figure, its
seeds, the commit, the hardware and the sha256 of its text. All text and all people are held out. No
threshold lives here: what is good enough is the reader's to say. Left out so far: sleep, speed.
"""
import contextlib
import errno
import functools
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import configurator
import data
from memory import (Carry, Factors, OrdinaryText, Plastic, SessionMemory, Snapshot, Store,
                    WriteRule, about, bearings, compact_memory, compact_sessions, dopamine, engrams,
                    norm_ratio, output_change, read_session, salience, salience_logit, superseded,
                    whitened)
from model import (BackboneConfig, Cache, CTMBlock, NanoCTM, ThoughtConfig, Thought, block_module,
                   flops_per_token, load_backbone, load_graft, mean_and_square,
                   read_tensors, replies, save_backbone, save_graft, successors)
from train import foremost, measure_moments, read_in_chunks

# -----------------------------------------------------------------------------
# settings

base = "weights/backbone"                   # the tiny backbone with its own FFN
graft = "weights/graft.safetensors"         # the CTM block in its last layer
control = "weights/ffn.safetensors"         # the backbone's FFN, trained further on as many tokens
thinking = "weights/thinking.safetensors"   # block after phase 2: never learned to be written to
picture = ""                                # of `memory`: file to plot recall by facts (matplotlib)
tokenizer = "weights"
seeds = 3                                   # samples of text and questions; spread is over these
first_seed = 0                              # these: first_seed, first_seed + 1, ...
louder = "1,1.1,1.2"                        # of `loudness`: times as loud as the graft writes
rows = 24                                   # windows of held-out text per seed
T = 256                                     # tokens per window
questions = 100                             # of `quality`, per seed and number of facts
kills = 300                                 # of `endurance`
full = False                                # all: depth or ticks?; opponents, ablations, hops, MQAR
full_steps = 250                            # steps per arm and seed


def one_process_each(tasks: int) -> ProcessPoolExecutor:
    """As many new single-threaded processes, with these settings, as there are cores, or tasks."""
    return ProcessPoolExecutor(min(tasks, os.cpu_count() or 1),
                               multiprocessing.get_context("spawn"), initializer=begin,
                               initargs=({k: globals()[k] for k in SETTINGS},))


SETTINGS = ("base", "graft", "thinking", "tokenizer", "seeds", "first_seed", "louder", "rows", "T",
            "full_steps")


def chosen_seeds() -> range:
    return range(first_seed, first_seed + seeds)


def begin(settings: dict) -> None:
    globals().update(settings)
    torch.set_num_threads(1)


def under(values: dict, prefix: str) -> dict:
    """Those whose names begin so, without it."""
    return {k.removeprefix(prefix): x for k, x in values.items() if k.startswith(prefix)}


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}


# -----------------------------------------------------------------------------
# held-out text

def tiny_text(words: data.Tokenizer, held_out: bool) -> np.ndarray:
    """Token ids of the tiny world's text: what nothing learns from, or all the rest."""
    docs = data.split_documents(data.tiny_documents())[held_out]
    return np.array(words.encode("".join(d + "<|endoftext|>" for d in docs)))


class HeldOut:
    """Windows of the tiny world's held-out text: (rows, T) tokens per seed,
    and the bytes that they stand for."""

    def __init__(self, words: data.Tokenizer):
        self.words, self.ids = words, tiny_text(words, held_out=True)

    def windows(self, seed: int, apart: bool = False) -> Tensor:
        """(rows, T) by chance; `apart`: none shares a token with another."""
        chance = np.random.default_rng(seed)
        starts = (T * chance.permutation(len(self.ids) // T)[:rows] if apart
                  else chance.integers(0, len(self.ids) - T, rows))
        return torch.stack([torch.from_numpy(self.ids[s:s + T]) for s in starts])

    def bytes_predicted(self, tokens: Tensor) -> int:
        return sum(len(self.words.decode([t for t in row[1:] if t != self.words.eot]).encode())
                   for row in tokens.tolist())


@torch.no_grad()
def think(model: NanoCTM, tokens: Tensor, halt: float | None = None) -> list[Thought]:
    return [model(part, halt=halt) for part in tokens.split(8)]


def of(thoughts: list[Thought], name: str) -> Tensor:
    """One field of all windows, without the last position, whose successor is unknown."""
    return torch.cat([getattr(t, name)[:, :-1] for t in thoughts])


# -----------------------------------------------------------------------------
# figures of one sample of text

def calibration_error(sure: Tensor, right: Tensor, bins: int = 15) -> float:
    """Expected calibration error over bins of equal mass
    (arXiv:1706.04599, with the bins of arXiv:1904.01685)."""
    order = sure.argsort(stable=True)
    return sum(abs(float(sure[b].mean() - right[b].float().mean())) * len(b) / len(sure)
               for b in order.chunk(bins))


def halted(certainty: Tensor, nats: Tensor, threshold: float) -> tuple[float, float]:
    """Mean ticks and nats if thinking had stopped at the first tick that certain:
    certainty, nats (rows, T, K)."""
    passed = certainty >= threshold
    last = torch.where(passed.any(-1), passed.int().argmax(-1), certainty.shape[-1] - 1)
    allowed = torch.arange(certainty.shape[-1]) <= last[..., None]
    read = certainty.masked_fill(~allowed, -1).argmax(-1)
    return float((last + 1).float().mean()), float(nats.gather(-1, read[..., None]).mean())


def choose_threshold(certainty: Tensor, nats: Tensor) -> float:
    """The lowest threshold whose cost in nats stays within 0.8 percent,
    on text that is not measured on."""
    _, all_ticks = halted(certainty, nats, 1.1)
    return min((t for t in np.linspace(0.05, 0.99, 95)
                if halted(certainty, nats, t)[1] <= 1.008 * all_ticks), default=1.1)


def text_figures(models: dict[str, NanoCTM], held_out: HeldOut, seed: int
                 ) -> dict[str, float | list[float]]:
    tokens = held_out.windows(seed)
    thoughts = {name: think(model, tokens) for name, model in models.items()}
    found = {f"{name}_nats": float(of(t, "nats").mean()) for name, t in thoughts.items()}
    thought, tuning = thoughts["graft"], think(models["graft"], held_out.windows(seed + 1000))
    found["graft_bits_per_byte"] = (float(of(thought, "nats").sum()) / math.log(2)
                                    / held_out.bytes_predicted(tokens))
    found["nats_by_tick"] = of(thought, "tick_nats").mean((0, 1)).tolist()
    shares = (torch.bincount(of(thought, "read_tick").flatten(),
                             minlength=len(found["nats_by_tick"])) / of(thought, "nats").numel())
    found["read_tick_shares"] = shares.tolist()
    found["read_tick_entropy"] = float(torch.special.entr(shares).sum())
    found["halt_at"] = choose_threshold(of(tuning, "certainty"), of(tuning, "tick_nats"))
    short = think(models["graft"], tokens, found["halt_at"])
    ticks = torch.cat([(t.certainty[:, :-1] > -1).sum(-1) for t in short])
    found["halt_ticks"] = float(ticks.float().mean())
    found["halt_nats"] = float(of(short, "nats").mean())
    top = torch.cat([t.logits[:, :-1].softmax(-1).max(-1).values for t in thought])
    best = torch.cat([t.logits[:, :-1].argmax(-1) for t in thought])
    found["calibration_ece"] = calibration_error(top.flatten(), (best == tokens[:, 1:]).flatten())
    return found


@torch.no_grad()
def in_context_recall(model: NanoCTM, words: data.Tokenizer, n_facts: int, seed: int) -> float:
    """Share of held-out people answered for to the letter, asked in held-out words,
    generated freely and greedily."""
    prompts, facts = data.context_questions(data.FactWorld(seed, "held_out"), n_facts, questions)
    said = [r for part in batches(prompts, 25) for r in replies(model, words, part)]
    return sum(map(data.is_recalled, said, facts)) / questions


def key_cosine_at_init(backbone: BackboneConfig, thought: ThoughtConfig, seed: int) -> float:
    """Mean cosine between the uncentred y_out, last tick, of pairs of random inputs,
    in an untrained block."""
    torch.manual_seed(seed)
    model = NanoCTM(backbone, thought)
    tokens, u = torch.zeros(64, 1, dtype=torch.long), torch.randn(64, 1, backbone.hidden_size)
    _, _, places, cache = model.trunk(tokens)
    with torch.no_grad():
        y = model.ticks(u, u, places, cache).y_out[-1][:, 0]
    return float(torch.nn.functional.cosine_similarity(y[:32], y[32:], dim=-1).mean())


# -----------------------------------------------------------------------------
# what thinking costs

def cost_table(backbone: BackboneConfig, thought: ThoughtConfig) -> list[dict]:
    """FLOPs that the block adds per token, counted;
    and CPU microseconds of the block and of the trunk, measured."""
    table, K, D = [], thought.ticks, backbone.hidden_size
    shapes = [("base", K, T, D), *((f"K={k}", k, T, D) for k in (1, 2, 4, 8, 16) if k != K),
              *((f"T={t}", K, t, D) for t in (64, 128, 512)),
              *((f"D={d}", K, T, d) for d in (64, 256))]
    for name, ticks, length, width in shapes:
        b, c = replace(backbone, hidden_size=width), replace(thought, ticks=ticks)
        model, tokens = NanoCTM(b, c), torch.randint(0, b.vocab_size, (2, length))
        with torch.no_grad():
            trunk = model.trunk(tokens)
            table.append({
                "shape": name, **flops_per_token(b, c, length),
                "trunk_us": 1e6 * cpu_seconds(lambda: model.trunk(tokens)) / tokens.numel(),
                "block_us": 1e6 * cpu_seconds(lambda: model.ticks(*trunk)) / tokens.numel()})
    return table


def cpu_seconds(work, times: int = 3) -> float:
    """The best of so many: CPU time, since wall time belongs to whoever else is on the machine."""
    taken = []
    for _ in range(times):
        begin = time.process_time()
        work()
        taken.append(time.process_time() - begin)
    return min(taken)


# -----------------------------------------------------------------------------
# quality

def quality() -> dict:
    words = data.Tokenizer(tokenizer)
    held_out = HeldOut(words)
    models = {"backbone": load_backbone(base),
              "ffn_same_tokens": load_graft(base, Path(control), "ffn"),
              "graft": load_graft(base, Path(graft), "ctm"),
              "thinking": load_graft(base, Path(thinking), "ctm"),
              "ffn_deleted": load_backbone(base, block="none")}
    for model in models.values():
        model.eval().requires_grad_(False)
    shape = models["graft"].backbone.config, models["graft"].ctm.config
    samples = []
    for seed in chosen_seeds():
        print(f"seed {seed}: text", file=sys.stderr)
        sample = text_figures(models, held_out, seed)
        for name in ("graft", "backbone"):
            for n in (2, 8):
                print(f"seed {seed}: {name}, {n} facts in the prompt", file=sys.stderr)
                sample[f"{name}_recall_{n}"] = in_context_recall(models[name], words, n, seed)
        sample["key_cosine_at_init"] = key_cosine_at_init(*shape, seed)
        samples.append(sample)

    found = {k: spread([s[k] for s in samples])
             for k in samples[0] if isinstance(samples[0][k], float)}
    value = {k: v["mean"] for k, v in found.items()}
    by_tick = np.mean([s["nats_by_tick"] for s in samples], 0).tolist()
    recovered = ((value["ffn_deleted_nats"] - value["graft_nats"])
                 / (value["ffn_deleted_nats"] - value["backbone_nats"]))
    costs = cost_table(*shape)
    print_table(found, by_tick, recovered, costs)
    trained = sum(p.numel() for p in block_module(models["graft"]).parameters())
    result = {f"{name}_nats": value[f"{name}_nats"] for name in models}
    result |= {k: value[k] for k in ("graft_bits_per_byte", "read_tick_entropy", "calibration_ece",
                                     "key_cosine_at_init")}
    result |= {"recovered": recovered, "nats_by_tick": by_tick,
               "read_tick_shares": np.mean([s["read_tick_shares"] for s in samples], 0).tolist(),
               "halting": {"mean_ticks": value["halt_ticks"], "nats": value["halt_nats"],
                           "halt": value["halt_at"]},
               "in_context_recall": {str(n): value[f"graft_recall_{n}"] for n in (2, 8)},
               "in_context_recall_backbone": {str(n): value[f"backbone_recall_{n}"]
                                              for n in (2, 8)},
               "questions": seeds * questions,
               "trainable": trained,
               "frozen": sum(p.numel() for p in models["graft"].backbone.parameters()),
               "sd": {k: v["sd"] for k, v in found.items()}, "cost": costs}
    return result | ({"depth_or_ticks": depth_or_ticks()} if full else {})


# -----------------------------------------------------------------------------
# depth or thinking time?

def depth_or_ticks() -> dict:
    """More layers against more ticks at equal FLOPs per token:
    both trained from nothing on the same text, held-out nats.

    The thinker has the tiny backbone's layers with a CTM of 4 ticks in the last one; the deep one
    is a plain transformer with as many layers as cost at least as much per token, FFN included.
    """
    shape = load_graft(base, Path(graft))
    b, c = shape.backbone.config, replace(shape.ctm.config, ticks=4)
    def cost(layers: int, thinking: bool) -> int:
        f = flops_per_token(replace(b, num_hidden_layers=layers), c, T)
        return f["trunk"] + (f["block"] if thinking else f["ffn"])
    thinker = cost(b.num_hidden_layers, True)
    layers = next(n for n in range(1, 100) if cost(n, False) >= thinker)
    arms = {f"ticks: {b.num_hidden_layers} layers, K=4": (b, "ctm"),
            f"depth: {layers} layers": (replace(b, num_hidden_layers=layers), "ffn")}
    result = {"flops_per_token": {"ticks": thinker, "depth": cost(layers, False)},
              "steps": full_steps}
    with one_process_each(2 * seeds) as pool:
        runs = {arm: [pool.submit(train_from_nothing, config, c, block, seed)
                      for seed in chosen_seeds()]
                for arm, (config, block) in arms.items()}
        for arm, done in runs.items():
            result[arm] = spread([run.result() for run in done])
            print(f"{arm:28s} {result[arm]['mean']:9.4f} {result[arm]['sd']:8.4f}", flush=True)
    return result


def train_from_nothing(config: BackboneConfig, c: ThoughtConfig, block: str, seed: int) -> float:
    """Held-out nats per token after so many steps of 8 windows, everything learning."""
    words = data.Tokenizer(tokenizer)
    train, val = (words.encode("".join(pieces))
                  for pieces in data.split_documents(data.tiny_documents()))
    torch.manual_seed(seed)
    model = NanoCTM(config, c, block)
    model.backbone.initialise()
    learning = [p for n, p in model.named_parameters()
                if block == "ffn" or f"layers.{config.num_hidden_layers - 1}.mlp" not in n]
    optimizer = torch.optim.AdamW(learning, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    mixture = data.Mixture(words, np.array(train), T, 1.0, 0.0, seed)
    for step in range(full_steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50, (full_steps - step) / (0.5 * full_steps))
        tokens, weight, _ = map(torch.from_numpy, mixture.batch(8, step))
        ticks, following = model.ticks(*model.trunk(tokens)), successors(tokens)
        loss, _ = model.tick_loss(model.measure(ticks, following), following, weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if model.ctm:
            model.ctm.settle(*mean_and_square(ticks), max(0.01, 1 / (step + 1)))
        if step % 50 == 0:
            print(f"seed {seed} {block} step {step}/{full_steps} loss {loss.item():.3f}",
                  file=sys.stderr)
    starts = range(0, len(val) - T, max(T, len(val) // 48))
    model.eval()
    return float(of(think(model, torch.tensor([val[s:s + T] for s in starts])), "nats").mean())


def print_table(found: dict, by_tick: list[float], recovered: float, costs: list[dict]) -> None:
    print(f"{'figure':28s} {'mean':>9s} {'sd':>8s}")
    for name, v in found.items():
        print(f"{name:28s} {v['mean']:9.4f} {v['sd']:8.4f}")
    print(f"{'recovered of the deletion':28s} {recovered:9.4f}")
    print("nats by tick                ", " ".join(f"{n:.3f}" for n in by_tick))
    print(f"\n{'cost':8s} {'FLOPs/token':>12s} {'reading':>12s} {'attention':>12s} {'trunk':>12s} "
          f"{'block us':>9s} {'trunk us':>9s}")
    for row in costs:
        print(f"{row['shape']:8s} {row['block']:12,d} {row['block_reading']:12,d} "
              f"{row['block_attention']:12,d} {row['trunk']:12,d} "
              f"{row['block_us']:9.1f} {row['trunk_us']:9.1f}")


# -----------------------------------------------------------------------------
# memory: told once, written, asked in another process

class Mind:
    """The model with its words: told sessions, asked questions.
    Everything greedy, everybody held out."""

    def __init__(self, name: str = "", **settings):
        """settings: of SessionMemory."""
        self.model = load_graft(base, Path(name or graft), "ctm").eval().requires_grad_(False)
        self.words, self.ctm, self.settings = data.Tokenizer(tokenizer), self.model.ctm, settings
        self.flops = flops_per_token(self.model.backbone.config, self.ctm.config, T)

    def told(self, sessions: list[str]) -> list[tuple[Factors, Snapshot, int]]:
        """Read each text as one session, side by side:
        what it leaves, and how many tokens it had."""
        left = []
        for part in batches(sessions, 25):
            ids = [self.words.encode(text) for text in part]
            session, factors = read_session(
                self.model, torch.from_numpy(data.padded(ids, -1)), **self.settings)
            left += [(f, session.snapshot(i, torch.tensor(ids[i])), len(ids[i]))
                     for i, f in enumerate(factors)]
        return left

    def factors(self, sessions: list[str]) -> list[Factors]:
        return [f for f, _, _ in self.told(sessions)]

    def write(self, factors: list[Factors], rule: WriteRule = WriteRule()) -> Plastic:
        """The memory that sessions make, to be read: P of hundreds of them fills the machine."""
        return Plastic(compact_sessions(self.ctm, factors, rule).weight)

    def ask(self, questions: list[str], plastic: Plastic | None | list[Plastic] = None,
            before: list[str] | None = None) -> list[str]:
        """Each question in a fresh context, with one memory, or a list of them that serve equal
        runs of the questions; after `before`, shared alike, in the same context. Nothing is carried
        on the way: a question and its answer are about a chunk, and what stands in the prompt is in
        sight."""
        def its(given: list, i: int):
            return given[i * len(given) // len(questions)]
        prompts = [its(before or [""], i) + data.user_turn(q) for i, q in enumerate(questions)]
        said: dict[int, str] = {}
        for part in batches(sorted(range(len(prompts)), key=lambda i: len(prompts[i])), 50):
            each = [its(plastic, i) for i in part] if isinstance(plastic, list) else None
            weight = (torch.stack([p.weight.float() for p in each]) if each
                      else plastic.weight.float() if plastic else None)
            said |= zip(part, replies(self.model, self.words, [prompts[i] for i in part], 16,
                                      plastic=weight))
        return [said[i] for i in range(len(prompts))]

    def known(self, questions: list[str], facts: list[data.Fact], plastic) -> list[bool]:
        """Which of the facts are recalled."""
        return list(map(data.is_recalled, self.ask(questions, plastic), facts))

    def recall(self, world: data.FactWorld, facts: list[data.Fact], plastic) -> float:
        return mean(self.known([world.ask(f, held_out=True) for f in facts], facts, plastic))


def batches(items: list, size: int) -> list[list]:
    return [items[at:at + size] for at in range(0, len(items), size)]


class Sample:
    """One seed's people, what they are told to be, and the model that was told:
    the same for every arm."""

    def __init__(self, seed: int):
        self.seed, self.mind, self.world = seed, Mind(), data.FactWorld(seed, "held_out")
        self.facts = self.world.population(100)
        self.texts = {n: self.world.texts(self.facts, n) for n in (1, 10)}
        self.windows = HeldOut(self.mind.words).windows(seed)
        self.ordinary = OrdinaryText(self.mind.model, self.windows[:8])
        self.left = self.mind.told(self.texts[10])
        self.factors = [f for f, _, _ in self.left]
        w, people = self.world, {f.name for f in self.facts}
        self.strangers = [w.near_miss(f, people) for f in self.facts]
        self.elsewhere = [w.other_relation(f, self.facts) for f in self.facts]
        # Each fact in training's words and in held-out ones; a stranger of nearly the same name;
        # the same person, something that nobody told.
        self.asked = {"direct": [w.ask(f) for f in self.facts],
                      "paraphrase": [w.ask(f, held_out=True) for f in self.facts],
                      "near_miss": [w.ask(f, held_out=True) for f in self.strangers],
                      "elsewhere_unknown": [w.ask(f, held_out=True) for f in self.elsewhere]}

    def nats(self, plastic: Plastic | None) -> float:
        return self.ordinary.nats(plastic and plastic.weight)

    @functools.cached_property
    def singles(self) -> list[tuple[Factors, Snapshot, int]]:
        return self.mind.told(self.texts[1])

    @functools.cached_property
    def whole(self) -> Plastic:
        return self.mind.write(self.factors)

    @functools.cached_property
    def edits(self) -> "Edits":
        return Edits(self)

    def known(self, plastic: Plastic | None, mind: Mind | None = None) -> list[bool]:
        """Which of the facts are recalled, asked in other words."""
        return (mind or self.mind).known(self.asked["paraphrase"], self.facts, plastic)

    def told_in(self, which: list[int], alone: list, tens: list) -> list:
        """What belongs to the sessions in which these facts were told: one alone, or tens."""
        return ([alone[i] for i in which] if len(which) == 1
                else tens[which[0] // 10:which[-1] // 10 + 1])

    def told_to(self, which: list[int]) -> list[str]:
        return self.told_in(which, self.texts[1], self.texts[10])

    def questions(self, which: list[int]) -> list[str]:
        return [self.asked[kind][i] for kind in self.asked for i in which]

    def graded(self, which: list[int], replies: list[str]) -> dict[str, list[bool]]:
        """Replies to `questions(which)`: is it the fact? Is a stranger given that of the one of
        nearly the same name, under either name (near_miss), or anybody's (anybodys), or told that
        nothing is known of them (unknown)? And of the same person's other relation?"""
        given = dict(zip(self.asked, batches(replies, len(which))))
        wanted = {"direct": self.facts, "paraphrase": self.facts,
                  "elsewhere_unknown": self.elsewhere}
        right = {kind: [data.is_recalled(reply, facts[i]) for i, reply in zip(which, given[kind])]
                 for kind, facts in wanted.items()}
        right |= {"near_miss": [], "anybodys": [], "unknown": []}
        for i, reply in zip(which, given["near_miss"]):
            fact, stranger = self.facts[i], self.strangers[i]
            told = {self.facts[j].value for j in which if self.facts[j].relation == fact.relation}
            of_value = {v: any(data.is_recalled(reply, f._replace(value=v))
                               for f in (fact, stranger)) for v in told}
            right["near_miss"].append(of_value[fact.value])
            right["anybodys"].append(any(of_value.values()))
            right["unknown"].append(data.is_recalled(reply, stranger))
        return right

    def graded_together(self, groups: list[list[int]], replies: list[str]) -> dict[str, list[bool]]:
        """The same of several groups, whose `questions` were asked one group after the other."""
        each = [self.graded(which, said) for which, said
                in zip(groups, batches(replies, len(replies) // len(groups)))]
        return {kind: [x for graded in each for x in graded[kind]] for kind in each[0]}


def draw(found: dict[str, dict], file: str) -> None:
    """Recall from weights against the number of facts told, with its 95 % intervals,
    next to the memory off and chance."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    sizes = sorted(int(k.split("_")[1]) for k in found if k.startswith("capacity_"))
    recall = [found[f"capacity_{n}"]["mean"] for n in sizes]
    low, high = zip(*(wilson(r, seeds * min(n, 100)) for r, n in zip(recall, sizes)))
    figure, axes = pyplot.subplots(figsize=(6, 3.2))
    axes.errorbar(sizes, recall,
                  np.maximum(0, [np.subtract(recall, low), np.subtract(high, recall)]),
                  marker="o", capsize=3, label="from weights, after a restart")
    axes.axhline(found["off_100"]["mean"], linestyle="--", color="gray", label="memory off")
    axes.set(xscale="log", xlabel="facts told, in sessions of 10",
             ylabel="recalled, in other words", ylim=(-0.02, 1.02),
             xticks=sizes, xticklabels=sizes)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)


def wilson(share: float, n: int, z: float = 1.96) -> list[float]:
    """95 % interval of a share of n (Wilson 1927)."""
    middle, half = (share + z * z / (2 * n),
                    z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def difference_interval(won: float, lost: float, n: int, z: float = 1.96) -> list[float]:
    """The 95 % interval of won - lost, two shares of the same n questions asked twice (Wald, for
    matched pairs)."""
    half = z * math.sqrt(max(0.0, won + lost - (won - lost) ** 2) / n)
    return [won - lost - half, won - lost + half]


def after_restart(mind: Mind, asked: list[tuple[list[list[tuple]], list[str]]]) -> list[list[str]]:
    """For each of several sets of stores: commit their sessions, then let a new process open them
    and answer, each store an equal run of the set's questions."""
    text = OrdinaryText(mind.model)
    with tempfile.TemporaryDirectory() as where:
        sets = [([Path(where) / f"{n}-{i}" for i in range(len(stores))], questions)
                for n, (stores, questions) in enumerate(asked)]
        for (folders, _), (stores, _) in zip(sets, asked):
            for folder, sessions in zip(folders, stores):
                with Store(folder, mind.model, max_drift=math.inf, text=text) as store:
                    for left in sessions:
                        store.commit(*left)
        with one_process_each(1) as pool:
            return pool.submit(answers, sets).result()


def answers(sets: list[tuple[list[Path], list[str]]]) -> list[list[str]]:
    """What the second process does: open each store, and ask. Nothing else is known to it."""
    mind, said = Mind(), []
    for folders, questions in sets:
        known = []
        for folder in folders:
            with Store(folder, mind.model, read_only=True) as store:
                known.append(Plastic(store.plastic()))
        said.append(mind.ask(questions, known))
    return said


def restart_figures(s: Sample) -> dict:
    """Recall at N = 1, 10, 100, in a new process; how often a stranger is given the fact
    of the one of nearly the same name, or anybody's."""
    found, everybody = {}, list(range(len(s.facts)))
    told = {1: [[left] for left in s.singles], 10: [[left] for left in s.left], 100: [s.left]}
    groups = {n: batches(everybody, n) for n in told}
    said = after_restart(s.mind, [(stores, [q for which in groups[n] for q in s.questions(which)])
                                  for n, stores in told.items()])
    for n, replies in zip(told, said):
        found |= {f"{n}_{kind}": mean(xs)
                  for kind, xs in s.graded_together(groups[n], replies).items()}
    return found


def neighbour_figures(s: Sample) -> dict:
    """What ten people of one relation lose when 1, 10 and 100 others of the same relation
    are told after them."""
    mind, world = s.mind, s.world
    facts = world.population(110, [sorted(data.RELATIONS)[s.seed % len(data.RELATIONS)]])
    left = mind.factors(world.texts(facts))
    ones = mind.factors(world.texts(facts[::10], 1))
    after = {"0": lambda j: [], "1": lambda j: [ones[j + 1]], "10": lambda j: [left[j + 1]],
             "100": lambda j: left[:j] + left[j + 1:]}
    known = {n: mind.recall(world, facts[:100],
                            [mind.write([left[j], *others(j)]) for j in range(10)])
             for n, others in after.items()}
    return {f"{n}_neighbour_drop": known["0"] - known[n] for n in ("1", "10", "100")}


def order_figures(s: Sample) -> dict:
    """First of ten sessions, each session having been first; denials; the model's own guesses;
    facts that change, and facts told three times, also with nothing superseded."""
    mind, world, facts, left = s.mind, s.world, s.facts, s.factors
    parts = batches(facts, 10)
    first = mind.recall(world, facts, [mind.write(left[j:] + left[:j]) for j in range(10)])
    changed = [world.another_value(f) for f in facts]
    anew = mind.factors(world.texts(changed))
    again = mind.factors(world.texts(facts * 2))
    asked = [world.ask(f, held_out=True) for f in facts]
    denied = mind.write(
        mind.factors([data.user_turn(" ".join(map(data.denial, part))) for part in parts]))
    guessed = mind.write([own_guess(mind, world, f) for f in facts])
    found = {"retention": first, "negation": mind.recall(world, facts, denied),
             "own_guess": mind.recall(world, facts, guessed)}
    for kind, rule in {"": WriteRule(), "_all_kept": WriteRule(near=math.inf)}.items():
        after, thrice = (mind.write(left + more, rule) for more in (anew, again))
        said = mind.ask(asked, after)
        found |= {f"changed{kind}": mean(map(data.is_recalled, said, changed)),
                  f"old{kind}": mean(map(data.is_recalled, said, facts)),
                  f"retold{kind}": mind.recall(world, facts, thrice),
                  f"retold{kind}_text": s.nats(thrice) / s.nats(None)}
    return found


def own_guess(mind: Mind, world: data.FactWorld, fact: data.Fact) -> Factors:
    """A session in which the user only asked, and the model said `fact` by itself."""
    asked, said = ([*mind.words.encode(t)]
                   for t in (data.user_turn(world.ask(fact)), data.answer(fact) + data.TURN_END))
    session = SessionMemory(mind.model, 1)
    thought = session.read(torch.tensor([asked]), Cache())
    session.read(torch.tensor([said]), thought.cache, own=len(said))
    return session.close()[0]


def capacity_figures(s: Sample) -> dict:
    """Recall of 100 of the facts told so far, in sessions of 10, as they become more."""
    mind, world, S = s.mind, s.world, s.mind.ctm.config.sync
    sizes = sorted({min(n, most_facts(world)) for n in (S // 8, S // 4, S // 2, S, 2 * S, 4 * S)})
    facts, found = world.population(sizes[-1]), {}
    left = mind.factors(world.texts(facts))
    for n in sizes:
        some = world.rng.sample(facts[:n], min(n, 100))
        found[f"capacity_{n}"] = mind.recall(world, some, mind.write(left[:-(-n // 10)]))
    return found


def most_facts(world: data.FactWorld) -> int:
    """All that can be said of its people."""
    return len(world.names) * len(data.RELATIONS)


# -- the other arms, on the same facts

def arm_figures(s: Sample) -> dict:
    """Memory off; all in the prompt; a random write of the same size;
    facts deranged within their relation."""
    mind, world, facts, nats = s.mind, s.world, s.facts, s.nats
    off = mind.recall(world, facts, None)
    found = {f"off_{n}": off for n in (1, 10, 100)} | {"off_text_nats": nats(None)}
    found["off_unknown"] = mind.recall(world, [f._replace(value=data.UNKNOWN) for f in facts], None)
    for n in (1, 10):
        groups = batches(list(range(len(facts))), n)
        said = mind.ask([q for which in groups for q in s.questions(which)], None, s.texts[n])
        right = {kind: mean(xs) for kind, xs in s.graded_together(groups, said).items()}
        found[f"in_context_{n}"] = right["paraphrase"]
        found |= {f"in_context_{n}_{kind}": right[kind]
                  for kind in ("near_miss", "anybodys", "unknown", "elsewhere_unknown")}
    for n, factors in ((1, [s.singles[0][0]]), (10, s.factors[:1]), (100, s.factors)):
        weight = mind.write(factors).weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(n),
                            dtype=torch.float64)
        noise = Plastic(noise * weight.norm() / noise.norm())
        found[f"random_{n}"] = mind.recall(world, facts, noise)
        found[f"random_{n}_text_nats"] = nats(noise)
    lies = deranged(world, facts)
    for n in (1, 10, 100):
        lied = mind.factors(world.texts(lies, min(n, 10)))
        groups = [lied] if n == 100 else [[f] for f in lied]
        found[f"deranged_{n}"] = mind.recall(world, facts, list(map(mind.write, groups)))
    return found


def deranged(world: data.FactWorld, facts: list[data.Fact]) -> list[data.Fact]:
    """Everybody with the value of somebody else of the same relation, never their own."""
    lies = []
    for f in facts:
        others = [g.value for g in facts if g.relation == f.relation and g.value != f.value]
        lies.append(f._replace(value=world.rng.choice(others or [world.another_value(f).value])))
    return lies


class FineTuning:
    """Gradient descent on the very tensor that memory is written beside. Its inputs do not depend
    on it: thought about once. It reads keys, not features of them, where it does better."""

    def __init__(self, mind: Mind, sessions: list[str], lr: float, channels: Tensor | None = None):
        """channels (S,): 1 for those that learn, 0 for the others; None: all."""
        self.mind, self.sessions = mind, []
        for text in sessions:
            tokens = torch.tensor([mind.words.encode(text)])
            thought, known = mind.model(tokens), successors(tokens) >= 0
            key = thought.key[known] / math.sqrt(thought.key.shape[-1])
            self.sessions.append((thought.at_read_tick(thought.hidden)[known],
                                  key if channels is None else key * channels,
                                  successors(tokens)[known]))
        self.weight = torch.zeros(mind.ctm.c_proj.weight.shape, requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.weight], lr=lr, weight_decay=0.0)
        self.tokens, self.passes = sum(len(key) for _, key, _ in self.sessions), 0

    def one_pass(self) -> None:
        """One step per session: the mean cross-entropy of all its tokens at the tick read."""
        for hidden, key, target in self.sessions:
            aided = hidden + key @ self.weight.T
            torch.nn.functional.cross_entropy(self.mind.model.head(aided), target).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.passes += 1

    def flops(self) -> int:
        """The sessions are read once; each pass then goes forward and back through the head, which
        does not learn, and through the tensor, which alone does: 4 D S a token."""
        f = self.mind.flops
        each = 2 * f["head"] + 4 * self.weight.numel()
        return self.tokens * (f["trunk"] + f["block"] + self.passes * each)


def fine_tune_figures(s: Sample) -> dict:
    """One pass at the best of four learning rates, chosen for its recall on these very facts;
    and passes until 95 % are recalled, or however many of 1 to 30 recall most.

    N = 1: ten models with a fact each, N = 10: three with ten, N = 100: one.
    """
    mind, found = Mind(), {}
    mind.ctm.read_along(0)
    text = OrdinaryText(mind.model, s.windows[:8])
    for n, models in MODELS.items():
        chosen = s.facts[:n * models]
        groups = [s.told_to(which) for which in batches(list(range(n * models)), n)]

        def runs(lr: float, stops: tuple[int, ...]):
            """-> recall, weight, passes and FLOPs of the first model, at each stop."""
            tuned = [FineTuning(mind, group, lr) for group in groups]
            for until in stops:
                for t in tuned:
                    while t.passes < until:
                        t.one_pass()
                plastics = [Plastic(t.weight.detach().clone()) for t in tuned]
                known = mind.recall(s.world, chosen, plastics)
                yield known, plastics[0].weight, until, tuned[0].flops()
                if known >= 0.95:
                    return
        tried = [run for lr in (0.03, 0.1, 0.3) for run in runs(lr, (1, 3, 10, 30))]
        tried += runs(1.0, (1,))
        for name, of_these in (("fine_tune", [run for run in tried if run[2] == 1]),
                               ("fine_tune_to_95", tried)):
            known, weight, passes, flops = max(of_these, key=lambda run: run[0])
            found |= {f"{name}_{n}": known, f"{name}_{n}_text_nats": text.nats(weight),
                      f"{name}_{n}_passes": float(passes), f"{name}_{n}_flops": float(flops)}
    return found


MODELS = {1: 10, 10: 3, 100: 1}             # of N facts each, where a model is slow to teach


def write_flops(mind: Mind, factors: list[Factors], tokens: int) -> int:
    """Reading the sessions once; then per factor 2 S^2 to whiten it, 2 F D for W, and for each
    factor before it 4 F for P phi and 2 D for what was said there; and 4 S^3 once for what text
    shares. The triangular solves within a session, n (F + D) per factor, are left out: n is a
    hundredth of F; Fourier transforms, a tenth of a feature's products, too."""
    S, (D, width) = mind.ctm.config.sync, Plastic.blank(mind.ctm).weight.shape
    n, f = sum(len(f.keys) for f in factors), mind.flops
    return (tokens * (f["trunk"] + f["block"] + f["head"]) + 4 * S ** 3
            + n * (2 * S * S + 2 * width * D) + (2 * width + D) * n * n)


# -- ordinary text, the carry, the warm start, the price

@torch.no_grad()
def session_nats(mind: Mind, tokens: Tensor, start: Carry | None) -> Tensor:
    """Nats (B, T) of tokens (B, T) read as sessions in a fresh context that go on from `start`;
    NaN where there is no successor, or padding."""
    session = SessionMemory(mind.model, len(tokens))
    session.start(start)
    return torch.cat([t.nats for t in read_in_chunks(mind.model, tokens, session)], 1)


def carry_figures(mind: Mind, tokens: Tensor, chats: Tensor, seen: int = 32) -> dict:
    """The second half of each window after a cut of the context:
    sync carried over, dropped, or another row's.

    Whole windows, and rows of chat about facts, each read as one session and without a session.
    Warm start: the first halves are the sessions remembered; the one most like a second half's
    first 32 tokens, as the store would find it, or the one least like them, starts it; nats are
    counted after these 32.
    """
    first, second = tokens.split(tokens.shape[1] // 2, 1)
    with torch.no_grad():
        sums = read_session(mind.model, first)[0].sums
        told, asked = (torch.stack([about(mind.model, row) for row in rows])
                       for rows in (first, second[:, :seen]))
    near = torch.nn.functional.cosine_similarity(asked[:, None], told[None], dim=-1)

    def after(which: Tensor) -> Tensor:
        return session_nats(mind, second, Carry(*(x[which] for x in sums)))
    cold, itself = session_nats(mind, second, None), torch.arange(len(told))
    found = {"carry_with": after(itself), "carry_without": cold,
             "carry_shuffled": after(itself.roll(1)),
             "session_with": session_nats(mind, tokens, None),
             "session_without": of(think(mind.model, tokens), "nats"),
             "session_chat_with": session_nats(mind, chats, None),
             "session_chat_without": of(think(mind.model, chats), "nats"),
             "warm_cold": cold[:, seen:], "warm_nearest": after(near.argmax(1))[:, seen:],
             "warm_wrong": after(near.argmin(1))[:, seen:]}
    return {name: float(nats.nanmean()) for name, nats in found.items()}


def write_cost(s: Sample) -> dict:
    """CPU seconds of reading and writing sessions, one after the other into one memory, over those
    of reading them: of each session its best of five, one read just before it is read and written,
    since one CPU is not as fast all the time; milliseconds of making the empty memory, which a
    process does once. `measured` lets no other part run beside it, which would cost writing more
    than reading (LOG.md)."""
    mind, texts = s.mind, s.texts[10]
    taken = torch.zeros(5, len(texts), 2)
    for each in taken:
        pointing, plastic = [], Plastic.blank(mind.ctm)
        for text, seconds in zip(texts, each):
            tokens = torch.tensor([mind.words.encode(text)])
            def reading() -> None:
                SessionMemory(mind.model, 1, threshold=1.1).read(tokens, Cache())   # none is marked
            def writing() -> None:
                nonlocal plastic
                factors = read_session(mind.model, tokens)[1][0]
                seen = whitened(mind.ctm, factors)
                pointing.append(bearings(seen))
                superseded(pointing, WriteRule().near, len(pointing) - 1)           # its time
                plastic = compact_memory(mind.ctm, plastic, factors, seen=seen)
            with torch.no_grad():
                seconds.copy_(torch.tensor([cpu_seconds(reading, 1), cpu_seconds(writing, 1)]))
    alone, both = taken.amin(0).sum(0).tolist()
    def empty() -> None:
        mind.ctm.projectors.clear()
        Plastic.blank(mind.ctm)
    return {"write_cost_ratio": both / alone, "empty_memory_ms": 1000 * cpu_seconds(empty)}


def written_figures(s: Sample) -> dict:
    mind, whole = s.mind, s.whole
    return restart_figures(s) | {
        "factors_per_fact": mean(len(f.keys) for f in s.factors) / 10,
        "text_nats_before": s.nats(None), "text_nats_after": s.nats(whole),
        "output_change": output_change(mind.ctm, whole.weight),
        "weight_norm_ratio": norm_ratio(mind.ctm, whole.weight),
        "write_flops": float(write_flops(mind, s.factors, sum(n for _, _, n in s.left)))}


def carry_part(s: Sample) -> dict:
    text = HeldOut(s.mind.words)
    chats = data.Mixture(s.mind.words, text.ids, T, 0.0, 1.0, s.seed, "held_out").batch(rows, 0)[0]
    return (carry_figures(s.mind, text.windows(s.seed, apart=True), torch.from_numpy(chats))
            | {"untrained_100": untrained_recall(s)})


PARTS = {"cost": write_cost, "neighbours": neighbour_figures, "order": order_figures,
         "capacity": capacity_figures, "arms": arm_figures, "fine_tune": fine_tune_figures,
         "carry": carry_part, "restart": written_figures}           # the longer, the later


def measured(parts: dict) -> dict[str, list[float]]:
    """Every figure of the parts, as a list over seeds: first what a write costs, by itself, then all
    others side by side. With --full each part is kept as it ends, so that an interrupted run goes
    on."""
    made_of = [Path(__file__).with_name(f"{name}.py")
               for name in ("bench", "data", "memory", "model", "train")]
    made_of += [Path(graft), Path(thinking)]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in made_of)
                            + json.dumps([globals()[k] for k in SETTINGS]).encode())
    kept = Path("out/bench_memory") / digest.hexdigest()[:12]
    tasks = [(name, seed) for name in reversed(parts) for seed in chosen_seeds()]  # longest first
    with one_process_each(len(tasks)) as pool:
        def begun(task: tuple[str, int]) -> Future:
            file = kept / "{}-{}.json".format(*task) if full else None
            return pool.submit(part_of, *task, file)
        found = {task: begun(task).result() for task in tasks if task[0] == "cost"}
        runs = {begun(task): task for task in tasks if task not in found}
        found |= {runs[run]: run.result()
                  for run in tqdm(as_completed(runs), total=len(runs), unit="part")}
    return {k: [found[name, seed][k] for seed in chosen_seeds()]
            for name in parts for k in found[name, first_seed]}


def part_of(name: str, seed: int, file: Path | None) -> dict:
    """One part of one seed's figures, whatever this process measured before; kept in `file`."""
    if file and file.exists():
        return json.loads(file.read_text())
    sample, dice = sample_of(seed)
    sample.world.rng.setstate(dice)
    torch.manual_seed(seed)
    found = (PARTS | FULL_PARTS | LOUDNESS)[name](sample)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".new").write_text(json.dumps(found))
        file.with_suffix(".new").replace(file)
    return found


@functools.cache
def sample_of(seed: int) -> tuple[Sample, tuple]:
    """A seed's sample, and where its chance stands."""
    sample = Sample(seed)
    return sample, sample.world.rng.getstate()


def untrained_recall(s: Sample) -> float:
    """The same 100 facts written into the block as phase 2 left it, which nothing taught salience,
    strength or Sigma: every token counts, at the trained block's strength, and Sigma is measured on
    training text."""
    before = Mind(thinking, threshold=0.0, expected=0.0, budget=1000)
    before.ctm.log_eta.data.copy_(s.mind.ctm.log_eta)
    keys = before.model(before.ctm.ordinary).key.flatten(0, 1)
    before.ctm.key_moment.copy_(keys.T @ keys / len(keys) / keys.shape[1])
    before.ctm.due_moment.zero_()
    before.ctm.whiten()
    return before.recall(s.world, s.facts, before.write(before.factors(s.texts[10])))


def memory() -> dict:
    if picture and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--picture expected the optional package matplotlib, found none: "
                         "pip install matplotlib")
    found = {k: spread(xs) for k, xs in measured(PARTS | (FULL_PARTS if full else {})).items()}
    v = {k: x["mean"] for k, x in found.items()}
    print_figures(found)
    if picture:
        draw(found, picture)
    if picture and full:
        draw_damage(found, picture)
    cells = {"direct": "direct", "paraphrase": "paraphrase", "neighbour_drop": "neighbour_drop",
             "near_miss_false": "near_miss", "near_miss_anybodys": "anybodys",
             "near_miss_unknown": "unknown", "elsewhere_unknown": "elsewhere_unknown"}
    arms = {name: under(v, f"{name}_") for name in (
        "off", "in_context", "random", "deranged", "fine_tune", "fine_tune_to_95", "untrained")}
    arms["fine_tune"] = {k: x for k, x in arms["fine_tune"].items() if not k.startswith("to_95")}
    arms["in_context"]["100"] = None                                # too many for the tiny context
    more = full_figures(found) if full else {}

    def told_again(kind: str) -> dict:
        return {"changed_fact": v[f"changed{kind}"], "old_fact": v[f"old{kind}"],
                "told_three_times": {"recall": v[f"retold{kind}"], "text": v[f"retold{kind}_text"]}}
    return more | told_again("") | {
        "recall": {n: {cell: v[f"{n}_{name}"] for cell, name in cells.items()}
                   for n in ("1", "10", "100")},
        "capacity": under(v, "capacity_"), "nothing_superseded": told_again("_all_kept"),
        "negation_false": v["negation"], "own_guess_recalled": v["own_guess"],
        "retention_first_of_10_sessions": v["retention"], "arms": arms | more.get("arms", {}),
        "carry": {f"nats_{k}": x for k, x in under(v, "carry_").items()},
        "session": {f"nats_{k}": x for k, x in under(v, "session_").items()},
        "warm_start": {f"nats_{k}": x for k, x in under(v, "warm_").items()},
        **{k: v[k] for k in ("text_nats_before", "text_nats_after", "output_change",
                             "weight_norm_ratio", "write_cost_ratio", "write_flops",
                             "empty_memory_ms", "factors_per_fact")},
        "S": load_graft(base, Path(graft)).ctm.config.sync, "questions": 100 * seeds,
        "sd": {k: x["sd"] for k, x in found.items()}}


def print_figures(found: dict[str, dict]) -> None:
    print(f"{'figure':28s} {'mean':>12s} {'sd':>8s}   95 % interval of a share")
    for name, x in found.items():
        asked_of_all = (name.endswith(("direct", "paraphrase", "near_miss", "anybodys", "unknown"))
                        or name.removesuffix("_all_kept") in ("changed", "old", "retold")
                        or name in ("retention", "negation", "own_guess"))
        opponent = re.match(f"(?:{'|'.join(OPPONENTS)})_(1|10|100)_", name)
        n = MODELS[int(opponent[1])] * int(opponent[1]) if opponent else 100
        inside = (" .. ".join(f"{b:.3f}" for b in wilson(x["mean"], n * seeds))
                  if asked_of_all else "")
        print(f"{name:28s} {x['mean']:12.4f} {x['sd']:8.4f}   {inside}")


# -----------------------------------------------------------------------------
# how loud the write is

def loudness() -> dict:
    """What recall, strangers and text make of a write that is `louder` times as loud: for choosing
    phase 3's `text_cost`. One memory is scaled, since W_m is linear in eta."""
    amounts = times_as_loud()                                       # bad input, before the work
    found = {k: spread(xs) for k, xs in measured(LOUDNESS).items()}
    print(f"{'times as loud':>13s} {'ten':>6s} {'namesakes':>9s} {'hundred':>7s} {'namesakes':>9s} "
          f"{'text':>8s}")
    for times in amounts:
        ten, namesake, hundred, another, text = (found[f"{k}_{times}"]["mean"] for k in (
            "10_paraphrase", "10_near_miss", "100_paraphrase", "100_near_miss", "text"))
        print(f"{times:13g} {ten:6.1%} {namesake:9.1%} {hundred:7.1%} {another:9.1%} x{text:.4f}")
    return found | {"questions": 100 * seeds}


def times_as_loud() -> list[float]:
    try:
        return list(map(float, louder.split(",")))
    except ValueError:
        raise ValueError(f"expected numbers such as --louder=1,1.2, found {louder!r}") from None


def loudness_figures(s: Sample) -> dict:
    found = {f"text_{times}": s.nats(Plastic(times * s.whole.weight)) / s.nats(None)
             for times in times_as_loud()}
    for n, memories in ((10, [s.mind.write([f]) for f in s.factors]), (100, [s.whole])):
        groups = batches(list(range(len(s.facts))), n)
        asked = [q for which in groups for q in s.questions(which)]
        for times in times_as_loud():
            loud = [Plastic(times * m.weight) for m in memories]
            right = s.graded_together(groups, s.mind.ask(asked, loud))
            found |= {f"{n}_{k}_{times}": mean(right[k]) for k in ("paraphrase", "near_miss")}
    return found


LOUDNESS = {"loudness": loudness_figures}


# -----------------------------------------------------------------------------
# memory --full: opponents that may change any weight, on the same facts

class Taught(NamedTuple):
    """What a way of learning leaves: a tensor beside c_proj, changes of the model's own weights, or
    text to put before a question."""
    plastic: Plastic | None = None
    change: dict[str, Tensor] = {}
    before: list[str] | None = None
    flops: float = 0.0


@contextlib.contextmanager
def changed(model: NanoCTM, change: dict[str, Tensor]):
    """The model with so much added to its weights, for a while."""
    weights = dict(model.named_parameters())
    kept = {name: weights[name].data for name in change}
    for name, delta in change.items():
        weights[name].data = kept[name] + delta
    try:
        yield
    finally:
        for name in change:
            weights[name].data = kept[name]


def opponent_figures(s: Sample, name: str) -> dict:
    """What one of OPPONENTS makes of MODELS; of its settings, the one that recalls most of these
    very facts is reported. So 10, 30 and 100 questions a seed. lost_to_more: what the thirty facts
    of N = 10 lose at N = 100."""
    (learn, sweep), found, known = OPPONENTS[name], {}, {}
    for n, models in MODELS.items():
        groups, tried = batches(list(range(n * models)), n), []
        for setting in sweep:
            said, nats, flops = [], None, []
            for which in groups:
                taught = learn(s, which, setting)
                with changed(s.mind.model, taught.change):
                    said += s.mind.ask(s.questions(which), taught.plastic, taught.before)
                    if nats is None:  # of the first model: each costs a reading of the text
                        text = (OrdinaryText(s.mind.model, s.windows[:8]) if taught.change
                                else s.ordinary)
                        nats = text.nats(taught.plastic and taught.plastic.weight)
                flops.append(taught.flops)
            right = s.graded_together(groups, said)
            tried.append((mean(right["paraphrase"]), right, nats, mean(flops)))
        _, right, nats, flops = max(tried, key=lambda t: (t[0], -t[2]))     # a tie: less damage
        known[n] = right["paraphrase"]
        found |= {f"{name}_{n}_{kind}": mean(x) for kind, x in right.items()}
        found |= {f"{name}_{n}_text_nats": nats, f"{name}_{n}_flops": float(flops)}
    return found | {f"{name}_lost_to_more": mean(known[10]) - mean(known[100][:30])}


# learn(s, which facts, setting) -> Taught

def by_writing(s: Sample, which: list[int], _) -> Taught:
    """Our own way, as the others are measured."""
    left = s.told_in(which, s.singles, s.left)
    factors = [f for f, _, _ in left]
    return Taught(s.mind.write(factors),
                  flops=float(write_flops(s.mind, factors, sum(n for _, _, n in left))))


def by_retrieval(s: Sample, which: list[int], most: int) -> Taught:
    """The statements nearest to the question by mean token embedding, put before it; each was told
    in a session of its own."""
    def embedded(texts: list[str]) -> Tensor:
        return torch.stack([about(s.mind.model, torch.tensor(s.mind.words.encode(t)))
                            for t in texts])
    told = [s.texts[1][i] for i in which]
    near = torch.nn.functional.cosine_similarity(embedded(s.questions(which))[:, None],
                                                 embedded(told)[None], dim=-1)
    before = ["".join(told[i] for i in row.topk(min(most, len(told))).indices.flip(0))
              for row in near]
    more = mean(len(s.mind.words.encode(b)) for b in before)
    f = s.mind.flops                                    # for each question, again and again
    return Taught(before=before, flops=more * (f["trunk"] + f["block"]))


def by_fine_tuning(passes: int, share: float = 1.0):
    """AdamW on the tensor that the memory is written beside, all of it or the channels that these
    sessions use most."""
    def learn(s: Sample, which: list[int], lr: float) -> Taught:
        sessions = s.told_to(which)
        tuned = FineTuning(s.mind, sessions, lr,
                           most_used(s, sessions, share) if share < 1 else None)
        for _ in range(passes):
            tuned.one_pass()
        weight = tuned.weight.detach() / math.sqrt(s.mind.ctm.config.sync)
        return Taught(change={"ctm.c_proj.weight": weight}, flops=float(tuned.flops()))
    return learn


def most_used(s: Sample, texts: list[str], share: float) -> Tensor:
    """(S,) 1 for the share of channels whose power in these sessions most exceeds that on ordinary
    text (as TF-IDF), else 0."""
    keys = torch.cat([s.mind.model(torch.tensor([s.mind.words.encode(t)])).key[0] for t in texts])
    use = keys.pow(2).mean(0) / s.mind.ctm.key_moment.diagonal().clamp(min=1e-9)
    return (use >= use.quantile(1 - share)).float()


def by_lora(passes: int, rank: int = 8):
    """LoRA (arXiv:2106.09685) on every matrix of the trunk and on c_proj, AdamW, a step per
    session, all its tokens at the tick read."""
    def learn(s: Sample, which: list[int], lr: float) -> Taught:
        model = s.mind.model
        unused = f"layers.{model.backbone.config.num_hidden_layers - 1}.mlp"
        weights = {n: p for n, p in model.named_parameters() if n.endswith("_proj.weight")
                   and (n.startswith("backbone.") or "c_proj" in n) and unused not in n}
        chance = torch.Generator().manual_seed(which[0])
        down = {n: torch.randn(rank, p.shape[1], generator=chance) / math.sqrt(p.shape[1])
                for n, p in weights.items()}
        for matrix in down.values():
            matrix.requires_grad_()
        up = {n: torch.zeros(len(p), rank, requires_grad=True) for n, p in weights.items()}
        optimizer = torch.optim.AdamW([*down.values(), *up.values()], lr=lr, weight_decay=0.0)
        sessions = [torch.tensor([s.mind.words.encode(t)]) for t in s.told_to(which)]
        for _ in range(passes):
            for tokens in sessions:
                thought = torch.func.functional_call(model,
                    {n: p + up[n] @ down[n] for n, p in weights.items()}, (tokens,))
                nats = torch.nn.functional.cross_entropy(
                    model.head(thought.at_read_tick(thought.hidden)[0, :-1]), tokens[0, 1:])
                nats.backward()
                optimizer.step()
                optimizer.zero_grad()
        f = s.mind.flops
        flops = (passes * sum(t.numel() for t in sessions) * 3
                 * (f["trunk"] + f["block"] + f["head"]))
        return Taught(change={n: (up[n] @ down[n]).detach() for n in weights}, flops=float(flops))
    return learn


class Edits:
    """What a closed-form edit of a middle layer's down_proj needs of each fact (after MEMIT,
    arXiv:2210.07229): the keys that its subject has there, and what to add to the layer's output so
    that the answer follows. All facts at once: none depends on another.

    The prompts are questions in three of training's wordings with their answers, the subject the
    name in both: more than a telling gives the other ways.
    """

    STEPS, WORDINGS = 40, 3

    def __init__(self, s: Sample):
        model, words = s.mind.model, s.mind.words
        middle = (model.backbone.config.num_hidden_layers - 1) // 2
        self.name = f"backbone.layers.{middle}.mlp.down_proj"
        layer, rows, subject, due = model.get_submodule(self.name), [], [], []
        for fact in s.facts:
            for _ in range(self.WORDINGS):
                asked, said_of = data.user_turn(s.world.ask(fact)), data.answer(fact)
                said = words.encode(said_of + data.TURN_END)
                rows.append(words.encode(asked) + said)
                subject.append([
                    len(words.encode(text[:text.rindex(fact.name) + len(fact.name)])) - 1
                    for text in (asked, asked + said_of)])
                due.append(len(said))
        tokens, at = torch.from_numpy(data.padded(rows, -1)), torch.tensor(subject)  # (rows, 2)
        row, targets = torch.arange(len(tokens))[:, None], successors(tokens)
        answers = torch.zeros_like(tokens, dtype=torch.bool)
        for i, (ids, n) in enumerate(zip(rows, due)):
            answers[i, len(ids) - n - 1:len(ids) - 1] = True
        where = foremost(answers.float(), int(answers.sum(1).max()))
        learned = answers.gather(1, where)
        inputs: list[Tensor] = []
        added = torch.zeros(len(s.facts), model.backbone.config.hidden_size, requires_grad=True)

        def steer(_, given: tuple, out: Tensor) -> Tensor:
            inputs[:] = [given[0][row, at].detach()]
            return out.index_put((row, at), added.repeat_interleave(self.WORDINGS, 0)[:, None],
                                 accumulate=True)
        handle, optimizer = layer.register_forward_hook(steer), torch.optim.Adam([added], lr=1.0)
        for _ in range(self.STEPS):
            thought = model(tokens, where=where)
            hidden = thought.at_read_tick(thought.hidden)[learned]
            nats = torch.nn.functional.cross_entropy(model.head(hidden),
                                                     targets.gather(1, where)[learned])
            (nats + 1e-5 * added.pow(2).sum(1).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        self.flops = 3 * self.STEPS * tokens.numel() / len(s.facts) * sum(
            flops_per_token(model.backbone.config, s.mind.ctm.config, tokens.shape[1])[part]
            for part in ("trunk", "block"))
        self.keys = inputs[0].view(len(s.facts), 2 * self.WORDINGS, -1).mean(1)  # (facts, D_int)
        self.values = added.detach()                                # (facts, D)
        handle.remove()
        seen = []
        handle = layer.register_forward_hook(
            lambda _, given, out: seen.append(given[0].flatten(0, 1)))
        model.trunk(model.ctm.ordinary)
        handle.remove()
        self.common = seen[0].T @ seen[0] / len(seen[0])            # second moment on ordinary text


def by_editing(s: Sample, which: list[int], weight: float) -> Taught:
    """W <- W + V' K (weight C + K' K)^-1, in closed form."""
    keys, values = s.edits.keys[which], s.edits.values[which]
    change = torch.linalg.solve(
        (weight * s.edits.common + keys.T @ keys + 1e-6 * torch.eye(keys.shape[1])).double(),
        (keys.T @ values).double())
    return Taught(change={f"{s.edits.name}.weight": change.T.float()},
                  flops=s.edits.flops * len(which))


# -----------------------------------------------------------------------------
# memory --full: what carries the memory, and what is decoration

def ablation_figures(s: Sample) -> dict:
    """A hundred facts with one ingredient of the write taken away, or put in: recall in other
    words, what it does to text, and the share of facts that are lost by it and won."""
    whole = s.known(s.whole), text_cost(s.ordinary, s.whole, s.ordinary)
    found = compared("ablation_nothing", whole, whole)

    def note(name: str, plastic: Plastic, who: Mind = s.mind) -> None:
        text = OrdinaryText(who.model, s.windows[:8])               # it may think otherwise
        cost = text_cost(text, plastic, s.ordinary if who is s.mind else text)
        found.update(compared(f"ablation_{name}", whole, (s.known(plastic, who), cost)))
    for name, plastic in other_rules(s):
        note(name, plastic)
    for name, mind, factors in other_blocks(s):
        note(name, mind.write(factors), mind)
    for name, cap in (("synapse layer too, 1 % of its norm", 0.01),
                      ("synapse layer too, 10 %", 0.1)):
        with changed(s.mind.model, synapse_change(s, cap)):
            note(name, s.whole)
    return found


def crowded_figures(s: Sample) -> dict:
    """The same with all that can be said of people in the memory, where it has most to protect:
    recall of a hundred facts, lost and won by what is taken away, and ordinary text."""
    mind, world = s.mind, s.world
    facts = world.population(most_facts(world))
    left = mind.factors(world.texts(facts))
    some = world.rng.sample(facts, 100)
    asked = [world.ask(f, held_out=True) for f in some]

    def did(rule: WriteRule, factors: list[Factors]) -> tuple[list[bool], Tensor]:
        plastic = mind.write(factors, rule)
        return mind.known(asked, some, plastic), text_cost(s.ordinary, plastic, s.ordinary)
    whole = did(WriteRule(), left)
    found = compared("crowded_nothing", whole, whole)
    for name, rule, factors in ingredients(left):
        found |= compared(f"crowded_{name}", whole, did(rule, factors))
    return found


def text_cost(text: OrdinaryText, plastic: Plastic, alone: OrdinaryText) -> Tensor:
    """(B,) what a memory costs each window of ordinary text, as a share of the nats without one,
    and unchanged: of `alone`."""
    before = alone.by_window(None)
    return (text.by_window(plastic.weight) - before) / before.mean()


def compared(name: str, whole: tuple[list[bool], Tensor], did: tuple[list[bool], Tensor]) -> dict:
    """What an ablation did, next to the whole write: recall, the shares of facts that are lost by
    it and won, text over text before, and how much of that is the ablation's, with the half width
    of its 95 % interval (paired by window, Student's t of eight)."""
    (known, cost), (right, costs) = whole, did
    more = costs - cost
    return {name: mean(right), f"{name}_text": 1 + float(costs.mean()),
            f"{name}_lost": mean(w and not r for w, r in zip(known, right)),
            f"{name}_won": mean(r and not w for w, r in zip(known, right)),
            f"{name}_text_change": float(more.mean()),
            f"{name}_text_margin": 2.36 * float(more.std()) / math.sqrt(len(more))}


def ingredients(told: list[Factors]) -> list[tuple[str, WriteRule, list[Factors]]]:
    """What can be left out of the write of these sessions."""
    return [("no protection of text", WriteRule(n0=0.0), told),
            ("no protection of the past", WriteRule(fade=0.0), told),
            ("no delta", WriteRule(delta=False), told),
            ("no dopamine", WriteRule(),
             [f._replace(values=f.values / f.dopamine[:, None]) for f in told])]


def other_rules(s: Sample):
    """-> names, and memories of the same hundred facts, otherwise written."""
    told, kept = s.factors, WriteRule(near=math.inf)
    again = s.mind.factors(s.world.texts(s.facts * 2))
    gated = [torch.where(f.keys.abs() > f.keys.abs().median(1, keepdim=True).values, f.keys, 0.0)
             for f in told]
    for name, rule, factors in (
            *ingredients(told),
            ("no projection", WriteRule(project=False), told),
            ("neither", WriteRule(delta=False, project=False), told),
            ("weight norm at most 1 %", WriteRule(norm_cap=0.01), told),
            ("nothing superseded", kept, told),
            ("told three times, nothing superseded", kept, told + again),
            ("... no delta", replace(kept, delta=False), told + again),
            ("what was expected, too", WriteRule(), Mind(expected=0.0).factors(s.texts[10])),
            ("every token eligible", WriteRule(),
             Mind(threshold=0.0, expected=0.0, budget=1000).factors(s.texts[10])),
            ("novelty gate", WriteRule(),
             [f._replace(keys=torch.nn.functional.normalize(keys, dim=1))
              for f, keys in zip(told, gated)])):
        yield name, s.mind.write(factors, rule)


def other_blocks(s: Sample):
    """-> names, blocks that think or read otherwise, and what they keep of the same sessions."""
    narrow, half = Mind(), torch.arange(s.mind.ctm.config.sync) % 2     # of what is read, too
    narrow.ctm.whiten((narrow.ctm.key_moment * torch.outer(half, half),
                       narrow.ctm.due_moment * torch.outer(half, half)))
    narrow.ctm.white.mul_(half)
    yield "half of S", narrow, s.factors
    wide = doubled(s.mind.words)
    yield "twice S, the new half untrained", wide, wide.factors(s.texts[10])
    for expand in (0, 1, 3, 12):
        other = Mind()
        other.ctm.read_along(expand)
        yield (f"F = {expand} S" if expand else "along the key itself, no features",
               other, s.factors)
    for k in sorted({1, max(1, s.mind.ctm.config.ticks // 2)}):
        few = Mind()
        few.ctm.config = replace(few.ctm.config, ticks=k)
        yield f"K={k}", few, few.factors(s.texts[10])
    bare = Mind()                           # what the block reads moves as well: it was trained so
    bare.ctm.baseline.zero_()
    yield "no baseline", bare, bare.factors(s.texts[10])


def doubled(words: data.Tokenizer) -> Mind:
    """The block with as many pairs of neurons again, drawn by chance and never trained: memory
    reads them all, c_proj, the query and salience the old ones alone. What keys show on text and on
    facts is measured anew, as phase 3 does at its end."""
    mind = Mind()
    known, S = mind.ctm, mind.ctm.config.sync
    wide = CTMBlock(len(known.start_z), replace(known.config, sync=2 * S), known.eps)
    state = wide.requires_grad_(False).state_dict()                 # its tensors, not copies
    for name, value in known.state_dict().items():
        if name in ("c_proj.weight", "q_proj.weight", "salience_weight"):
            state[name].zero_()
        state[name][*map(slice, value.shape)] = value
    mind.model.ctm = mind.ctm = wide.eval()
    mixture = data.Mixture(words, tiny_text(words, held_out=False), T, 0.7, 0.15, 0, "train", 0)
    seen, square = mean_and_square(
        mind.model.ticks(*mind.model.trunk(torch.from_numpy(mixture.batch(rows, 0)[0]))))
    wide.baseline[:, S:], wide.variance[:, S:] = seen[:, S:], (square - seen ** 2)[:, S:]
    measure_moments(mind.model, mixture, "cpu")
    return mind


def synapse_change(s: Sample, cap: float) -> dict[str, Tensor]:
    """What the salient tokens would write into the last synapse layer: dopamine x (z - mean z) (pre
    - mean pre)' at the read tick, the means those of ordinary text, the sum scaled to `cap` of the
    layer's norm. Keys move with it, so that nothing is exact any more.
    """
    model, ctm = s.mind.model, s.mind.ctm
    last = f"ctm.synapse.up.{len(ctm.synapse.up) - 1}"

    def lived(tokens: Tensor) -> tuple[Thought, Tensor, Tensor]:
        """-> the thought, and pre (B, T, in) and z (B, T, D) at its read ticks."""
        pre, post = [], []
        handles = [
            model.get_submodule(last).register_forward_hook(
                lambda _, given, out: pre.append(given[0].unflatten(0, tokens.shape))),
            ctm.nlm.register_forward_hook(
                lambda _, given, out: post.append(out.T.unflatten(0, tokens.shape)))]
        thought = model(tokens)
        for handle in handles:
            handle.remove()
        return thought, *(thought.at_read_tick(torch.stack(x, 2)) for x in (pre, post))
    _, *ordinary = lived(ctm.ordinary)
    mean_pre, mean_post = (x.flatten(0, 1).mean(0) for x in ordinary)
    total = torch.zeros(len(mean_post), len(mean_pre))
    for text in s.texts[10]:
        thought, pre, post = lived(torch.tensor([s.mind.words.encode(text)]))
        told = salience(ctm, thought.key[0, :-1]) > 0.5
        reward = dopamine(thought.nats[0, :-1], ctm.mean_surprise)[told]
        total += (((post[0, :-1][told] - mean_post) * reward[:, None]).T
                  @ (pre[0, :-1][told] - mean_pre))
    return {f"{last}.weight": total * cap * model.get_submodule(last).weight.norm() / total.norm()}


# -----------------------------------------------------------------------------
# memory --full: forgetting

def forgetting_figures(s: Sample) -> dict:
    """Each of ten sessions in turn forgotten from a store on disk: what is still recalled of it,
    what the other ninety facts lose, how often the memory and the sessions' files are those, to the
    bit, of a store that was never told, and how often a name or a value of it is left in any file,
    where the other store has none (three letters stand somewhere in millions of bytes by chance).

    The manifest is not compared: it says when each session was told, and what ordinary text cost
    before and after it, which was measured with the forgotten one still there.
    """
    mind, text = s.mind, OrdinaryText(s.mind.model)
    before = s.known(s.whole)
    found = {"recall": [], "others_lose": [], "as_never_told": [], "words_left": []}
    for gone, facts in enumerate(batches(s.facts, 10)):
        with tempfile.TemporaryDirectory() as where:
            with (Store(Path(where) / "a", mind.model, max_drift=math.inf, text=text) as store,
                  Store(Path(where) / "b", mind.model, max_drift=math.inf, text=text) as never):
                ids = [store.commit(*told)["id"] for told in s.left]
                store.forget(ids[gone])
                for told in s.left[:gone] + s.left[gone + 1:]:
                    never.commit(*told)
                weight, other = store.plastic(), never.plastic()
            left, without = (files(Path(where) / name) for name in "ab")
        told, untold = (b"".join(blobs.values()) for blobs in (left, without))
        del left["manifest.json"], without["manifest.json"]
        found["as_never_told"].append(torch.equal(weight, other) and left == without)
        found["words_left"].append(any(word in told and word not in untold for f in facts
                                       for word in (f.name.encode(), f.value.encode())))
        after = s.known(Plastic(weight))
        own = slice(10 * gone, 10 * gone + 10)
        found["recall"] += after[own]
        found["others_lose"].append(mean(before[:own.start] + before[own.stop:])
                                    - mean(after[:own.start] + after[own.stop:]))
    return {f"forget_{k}": mean(x) for k, x in found.items()}


# -----------------------------------------------------------------------------
# memory --full: two hops and denials

DESCRIBED = {"home": "the one who lives in {v}", "job": "the {v}",
             "pet": "the one who keeps a {v}", "food": "the one who likes to eat {v}",
             "instrument": "the one who plays the {v}", "hobby": "the one who enjoys {v}"}


def hop_figures(s: Sample, people: int = 8, groups: int = 12) -> dict:
    """Two facts each of a few people, told in one session or in two; the second is asked of whoever
    the first is true of.

    Direct: the same question by name. Chance: the share of people who have the value that was said
    most among those told. Denials: a fact is told, and denied in the same session or in the next
    one; how often is it still the answer?
    """
    world, mind, found = data.FactWorld(1000 + s.seed, "held_out"), s.mind, {}
    told = {"together": [], "apart": [], "denied_together": [], "denied_apart": []}
    asked, named, answers, guesses = [], [], [], []
    for _ in range(groups):
        first, second = world.rng.sample(sorted(data.RELATIONS), 2)
        names = world.rng.sample(world.names, people)
        values = world.rng.sample(list(world.values[first]), people)
        known = [data.Fact(n, first, v) for n, v in zip(names, values)]
        wanted = [data.Fact(n, second, world.rng.choice(list(world.values[second])))
                  for n in names]
        both = [f for pair in zip(known, wanted) for f in pair]
        told["together"].append(world.texts(both, len(both)))
        told["apart"].append(world.texts([*known, *wanted], people))
        no = data.user_turn(" ".join(map(data.denial, wanted)))
        told["denied_together"].append([text + no for text in world.texts(wanted, people)])
        told["denied_apart"].append([*world.texts(wanted, people), no])
        asked += [data.RELATIONS[second].questions[0].format(n=DESCRIBED[first].format(v=f.value))
                  for f in known]
        named += [data.RELATIONS[second].questions[0].format(n=f.name) for f in wanted]
        answers += wanted
        guesses += ([max(sum(f.value == v for f in wanted) for v in world.values[second]) / people]
                    * people)
    for name, sessions in told.items():
        written = [mind.write(mind.factors(texts)) for texts in sessions]
        questions = {"": asked, "_by_name": named} if "denied" not in name else {"": named}
        for kind, q in questions.items():
            found[f"hop_{name}{kind}"] = mean(f" {f.value}" in reply
                                              for f, reply in zip(answers, mind.ask(q, written)))
    return found | {"hop_chance": mean(guesses)}


# -----------------------------------------------------------------------------
# memory --full: multi-query associative recall across a restart

MQAR_VOCABULARY, MQAR_SHAPES, MQAR_STATES = 8192, ((64, 4), (128, 8), (256, 16)), (8, 32, 128)


def mqar(chance: np.random.Generator, rows: int, length: int, pairs: int
         ) -> tuple[Tensor, Tensor, Tensor]:
    """The field's multi-query associative recall (Zoology, arXiv:2312.04927) -> what is told (rows,
    2 pairs): key, value, key, ...; what is asked later (rows, length - 2 pairs): every key once,
    among chance tokens; the value due there, else -1.

    Keys are from one half of the vocabulary and values from the other; the gaps before queries
    follow a power law of exponent 0.01.
    """
    half, slots = MQAR_VOCABULARY // 2, (length - 2 * pairs) // 2
    odds = np.arange(1, slots + 1) ** (0.01 - 1)
    told = np.zeros((rows, 2 * pairs), np.int64)
    asked = chance.integers(1, MQAR_VOCABULARY, (rows, length - 2 * pairs))
    due = np.full_like(asked, -1)
    for row in range(rows):
        told[row, ::2] = chance.choice(np.arange(1, half), pairs, replace=False)
        told[row, 1::2] = chance.choice(np.arange(half, MQAR_VOCABULARY), pairs, replace=False)
        at = 2 * chance.choice(slots, pairs, replace=False, p=odds / odds.sum())
        asked[row, at], due[row, at] = told[row, ::2], told[row, 1::2]
    return tuple(map(torch.from_numpy, (told, asked, due)))


class MatrixState(torch.nn.Module):
    """What a plain recurrent state of the same bytes does: M (D, S) += v k', or the delta rule's (v
    - M k) k', read as M q.

    Keys and values are learned maps of the embeddings, and each pair is handed over whole: no
    binding has to be learned.
    """

    def __init__(self, width: int, S: int, delta: bool):
        super().__init__()
        self.embed, self.delta = torch.nn.Embedding(MQAR_VOCABULARY, width), delta
        self.key = torch.nn.Linear(width, S, bias=False)
        self.value = torch.nn.Linear(width, width, bias=False)
        torch.nn.init.normal_(self.embed.weight, std=width ** -0.5)

    def forward(self, told: Tensor, queries: Tensor) -> Tensor:
        """told (B, 2 N), queries (B, n) -> logits (B, n, V)"""
        k, q = (torch.nn.functional.normalize(self.key(self.embed(x)), dim=-1)
                for x in (told[:, ::2], queries))
        v, state = self.value(self.embed(told[:, 1::2])), 0.0
        for i in range(k.shape[1]):
            seen = torch.einsum("bds,bs->bd", state, k[:, i]) if self.delta and i else 0.0
            state = state + torch.einsum("bd,bs->bds", v[:, i] - seen, k[:, i])
        return (10 * torch.nn.functional.normalize(torch.einsum("bds,bns->bnd", state, q), dim=-1)
                @ self.embed.weight.T * self.embed.weight.shape[1] ** 0.5)


def mqar_model(S: int, width: int = 64) -> NanoCTM:
    """One layer of attention and a CTM of 2 ticks, everything to be learned. Memory reads the keys
    themselves: it is compared with states of the same bytes."""
    model = NanoCTM(BackboneConfig(MQAR_VOCABULARY, width, 64, 1, 2, 2, 32, rope_theta=1e4,
                                   max_position_embeddings=512),
                    ThoughtConfig(2, 2, S, 4, 64, head_dim=32, expand=0))
    model.backbone.initialise()
    # as MatrixState: random tokens, told apart from the start
    torch.nn.init.normal_(model.backbone.embed_tokens.weight, std=width ** -0.5)
    return model


def mqar_loss(model: NanoCTM, told: Tensor, asked: Tensor, due: Tensor) -> tuple[Tensor, Tensor]:
    """Through the write, as phase 3 does it: factors of the pairs, solved by ridge regression, read
    where a key is asked."""
    pairs, root = told.shape[1] // 2, math.sqrt(model.ctm.config.sync)
    ticks = model.ticks(*model.trunk(told))
    thought = model.measure(ticks, successors(told))
    news = (torch.arange(told.shape[1]) % 2 == 0).expand(told.shape)
    worth = torch.nn.functional.binary_cross_entropy_with_logits(
        salience_logit(model.ctm, thought.key), news.float())
    hidden, keys = (x[news].unflatten(0, (-1, pairs))
                    for x in (thought.at_read_tick(thought.hidden), thought.key / root))
    values = engrams(model, hidden.flatten(0, 1), told[:, 1::2].flatten(),
                     torch.ones(hidden.shape[:2]).flatten()).view_as(hidden)
    solved = torch.linalg.solve(keys @ keys.mT + 1e-3 * torch.eye(pairs), values)  # (B, pairs, D)
    where = (due >= 0).nonzero()[:, 1].view(-1, pairs)
    asking, target = model.ticks(*model.trunk(asked), where=where), due.gather(1, where)
    aided = model.measure(asking, target, (keys.mT @ solved).mT)
    loss, _ = model.tick_loss(aided, target, torch.ones(target.shape))
    return loss + 20 * worth, mean_and_square(ticks)    # what is not kept cannot be answered


def mqar_figures(s: Sample, steps: int = 250, rows: int = 64) -> dict:
    """Share of values due that are answered right (arg max over 8,192): pairs told in one session
    each, asked in another process.

    Each model learns `steps` batches of every shape in turn, and is then tested on examples that it
    never saw.
    """
    found, chance = {}, np.random.default_rng(s.seed)
    tests = {f"{length},{pairs}": mqar(np.random.default_rng(10**6 + s.seed), rows, length, pairs)
             for length, pairs in MQAR_SHAPES}
    for S in MQAR_STATES:
        for name, model in (("ctm", mqar_model(S)), ("linear", MatrixState(64, S, False)),
                            ("delta", MatrixState(64, S, True))):
            learn_mqar(model, chance, steps, rows // 2)
            for shape, (told, asked, due) in tests.items():
                found[f"mqar_{shape}_{name}_{S}"] = (
                    mqar_after_restart(model, told, asked, due) if name == "ctm" else
                    float((model(told, told[:, ::2]).argmax(-1) == told[:, 1::2]).float().mean()))
        found[f"mqar_bytes_{S}"] = 4.0 * 64 * S
    return found


def learn_mqar(model: NanoCTM | MatrixState, chance: np.random.Generator, steps: int, rows: int
               ) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = (5e-3
                                           * min(1, (step + 1) / 20, 2 * (steps - step) / steps))
        told, asked, due = mqar(chance, rows, *MQAR_SHAPES[step % len(MQAR_SHAPES)])
        if isinstance(model, NanoCTM):
            loss, seen = mqar_loss(model, told, asked, due)
        else:
            loss = torch.nn.functional.cross_entropy(
                model(told, told[:, ::2]).flatten(0, 1), told[:, 1::2].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(model, NanoCTM):
            model.ctm.settle(*seen, max(0.02, 1 / (step + 1)))
    model.eval().requires_grad_(False)


def mqar_after_restart(model: NanoCTM, told: Tensor, asked: Tensor, due: Tensor) -> float:
    """Every row a session and a store of its own; the answers come from a new process that has the
    files alone."""
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        save_backbone(model, folder / "base")
        save_graft(model, folder / "graft.safetensors")
        for i, row in enumerate(told):
            session, factors = read_session(model, row[None])
            with Store(folder / str(i), model, rule=MQAR_RULE, max_drift=math.inf) as store:
                store.commit(factors[0], session.snapshot(0, row), len(row))
        with one_process_each(1) as pool:
            return pool.submit(mqar_answers, folder, asked, due).result()


MQAR_RULE = WriteRule(n0=0.0)  # there is no ordinary text here to protect


def mqar_answers(folder: Path, asked: Tensor, due: Tensor) -> float:
    model, right = load_graft(str(folder / "base"), folder / "graft.safetensors"), []
    model.eval().requires_grad_(False)
    for i, (row, wanted) in enumerate(zip(asked, due)):
        with Store(folder / str(i), model, read_only=True, rule=MQAR_RULE) as store:
            said = model(row[None], plastic=store.plastic()).logits[0].argmax(-1)
        right += (said == wanted)[wanted >= 0].tolist()
    return mean(right)


RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
OPPONENTS = {"weights": (by_writing, (None,)), "retrieval": (by_retrieval, (2, 4, 8)),
             "lora_30": (by_lora(30), (0.001, 0.003, 0.01)),
             **{f"tune_{n}": (by_fine_tuning(n), RATES) for n in (1, 10, 100)},
             "sparse_10": (by_fine_tuning(10, 0.1), RATES),
             "edit": (by_editing, (0.001, 0.1, 10.0, 100.0))}
FULL_PARTS = {f"opponent {name}": functools.partial(opponent_figures, name=name)
              for name in OPPONENTS}
FULL_PARTS |= {"ablation": ablation_figures, "crowded": crowded_figures,
               "forgetting": forgetting_figures,
               "two hops": hop_figures, "mqar": mqar_figures}


def full_figures(found: dict[str, dict]) -> dict:
    """The additions of --full to the last line, printed as tables too."""
    v = {k: x["mean"] for k, x in found.items()}
    arms = {name: under(v, f"{name}_") for name in OPPONENTS}
    print(f"\n{'learned by':14s} {'N=1':>6s} {'10':>6s} {'100':>6s} {'direct':>7s} "
          f"{'stranger':>8s} {'anybodys':>8s} {'lost':>10s} {'text':>7s} {'FLOPs':>9s}")
    for name, a in arms.items():
        print(f"{name:14s} {a['1_paraphrase']:6.3f} {a['10_paraphrase']:6.3f} "
              f"{a['100_paraphrase']:6.3f} {a['100_direct']:7.3f} {a['100_near_miss']:8.3f} "
              f"{a['100_anybodys']:8.3f} {a['lost_to_more']:10.3f} {a['100_text_nats']:7.3f} "
              f"{a['100_flops']:9.2e}")
    print(f"\n{'MQAR after a restart':24s}" + "".join(f"{4 * 64 * S:9d} B" for S in MQAR_STATES))
    for shape in MQAR_SHAPES:
        for name in ("ctm", "linear", "delta"):
            print(f"{'{},{}'.format(*shape):12s}{name:12s}"
                  + "".join(f"{v['mqar_{},{}_{}_{}'.format(*shape, name, S)]:11.3f}"
                            for S in MQAR_STATES))
    tables = {}
    for kind, told in (("ablation", "100 facts"), ("crowded", "all facts there are")):
        a = under(v, f"{kind}_")
        tables[kind] = {name: {"recall": a[name], "text": a[f"{name}_text"],
                               "change": a[f"{name}_won"] - a[f"{name}_lost"],
                               "interval": difference_interval(a[f"{name}_won"], a[f"{name}_lost"],
                                                               100 * seeds),
                               "text_change": a[f"{name}_text_change"],
                               "text_margin": a[f"{name}_text_margin"] / math.sqrt(seeds)}
                        for name in a if f"{name}_text" in a}
        print(f"\n{told + ', without':36s} {'recall':>7s} {'change':>7s} {'95 % interval':>18s} "
              f"{'text x':>8s} {'change':>18s}")
        for name, a in tables[kind].items():
            between = "{:+.3f} .. {:+.3f}".format(*a["interval"]) if any(a["interval"]) else "–"
            print(f"{name:36s} {a['recall']:7.3f} {a['change']:+7.3f}   {between:>16s} "
                  f"{a['text']:8.4f} {a['text_change']:+8.4f} +-{a['text_margin']:7.4f}")
    return {"arms": arms, "ablation": tables["ablation"], "ablation_crowded": tables["crowded"],
            "forgetting": under(v, "forget_"), "two_hop": under(v, "hop_"),
            "mqar": under(v, "mqar_")}


def draw_damage(found: dict[str, dict], file: str) -> None:
    """Recall of a hundred facts against what they cost ordinary text, each way of learning a
    point."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    before = found["text_nats_before"]["mean"]
    for name in OPPONENTS:
        x, y = (found[f"{name}_100_text_nats"]["mean"] - before,
                found[f"{name}_100_paraphrase"]["mean"])
        axes.plot([x], [y], "*" if name == "weights" else "s" if name == "retrieval" else "o",
                  markersize=12 if name == "weights" else 6)
        axes.annotate(name.replace("_", " "), (x, y), textcoords="offset points", xytext=(6, 4))
    axes.set(xlabel="nats per token lost on ordinary text", ylabel="recall of 100 facts",
             ylim=(-0.02, 1.02))
    figure.tight_layout()
    path = Path(file)
    figure.savefig(path.with_name(f"{path.stem}_damage{path.suffix}"))


# -----------------------------------------------------------------------------
# endurance: the store under fire

class Fire:
    """A few sessions really told, and a folder where stores of them are attacked. The text by which
    writes are judged is short, so that most of a child's time goes to the disk, which is where a
    kill can hurt."""

    def __init__(self, folder: Path, sessions: int = 8):
        self.mind, self.folder, world = Mind(), folder, data.FactWorld(0, "held_out")
        self.told = self.mind.told(
            [text for i in range(sessions) for text in world.texts(world.facts(1 + i % 3))])
        self.text = OrdinaryText(self.mind.model, self.mind.ctm.ordinary[:1, :8])

    def open(self, name: str, **settings) -> Store:
        return Store(self.folder / name, self.mind.model, max_drift=math.inf, text=self.text,
                     **settings)

    def made(self, name: str, sessions: int) -> Path:
        """A new store with so many sessions."""
        with self.open(name) as store:
            for told in self.told[:sessions]:
                store.commit(*told)
        return self.folder / name


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
            and p.name != "lock"}


def in_child(work, after_s: float | None = None) -> tuple[list[str], int]:
    """Fork; work(say) runs in the child, which is killed after so many seconds, if any. -> what it
    said, its exit code."""
    listen, speak = os.pipe()
    child = os.fork()
    if not child:                                                   # never returns
        os.close(listen)
        try:
            work(lambda line: os.write(speak, (line + "\n").encode()))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(speak)
    try:
        if after_s is not None:
            time.sleep(after_s)
            os.kill(child, signal.SIGKILL)
        with os.fdopen(listen) as pipe:
            said = pipe.read().splitlines()
    finally:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said, code


def refused(work) -> bool:
    try:
        work()
    except ValueError:
        return True
    return False


def live_on(fire: Fire, exported: Path, luck: int, say) -> None:
    """Tell, forget and import without end, saying before each what is about to happen, and after it
    which sessions there are."""
    dice = random.Random(luck)
    with fire.open("killed") as store:
        while True:
            act = dice.choice(("tell", "tell", "tell", "forget", "forget all", "import"))
            if act == "tell":
                say("begin tell")
                store.commit(*dice.choice(fire.told))
            elif act == "import":
                say("begin import")
                store.import_from(exported)
            elif store.entries:
                which = dice.choice(store.entries)["id"] if act == "forget" else "all"
                say(f"begin forget {which}")
                store.forget(which)
            say("done " + " ".join(e["id"] for e in store.entries))


def killed_at_random(fire: Fire, times: int, seed: int, within_s: float = 1.0) -> dict:
    """Children live on and are killed at a random instant; all that they had finished must be
    there, and nothing by halves."""
    chance, known = random.Random(seed), []                         # known: ids that must be there
    bits, exported = ([_bits(factors) for factors, _, _ in fire.told],
                      fire.folder / "three.safetensors")
    with fire.open(fire.made("three", 3).name) as store:
        store.export(exported)
        imported = [e["id"] for e in store.entries]
    fire.made("killed", 0)
    found = {"kills": 0, "died_of_something_else": 0, "unreadable": 0, "half_written": 0,
             "lost_sessions": 0, "interrupted": {"tell": 0, "forget": 0, "import": 0}}
    for i in range(times):
        said, code = in_child(lambda say: live_on(fire, exported, seed * 10**6 + i, say),
                              chance.uniform(0.0, within_s))
        found["kills" if code == -signal.SIGKILL else "died_of_something_else"] += 1
        known = next((line.split()[1:] for line in reversed(said)
                      if line.startswith("done")), known)
        pending = said[-1].split()[1:] if said and said[-1].startswith("begin") else [""]
        if pending[0]:
            found["interrupted"][pending[0]] += 1
        try:
            # as a writer: what a crash left over is cleared away
            with fire.open("killed") as store:
                now, factors = [e["id"] for e in store.entries], store.factors
        except ValueError:
            found["unreadable"] += 1
            shutil.rmtree(fire.folder / "killed")
            known = []
            continue
        allowed = {"": [known], "tell": [known, [*known, *now[len(known):][:1]]],
                   "forget": [known, [k for k in known
                                      if k not in pending and "all" not in pending]],
                   "import": [known, [*known, *(k for k in imported if k not in {
                       n.split("-")[0] for n in known})]]}[pending[0]]
        found["half_written"] += (sum(_bits(f) not in bits for f in factors)
                                  + (now not in allowed and set(known) <= set(now)))
        found["lost_sessions"] += 0 if now in allowed else len(set(known) - set(now))
        known = now
    return found


def _bits(factors: Factors) -> bytes:
    return b"".join(x.numpy().tobytes() for x in factors.rounded())


def every_byte_flipped(fire: Fire) -> dict:
    """One after another, a bit in each byte of the manifest and of one session's factors: opening
    has to notice."""
    folder, undetected, flips = fire.made("flipped", 2), 0, 0
    for path in (folder / "manifest.json",
                 min((folder / "sessions").glob("*"), key=lambda p: p.stat().st_size)):
        whole = path.read_bytes()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1:])
            flips += 1
            undetected += not refused(lambda: fire.open(folder.name, read_only=True).close())
            if flips % 1000 == 0:
                print(f"{flips} bytes flipped", file=sys.stderr)
        path.write_bytes(whole)
    fire.open(folder.name, read_only=True).close()  # and the untouched store still opens
    return {"flips": flips, "flips_undetected": undetected}


def lies(fire: Fire) -> dict[str, tuple[dict, dict]]:
    """Exported files that no store should take in: tensors and metadata by the name of what is
    wrong with them."""
    with fire.open(fire.made("exporting", 3).name) as store:
        store.export(fire.folder / "good.safetensors")
    tensors, about = read_tensors(fire.folder / "good.safetensors")
    first, second, third = json.loads(about["sessions"])
    key, value = "1.factors.keys", "1.factors.values"

    def tensor(name: str, new: Tensor) -> tuple[dict, dict]:
        return tensors | {name: new}, about

    def spoiled(name: str, x: float) -> tuple[dict, dict]:
        return tensor(name, tensors[name].index_fill(0, torch.tensor([0]), x))

    def entry(**change) -> tuple[dict, dict]:
        return tensors, about | {"sessions": json.dumps([first, second | change, third])}

    def said(**change) -> tuple[dict, dict]:
        return tensors, about | change
    return {"NaN": spoiled(value, math.nan), "Inf": spoiled("1.factors.surprise", math.inf),
            "NaN in a snapshot": spoiled("1.snapshot.alpha", math.nan),
            "other factors": spoiled(value, 1.0), "wrong shape": tensor(key, tensors[key][:, 1:]),
            "fewer rows": tensor(value, tensors[value][1:]),
            "wrong type": tensor(key, tensors[key].double()),
            "no keys": ({k: v for k, v in tensors.items() if k != key}, about),
            "absolute path": entry(id=str(fire.folder / "escaped")),
            "climbing path": entry(id="../../escaped"), "no id": entry(id=""),
            "text for a number": entry(tokens="many"), "huge number": entry(told_at=10**400),
            "NaN for a date": entry(told_at=math.nan),
            "negative": entry(tokens=-1), "newer format": said(format="99"),
            "no list": said(sessions="{}"), "another model": said(base="0-0"),
            "nested for ever": said(sessions="[" * 10**5),
            "a million entries": said(sessions=json.dumps([{}] * 10**6))}


def bad_imports(fire: Fire) -> dict:
    """None of the lies may be taken in, and nothing may be written outside the store."""
    attempts, folder = lies(fire), fire.made("importing", 1)
    before, accepted, strays = files(folder), [], 0
    for name, (tensors, said) in attempts.items():
        file = fire.folder / "lie.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, file, said)
        there = {p for p in fire.folder.rglob("*") if folder not in p.parents}
        with fire.open(folder.name) as store:
            if not refused(lambda: store.import_from(file)):
                accepted.append(name)
        strays += len({p for p in fire.folder.rglob("*") if folder not in p.parents} - there)
    return {"bad_imports": len(attempts), "bad_imports_accepted": len(accepted),
            "accepted": accepted,
            "bad_imports_spoiled_the_store": files(folder) != before, "outside_writes": strays}


def hostile_disk(fire: Fire) -> dict:
    """A disk that fills up at every step of a commit, a folder that became read-only, a second
    writer: refused, and the store as before."""
    def attempt(say, store: Store) -> None:
        held = len(store.entries)
        try:
            store.commit(*fire.told[-1])
            say("written")
        except OSError:
            say("refused" if len(store.entries) == held else "half")

    def full(say) -> None:
        with fire.open("hostile") as store:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            attempt(say, store)                                     # a file that does not fit
            resource.setrlimit(resource.RLIMIT_FSIZE,
                               (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            flush = os.fsync
            # session, its folder, snapshot, its folder, W_m, manifest: then the disk is full
            for last in range(6):
                left = iter(range(last))

                def until_full(handle: int) -> None:
                    if next(left, None) is None:
                        raise OSError(errno.ENOSPC, "no space left on device")
                    flush(handle)
                os.fsync = until_full
                attempt(say, store)

    def locked(say) -> None:
        with fire.open("hostile") as store:
            parts = (fire.folder, store.folder, store.folder / "sessions",
                     store.folder / "snapshots")
            for path in parts:
                if os.geteuid() == 0:  # nothing is read-only to root: become somebody
                    os.chown(path, 65534, 65534)
                path.chmod(0o500)
            if os.geteuid() == 0:
                os.setresuid(65534, 65534, 65534)
            attempt(say, store)

    found, folder = {}, fire.made("hostile", 2)
    before = files(folder)
    for name, work in (("disk_full", full), ("read_only", locked)):
        said, code = in_child(work)
        for path in (fire.folder, folder, folder / "sessions", folder / "snapshots"):
            path.chmod(0o700)
            os.chown(path, os.geteuid(), os.getegid())
        with fire.open("hostile") as store:  # what is left over of a refused commit is cleared away
            found[name] = {"refused": said.count("refused"), "attempts": len(said), "exit": code,
                           "as_before": len(store.entries) == 2 and files(folder) == before}
    with fire.open("hostile"):
        return found | {"second_writer_refused": refused(lambda: fire.open("hostile").close())}


def prices(fire: Fire, sessions: int = 1000) -> dict:
    """Milliseconds of a commit with all its checks; of opening so many sessions of as many factors
    as one to three facts leave, each with keys of its own, and of a commit there that supersedes
    the first of them; bytes of a session of ten facts."""
    world, chance = data.FactWorld(1, "held_out"), torch.Generator().manual_seed(1)
    def elsewhere(f: Factors) -> Factors:
        return f._replace(keys=torch.nn.functional.normalize(
            torch.randn(f.keys.shape, generator=chance), dim=1))
    with Store(fire.folder / "ten", fire.mind.model) as store:
        store.text  # thought about once, before the first commit
        texts = [text for _ in range(5) for text in world.texts(world.facts(10))]
        spent = [timed(lambda: store.commit(*told)) for told in fire.mind.told(texts)]
        size = sum(len(blob) for name, blob in files(store.folder).items()
                   if name.startswith(("sessions", "snapshots"))) / len(spent)
    with fire.open("many") as store:  # all at once: a thousand manifests would take their time
        told = [({"id": "", "told_at": float(i), "tokens": n, "text_nats": [0.0, 0.0],
                  "factors": len(f.keys)}, elsewhere(f).rounded(), s)
                for i in range(sessions) for f, s, n in [fire.told[i % len(fire.told)]]]
        store._add(told, store._written([factors for _, factors, _ in told]))
    def open_and_read() -> None:
        with fire.open("many", read_only=True) as store:
            store.plastic()
    open_s = timed(open_and_read)
    with fire.open("many") as store:
        store.text
        retold_s = timed(lambda: store.commit(store.factors[0], *fire.told[0][1:]))
    return {"commit_ms": 1000 * mean(spent), f"open_ms_{sessions}_sessions": 1000 * open_s,
            f"commit_ms_superseding_1_of_{sessions}": 1000 * retold_s,
            "bytes_per_session": size}


def timed(work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def endurance() -> dict:
    with tempfile.TemporaryDirectory() as where:
        fire, found = Fire(Path(where)), {"attack_seed": 1}
        for attack in (functools.partial(killed_at_random, times=kills, seed=1),
                       every_byte_flipped, bad_imports, hostile_disk, prices):
            more = attack(fire)
            print("\n".join(f"{name:30s} {value}" for name, value in more.items()), flush=True)
            found |= more
    return found


# -----------------------------------------------------------------------------
# the card that goes with shipped weights

def report_of(run: Path) -> dict:
    """How a training came about, what it took, and its last held-out figures."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return log[0]["run"] | {"minutes": round([e for e in log if "minutes" in e][-1]["minutes"], 1),
                            "figures": [e for e in log if "val" in e][-1]}


def card() -> dict:
    """Collect what the tiny configs left in out/ into one folder, with a card: how it came about,
    and its sha256."""
    folder = Path(base).parent
    (folder / "backbone").mkdir(parents=True, exist_ok=True)
    runs = {"backbone": "tiny_phase1", "ffn": "tiny_ffn", "thinking": "tiny_phase2",
            "graft": "tiny_phase3"}
    shipped = {"tiny_phase1/last/model.safetensors": "backbone/model.safetensors",
             "tiny_phase1/last/config.json": "backbone/config.json",
             **{f"{runs[name]}/last/graft.safetensors": f"{name}.safetensors"
                for name in ("thinking", "graft", "ffn")}}
    # the Makefile spells out its commands; each run's config is below
    about = {"command": "make tiny", "files": {}}
    for source, target in shipped.items():
        if not (Path("out") / source).exists():
            raise ValueError(f"expected out/{source}, found none: run `make tiny` first")
        shutil.copy(Path("out") / source, folder / target)
        about["files"][target] = hashlib.sha256((folder / target).read_bytes()).hexdigest()
    if Path("out/tokenizer/ranks.json").exists():
        shutil.copy("out/tokenizer/ranks.json", folder / "ranks.json")
    about["files"]["ranks.json"] = hashlib.sha256((folder / "ranks.json").read_bytes()).hexdigest()
    for name, run in runs.items():
        about[name] = report_of(Path("out") / run)
    came, about["graft_before"] = about["graft"], []                # parts of phase 3, latest first
    while ((run := Path(came["config"]["graft"]).parent.parent).name != runs["thinking"]
           and (run / "log.jsonl").exists()):
        came = report_of(run)
        about["graft_before"].append(came)
    about["text_sha256"] = data.text_sha256(data.tiny_documents())
    (folder / "card.json").write_text(json.dumps(about, indent=1))
    return about


COMMANDS = {"quality": quality, "memory": memory, "endurance": endurance, "loudness": loudness,
            "card": card}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        if sys.argv[1:2] in (["--help"], ["-h"]):
            configurator.configure(globals())
        configurator.stop(f"expected one of {', '.join(COMMANDS)}, found "
                          f"{' '.join(sys.argv[1:2]) or 'nothing'}: python bench.py quality", 2)
    command = sys.argv[1]
    configurator.configure(globals(), sys.argv[2:])
    torch.set_num_threads(1)
    since, found = time.time(), COMMANDS[command]()
    text_sha256 = data.text_sha256(data.tiny_documents())
    known = Path(base).parent / "card.json"
    expected = json.loads(known.read_text())["text_sha256"] if known.exists() else text_sha256
    if expected != text_sha256:
        print(f"note: this Python's documentation differs from the card's text ({expected[:12]}): "
              "nats are not comparable")
    print(json.dumps(found
                     | {"text_sha256": text_sha256, "seeds": list(chosen_seeds()),
                        "commit": configurator.commit(), "seconds": round(time.time() - since),
                        "python": platform.python_version(), "torch": torch.__version__,
                        "hardware": f"{platform.machine()} CPU"}))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        configurator.stop(str(problem))
