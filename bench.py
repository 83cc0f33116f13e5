"""Every number that the README claims, measured again.

    python bench.py quality             # the tiny weights, about a minute
    python bench.py quality --full      # and the question "depth or thinking time?", trained on the spot (an hour)
    python bench.py card                # after `make tiny`: copy what was trained into weights/, with its card

A table for people, and as the last line of standard output one JSON object with every figure, its seeds, the commit,
the hardware and the sha256 of its text. All text and all people are held out. No threshold lives here: what is good
enough is the reader's to say. Left out so far: memory, endurance, sleep, speed.
"""
import hashlib
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor

import configurator
import data
from model import (BackboneConfig, NanoCTM, ThoughtConfig, Thought, block_module, flops_per_token, load_backbone, load_graft,
                   replies, successors)

# -----------------------------------------------------------------------------
# settings

base = "weights/backbone"                   # the tiny backbone with its own FFN
graft = "weights/graft.safetensors"         # the CTM block in its last layer
control = "weights/ffn.safetensors"         # the backbone's FFN, trained further on the same tokens
tokenizer = "weights"
seeds = 3                                   # samples of text and of questions; the spread is over these
rows = 24                                   # windows of held-out text per seed
T = 256                                     # tokens per window
questions = 100                             # per seed and number of facts
full = False                                # also train the arms of "depth or thinking time?"
full_steps = 400                            # steps per arm and seed


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}


# -----------------------------------------------------------------------------
# held-out text

class HeldOut:
    """Windows of the tiny world's held-out text: (rows, T) tokens per seed, and the bytes that they stand for."""

    def __init__(self, words: data.Tokenizer):
        docs = data.tiny_documents()
        _, val = data.split_documents(docs)
        self.sha256 = data.text_sha256(docs)
        self.words, self.ids = words, np.array(words.encode("".join(p + "<|endoftext|>" for p in val)))

    def windows(self, seed: int) -> Tensor:
        starts = np.random.default_rng(seed).integers(0, len(self.ids) - T, rows)
        return torch.stack([torch.from_numpy(self.ids[s:s + T]) for s in starts])

    def bytes_predicted(self, tokens: Tensor) -> int:
        return sum(len(self.words.decode([t for t in row[1:] if t != self.words.eot]).encode()) for row in tokens.tolist())


@torch.no_grad()
def think(model: NanoCTM, tokens: Tensor, halt: float | None = None) -> list[Thought]:
    return [model(part, halt=halt) for part in tokens.split(8)]


def of(thoughts: list[Thought], name: str) -> Tensor:
    """One field of all windows, without the last position, whose successor is unknown."""
    return torch.cat([getattr(t, name)[:, :-1] for t in thoughts])


# -----------------------------------------------------------------------------
# figures of one sample of text

def calibration_error(sure: Tensor, right: Tensor, bins: int = 15) -> float:
    """Expected calibration error over bins of equal mass (arXiv:1706.04599, with the bins of arXiv:1904.01685)."""
    order = sure.argsort(stable=True)
    return sum(abs(float(sure[b].mean() - right[b].float().mean())) * len(b) / len(sure) for b in order.chunk(bins))


def halted(certainty: Tensor, nats: Tensor, threshold: float) -> tuple[float, float]:
    """Mean ticks and nats if thinking had stopped at the first tick that certain: certainty, nats (rows, T, K)."""
    passed = certainty >= threshold
    last = torch.where(passed.any(-1), passed.int().argmax(-1), certainty.shape[-1] - 1)
    allowed = torch.arange(certainty.shape[-1]) <= last[..., None]
    read = certainty.masked_fill(~allowed, -1).argmax(-1)
    return float((last + 1).float().mean()), float(nats.gather(-1, read[..., None]).mean())


def choose_threshold(certainty: Tensor, nats: Tensor) -> float:
    """The lowest threshold whose cost in nats stays within 0.8 percent, on text that is not measured on."""
    _, all_ticks = halted(certainty, nats, 1.1)
    return min((t for t in np.linspace(0.05, 0.99, 95) if halted(certainty, nats, t)[1] <= 1.008 * all_ticks), default=1.1)


def text_figures(models: dict[str, NanoCTM], held_out: HeldOut, seed: int) -> dict[str, float | list[float]]:
    tokens = held_out.windows(seed)
    thoughts = {name: think(model, tokens) for name, model in models.items()}
    found = {f"{name}_nats": float(of(t, "nats").mean()) for name, t in thoughts.items()}
    thought, tuning = thoughts["graft"], think(models["graft"], held_out.windows(seed + 1000))
    found["graft_bits_per_byte"] = float(of(thought, "nats").sum()) / math.log(2) / held_out.bytes_predicted(tokens)
    found["nats_by_tick"] = of(thought, "tick_nats").mean((0, 1)).tolist()
    shares = torch.bincount(of(thought, "read_tick").flatten(), minlength=len(found["nats_by_tick"])) / of(thought, "nats").numel()
    found["read_tick_shares"] = shares.tolist()
    found["read_tick_entropy"] = float(torch.special.entr(shares).sum())
    found["halt_at"] = choose_threshold(of(tuning, "certainty"), of(tuning, "tick_nats"))
    short = think(models["graft"], tokens, found["halt_at"])
    found["halt_ticks"] = float((of(short, "certainty") > -1).sum(-1).float().mean())
    found["halt_nats"] = float(of(short, "nats").mean())
    top = torch.cat([t.logits[:, :-1].softmax(-1).max(-1).values for t in thought])
    best = torch.cat([t.logits[:, :-1].argmax(-1) for t in thought])
    found["calibration_ece"] = calibration_error(top.flatten(), (best == tokens[:, 1:]).flatten())
    return found


@torch.no_grad()
def in_context_recall(model: NanoCTM, words: data.Tokenizer, n_facts: int, seed: int) -> float:
    """Share of held-out people answered for to the letter, asked in held-out words, generated freely and greedily."""
    prompts, facts = data.context_questions(data.FactWorld(seed, "held_out"), n_facts, questions)
    said = [r for at in range(0, questions, 25) for r in replies(model, words, prompts[at:at + 25])]
    return sum(map(data.is_recalled, said, facts)) / questions


def key_cosine_at_init(backbone: BackboneConfig, thought: ThoughtConfig, seed: int) -> float:
    """Mean cosine between the uncentred y_out, last tick, of pairs of random inputs, in an untrained block."""
    torch.manual_seed(seed)
    model = NanoCTM(backbone, thought)
    tokens, u = torch.zeros(64, 1, dtype=torch.long), torch.randn(64, 1, backbone.hidden_size)
    _, _, places, cache = model.trunk(tokens)
    with torch.no_grad():
        y = model.ticks(u, u, places, cache).y_out[:, 0, -1]
    return float(torch.nn.functional.cosine_similarity(y[:32], y[32:], dim=-1).mean())


# -----------------------------------------------------------------------------
# what thinking costs

def cost_table(backbone: BackboneConfig, thought: ThoughtConfig) -> list[dict]:
    """FLOPs that the block adds per token, counted; and CPU microseconds of the block and of the trunk, measured."""
    from dataclasses import replace
    table = []
    shapes = [("base", {}, T)] + [(f"K={k}", {"ticks": k}, T) for k in (1, 2, 4, 16)] + [(f"T={t}", {}, t) for t in (64, 128, 512)]
    for name, change, length in shapes + [(f"D={d}", {"hidden_size": d}, T) for d in (64, 256)]:
        b = replace(backbone, **{k: v for k, v in change.items() if k == "hidden_size"})
        c = replace(thought, **{k: v for k, v in change.items() if k != "hidden_size"})
        model, tokens = NanoCTM(b, c), torch.randint(0, b.vocab_size, (2, length))
        with torch.no_grad():
            trunk = model.trunk(tokens)
            table.append({"shape": name, **flops_per_token(b, c, length),
                          "trunk_us": 1e6 * cpu_seconds(lambda: model.trunk(tokens)) / tokens.numel(),
                          "block_us": 1e6 * cpu_seconds(lambda: model.ticks(*trunk)) / tokens.numel()})
    return table


def cpu_seconds(work) -> float:
    """The best of three: CPU time, since wall time belongs to whoever else is on the machine."""
    taken = []
    for _ in range(3):
        begin = time.process_time()
        work()
        taken.append(time.process_time() - begin)
    return min(taken)


# -----------------------------------------------------------------------------
# quality

def quality() -> dict:
    words = data.Tokenizer(tokenizer)
    held_out = HeldOut(words)
    models = {"backbone": load_backbone(base), "ffn_same_tokens": load_graft(base, Path(control)),
              "graft": load_graft(base, Path(graft)), "ffn_deleted": load_backbone(base, block="none")}
    for model in models.values():
        model.eval().requires_grad_(False)
    shape = models["graft"].backbone.config, models["graft"].ctm.config
    samples = []
    for seed in range(seeds):
        print(f"seed {seed}: text", file=sys.stderr)
        sample = text_figures(models, held_out, seed)
        for name in ("graft", "backbone"):
            for n in (2, 8):
                print(f"seed {seed}: {name}, {n} facts in the prompt", file=sys.stderr)
                sample[f"{name}_recall_{n}"] = in_context_recall(models[name], words, n, seed)
        sample["key_cosine_at_init"] = key_cosine_at_init(*shape, seed)
        samples.append(sample)

    found = {k: spread([s[k] for s in samples]) for k in samples[0] if isinstance(samples[0][k], float)}
    value = {k: v["mean"] for k, v in found.items()}
    by_tick = np.mean([s["nats_by_tick"] for s in samples], 0).tolist()
    recovered = (value["ffn_deleted_nats"] - value["graft_nats"]) / (value["ffn_deleted_nats"] - value["backbone_nats"])
    costs = cost_table(*shape)
    print_table(found, by_tick, recovered, costs)
    trained = sum(p.numel() for p in block_module(models["graft"]).parameters())
    result = {k: value[k] for k in ("backbone_nats", "ffn_same_tokens_nats", "graft_nats", "ffn_deleted_nats", "graft_bits_per_byte")}
    result |= {"recovered": recovered, "nats_by_tick": by_tick, "read_tick_entropy": value["read_tick_entropy"],
               "read_tick_shares": np.mean([s["read_tick_shares"] for s in samples], 0).tolist(),
               "halting": {"mean_ticks": value["halt_ticks"], "nats": value["halt_nats"], "halt": value["halt_at"]},
               "calibration_ece": value["calibration_ece"], "text_sha256": held_out.sha256,
               "in_context_recall": {str(n): value[f"graft_recall_{n}"] for n in (2, 8)},
               "in_context_recall_backbone": {str(n): value[f"backbone_recall_{n}"] for n in (2, 8)},
               "questions": seeds * questions, "key_cosine_at_init": value["key_cosine_at_init"], "trainable": trained,
               "frozen": sum(p.numel() for p in models["graft"].backbone.parameters()),
               "sd": {k: v["sd"] for k, v in found.items()}, "cost": costs}
    return result | ({"depth_or_ticks": depth_or_ticks()} if full else {})


# -----------------------------------------------------------------------------
# depth or thinking time?

def depth_or_ticks() -> dict:
    """More layers against more ticks at equal FLOPs per token: both trained from nothing on the same text, held-out nats.

    The thinker has the tiny backbone's layers with a CTM of 4 ticks in the last one; the deep one is a plain
    transformer with as many layers as cost at least as much per token, FFN included.
    """
    from dataclasses import replace
    words, shape = data.Tokenizer(tokenizer), load_graft(base, Path(graft))
    b, c = shape.backbone.config, replace(shape.ctm.config, ticks=4)
    def cost(layers: int, thinking: bool) -> int:
        f = flops_per_token(replace(b, num_hidden_layers=layers), c, T)
        return f["trunk"] + (f["block"] if thinking else f["ffn"])
    thinker = cost(b.num_hidden_layers, True)
    layers = next(n for n in range(1, 100) if cost(n, False) >= thinker)
    arms = {f"ticks: {b.num_hidden_layers} layers, K=4": (b, "ctm"), f"depth: {layers} layers": (replace(b, num_hidden_layers=layers), "ffn")}
    train, val = (words.encode("".join(pieces)) for pieces in data.split_documents(data.tiny_documents()))
    result = {"flops_per_token": {"ticks": thinker, "depth": cost(layers, False)}, "steps": full_steps}
    for arm, (config, block) in arms.items():
        result[arm] = spread([train_from_nothing(config, c, block, words, train, val, seed) for seed in range(seeds)])
        print(f"{arm:28s} {result[arm]['mean']:9.4f} {result[arm]['sd']:8.4f}", flush=True)
    return result


def train_from_nothing(config: BackboneConfig, c: ThoughtConfig, block: str, words, train, val, seed: int) -> float:
    """Held-out nats per token after `full_steps` steps of 8 windows, everything learning."""
    torch.manual_seed(seed)
    model = NanoCTM(config, c, block)
    model.backbone.initialise()
    learning = [p for n, p in model.named_parameters() if block == "ffn" or f"layers.{config.num_hidden_layers - 1}.mlp" not in n]
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
            model.ctm.baseline.lerp_(ticks.y_out.detach().mean((0, 1)), max(0.01, 1 / (step + 1)))
        if step % 50 == 0:
            print(f"seed {seed} {block} step {step}/{full_steps} loss {loss.item():.3f}", file=sys.stderr)
    starts = range(0, len(val) - T, max(T, len(val) // 48))
    model.eval()
    return float(of(think(model, torch.tensor([val[s:s + T] for s in starts])), "nats").mean())


def print_table(found: dict, by_tick: list[float], recovered: float, costs: list[dict]) -> None:
    print(f"{'figure':28s} {'mean':>9s} {'sd':>8s}")
    for name, v in found.items():
        print(f"{name:28s} {v['mean']:9.4f} {v['sd']:8.4f}")
    print(f"{'recovered of the deletion':28s} {recovered:9.4f}")
    print("nats by tick                ", " ".join(f"{n:.3f}" for n in by_tick))
    print(f"\n{'cost':8s} {'FLOPs/token':>12s} {'reading':>12s} {'attention':>12s} {'trunk':>12s} {'block us':>9s} {'trunk us':>9s}")
    for row in costs:
        print(f"{row['shape']:8s} {row['block']:12,d} {row['block_reading']:12,d} {row['block_attention']:12,d} {row['trunk']:12,d} "
              f"{row['block_us']:9.1f} {row['trunk_us']:9.1f}")


# -----------------------------------------------------------------------------
# the card that goes with shipped weights

def card() -> dict:
    """Collect what the tiny configs left in out/ into one folder, with a card: how it came about, and its sha256."""
    folder = Path(base).parent
    (folder / "backbone").mkdir(parents=True, exist_ok=True)
    runs = {"backbone": "tiny_phase1", "graft": "tiny_phase2", "ffn": "tiny_ffn"}
    files = {"tiny_phase1/last/model.safetensors": "backbone/model.safetensors", "tiny_phase1/last/config.json": "backbone/config.json",
             "tiny_phase2/last/graft.safetensors": "graft.safetensors", "tiny_ffn/last/graft.safetensors": "ffn.safetensors"}
    about = {"command": "make tiny", "files": {}}                   # the Makefile spells it out; each run's config is below
    for source, target in files.items():
        if not (Path("out") / source).exists():
            raise ValueError(f"expected out/{source}, found none: run `make tiny` first")
        shutil.copy(Path("out") / source, folder / target)
        about["files"][target] = hashlib.sha256((folder / target).read_bytes()).hexdigest()
    if Path("out/tokenizer/ranks.json").exists():
        shutil.copy("out/tokenizer/ranks.json", folder / "ranks.json")
    about["files"]["ranks.json"] = hashlib.sha256((folder / "ranks.json").read_bytes()).hexdigest()
    for name, run in runs.items():
        log = [json.loads(line) for line in (Path("out") / run / "log.jsonl").read_text().splitlines()]
        about[name] = log[0]["run"] | {"minutes": round(log[-1]["minutes"], 1), "figures": [e for e in log if "val" in e][-1]}
    about["text_sha256"] = HeldOut(data.Tokenizer(str(folder))).sha256
    (folder / "card.json").write_text(json.dumps(about, indent=1))
    return about


COMMANDS = {"quality": quality, "card": card}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        if sys.argv[1:2] in (["--help"], ["-h"]):
            configurator.configure(globals())
        configurator.stop(f"expected one of {', '.join(COMMANDS)}, found {' '.join(sys.argv[1:2]) or 'nothing'}: "
                          f"python bench.py quality", 2)
    command = sys.argv[1]
    configurator.configure(globals(), sys.argv[2:])
    torch.set_num_threads(1)
    begin = time.time()
    found = COMMANDS[command]()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"
    card = Path(base).parent / "card.json"
    expected = json.loads(card.read_text())["text_sha256"] if card.exists() else None
    if expected and expected != found["text_sha256"]:
        print(f"note: this Python's documentation differs from the card's text ({expected[:12]}): nats are not comparable")
    print(json.dumps(found | {"seeds": list(range(seeds)), "commit": commit, "seconds": round(time.time() - begin), "python":
                              platform.python_version(), "torch": torch.__version__, "hardware": f"{platform.machine()} CPU"}))


if __name__ == "__main__":
    try:
        main()
    except ValueError as problem:
        configurator.stop(str(problem))
