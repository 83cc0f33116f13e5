"""The loop end to end on a very small world:
phases 1 and 2, exact resume, and one line for everything that goes wrong."""
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import train as training
from conftest import randomised, same, some_tokens
from memory import Lived, prediction_error
from model import (BackboneConfig, Cache, CTMBlock, NanoCTM, ThoughtConfig, flops_per_token,
                   load_graft, mean_and_square, successors, symmetric)

ROOT = Path(__file__).parent.parent
SMALL = ("--hidden_size=32 --intermediate_size=48 --num_hidden_layers=2 --num_attention_heads=2 "
         "--num_key_value_heads=1 --head_dim=16 --ticks=3 --history=2 --sync=48 --nlm_hidden=2 "
         "--unet_step=16 --block_head_dim=16 --B=4 --T=128 --warmup_steps=2 --log_interval=2 "
         "--eval_interval=4 --eval_rows=2 --eval_questions=2 "
         "--max_position_embeddings=256").split()


def train(*options: str, processes: int = 1) -> subprocess.CompletedProcess:
    start = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc_per_node={processes}"]
    return subprocess.run([*start, "train.py", *SMALL, *options], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A token file and a phase-1 backbone trained for 4 of 8 steps, then resumed;
    and 8 steps without a pause."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "text.txt").write_text("\n".join(topics[k] for k in sorted(topics)[:8]))
    data.write_tokens(str(folder / "text.txt"), data.Tokenizer(str(ROOT / "weights")),
                      folder / "tokens")
    options = [f"--text={folder}/tokens", "--max_steps=8"]
    for out, extra in (("whole", []), ("paused", ["--stop_at=4"]), ("paused", ["--resume"])):
        run = train(*options, f"--out_dir={folder}/{out}", *extra)
        assert run.returncode == 0, run.stderr
    return folder


def same_files(a: Path, b: Path) -> bool:
    one, two = load_file(a), load_file(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def phase2(world: Path, out: str, *extra: str, processes: int = 1) -> subprocess.CompletedProcess:
    return train("--phase=2", f"--base={world}/whole/last", f"--text={world}/tokens",
                 f"--out_dir={world}/{out}", "--max_steps=8", "--imitation_steps=2",
                 "--thinking_share=0.5", *extra, processes=processes)


@pytest.fixture(scope="module")
def grafted(world) -> Path:
    """The same, with a graft that phase 2 trained without a pause."""
    run = phase2(world, "g1")
    assert run.returncode == 0, run.stderr
    return world


def test_phase_1_resumes_bit_for_bit(world):
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert same_files(world / "whole/last" / name, world / "paused/last" / name)
    assert (world / "whole/best/model.safetensors").exists()


def test_phase_2_resumes_bit_for_bit_and_touches_nothing_but_the_block(grafted):
    world, before = grafted, (grafted / "whole/last/model.safetensors").read_bytes()
    for out, extra in (("g2", ["--stop_at=4"]), ("g2", ["--resume", "--workers=2"])):
        run = phase2(world, out, *extra)
        assert run.returncode == 0, run.stderr
    for name in ("graft.safetensors", "optimizer.safetensors"):
        assert same_files(world / "g1/last" / name, world / "g2/last" / name)
    assert (world / "whole/last/model.safetensors").read_bytes() == before
    log = [json.loads(line) for line in (world / "g1/log.jsonl").read_text().splitlines()]
    assert (log[0]["run"]["config"]["seed"] == 1 and log[-1]["step"] == 8
            and {"loss", "nats", "val", "recall_8"} <= log[-1].keys())


@pytest.mark.parametrize("every", (1, 2))
def test_a_brief_step_thinks_a_few_ticks_about_every_token(model, monkeypatch, every):
    for name, value in (("phase", 2), ("ask_every", every), ("brief_ticks", 2), ("full_share", 0.25),
                        ("thinking_share", 0.5), ("inherited_share", 0.0)):
        monkeypatch.setattr(training, name, value)
    assert [training.is_brief(step) for step in range(8)] == [True, True, True, False] * 2
    tokens = torch.randint(model.backbone.config.vocab_size, (2, 8))
    K = model.ctm.config.ticks
    for step, shape in ((2, (2, 8, 2)), (3, (2, 4, K))):
        loss, report, thought = training.mixture_loss(
            model, (tokens, (torch.arange(8) < 7).float().expand(2, -1), tokens), step)
        assert thought.hidden.shape[:3] == (2, shape[1] // every, shape[2]) and loss.isfinite()
        assert ("y_out" in report) == (shape[2] == K)               # a baseline is of all ticks
    monkeypatch.setattr(training, "brief_ticks", 0)
    assert not any(map(training.is_brief, range(8)))


def learn(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, optimizer, steps: int) -> list:
    """Losses of so many steps, the first of which only looks."""
    losses = []
    for step in range(steps):
        optimizer.looking = step < 10
        loss = (model(x) - y).pow(2).mean()
        (loss * (step > 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def two_layers() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


def test_without_a_ridge_it_is_adamw():
    x, y = torch.randn(64, 12), torch.randn(64, 3)
    ours, theirs = two_layers(), two_layers()
    groups = [{"params": [p for p in theirs.parameters() if p.dim() == d], "weight_decay": w}
              for d, w in ((2, training.weight_decay), (1, 0.0))]
    assert (learn(ours, x, y, training.WhitenedAdamW(ours, 0.0, lr=1e-2), 20)
            == learn(theirs, x, y, torch.optim.AdamW(groups, lr=1e-2), 20))


def test_a_whitened_step_does_not_depend_on_how_its_inputs_are_mixed():
    """x -> T x, W -> W T^-1 is the same map, and learns the same; with AdamW it does not.
    T is triangular, as ways are, so that not even a turn of the coordinates is left, and keeps
    the inputs' power, by which steps are measured."""
    torch.manual_seed(0)
    x, y, after = torch.randn(256, 12), torch.randn(256, 3), {}
    T = torch.eye(12) + torch.randn(12, 12).tril(-1) / 2
    T = T * x.norm() / (x @ T.T).norm()
    for ridge in (1e-7, 0.0):
        for mixed in (False, True):
            model = two_layers()
            if mixed:
                model[0].weight.data = torch.linalg.solve(T, model[0].weight.data, left=False)
            after[ridge, mixed] = learn(model, x @ T.T if mixed else x, y, training.WhitenedAdamW(
                model, ridge, lr=1e-2), 20)
    assert after[1e-7, True] == pytest.approx(after[1e-7, False], rel=1e-3)
    assert after[0.0, True] != pytest.approx(after[0.0, False], rel=1e-3)


def test_what_varies_little_is_learned_as_fast_when_steps_are_whitened():
    torch.manual_seed(0)
    x = torch.randn(512, 12) * torch.logspace(0, -3, 12) @ torch.linalg.qr(torch.randn(12, 12)).Q
    y = x @ torch.linalg.pinv(x) @ torch.randn(512, 3)              # linear in x, by all directions
    last = {}
    for ridge in (1e-6, 0.0):
        model = torch.nn.Linear(12, 3)
        last[ridge] = learn(model, x, y, training.WhitenedAdamW(model, ridge, lr=3e-2), 200)[-1]
    assert last[1e-6] < 0.1 * last[0.0]


@pytest.mark.parametrize("phase", ["phase2", "phase3"])
def test_two_processes_take_the_same_steps_together(grafted, phase):
    world, out = grafted, f"two {phase}"
    run = globals()[phase](world, out, "--input_ridge=0.01", "--ask_every=2", processes=2)
    assert run.returncode == 0, run.stderr
    assert not same_files(world / out / "last/graft.safetensors",
                          world / "g1/last/graft.safetensors")
    lines = [line for line in run.stdout.splitlines() if line.startswith("weights of rank")]
    assert len(lines) == 2 and lines[0].split()[-1] == lines[1].split()[-1]  # same weights in both


def phase3(world: Path, out: str, *extra: str, processes: int = 1) -> subprocess.CompletedProcess:
    return train("--phase=3", f"--base={world}/whole/last",
                 f"--graft={world}/g1/last/graft.safetensors", f"--text={world}/tokens",
                 f"--out_dir={world}/{out}", "--max_steps=8", "--eval_interval=8",
                 "--thinking_share=0.5", "--carry_share=0.5", "--episode_facts=6",
                 "--carry_facts=3", "--crowd_facts=4", "--moment_batches=4",
                 "--session_rows=16", *extra,
                 processes=processes)


def test_phase_3_resumes_bit_for_bit_and_learns_what_memory_needs(grafted, monkeypatch):
    world = grafted
    for out, extra in (("m1", []), ("m2", ["--stop_at=4"]), ("m2", ["--resume"])):
        run = phase3(world, out, "--document_write=True", "--brief_ticks=2", "--full_share=0.5",
                     "--text_cost=0.01", "--input_ridge=0.01", "--ask_every=3", *extra)
        assert run.returncode == 0, run.stderr
    for name in ("graft.safetensors", "optimizer.safetensors"):
        assert same_files(world / "m1/last" / name, world / "m2/last" / name)
    before, after = (load_file(world / f"{run}/last/graft.safetensors") for run in ("g1", "m1"))
    for name in ("salience_weight", "engram", "engram_bias", "log_half_life",
                 "sync_out.rho_raw", "key_moment", "due_moment", "session_proj",
                 "synapse.down.0.weight"):
        assert not torch.equal(before[name], after[name]), name
    moment = symmetric(after["key_moment"], len(after["baseline"][0]))
    assert after["ordinary"].any() and torch.linalg.eigvalsh(moment).min() > -1e-6
    assert moment.trace() == pytest.approx(1)                       # of unit vectors
    assert load_graft(f"{world}/whole/last", world / "m1/last/graft.safetensors"
                      ).ctm.config.expand == training.expand > training.train_expand
    log = [json.loads(line) for line in (world / "m1/log.jsonl").read_text().splitlines()]
    assert {"value_nats", "agree", "reading", "rank", "salient_facts", "weights_10",
            "weights_50"} <= log[-1].keys()
    monkeypatch.setattr(training, "phase", 3)                       # learning on keeps its strength
    monkeypatch.setattr(training, "base", f"{world}/whole/last")
    for run, eta in (("g1", math.log(training.write_strength)), ("m1", float(after["log_eta"]))):
        monkeypatch.setattr(training, "graft", f"{world}/{run}/last/graft.safetensors")
        assert training.build_model().ctm.log_eta.item() == pytest.approx(eta)


@pytest.mark.parametrize("phase, step, moved",
                         [(2, 0, 1.0), (2, 10, 1 / 11), (3, 0, 0.01), (3, 10, 0.001)])
def test_phase_3_goes_on_from_the_baseline_of_phase_2_and_it_slows_as_the_weights_do(
        monkeypatch, phase, step, moved):
    for name, value in {"phase": phase, "lr": 0.5, "min_lr": 0.05, "warmup_steps": 0,
                        "max_steps": 10, "baseline_rate": 0.01}.items():
        monkeypatch.setattr(training, name, value)
    ctm = CTMBlock(8, ThoughtConfig(ticks=2, sync=16, head_dim=8), 1e-6)
    training.apply_baseline(SimpleNamespace(ctm=ctm), {"y_out": torch.ones(2, 2, 16)}, step)
    same(ctm.baseline, torch.full((2, 16), moved))


@pytest.mark.parametrize("minds", [1, 2, 5])
def test_memories_solved_side_by_side_are_those_solved_apart(minds):
    """And each is the ridge regression of its own factors, weighted by their salience:
    W = V K (K' s K + ridge + n0 Sigma)^-1."""
    torch.manual_seed(minds)
    keys, values, salient = (torch.nn.functional.normalize(torch.randn(10, 24)),
                             torch.randn(10, 6), torch.rand(10))
    ctm = CTMBlock(8, ThoughtConfig(sync=24, head_dim=8, expand=0), 1e-6)
    mind = torch.arange(10) % minds
    ctm.key_moment.lerp_(keys[:3].T @ keys[:3] / 3, 0.5)
    ctm.whiten()
    together = training.written(ctm, keys, salient, mind)
    for one in range(minds):
        k, v, s = (x[mind == one].double() for x in (keys, values, salient))
        common = training.write_n0 * ctm.key_moment
        taken = k.T @ (k * s[:, None]) + training.write_ridge * torch.eye(24) + common
        expected = torch.linalg.solve(taken, k.T @ v).T
        W = together.said(values)[mind == one].T @ together.toward[:, mind == one].T
        assert torch.allclose(W, expected.float(), atol=1e-4)
        assert torch.allclose(together.reads(keys[:3])[:, mind == one] @ values[mind == one],
                              keys[:3] @ W.T, atol=1e-4)
    assert training.participation_ratio(torch.eye(24)[:7]) == pytest.approx(7)


def test_what_is_solved_or_subtracted_is_no_affair_of_bf16(model, monkeypatch):
    S, D = model.ctm.config.sync, model.backbone.config.hidden_size
    factors = torch.nn.functional.normalize(torch.randn(9, S)), torch.randn(9, D), torch.rand(9)
    monkeypatch.setattr(training, "telling", lambda *_: factors)
    ticks = model.ticks(*model.trunk(some_tokens(model, 2, 9)))
    plain, autocast = [], []
    for found, low in ((plain, False), (autocast, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            found += [training.remembered(model, None, None, None), mean_and_square(ticks)]
    assert all(map(torch.equal, plain, autocast))


def test_life_writes_as_long_as_training_did_in_the_middle(model):
    """And settling that changes nothing of what training writes."""
    chance = torch.Generator().manual_seed(0)
    told = torch.randint(model.backbone.config.vocab_size, (8, 24), generator=chance)
    news = torch.rand(told.shape, generator=chance) < 0.2
    mixture = SimpleNamespace(episodes=lambda *_: (told.numpy(), news.float().numpy()))
    lived, known = Lived.of(model(told)), news & (successors(told) >= 0)
    before = training.telling(model, lived, successors(told), known)[1]
    training.settle_length(model, mixture, "cpu")
    same(training.telling(model, lived, successors(told), known)[1], before)
    error = prediction_error(model, lived.hidden[known], successors(told)[known])
    assert (error @ model.ctm.engram.T).norm(dim=1).median() == pytest.approx(1, rel=1e-4)


def test_moments_are_measured_of_the_keys_that_move_them_and_move_at_a_rate_of_their_own(
        model, monkeypatch):
    """Where they are not, memory is read along other features than it was trained with."""
    told, asked, news, weight = (some_tokens(model, 2, 12), some_tokens(model, 2, 16),
                                 torch.zeros(2, 12), torch.ones(2, 16))
    news[:, [3, 4, 5, 8]], weight[:, [4, 9]], weight[0, 13] = 1, 4, -4
    e = data.Episodes(told, news, asked, weight, torch.tensor([[0, 3], [0, 8], [1, 3], [1, 8]]),
                      torch.tensor([[0, 4, 1], [0, 9, 0], [1, 4, 2], [1, 9, 3]]))
    for name, value in (("moment_batches", 1), ("chunk", 4), ("carry_share", 1.0),
                        ("baseline_rate", 0.0)):
        monkeypatch.setattr(training, name, value)
    batch = told, torch.ones(2, 12).index_fill(1, torch.tensor(11), 0), told.flip(0)
    key = training.phase3_loss(model, batch, e, e, 0)[1]["key"]
    text = torch.zeros(1, len(model.ctm.start_z)), key[:1]
    due = training.episode_loss(model, e, e, text, False)[1]["due"]
    training.measure_moments(model, SimpleNamespace(
        batch=lambda *_: [x.numpy() for x in batch],
        episodes=lambda *_: [x.numpy() for x in e]), "cpu")
    for moment, k in ((model.ctm.key_moment, key), (model.ctm.due_moment, due)):
        torch.testing.assert_close(moment, k.T @ k / k.shape[1] / len(k))
    training.apply_moment(moment.zero_(), key[:1] * 0 + 1, math.inf)
    same(moment, torch.full_like(moment, training.moment_rate / len(moment)))


def test_eta_is_as_loud_as_text_bears(sessions, monkeypatch):
    """From a memory that would cost too little, and from one that would cost too much."""
    model, mixture = sessions
    monkeypatch.setattr(training, "text_cost", 0.03)
    rows = training.text_rows(mixture, 64)
    told = torch.randn(model.ctm.c_proj.weight.shape[0], model.ctm.features(
        torch.zeros(1, model.ctm.config.sync)).shape[-1], generator=torch.Generator().manual_seed(0))
    for size in (1.0, 3.0):
        monkeypatch.setattr(training, "weights_told", lambda *_: size * told)
        before = model.ctm.log_eta.clone()
        training.settle_strength(model, mixture, "cpu")
        louder = (model.ctm.log_eta - before).exp() * size
        alone, aided = (model(rows, plastic=w).nats[:, :-1].mean() for w in (None, louder * told))
        assert aided / alone - 1 == pytest.approx(0.03, rel=0.05)


@pytest.mark.parametrize("step, cost, settled", [
    (7, 0.01, ["measure_moments", "settle_length", "settle_session", "settle_strength"]),
    (7, 0.0, ["measure_moments", "settle_length", "settle_session"]), (6, 0.01, [])])
def test_the_last_step_settles_what_the_memory_needs_and_eta_if_asked_to(monkeypatch, step, cost,
                                                                         settled):
    called = []
    for name, value in {"phase": 3, "max_steps": 8, "text_cost": cost}.items():
        monkeypatch.setattr(training, name, value)
    for name in ("measure_moments", "settle_length", "settle_session", "settle_strength"):
        monkeypatch.setattr(training, name, lambda *_, name=name: called.append(name))
    ctm = SimpleNamespace(read_along=lambda expand: None)
    training.after_step(SimpleNamespace(ctm=ctm), None, {}, step, "cpu", 0)
    assert called == settled


@pytest.fixture
def sessions(monkeypatch):
    """A model that is unsure of all it says; a mixture whose rows have five words each."""
    model, chance = randomised("grouped queries"), np.random.default_rng(0)
    model.backbone.norm.weight.data.fill_(0.1)

    def rows(n: int, *_) -> tuple:
        return (np.stack([chance.choice(chance.integers(97, size=5), 64) for _ in range(n)]),)
    for name, value in (("T", 64), ("chunk", 8)):
        monkeypatch.setattr(training, name, value)
    return model, SimpleNamespace(text=rows(400)[0].flatten(), batch=rows, T=64, tokenizer=None)


def test_what_a_session_was_made_of_is_expected_of_what_is_to_come(sessions, monkeypatch):
    model, mixture = sessions
    monkeypatch.setattr(training, "session_rows", 400)
    training.settle_session(model, mixture, "cpu")
    others, nats = torch.from_numpy(mixture.batch(64)[0]), []
    for _ in range(2):
        session = training.SessionMemory(model, 64, 8)
        thoughts = list(training.read_in_chunks(model, others, session))
        nats.append(float(torch.cat([t.nats for t in thoughts], 1)[:, 8:-1].mean()))
        model.ctm.session_proj.zero_()
    assert nats[0] < nats[1] - 0.1


def test_what_a_session_says_is_half_a_newton_step_from_what_it_knew_before(sessions, monkeypatch):
    """Token by token, with one chunk after another read by `forward`."""
    model, mixture = sessions
    made = [mixture.batch(16)[0] for _ in range(4)]                 # the first two will be cut
    made[1][3, 40:] = -1
    monkeypatch.setattr(training, "session_rows", 64)
    model.ctm.session_proj.zero_()
    pairs = []
    for rows, size in zip(made, (32, 32, 64, 64)):
        session = training.SessionMemory(model, 16, 8)
        for context in torch.from_numpy(rows).split(size, 1):
            cache = Cache()
            for piece, after in zip(context.split(8, 1), successors(context).split(8, 1)):
                thought = model(piece, cache, m=session.m)
                cache, x = thought.cache, model.ctm.session_key(session.m)
                h = thought.at_read_tick(thought.hidden).requires_grad_()
                nats = torch.nn.functional.cross_entropy(
                    model.head(h).flatten(0, 1), after.flatten(), ignore_index=-1, reduction="sum")
                e, session_before = -torch.autograd.grad(nats, h)[0], x[:, None].expand(-1, 8, -1)
                pairs.append((session_before[after >= 0].double(), e[after >= 0].double()))
                session.observe(thought, after)
    training.settle_session(model, SimpleNamespace(
        text=mixture.text, batch=lambda *key: (made[key[2]],)), "cpu")
    x, e = map(torch.cat, zip(*pairs))
    xx, ee = x.T @ x, e.T @ e / len(e)
    xx += torch.eye(len(xx)) * 0.03 * xx.diagonal().mean()
    ee += torch.eye(len(ee)) * 0.1 * ee.diagonal().mean()
    expected = 0.5 * torch.linalg.inv(ee) @ (e.T @ x) @ torch.linalg.inv(xx)
    assert torch.allclose(model.ctm.session_proj.double(), expected, rtol=1e-3, atol=1e-3)


def test_a_write_as_a_plain_sum_trains_another_block(grafted):
    """And what a session says is not measured, where that is left to a later run."""
    run = phase3(grafted, "sum", "--write_rule=sum", "--document_write=True", "--session_rows=0")
    assert run.returncode == 0, run.stderr
    solved, summed = (load_file(grafted / f"{run}/last/graft.safetensors") for run in ("m1", "sum"))
    assert not torch.equal(solved["engram"], summed["engram"])
    assert solved["session_proj"].any() and not summed["session_proj"].any()


def test_the_control_of_phase_3_never_trains_through_the_write(grafted):
    world = grafted
    run = phase3(world, "unwritten", "--through_write=False")
    assert run.returncode == 0, run.stderr
    before, after = (load_file(world / f"{run}/last/graft.safetensors")
                     for run in ("g1", "unwritten"))
    assert torch.equal(before["salience_weight"], after["salience_weight"])
    length = after["log_eta"].exp() / training.write_strength       # settled, nothing else
    assert torch.allclose(before["engram"], after["engram"] * length, rtol=1e-5)
    assert not torch.equal(before["synapse.down.0.weight"], after["synapse.down.0.weight"])


def test_a_read_out_that_learns_alone_says_what_it_did_where_a_value_is_due(grafted):
    """Nothing that a key or a write is made of moves; what a session says is measured anew. Going
    on in the folder of the graft itself changes nothing."""
    world, changes = grafted, {}
    for out in ("told", "own"):
        run = phase3(world, out, "--max_steps=1")
        assert run.returncode == 0, run.stderr
    told = load_graft(f"{world}/whole/last", world / "told/last/graft.safetensors")

    def alone(out: str, graft: str, weight: float, *extra: str) -> CTMBlock:
        run = phase3(world, out, f"--graft={world}/{graft}/last/graft.safetensors",
                     f"--keep_due={weight}", "--input_ridge=0.01", "--lr=0.1", "--clip=1e9",
                     "--max_steps=24", *extra)
        assert run.returncode == 0, run.stderr
        return load_graft(f"{world}/whole/last", world / f"{out}/last/graft.safetensors").ctm

    alone("own", "own", 1.0, "--stop_at=4")
    resumed = alone("own", "own", 1.0, "--resume")
    for weight in (1e-6, 1.0):
        before, after = told.ctm, alone(f"kept{weight}", "told", weight)
        moved = {name for name, x in before.named_parameters()
                 if not torch.equal(x, after.get_parameter(name))}
        assert moved == {"c_proj.weight"}
        for name in ("baseline", "key_moment", "due_moment"):
            assert torch.equal(before.get_buffer(name), after.get_buffer(name)), name
        assert "value_nats" not in (world / f"kept{weight}/log.jsonl").read_text()  # no episodes
        after.c_proj_before = before.c_proj.weight
        changes[weight] = training.change_where_due(after).item()
    assert 0 < changes[1.0] < changes[1e-6] / 4
    assert torch.equal(resumed.c_proj.weight, after.c_proj.weight)
    run = phase3(world, "untold", "--keep_due=1e-3")
    assert run.returncode == 1 and "a graft that phase 3 taught" in run.stderr


def test_a_read_out_that_learns_alone_learns_from_text(monkeypatch):
    """Not from sessions; what is measured at the end still is of both, with the same people."""
    words = data.Tokenizer(str(ROOT / "weights"))
    text = np.array(words.encode(topics["pass"] * 9), "uint16")
    mixture = data.Mixture(words, text, 128, 0.0, 0.15, 1)
    monkeypatch.setattr(training, "keep_due", 1e-3)
    learned = training.Material(mixture, 0)[0][0]
    assert (learned[0] >= 0).all() and (mixture.batch(training.B, 0, 0, 0)[0] < 0).any()


def test_processes_of_a_step_tell_in_sessions_of_one_size(monkeypatch):
    """Or the quicker one waits for the other. Other steps have other sizes, as has the crowd; who is
    told differs."""
    words = data.Tokenizer(str(ROOT / "weights"))
    text = np.array(words.encode(topics["pass"] * 9), "uint16")
    mixture = data.Mixture(words, text, 128, 1.0, 0.15, 1)
    monkeypatch.setattr(training, "phase", 3)
    first, second = (training.Material(mixture, rank) for rank in (0, 1))
    rows, crowd = ([len(first[step][part][0]) for step in range(8)] for part in (1, 2))
    assert rows == [len(second[step][1][0]) for step in range(8)] and len(set(rows)) > 1
    assert crowd == [len(second[step][2][0]) for step in range(8)] and crowd != rows
    assert not np.array_equal(first[0][1][0], second[0][1][0])


def test_the_control_trains_the_layers_own_ffn_and_may_teach_the_block(grafted):
    world, taught = grafted, "--ffn={}/ffn/last/graft.safetensors".format(grafted)
    for out, extra in (("ffn", ["--block=ffn", "--lr=0.1"]), ("t1", ["--teacher", taught]),
                       ("t2", ["--teacher", taught, "--stop_at=4"]),
                       ("t2", ["--teacher", taught, "--resume"]), ("own", ["--teacher"])):
        run = phase2(world, out, *extra)
        assert run.returncode == 0, run.stderr
    assert load_file(world / "ffn/last/graft.safetensors").keys() == {
        f"{n}_proj.weight" for n in ("up", "gate", "down")}
    alike = [same_files(world / "t1/last/graft.safetensors", world / out / "last/graft.safetensors")
             for out in ("t2", "own")]
    assert alike == [True, False]
    run = phase2(world, "no ffn", f"--ffn={world}/g1/last/graft.safetensors")
    assert run.returncode == 1 and "expected a ffn block, found a ctm block" in run.stderr
    run = phase3(world, "no ctm", f"--graft={world}/ffn/last/graft.safetensors")
    assert run.returncode == 1 and "expected a ctm block, found a ffn block" in run.stderr


def test_a_crash_within_the_swap_of_a_checkpoint_leaves_one_to_go_on_from(grafted):
    """Between save's two renames there is no `last`: the new one goes on, or else the old one."""
    world = grafted
    for left in (".old", ".new"):
        out = f"swap{left}"
        assert phase2(world, out, "--stop_at=4").returncode == 0
        (world / out / "last").rename((world / out / "last").with_suffix(left))
        run = phase2(world, out, "--resume")
        assert run.returncode == 0, run.stderr
        assert same_files(*(world / of / "last/graft.safetensors" for of in ("g1", out)))


BAD = [("--base=nowhere/at/all/x", "expected a Qwen3 folder or a reachable Hugging Face name"),
       ("--base=", "run `python train.py config/tiny_phase1.py` first"),
       ("--text=nowhere", "run `python data.py"),
       ("--resume", "--resume expected a checkpoint in"),
       ("--lr=1e30 --clip=1e30 --imitation_steps=0", "no checkpoint yet"),
       ("--block_head_dim=13", "must divide the width"),
       ("--block=mlp", "expected block 'ctm', 'ffn' or 'none'"),
       ("--T=4000", "give more text or a smaller T"),
       ("--phase=4", "expected phase 1, 2 or 3"),
       ("--phase=3", "--graft=out/tiny_phase2"),
       ("--write_rule=product", "expected write_rule 'sum' or 'solved'"),
       ("--dtype=fp16", "expected dtype 'bfloat16' or 'float32'"),
       ("--B=0", "expected B of at least 1"), ("--lr=0", "expected lr above 0"),
       ("--keep_before=1", "expected keep_before of 0 to below 1"),
       ("--keep_due=1", "expected keep_due of 0, or above in phase 3"),
       ("--text_cost=-1", "expected text_cost of 0 to below 1"),
       ("--ask_every=0", "expected ask_every of at least 1"),
       ("--ask_every=2 --other_tick=best", "expected other_tick 'any' with ask_every"),
       ("--brief_ticks=99", "expected brief_ticks of 0 to"),
       ("--full_share=0", "expected full_share above 0 and at most 1"),
       ("--thinking_share=2", "expected thinking_share above 0 and at most 1"),
       ("--teacher=True --block=ffn", "expected teacher and ffn only where"),
       ("--ffn=nowhere", "expected a safetensors file at nowhere"),
       ("--tokenizer=out/none", "python data.py --train_vocab=2048 --tokenizer=out/none"),
       ("--dry_run --ticks=0", "expected ticks of at least 1"),
       ("--expand=-1", "expected expand of at least 0"),
       ("--carry_share=2", "expected carry_share of 0 to 1"),
       ("--num_key_value_heads=3", "to be a multiple of num_key_value_heads"),
       ("--device=gpu", "expected device cpu")]


@pytest.fixture(scope="module")
def refused(world) -> dict[str, subprocess.CompletedProcess]:
    """All of them at once, a process per core: what takes time is starting Python."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = pool.map(
            lambda extra: phase2(world, "bad " + extra.replace("/", " "), *extra.split()),
            (extra for extra, _ in BAD))
        return dict(zip((extra for extra, _ in BAD), runs))


@pytest.mark.parametrize("extra, said", BAD)
def test_bad_input_ends_with_one_line(refused, extra, said):
    run = refused[extra]
    assert (run.returncode in (1, 2) and run.stderr.count("error:") == 1
            and said in run.stderr), run.stderr


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(world):
    good = phase2(world, "nan", "--stop_at=4", "--imitation_steps=0")
    assert good.returncode == 0, good.stderr
    run = phase2(world, "nan", "--resume", "--lr=1e18", "--clip=1e30", "--imitation_steps=0")
    assert (run.returncode == 1 and "expected a finite loss" in run.stderr
            and "is the last good checkpoint" in run.stderr)
    saved = load_file(world / "nan/last/graft.safetensors")
    assert json.loads((world / "nan/last/state.json").read_text())["step"] == 4
    assert all(torch.isfinite(t).all() for t in saved.values())


def test_resume_refuses_other_settings(grafted):
    world = grafted
    run = phase2(world, "g1", "--resume", "--seed=2")
    assert run.returncode == 1 and "resume with the same config" in run.stderr


def test_dry_run_prints_the_size_of_the_design_without_weights():
    run = subprocess.run([sys.executable, "train.py", "config/phase2.py", "--dry_run=True"],
                         cwd=ROOT, capture_output=True, text=True)
    frozen, trainable = (int(w.replace(",", "")) for w in run.stdout.split("\n")[0].split()
                         if w[0].isdigit())
    total = float(run.stdout.strip().split("\n")[-1].split()[0])
    assert 590e6 < frozen < 600e6 and 62e6 < trainable < 72e6 and 0 < total <= 16


@pytest.mark.parametrize("length", [16, 63])
def test_flops_are_what_torch_counts(length):
    b, c = (BackboneConfig(97, 64, 96, 3, 4, 2, 16, 1e-6, 1e4, 256),
            ThoughtConfig(4, 3, 64, 3, 32, 16, 32))
    model, tokens = NanoCTM(b, c), torch.zeros(2, length, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as trunk:
            parts = model.trunk(tokens)
        with FlopCounterMode(display=False) as block:
            model.ticks(*parts)
    said, once_a_row = flops_per_token(b, c, length), 2 * (length - 1) * 2 * c.sync * b.hidden_size
    assert (trunk.get_total_flops(), block.get_total_flops()) == (
        2 * length * said["trunk"],
        2 * length * (said["block"] - said["block_reading"]) - once_a_row)
