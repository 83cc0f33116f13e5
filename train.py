"""Train nanoCTM: one loop for every phase.

    python train.py config/tiny_phase1.py       # the small backbone learns language, from nothing
    python train.py config/tiny_phase2.py       # the CTM block learns to think in its last layer
    python train.py config/tiny_phase3.py       # and to be written to
    python train.py config/phase2.py --dry_run=True  # what a run will need, without any weights
    torchrun --nproc_per_node=2 train.py config/...  # data-parallel; on a CPU a thread each

Phase 1: cross-entropy. Phase 2: the block first imitates the FFN that it replaces (regression on
its output, no head needed), then learns by the tick loss. Phase 3: it reads with a carried state
and learns to be written to: told in one session, solved into a memory with gradients, asked in
another. All read the same mixture. A run resumes exactly: batches are a function of (seed, step),
so the step is the data position. Checkpoints: out_dir/last and out_dir/best; phase 3 measures what
its write needs, and what a session says, at its last step alone: a memory lives with `last`.
Left out on purpose: anything that changes K or the architecture in the middle of a run.
"""
import copy
import json
import math
import os
import platform
import random
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file

import configurator
import data
from memory import (Lived, SessionMemory, WriteRule, compact_sessions, dopamine, empty_projector,
                    prediction_error, read_session, salience, salience_logit)
from model import (HEAD_ENTRIES, BackboneConfig, CTMBlock, NanoCTM, Thought, ThoughtConfig, Ticks,
                   at_tick, block_module, choose_device, fingerprint, flops_per_token,
                   load_backbone, load_graft, mean_and_square, read_tensors, replies,
                   save_backbone, save_graft, successors, take)

# -----------------------------------------------------------------------------
# settings, overridden by a config file and the command line

phase = 1                   # 1 language, 2 thinking, 3 continuity
out_dir = "out/tiny_phase1" # checkpoints and log.jsonl
base = ""                   # Qwen3 folder or Hugging Face name to start from; phase 1: "" for none
block = "ctm"               # phase 2, last layer: "ctm" learns, or as control its own "ffn" further
resume = False              # go on from out_dir/last
seed = 1
# data
tokenizer = "weights"       # a folder with ranks.json, or a Hugging Face name
text = "data/tiny"          # a folder made by data.py
text_share = 0.25           # rows of text among rows of fact sessions
told_share = 0.15           # what is learned of a session besides its answers
curriculum = 0              # steps of statements worded like answers; as many more to full variety
B = 16                      # rows per micro-batch and process
T = 256                     # tokens per row
accumulation = 1            # micro-batches per step
# backbone, phase 1 only
vocab_size = 2048
hidden_size = 128           # D
intermediate_size = 256
num_hidden_layers = 3
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 32
rope_theta = 10000.0
max_position_embeddings = 512
# block
ticks = 8                   # K
history = 8                 # M
sync = 256                  # S
expand = 6                  # F / S: features of a key that memory reads; 0: the key itself
train_expand = 3            # the same while phase 3 learns, for its time: fewer of their kind
nlm_hidden = 4
unet_step = 128
block_head_dim = 64
# optimisation: AdamW, linear warm-up, cosine to min_lr
max_steps = 1000
imitation_steps = 0         # phase 2: steps of regression on the FFN before the tick loss
lr = 3e-3
min_lr = 1e-4
warmup_steps = 100
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
clip = 1.0                  # norm of the gradient at most
input_ridge = 0.0           # linear maps learn where what they read is white; 0: as it is
other_tick = "any"          # tick loss, beside the most certain tick: "any" by chance, or "best"
ask_every = 1               # mixture: of so many tokens one is asked how certain each tick is, and
                            # learns at the most certain, the others at one by chance; 1: each at both
full_share = 1.0            # of steps: they think K ticks; in phase 3 they tell and ask as well
brief_ticks = 0             # of the others, about every token; 0: K, as thinking_share says
thinking_share = 1.0        # share of a row that thinks at a step; the block costs that much less
inherited_share = 0.3       # phases 2, 3: steps that start from an earlier session's sync
# phase 3
graft = ""                  # the thinking block to start from; one of phase 3 learns on
chunk = 32                  # C: tokens between two renewals of the carried sync
carry_rows = 4              # mixture rows on steps that read by chunks, gradients through the carry
carry_share = 0.25          # these steps; on the others nothing is carried
cut_share = 0.75            # of the carrying steps: between contexts all but the sync is dropped
cut_contexts = 4            # a row is cut into so many contexts
document_write = False      # at a cut write what was read, read on with it: long text as sessions
episode_facts = 64          # told per step and process in sessions of one memory, asked in others
carry_facts = 24            # on carrying steps, all tokens think; the rest told without gradients
crowd_facts = 64            # beside them, a session or more, known and told without gradients
episode_weight = 0.5        # of all that episodes teach, beside the mixture
through_write = True        # learn through the write; False is the control
keep_due = 0.0              # above 0: c_proj learns alone, and from rows of text and small talk
                            # alone; so much for each squared change where a value is due
keep_before = 0.4           # and at the end so much of the c_proj that was there before is kept
write_strength = 20.0       # eta at the start: |g E|^2 eta / |h| should be several nats
write_rule = "solved"       # memory of factors in training: "sum", or "solved" by ridge regression
write_ridge = 1e-3          # of the solved rule
write_n0 = 5.0              # of the solved rule: ordinary text weighs as much as so many keys
contrast_weight = 1.0       # key where a fact was told against key where it is asked
contrast_scale = 15.0       # of the cosines
reading_weight = 3.0        # squared error of facts read: by its question 1, by others, strangers 0
teacher = False             # phases 2, 3: without a carry, the FFN and the text teach half and half
ffn = ""                    # this FFN: a file of --block=ffn; "": the base's own
locality_weight = 1.0       # KL on text and on people never told of, with and without the memory
salience_weight = 0.5       # cross-entropy of salience with being a value that may be asked for
baseline_rate = 0.01        # of the running mean and variance of y_out, at the full lr
moment_rate = 0.02          # of the running second moments of keys, which whiten them
moment_batches = 200        # at the end: two rows and 64 facts each, for what a write protects
session_rows = 4800         # at the end: of text and mixture, for what a session says of its own;
                            # 0: session_proj stays as it was
text_cost = 0.0             # at the end: of its nats, what text is to pay for a hundred facts, by
                            # eta; 0: eta stays as it was learned
# machine
device = ""                 # "" picks cuda when there is one
dtype = "bfloat16"          # on a GPU, of matrix products; "float32": for models that are fp32
workers = 0                 # processes that make batches ahead; 0: made when they are needed
compile = False             # torch.compile what a thought does by itself in a tick
checkpoint_ticks = False    # recompute ticks backwards instead of keeping them
dry_run = False             # print parameters, FLOPs and memory, then stop
stop_at = 0                 # end early at this step, the schedule unchanged; 0: run to max_steps
# reporting
log_interval = 20
eval_interval = 200
eval_rows = 32              # held-out rows of text per evaluation
eval_questions = 32         # held-out questions per evaluation


# -----------------------------------------------------------------------------
# one process among several

def start_processes(where: str) -> None:
    """Find each other, when torchrun started us."""
    if "RANK" in os.environ:
        if where == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if where == "cuda" else "gloo")


def this_process() -> tuple[int, int]:
    """-> rank, world size; one process when torchrun did not start us."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def averaged(x: torch.Tensor) -> torch.Tensor:
    """x, the same shape in every process -> its mean over them."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


def average_gradients(parameters: list[torch.Tensor]) -> None:
    """One all-reduce over all gradients, so that every process takes the same step."""
    reached = [p for p in parameters if p.grad is not None]         # the same ones in every process
    flat = averaged(torch.cat([p.grad.flatten() for p in reached]))
    for p, g in zip(reached, flat.split([p.numel() for p in reached])):
        p.grad.copy_(g.view_as(p))


# -----------------------------------------------------------------------------
# what is trained

def build_model() -> NanoCTM:
    """The model of this phase with only its learning part requiring gradients.
    ValueError in one line."""
    if phase == 1 and base:
        return load_backbone(base)                                  # pretrained: measured or tuned
    if phase == 1:
        shape = {k: globals()[k] for k in BackboneConfig.__dataclass_fields__ if k in globals()}
        model = NanoCTM(BackboneConfig(**shape), block="ffn")
        model.backbone.initialise()
        return model
    if not base:
        raise ValueError(f"phase {phase} expected base, found none: run "
                         "`python train.py config/tiny_phase1.py` first, then set "
                         "--base=out/tiny_phase1/last, or --base=Qwen/Qwen3-0.6B")
    if phase == 3 and not graft:
        raise ValueError("phase 3 expected graft, found none: run "
                         "`python train.py config/tiny_phase2.py` first, then set "
                         "--graft=out/tiny_phase2/last/graft.safetensors")
    model = (load_graft(base, Path(graft), "ctm") if phase == 3
             else load_backbone(base, thought=thought_config(), block=block))
    if phase == 3:
        if not was_writable(model):
            if keep_due:
                raise ValueError("expected with keep_due a graft that phase 3 taught, found "
                                 f"{graft}, which it did not: nothing is due there yet")
            model.ctm.log_eta.data.fill_(math.log(write_strength))
        model.ctm.read_along(train_expand)
    if ffn:
        trained = load_graft(base, Path(ffn), "ffn")
        model.backbone.layers[-1].mlp.load_state_dict(block_module(trained).state_dict())
    block_module(model).float()
    freeze(model)
    if keep_due:
        before = model.ctm.c_proj.weight.detach().clone()
        model.ctm.register_buffer("c_proj_before", before, persistent=False)
    return model


def freeze(model: NanoCTM) -> None:
    """All but what learns in phases 2 and 3."""
    model.requires_grad_(False)
    (model.ctm.c_proj if keep_due else block_module(model)).requires_grad_(True)


def was_writable(model: NanoCTM) -> bool:
    """Whether phase 3 has measured this block's keys: it goes on from its strength and moments."""
    return model.ctm is not None and bool(model.ctm.key_moment.tril(-1).any())


def learner(model: NanoCTM) -> torch.nn.Module:
    """What this phase teaches, and keeps."""
    return model.backbone if phase == 1 else block_module(model)


def thought_config() -> ThoughtConfig:
    return ThoughtConfig(ticks, history, sync, nlm_hidden, unet_step, head_dim=block_head_dim,
                         expand=expand)


class WhitenedAdamW(torch.optim.AdamW):
    """AdamW that moves the weight W = A P of a linear map by moving A. P = L^-1 makes what the map
    reads white: L L' = E xx' / (mean of its diagonal) + ridge I.

    What the maps of a thought read varies in some directions a hundred times as much as in most,
    from which a step that is as long in all of them learns little (LOG.md). This is the inputs'
    half of K-FAC (arXiv:1503.05671), alone as in FOOF (arXiv:2201.12250), before Adam. E xx' is of
    what was read in the first ten steps and every twentieth, averaged over processes, older steps
    counting less. These weights do not decay. With ridge 0, AdamW.
    """

    def __init__(self, learner: torch.nn.Module, ridge: float, **settings):
        self.ridge, self.looking = ridge, False
        self.maps = [m for m in learner.modules()
                     if isinstance(m, torch.nn.Linear) and m.weight.requires_grad and ridge]
        self.seen: list[list[torch.Tensor]] = [[] for _ in self.maps]
        whitened = [m.weight for m in self.maps]
        others = [p for p in learner.parameters()
                  if p.requires_grad and all(p is not w for w in whitened)]
        groups = [{"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
                  {"params": [p for p in others if p.dim() < 2] + whitened, "weight_decay": 0.0}]
        super().__init__([g for g in groups if g["params"]], **settings)
        for layer, seen in zip(self.maps, self.seen):
            layer.register_forward_pre_hook(partial(self._look, seen))

    def _look(self, seen: list[torch.Tensor], layer: torch.nn.Module,
              read: tuple[torch.Tensor]) -> None:
        """Second moment (n, n) of some rows of what a map reads, on steps that look, to learn."""
        if self.looking and torch.is_grad_enabled():
            x = read[0].detach().flatten(0, -2)
            x = x[::max(1, len(x) // 256)].float()
            seen.append(x.T @ x / len(x))

    @torch.no_grad()
    def step(self) -> None:
        ways = [self.state[m.weight].get("way") for m in self.maps]
        turned = [(m.weight, way, m.weight.clone()) for m, way in zip(self.maps, ways)
                  if way is not None]                               # none yet at the first step
        for weight, way, _ in turned:
            weight.grad = weight.grad @ way.T
        super().step()
        for weight, way, before in turned:
            weight.copy_(before + (weight - before) @ way)
        for layer, seen in zip(self.maps, self.seen):
            if seen:
                self._renew(self.state[layer.weight], averaged(torch.stack(seen).mean(0)))
                seen.clear()

    def _renew(self, state: dict, found: torch.Tensor) -> None:
        """Move what is known of a map's inputs towards what was found, and its way with them."""
        n, times = len(found), float(state.get("times", 0)) + 1
        moment = state.get("moment", torch.zeros_like(found)).lerp(found, 1 / min(times, 5))
        same = torch.eye(n, dtype=torch.float64, device=found.device)
        L = torch.linalg.cholesky(moment.double() * n / moment.trace() + self.ridge * same)
        state |= {"times": torch.tensor(times), "moment": moment,
                  "way": torch.linalg.solve_triangular(L, same, upper=False).float().contiguous()}


def learning_rate(step: int) -> float:
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1)))


def tensors(arrays: tuple[np.ndarray, ...], device: str) -> list[torch.Tensor]:
    """What data.py makes, on the device."""
    return [torch.from_numpy(x).to(device) for x in arrays]


# -----------------------------------------------------------------------------
# losses of phases 1 and 2

Batch = tuple[torch.Tensor, ...]


def mixture_loss(model: NanoCTM, batch: Batch, step: int
                 ) -> tuple[torch.Tensor, dict, Thought | None]:
    """Loss of one micro-batch, a report (nats of the tick read, its mean index, and where all K
    ticks think mean and mean square of y_out (2, K, S)), and the thought, with ask_every of those
    asked; None while it imitates and without the block."""
    tokens, weight, before = batch
    trunk, following = model.trunk(tokens), successors(tokens)
    if model.ctm is None:                                           # one tick: nothing to choose
        ticks, learned = model.ticks(*trunk), weight > 0
        loss, nats = model.reading_loss((ticks.h[:, :, None] + ticks.out)[learned],
                                        following[learned], weight[learned] / weight.sum())
        return loss, {"nats": nats.mean().item(), "read_tick": 0.0}, None
    imitating = phase == 2 and step < imitation_steps
    m = (inherited_session(model, before).m
         if not imitating and share_of_steps(inherited_share, step) else None)
    brief = is_brief(step)
    where = (None if brief else                                     # what is learned comes first
             foremost(weight, max(1, int(weight.shape[1] * thinking_share))))
    ticks, u = model.ticks(*trunk, m=m, where=where, number=brief_ticks * brief), trunk[1]
    if where is not None:
        u = take(u, where)
        weight, following = weight.gather(1, where), following.gather(1, where)
    if imitating:
        loss, report, thought = imitation_loss(model, ticks, u), {}, None
    else:
        with torch.no_grad():
            taught = ticks.h + model.backbone.layers[-1].mlp(u) if teacher else None
        if ask_every > 1:
            loss, report, thought = model.sparse_tick_loss(ticks, following, weight, ask_every,
                                                           taught)
        else:
            thought = model.measure(ticks, following)
            loss, report = model.tick_loss(thought, following, weight, other_tick, taught)
    if not brief:
        report["y_out"] = mean_and_square(ticks)
    return loss, report, thought


def foremost(importance: torch.Tensor, n: int) -> torch.Tensor:
    """importance (B, T) -> the n most important positions of each row, in order,
    by chance among equals."""
    return ((importance + torch.rand(importance.shape).to(importance))
            .topk(n, 1).indices.sort(1).values)


def imitation_loss(model: NanoCTM, ticks: Ticks, u: torch.Tensor) -> torch.Tensor:
    """Squared distance of every tick's output to the FFN's, relative to the power of the FFN's;
    1 is saying nothing."""
    with torch.no_grad():
        wanted = model.backbone.layers[-1].mlp(u)[ticks.real].float()
    return (ticks.out[ticks.real].float() - wanted[:, None]).pow(2).mean() / wanted.pow(2).mean()


def share_of_steps(share: float, step: int) -> bool:
    """Whether this step belongs to a fixed, evenly spread share of the steps."""
    return int((step + 1) * share) > int(step * share)


def is_brief(step: int) -> bool:
    """Whether this step thinks a few ticks about every token of the mixture, and that is all."""
    return brief_ticks > 0 and not share_of_steps(full_share, step)


def inherited_session(model: NanoCTM, before: torch.Tensor) -> SessionMemory:
    """The session that has read the end of what came before.
    No gradient here: phase 3 trains the carry."""
    with torch.no_grad():
        real = (before >= 0).sum(1, keepdim=True)                   # right-padded: last 64 tokens
        last = real - 64 + torch.arange(64, device=before.device)
        session = SessionMemory(model, len(before), chunk)
        for _ in read_in_chunks(
                model, before.gather(1, last.clamp(min=0)).masked_fill(last < 0, -1), session):
            pass
        session.close()
        return session


# -----------------------------------------------------------------------------
# losses of phase 3: the carry, and learning to be writable

def read_in_chunks(model: NanoCTM, tokens: torch.Tensor, session: SessionMemory,
                   plastic: torch.Tensor | None = None) -> Iterator[Thought]:
    """Thoughts about one context, chunk by chunk with the carried sync, gradients throughout;
    the trunk runs ahead. When one comes out, session.m is still what it was thought with."""
    trunk, following, at = model.trunk(tokens), successors(tokens), 0
    while at < tokens.shape[1]:
        where = torch.arange(at, min(at + session.room(tokens[:, at:]), tokens.shape[1]),
                             device=tokens.device).expand(len(tokens), -1)
        ticks = model.ticks(*trunk, m=session.m, where=where)
        thought = model.measure(ticks, following.gather(1, where), plastic)
        yield thought
        session.observe(thought, following.gather(1, where))
        at += where.shape[1]


def carried_reading(model: NanoCTM, batch: Batch, turn: int) -> tuple[torch.Tensor, list[Thought]]:
    """The mixture read as sessions: sync carried from chunk to chunk, at times from before, at
    times across a cut. turn: which carrying step. -> what is learned (B, T), the thoughts."""
    (tokens, weight, before), session = batch, SessionMemory(model, len(batch[0]), chunk)
    if share_of_steps(inherited_share, turn):
        session.start(inherited_session(model, before).sums)
    T = tokens.shape[1]
    contexts, thoughts = tokens.split(
        -(-T // cut_contexts) if share_of_steps(cut_share, turn) else T, 1), []
    if not document_write:                                          # told before a cut, it is gone
        told_here = torch.arange(T, device=tokens.device) < contexts[0].shape[1]
        weight = weight.masked_fill((weight > 1) & ~told_here, 0.0)
    for i, context in enumerate(contexts):
        plastic = None
        if document_write and i:                                    # write what came before the cut
            lived, after = all_lived(thoughts), torch.cat([successors(c) for c in contexts[:i]], 1)
            known = (after >= 0) & lived.real
            plastic = remembered(model, lived, after, known) if known.any() else None
        thoughts += read_in_chunks(model, context, session, plastic)
    return weight, thoughts


def carried_loss(model: NanoCTM, batch: Batch, step: int
                 ) -> tuple[torch.Tensor, dict, list[Thought]]:
    """Tick loss of the mixture read as sessions."""
    batch = tuple(x[:carry_rows] for x in batch)
    weight, thoughts = carried_reading(model, batch, int(step * carry_share))
    following, sizes = successors(batch[0]), [t.read_tick.shape[1] for t in thoughts]
    losses, reports = zip(*(model.tick_loss(t, f, w, other_tick) for t, f, w
                            in zip(thoughts, following.split(sizes, 1), weight.split(sizes, 1))
                            if (w > 0).any()))
    return (torch.stack(losses).mean(),
            {k: sum(r[k] for r in reports) / len(reports) for k in reports[0]}, thoughts)


def phase3_loss(model: NanoCTM, batch: Batch, told: data.Episodes, crowd: data.Episodes,
                step: int) -> tuple[torch.Tensor, dict]:
    """The mixture, with or without a carry, and episodes:
    what session A writes, session B is asked, beside ordinary text."""
    carrying = share_of_steps(carry_share, step) and not is_brief(step)
    if carrying:
        loss, report, thoughts = carried_loss(model, batch, step)
    else:
        loss, report, thought = mixture_loss(model, batch, step)
        thoughts = [thought]
    lived = all_lived(thoughts)
    if carrying:
        report["key"] = lived.key[lived.real].detach()              # whole rows: ordinary reading
    if through_write and not keep_due and share_of_steps(full_share, step):
        extra, more = episode_loss(
            model, told, crowd, (lived.hidden[lived.real], lived.key[lived.real]), carrying)
        loss, report = loss + episode_weight * extra, report | more
    if keep_due:
        loss = loss + keep_due * change_where_due(model.ctm)
    return loss, report


def change_where_due(ctm: CTMBlock) -> torch.Tensor:
    """Mean square of what c_proj says otherwise than before at a key where a value is due. As
    elastic weight consolidation (arXiv:1612.00796) holds what an earlier task needs, so that what
    the memory has to outvote stays as sure as it was."""
    change = ctm.c_proj.weight - ctm.c_proj_before
    return ctm.config.sync * (change @ ctm.due_moment * change).sum()


def all_lived(thoughts: list[Thought]) -> Lived:
    return Lived(*(torch.cat(column, 1) for column in zip(*map(Lived.of, thoughts))))


def episode_loss(model: NanoCTM, e: data.Episodes, crowd: data.Episodes, text: tuple,
                 carrying: bool) -> tuple[torch.Tensor, dict]:
    """Tell session A, write, ask session B in a fresh context: tick loss on its answers, what each
    question reads, contrast of keys, locality. On carrying steps B is warm-started with A's sync,
    as a living session may be."""
    lived, following, news, at, m = told_session(model, e, carrying)
    known, rows, root = ((following >= 0) & lived.real, e.told_at[:, 0],
                         math.sqrt(lived.key.shape[-1]))
    own = telling(model, lived, following, known)
    keys, values, salient = map(torch.cat, zip(own, crowd_factors(model, crowd)))
    mind_of_row = shared_memories(len(e.told)).to(keys.device)      # (B,) memory written and asked
    mind = F.pad(mind_of_row[:, None].expand_as(known)[known],
                 (0, len(keys) - len(own[0])))                      # of each factor; crowd's: first
    several = bool(mind_of_row.any())
    with torch.autocast(keys.device.type, enabled=False):           # solving is no affair of bf16
        reader = written(model.ctm, model.ctm.features(keys.float()), salient.float(), mind)
        heard, said = (mind_of_row[:, None] == mind).float(), reader.said(values.float())
        each = [said[mind == i].T @ reader.toward[:, mind == i].T
                for i in range(int(mind_of_row.max()) + 1)]
        plastic = torch.stack(each).index_select(0, mind_of_row) if several else each[0]

    where = due_first((e.weight < 0) | (e.weight > 1), e.weight > 0)
    ticks, after = (model.ticks(*model.trunk(e.asked), m=m, where=where),
                    successors(e.asked).gather(1, where))
    thought, weight = model.measure(ticks, after, plastic), e.weight.gather(1, where)
    answers, _ = model.tick_loss(thought, after, weight.abs(), other_tick)

    silent, alone = weight < 0, thought.alone
    nobody = silent.nonzero()[:, 0]                                 # row of each stranger
    row, column, fact = (e.asked_at[:, 0], place(where, e.asked)[*e.asked_at[:, :2].T],
                         e.asked_at[:, 2])
    told_keys, asked_keys, strange_keys = (
        lived.key[rows, at] / root, alone.key[row, column] / root, alone.key[silent] / root)
    agreement = asked_keys @ told_keys.T                            # (questions, facts) cosines
    contrast = F.cross_entropy(contrast_scale * agreement, fact)
    spot = (known.flatten().cumsum(0) - 1).view_as(known)[rows, at] # of each fact among the factors
    with torch.autocast(keys.device.type, enabled=False):           # (questions+strangers, factors)
        found = reader.reads(model.ctm.features(torch.cat([asked_keys, strange_keys]).float())
                             ) * heard[torch.cat([row, nobody])]
    text_hidden, text_key = text
    few = torch.randperm(len(text_key))[:128].to(text_key.device)
    local = locality_loss(model, text_hidden[few],
                          model.ctm.features(text_key[few] / root)
                          @ (plastic[0] if several else plastic).T)
    if len(nobody):
        local = local + locality_loss(model, at_tick(alone.hidden, alone.read_tick)[silent],
                                      found[len(fact):] @ values.float())
    read = found * salient
    wanted = torch.zeros_like(read)
    wanted[torch.arange(len(fact)), spot[fact]] = 1.0
    reading = (read - wanted).pow(2).sum(1).mean()
    worth = F.binary_cross_entropy_with_logits(                     # values are asked for later
        salience_logit(model.ctm, lived.key[known]).float(), news[known])
    loss = (answers + contrast_weight * contrast + reading_weight * reading
            + locality_weight * local + salience_weight * worth)
    right = agreement.argmax(1) == fact
    return loss, {
        "value_nats": thought.nats[row, column].mean().item(),
        "contrast": contrast.item(), "reading": reading.item(),
        "own": read[torch.arange(len(fact)), spot[fact]].mean().item(),
        "stranger": read[len(fact):].amax(1).mean().item() if len(nobody) else 0.0,
        "local": local.item(), "agree": agreement.gather(1, fact[:, None]).mean().item(),
        "hit": right.float().mean().item(), "rank": participation_ratio(told_keys).item(),
        "salient": salient.mean().item(),
        "salient_facts": salience(model.ctm, told_keys * root).mean().item(),
        "due": torch.cat([told_keys, asked_keys, strange_keys]).detach() * root}


EPISODE_FIGURES = ("value_nats", "contrast", "reading", "own", "stranger", "local", "agree", "hit",
                   "rank", "salient", "salient_facts")


@torch.no_grad()
def participation_ratio(keys: torch.Tensor) -> torch.Tensor:
    """In how many directions keys (n, S) spread, uncentred:
    (sum of squared singular values)^2 / sum of their squares."""
    alike = keys @ keys.T
    return alike.trace() ** 2 / alike.pow(2).sum()


def told_session(model: NanoCTM, e: data.Episodes, carrying: bool
                 ) -> tuple[Lived, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Read session A -> what was lived (B, n), successors, which are news (B, n),
    where among the n each fact's value was due, m.

    Carrying, all tokens think, chunk by chunk; else those where a value is due, and others only
    where a row has fewer of these: a fact costs a tenth then.
    """
    if carrying:
        session = SessionMemory(model, len(e.told), chunk)
        lived = all_lived(read_in_chunks(model, e.told, session))
        session.close()
        return lived, successors(e.told), e.news, e.told_at[:, 1], session.m
    where = due_first(e.news > 0)
    following = successors(e.told).gather(1, where)
    lived = Lived.of(model(e.told, where=where))
    return lived, following, e.news.gather(1, where), place(where, e.told)[*e.told_at.T], None


def telling(model: NanoCTM, lived: Lived, following: torch.Tensor, known: torch.Tensor
            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors of the tokens in `known` (B, n), as a living session forms them but for v:
    keys (N, S), values (N, D), salience (N,)."""
    hidden, key, came = lived.hidden[known], lived.key[known], following[known]
    salient, (_, surprise) = salience(model.ctm, key), model.score(hidden, came)
    # v = eta dopamine salience (U e + b), where life says U e / |U e| and has a threshold for
    # salience. b is the same for all that is known, so whoever is asked about reads it; LOG.md has
    # what training without it came to.
    strength = dopamine(surprise, model.ctm.mean_surprise) * salient
    toward = prediction_error(model, hidden, came) @ model.ctm.engram.T + model.ctm.engram_bias
    values = torch.exp(model.ctm.log_eta) * strength[:, None] * toward
    return key / math.sqrt(key.shape[-1]), values, salient


def due_first(due: torch.Tensor, then: torch.Tensor | float = 0.0) -> torch.Tensor:
    """due (B, T) bool -> positions (B, n): all that are due; where a row has fewer than another,
    others by chance, of `then` (B, T) bool before the rest."""
    return foremost(4.0 * due + 2.0 * then, int(due.sum(1).max()))


@torch.no_grad()
def crowd_factors(model: NanoCTM, e: data.Episodes
                  ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The factors of news alone, no gradients: others whom the memory knows."""
    where = due_first(e.news > 0)
    following, news = successors(e.told).gather(1, where), e.news.gather(1, where) > 0
    return telling(model, Lived.of(model(e.told, where=where)), following, news)


def place(where: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Where each position of tokens (B, T) stands in `where` (B, n); 0 for those left out."""
    return torch.zeros_like(tokens).scatter(
        1, where, torch.arange(where.shape[1]).to(where).expand_as(where))


def shared_memories(rows: int) -> torch.Tensor:
    """(rows,) numbers of the memories that rows share:
    half the time all the same one, else four, or each row its own."""
    return torch.arange(rows) % (1, 1, 4, rows)[int(torch.randint(4, ()))]


class Reader(NamedTuple):
    """How a memory of n factors reads phi (m, F): phi toward mixing^-1, so much of each factor. What
    has F columns is never solved for: it is the widest of all."""
    toward: torch.Tensor                # (F, n)
    mixing: torch.Tensor | None         # (n, n) fp64; None: factors do not mix

    def reads(self, phi: torch.Tensor) -> torch.Tensor:
        """phi (m, F) -> (m, n)."""
        found = phi @ self.toward
        return (found if self.mixing is None else
                torch.linalg.solve(self.mixing, found.double(), left=False).float())

    def said(self, values: torch.Tensor) -> torch.Tensor:
        """values (n, D) -> (n, D), what stands for them in W_m = said' toward'."""
        return (values if self.mixing is None else
                torch.linalg.solve(self.mixing, values.double()).float())


def written(ctm: CTMBlock, keys: torch.Tensor, salient: torch.Tensor,
            mind: torch.Tensor | None = None) -> Reader:
    """Where the factors are, phi (n, F) -> their reader, with gradients.

    "sum" is linear attention over the factors. "solved" is what the living rule arrives at when it
    may look at all factors at once: W K' = V by ridge regression, protected alike, each factor
    weighted by its salience, where life has a threshold.
    mind (n,): which of several memories, solved side by side, each factor belongs to.
    """
    if write_rule == "sum":
        return Reader(keys.T, None)
    rule = WriteRule(n0=write_n0, ridge=write_ridge)
    toward = empty_projector(ctm, rule).along(keys.double())[0].T.to(keys)  # its sums cancel: fp64
    alike = keys @ toward
    if mind is not None:
        alike = alike * (mind[:, None] == mind)
    # values carry their salience already
    return Reader(toward, torch.eye(len(keys)).to(keys).double() + salient[:, None] * alike)


def remembered(model: NanoCTM, lived: Lived, following: torch.Tensor,
               known: torch.Tensor) -> torch.Tensor:
    """What was lived (B, n), as one memory W_m (D, F), with gradients."""
    keys, values, salient = telling(model, lived, following, known)
    with torch.autocast(keys.device.type, enabled=False):           # solving is no affair of bf16
        reader = written(model.ctm, model.ctm.features(keys.float()), salient.float())
        return reader.said(values.float()).T @ reader.toward.T


def locality_loss(model: NanoCTM, hidden: torch.Tensor, aid: torch.Tensor) -> torch.Tensor:
    """KL from what is predicted without the memory to what is predicted with it,
    where it has nothing to say: hidden, aid (n, D)."""
    hidden = hidden.detach()
    before, after = (model.head(x).float().log_softmax(-1)
                     for x in (hidden, hidden + aid.to(hidden.dtype)))
    return F.kl_div(after, before, log_target=True, reduction="batchmean")


@torch.no_grad()
def apply_baseline(model: NanoCTM, report: dict, step: int) -> None:
    """Move the running means, after the optimizer's step only: y_out and its square per tick, and
    the surprise of a token. They follow weights that move, so they slow down as these do: if they
    went on, weights that are slow by then could not follow them (LOG.md)."""
    surprise = torch.tensor([report.get("nats", float(model.ctm.mean_surprise))],
                            device=report["y_out"].device)
    seen = averaged(torch.cat([report["y_out"].flatten(), surprise]))
    before = int(step * full_share)
    rate = max(baseline_rate * learning_rate(step) / lr,
               1 / (before + 1) if phase == 2 else 0)               # phase 3 has phase 2's
    model.ctm.settle(*seen[:-1].view_as(report["y_out"]), rate)
    model.ctm.mean_surprise.lerp_(seen[-1], rate)


@torch.no_grad()
def apply_moment(moment: torch.Tensor, key: torch.Tensor, before: float) -> None:
    """Move a running second moment (S, S) towards that of these keys (n, S), as unit vectors;
    before: how often it was moved."""
    found = averaged(key.T @ key / key.shape[1] / len(key))
    found = (found + found.T) / 2                                   # to the bit, as a file keeps it
    moment.lerp_(found, max(moment_rate, 1 / (1 + before)))


@torch.no_grad()
def measure_moments(model: NanoCTM, mixture: data.Mixture, device: str) -> None:
    """Once the block is trained: both second moments anew, on `moment_batches` of training
    material. A write finds its way around what they hold, so keys they have too few of are
    disturbed. Of the same keys as training's: of rows read as sessions (of fresh rows alone they
    differ by a third), and where each fact's value is due."""
    moments = model.ctm.key_moment, model.ctm.due_moment
    sums = [torch.zeros_like(m, dtype=torch.float64) for m in moments]
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    rank, world = this_process()                                    # each measures its share

    def add(which: int, key: torch.Tensor) -> None:
        sums[which] += (key.T @ key).double()
        counts[which] += len(key)

    for i in range(rank, moment_batches, world):
        lived = all_lived(carried_reading(
            model, tensors(mixture.batch(2, max_steps, i), device), i)[1])
        add(0, lived.key[lived.real])
        e = data.Episodes(*tensors(mixture.episodes(64, max_steps, i), device))
        told, asked = torch.zeros_like(e.told, dtype=torch.bool), e.weight < 0
        told[*e.told_at.T], asked[*e.asked_at[:, :2].T] = True, True
        for tokens, wanted in ((e.told, told), (e.asked, asked)):   # as `episode_loss` has them
            where = due_first(wanted)
            add(1, model(tokens, where=where).key[wanted.gather(1, where)])
    for moment, found, n in zip(moments, map(averaged, sums), averaged(counts)):
        moment.copy_((found + found.T) / (2 * n * len(found)))      # symmetric, as a file keeps it
    model.ctm.whiten()


@torch.no_grad()
def settle_session(model: NanoCTM, mixture: data.Mixture, device: str, rows: int = 16) -> None:
    """session_proj anew: half a Newton step towards fewer nats of what is to come. With x the
    session's key before each chunk, and e minus the gradient of nats at what the head read:

        session_proj = 1/2 (E ee' + ridge)^-1 (E ex') (E xx' + ridge)^-1

    E ee' is the curvature of cross-entropy (Fisher) as far as predictions are calibrated. Sessions
    are rows of training text and of the mixture, in turn, half of both cut in the middle. Adam gets
    half as far (LOG.md).
    """
    ctm, (rank, world) = model.ctm, this_process()                  # each measures its share
    ctm.session_proj.zero_()                                        # e is what is thought without
    D, S = ctm.session_proj.shape
    xx, ex, ee, n = sums = [torch.zeros(shape, dtype=torch.float64, device=device)
                            for shape in ((S, S), (D, S), (D, D), ())]
    batches = -(-session_rows // rows)
    starts = np.linspace(0, len(mixture.text) - T, batches * rows).astype(int)
    starts = np.random.default_rng(0).permutation(starts).reshape(-1, rows)
    for i in range(rank, batches, world):
        tokens = torch.from_numpy(
            mixture.batch(rows, max_steps, i)[0] if i % 8 < 4 else
            np.stack([mixture.text[s:s + T] for s in starts[i]]).astype("int64")).to(device)
        session = SessionMemory(model, rows, chunk)
        for context in tokens.split(-(-T // 2) if i % 4 < 2 else T, 1):
            at, following = 0, successors(context)
            for thought in read_in_chunks(model, context, session):
                after = following[:, at:(at := at + thought.read_tick.shape[1])]
                known, hidden = after >= 0, thought.at_read_tick(thought.hidden)
                e, x = torch.zeros(hidden.shape, device=device), ctm.session_key(session.m)
                with torch.enable_grad():
                    h = hidden[known].requires_grad_()
                    loss, _ = model.reading_loss(h[:, None], after[known], torch.ones(len(h)).to(h))
                    e[known] = -torch.autograd.grad(loss, h)[0].float()
                each = e.flatten(0, 1)
                for total, found in zip(sums, ((known.sum(1, True) * x).T @ x, e.sum(1).T @ x,
                                               each.T @ each, known.sum())):
                    total += found
    xx, ex, ee, n = map(averaged, sums)
    for moment, ridge in ((xx, 0.03), (ee, 0.1)):
        moment.diagonal().add_(ridge * moment.diagonal().mean() + 1e-9)
    ctm.session_proj.copy_(
        0.5 * torch.linalg.solve(ee / n, torch.linalg.solve(xx, ex, left=False)))


@torch.no_grad()
def settle_length(model: NanoCTM, mixture: data.Mixture, device: str, batches: int = 4) -> None:
    """Training writes eta U e, life eta U e / |U e|: make |U e| 1 for the middle one of what is
    news, eta and b as much larger and smaller, so that the one is as long as the other."""
    lengths = []
    for i in range(batches):
        told, news = tensors(mixture.episodes(64, max_steps, i)[:2], device)
        where = foremost(news, int((news > 0).sum(1).max()))
        known, thought = news.gather(1, where) > 0, model(told, where=where)
        error = prediction_error(model, thought.at_read_tick(thought.hidden)[known],
                                 successors(told).gather(1, where)[known])
        lengths.append((error @ model.ctm.engram.T).norm(dim=1))
    middle = averaged(torch.cat(lengths).median())                  # the same in every process
    model.ctm.log_eta.add_(middle.log())
    for x in (model.ctm.engram, model.ctm.engram_bias):
        x.div_(middle)


@torch.no_grad()
def settle_strength(model: NanoCTM, mixture: data.Mixture, device: str) -> None:
    """eta anew: as loud as text bears. A hundred people of training, told in sessions of ten and
    written by the living rule, then cost training's text `text_cost` of its nats. W_m is linear in
    eta, and what it costs nearly quadratic."""
    world = data.FactWorld(3000, "train")
    told = weights_told(model, mixture.tokenizer, world, world.facts(100))
    rank, processes = this_process()                                # each measures its share
    rows = text_rows(mixture, 64)[rank::processes].to(device)

    def nats(plastic: torch.Tensor | None) -> torch.Tensor:
        return averaged(torch.cat([model(r, plastic=plastic).nats[:, :-1]
                                   for r in rows.split(B)]).mean())

    before, louder = nats(None), torch.ones((), device=device)
    for _ in range(4):                                              # each halves the error, or more
        cost = (nats(louder * told) / before - 1).clamp(min=text_cost / 4)
        louder *= (text_cost / cost).sqrt()
    model.ctm.log_eta.add_(louder.log())


# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def evaluate(model: NanoCTM, mixture: data.Mixture, device: str) -> dict[str, float]:
    """Held-out text nats at the tick read, and by free generation, of held-out people: recall with
    2 and 8 facts in the prompt, "I do not know" of what none of 8 tells, recall from weights."""
    nats = torch.cat([model(r.to(device)).nats[:, :-1].flatten()
                      for r in text_rows(mixture, eval_rows).split(B)]).mean().item()
    found = {"val": nats}
    for name, n, untold in (("recall_2", 2, False), ("recall_8", 8, False), ("untold_8", 8, True)):
        prompts, facts = data.context_questions(
            data.FactWorld(1000 + n, "held_out"), n, eval_questions, untold)
        said = replies(model, mixture.tokenizer, prompts)
        found[name] = sum(map(data.is_recalled, said, facts)) / len(facts)
    if phase == 3:
        learned = [(x, x.clone()) for x in
                   (model.ctm.log_eta, model.ctm.engram, model.ctm.engram_bias)]
        with torch.random.fork_rng():                               # training goes on as it was
            settle_length(model, mixture, device)
            for n in (10, 50):
                found[f"weights_{n}"] = recall_from_weights(model, mixture.tokenizer, n)
        for x, before in learned:
            x.copy_(before)
    return found


def text_rows(mixture: data.Mixture, n: int) -> torch.Tensor:
    """(n, T) windows of its text, evenly spread; fewer of a text that is shorter."""
    start = range(0, len(mixture.text) - mixture.T, max(mixture.T, len(mixture.text) // n))
    return torch.stack([torch.from_numpy(mixture.text[i:i + mixture.T].astype("int64"))
                        for i in start[:n]])


def weights_told(model: NanoCTM, words: data.Tokenizer, world: data.FactWorld,
                 facts: list[data.Fact]) -> torch.Tensor:
    """W_m (D, F) after these facts, told once in sessions of ten and written by the living rule."""
    sessions = [words.encode(text) for text in world.texts(facts)]
    tokens = torch.from_numpy(data.padded(sessions, -1)).to(model.ctm.start_z.device)
    plastic = compact_sessions(model.ctm, read_session(model, tokens, chunk)[1])
    return plastic.weight.float().to(tokens.device)


def recall_from_weights(model: NanoCTM, words: data.Tokenizer, n_facts: int) -> float:
    """Held-out people, asked about in other words in a fresh context."""
    world = data.FactWorld(2000 + n_facts, "held_out")
    facts = world.facts(n_facts)
    plastic = weights_told(model, words, world, facts)
    asked = world.rng.sample(facts, min(n_facts, eval_questions))
    said = replies(model, words, [data.user_turn(world.ask(f, held_out=True)) for f in asked],
                   plastic=plastic)
    return sum(map(data.is_recalled, said, asked)) / len(asked)


# -----------------------------------------------------------------------------
# checkpoints: model files that anybody can load, and the optimizer beside them

def save(model: NanoCTM, optimizer: torch.optim.Optimizer, folder: Path, state: dict) -> None:
    """Write a complete checkpoint into a neighbour folder, then swap it in;
    a crash leaves a whole one, at worst as `.old`."""
    fresh = folder.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    if phase == 1:
        save_backbone(model, fresh)
    else:
        save_graft(model, fresh / "graft.safetensors", phase=str(phase), seed=str(seed),
                   step=str(state["step"]))
    moments = {f"{i}.{k}": v for i, s in optimizer.state_dict()["state"].items()
               for k, v in s.items()}
    if model.ctm:                                                   # when, differs between runs
        moments |= {f"whitened.{i}": m for i, m in enumerate(model.ctm.whitened)}
    if keep_due:                                                    # graft may be out_dir's own
        moments["c_proj_before"] = model.ctm.c_proj_before
    save_file(moments, fresh / "optimizer.safetensors")
    (fresh / "state.json").write_text(json.dumps(state, indent=1))
    old = folder.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def keep(model: NanoCTM, optimizer: torch.optim.Optimizer, folder: Path, state: dict,
         score: float) -> None:
    """Save as folder/last, and as folder/best too when no earlier score was as low."""
    if score < state["best"]:
        state["best"] = score
        save(model, optimizer, folder / "best", state)
    save(model, optimizer, folder / "last", state)


def restore(model: NanoCTM, optimizer: torch.optim.Optimizer, folder: Path, config: dict) -> dict:
    """Load weights, moments and position from a checkpoint of the same run.
    ValueError in one line otherwise."""
    for interrupted in (".new", ".old"):                            # a crash within save's swap
        if not folder.exists() and (folder.with_suffix(interrupted) / "state.json").exists():
            folder = folder.with_suffix(interrupted)
    if not (folder / "state.json").exists():
        raise ValueError(f"--resume expected a checkpoint in {folder}, found none: "
                         "start without --resume first")
    state = configurator.read_json(folder / "state.json", "step", "best", "processes", "config")
    if state["processes"] != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(f"--resume expected {state['processes']} processes as before, "
                         f"found {os.environ.get('WORLD_SIZE', 1)}: start as many, "
                         "or the run would be another one")
    free = {"resume", "stop_at", "lr", "min_lr", "clip", "device", "out_dir", "workers", "compile",
            "checkpoint_ticks", "log_interval", "eval_interval"}
    changed = [k for k, v in config.items() if k not in free and state["config"].get(k) != v]
    if changed:
        raise ValueError(f"--resume expected the settings of {folder}, found "
                         f"{changed[0]}={config[changed[0]]!r} instead of "
                         f"{state['config'].get(changed[0])!r}: resume with the same config")
    saved = (load_backbone(str(folder)) if phase == 1
             else load_graft(base, folder / "graft.safetensors"))
    learner(model).load_state_dict(learner(saved).state_dict())
    (moments, _), own = read_tensors(folder / "optimizer.safetensors"), optimizer.state_dict()
    if model.ctm:
        whitened = tuple(moments.pop(f"whitened.{i}", None) for i in (0, 1))
        if any(m is None for m in whitened):
            raise ValueError(f"--resume expected the moments of whitened keys in {folder}, found "
                             "none: an earlier version wrote it; start without --resume")
        model.ctm.whiten(whitened)
    if keep_due:
        model.ctm.c_proj_before.copy_(moments.pop("c_proj_before"))
    for name, value in moments.items():
        i, _, key = name.partition(".")
        own["state"].setdefault(int(i), {})[key] = value
    optimizer.load_state_dict(own)
    return state


# -----------------------------------------------------------------------------
# what a run will need, without any weights

def report_needs() -> None:
    """Print parameters, FLOPs per token and an estimate of memory.
    Shapes only: nothing is downloaded or allocated."""
    shape = {k: globals()[k] for k in BackboneConfig.__dataclass_fields__ if k in globals()}
    if base:
        local = Path(base) / "config.json"
        shape = asdict(BackboneConfig.from_json(Path(base)) if local.exists() else BackboneConfig())
        if not local.exists() and base != "Qwen/Qwen3-0.6B":
            raise ValueError("--dry_run expected a folder with config.json or Qwen/Qwen3-0.6B, "
                             f"found {base!r}: download it first")
    with torch.device("meta"):
        model = NanoCTM(BackboneConfig(**shape), thought_config(),
                        block="ffn" if phase == 1 else block)
    b, c, grafted = model.backbone.config, thought_config(), model.ctm is not None
    if phase > 1:
        freeze(model)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    flops, thinking = flops_per_token(b, c, T), thinking_share if grafted else 1.0
    forward = flops["trunk"] + (thinking * flops["block"] if grafted else flops["ffn"])
    n = B * T * thinking                                            # tokens that think at once
    widths = sum(2 * layer.out_features for layer
                 in [*model.ctm.synapse.down, *model.ctm.synapse.up]) if grafted else 0
    D, K, S, h = b.hidden_size, c.ticks, c.sync, c.nlm_hidden
    one_tick = (n * 2 * (3 * widths + D * (2 * c.history + 6 * h + 8)) if grafted
                else B * T * 2 * 8 * b.intermediate_size)
    all_ticks = n * K * (2 * 4 * D + 4 * 10 * S) if grafted else 0  # z, a, out bf16; sum, key fp32
    cached = B * T * 2 * 2 * b.num_hidden_layers * b.num_key_value_heads * b.head_dim
    memory = {"frozen weights, bf16": 2 * frozen,
              "learning: weights, gradients, two moments, fp32": 16 * learning,
              "kept of every tick": all_ticks,
              "one tick, recomputed backwards" if checkpoint_ticks else "ticks, all kept":
                  one_tick * (1 if checkpoint_ticks or not grafted else K),
              "keys and values of the trunk": cached,
              "logits in flight": 5 * 4 * HEAD_ENTRIES["cuda"],
              "trunk, a layer at a time": B * T * 2 * (8 * D + 3 * b.intermediate_size)
                                          * (b.num_hidden_layers if phase == 1 else 2)}
    print(f"parameters: {frozen:,} frozen, {learning:,} trainable")
    print(f"FLOPs per token, forward: {forward:,.0f} (trunk {flops['trunk']:,}, "
          + (f"block {flops['block']:,} over {K} ticks" if grafted else f"FFN {flops['ffn']:,}")
          + f", one reading {flops['head']:,})")
    print(f"tokens per step: {B * T * accumulation:,} per process")
    for what, size in memory.items():
        print(f"  {size / 1e9:6.2f} GB  {what}")
    print(f"  {sum(memory.values()) / 1e9:6.2f} GB  in all, estimated")


# -----------------------------------------------------------------------------
# the run

def header(config: dict, world: int, device: str) -> dict:
    """What somebody needs to run this again."""
    hardware = (torch.cuda.get_device_name() if device == "cuda"
                else f"{platform.machine()} CPU, {os.cpu_count()} cores")
    return {"commit": configurator.commit(), "hardware": hardware, "processes": world,
            "python": platform.python_version(), "torch": torch.__version__, "config": config}


def check_settings() -> None:
    """ValueError in one line for what a type check cannot see."""
    if phase not in (1, 2, 3):
        raise ValueError(f"expected phase 1, 2 or 3, found {phase}: "
                         "phase 4 is living, see sample.py --memory on")
    if phase == 3 and block != "ctm":
        raise ValueError(f"expected block 'ctm' in phase 3, found {block!r}: "
                         "only the CTM block has keys to write to")
    if (teacher or ffn) and (phase == 1 or block != "ctm"):
        raise ValueError("expected teacher and ffn only where a CTM block learns, "
                         f"found phase {phase} with block {block!r}: set --teacher=False --ffn=")
    for name, choice in (("other_tick", ("any", "best")), ("write_rule", ("sum", "solved")),
                         ("dtype", ("bfloat16", "float32"))):
        if globals()[name] not in choice:
            raise ValueError(f"expected {name} {choice[0]!r} or {choice[1]!r}, "
                             f"found {globals()[name]!r}: choose one of the two")
    if ask_every > 1 and other_tick == "best":
        raise ValueError(f"expected other_tick 'any' with ask_every, found 'best' with {ask_every}: "
                         "which tick is best only asking each tells")
    for name in ("B", "T", "accumulation", "ask_every", "ticks", "history", "log_interval",
                 "eval_interval", "eval_rows", "eval_questions", "crowd_facts", "chunk",
                 "cut_contexts", "carry_rows", "moment_batches"):
        if globals()[name] < 1:
            raise ValueError(f"expected {name} of at least 1, found {globals()[name]}: raise it")
    for name in ("max_steps", "stop_at", "imitation_steps", "expand", "train_expand",
                 "session_rows"):
        if globals()[name] < 0:
            raise ValueError(f"expected {name} of at least 0, found {globals()[name]}: raise it")
    for name in ("carry_share", "cut_share", "inherited_share", "text_share", "told_share"):
        if not 0 <= globals()[name] <= 1:
            raise ValueError(f"expected {name} of 0 to 1, found {globals()[name]}: it is a share")
    if num_key_value_heads < 1 or num_attention_heads % num_key_value_heads:
        raise ValueError("expected num_attention_heads to be a multiple of num_key_value_heads, "
                         f"found {num_attention_heads} and {num_key_value_heads}: change one")
    if not 0 <= brief_ticks <= ticks:
        raise ValueError(f"expected brief_ticks of 0 to {ticks}, found {brief_ticks}: no thought "
                         "is longer than ticks")
    if not 0 <= keep_before < 1:
        raise ValueError(f"expected keep_before of 0 to below 1, found {keep_before}: it is a share")
    if lr <= 0:
        raise ValueError(f"expected lr above 0, found {lr}: 3e-3 suits small models")
    if keep_due < 0 or keep_due and phase != 3:
        raise ValueError(f"expected keep_due of 0, or above in phase 3, found {keep_due} in phase "
                         f"{phase}: only after phase 3 is there something to keep")
    if not 0 <= text_cost < 1:
        raise ValueError(f"expected text_cost of 0 to below 1, found {text_cost}: 0.0035 is a share")
    for name, all_of_it in (("full_share", "1 makes every step a full one"),
                            ("thinking_share", "1 thinks about every token")):
        if not 0 < globals()[name] <= 1:
            raise ValueError(f"expected {name} above 0 and at most 1, found {globals()[name]}: "
                             f"{all_of_it}")


def prepare(device: str) -> tuple[NanoCTM, data.Mixture, data.Mixture, str]:
    """-> the model of this phase, what it learns from, what it is judged by, and the text's hash.
    ValueError in one line."""
    words = data.Tokenizer(tokenizer)
    train_text, val_text, about = data.open_tokens(Path(text), words.n_vocab)
    mixture, held_out = (data.Mixture(words, t, T, text_share, told_share, seed, split, curriculum)
                         for t, split in ((train_text, "train"), (val_text, "held_out")))
    model = build_model().to(device)
    words.insist_on(model.backbone.config.vocab_size)
    if model.ctm:                                                   # text to judge living writes by
        windows = [train_text[i * (len(train_text) // 4):][:model.ctm.ordinary.shape[1]]
                   .astype("int64") for i in range(4)]
        model.ctm.ordinary.copy_(torch.from_numpy(np.stack(windows)))
    model.checkpoint_ticks = checkpoint_ticks
    if compile and model.ctm:
        model.ctm.think = torch.compile(model.ctm.think, dynamic=True)
    return model, mixture, held_out, about["text_sha256"]


class Material(torch.utils.data.Dataset):
    """What a process learns from, micro-batch by micro-batch: the mixture, and in phase 3 who is
    told and who else is known. A function of the number alone, so that others may make it ahead.
    Sessions of one number are of one size in all processes, or the quicker ones would wait."""

    def __init__(self, mixture: data.Mixture, rank: int):
        self.mixture, self.rank = copy.copy(mixture), rank
        if keep_due:
            self.mixture.text_share = 1.0

    def __getitem__(self, i: int) -> tuple[np.ndarray, ...]:
        key = (*divmod(i, accumulation), self.rank)
        shares = (() if phase < 3 else
                  (carry_facts, episode_facts - carry_facts + crowd_facts)
                  if share_of_steps(carry_share, key[0]) else (episode_facts, crowd_facts))
        sizes = random.Random(f"{seed}/sizes/{i}").choices(data.EPISODE_SIZES, k=len(shares))
        return (self.mixture.batch(B, *key),
                *(self.mixture.episodes(n, *key, part, size=size)
                  for part, (n, size) in enumerate(zip(shares, sizes))))


def material(mixture: data.Mixture, rank: int, steps: range) -> Iterator[list]:
    """-> what each micro-batch of these steps learns from, as tensors, in order."""
    return iter(torch.utils.data.DataLoader(
        Material(mixture, rank), batch_size=None, num_workers=workers,
        sampler=range(steps.start * accumulation, steps.stop * accumulation)))


def step_loss(model: NanoCTM, batch: Batch, episodes: list[Batch], step: int
              ) -> tuple[torch.Tensor, dict]:
    """Loss and report of one micro-batch."""
    if phase < 3:
        return mixture_loss(model, batch, step)[:2]
    return phase3_loss(model, batch, *(data.Episodes(*e) for e in episodes), step)


def after_step(model: NanoCTM, mixture: data.Mixture, report: dict, step: int, device: str,
               earlier: float) -> None:
    """What moves without a gradient, after the optimizer's step only; earlier: how often the
    moments had been moved when the run began."""
    if "y_out" in report and not keep_due:                          # or keys would move
        apply_baseline(model, report, step)
    if "key" in report and not keep_due:                            # or what writes go around
        apply_moment(model.ctm.key_moment, report["key"], int(step * carry_share) + earlier)
    if "due" in report:
        apply_moment(model.ctm.due_moment, report["due"], int(step * full_share) + earlier)
    if phase == 3 and step + 1 == max_steps:
        if keep_due:                                                # no key has moved
            with torch.no_grad():
                model.ctm.c_proj.weight.lerp_(model.ctm.c_proj_before, keep_before)
        else:
            measure_moments(model, mixture, device)
            settle_length(model, mixture, device)
        if session_rows:
            settle_session(model, mixture, device)
        model.ctm.read_along(expand)
        if text_cost:
            settle_strength(model, mixture, device)


def main() -> None:
    config = configurator.configure(globals())
    check_settings()
    if dry_run:
        return report_needs()
    where = choose_device(device)
    start_processes(where)
    rank, world = this_process()
    if where == "cpu":
        torch.set_num_threads(1)                                    # more only pay on larger models
    torch.manual_seed(seed)                                         # same weights in every process
    model, mixture, held_out, text_sha256 = prepare(where)
    earlier = math.inf if was_writable(model) else 0
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = WhitenedAdamW(learner(model), input_ridge, lr=lr, betas=(beta1, beta2))
    folder, state = Path(out_dir), {"step": 0, "best": float("inf"), "processes": world,
                                    "config": config}
    if resume:
        state = restore(model, optimizer, folder / "last", config) | {"config": config}
    log = Log(folder / "log.jsonl", rank, resume)
    log.record({"run": header(config, world, where) | {"text_sha256": text_sha256}})
    log.say(f"phase {phase}: {sum(p.numel() for p in learning):,} parameters learn, "
            f"{sum(p.numel() for p in model.parameters() if not p.requires_grad):,} are frozen")
    autocast = torch.autocast(where, torch.bfloat16,
                              enabled=where == "cuda" and dtype == "bfloat16")
    last_step = min(stop_at or max_steps, max_steps)

    begin, before = time.time(), state.get("minutes", 0.0)
    if max_steps == 0:
        log.say(" | ".join(f"{k} {v:.4f}" for k, v in evaluate(model, held_out, where).items()))
    busy, counted, tokens_read = 0.0, 0, 0                          # seconds, without evaluation
    ahead = material(mixture, rank, range(state["step"], last_step))
    for step in range(state["step"], last_step):
        clock = time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        torch.manual_seed(seed + 1000 * step + 10**9 * rank)        # chance by step: exact resume
        optimizer.looking = step < 10 or step % 20 == 0
        if phase == 3 and optimizer.looking:
            model.ctm.whiten()
        total = 0.0
        for _ in range(accumulation):
            batch, *episodes = ([x.to(where) for x in part] for part in next(ahead))
            tokens_read += int((batch[0] >= 0).sum()) * world
            with autocast:
                loss, report = step_loss(model, batch, episodes, step)
            (loss / accumulation).backward()
            total += loss.item() / accumulation
        average_gradients(learning)
        norm = torch.nn.utils.clip_grad_norm_(learning, clip)
        if not torch.isfinite(norm):
            raise ValueError(not_finite(f"loss {total} with gradient norm {norm}", step, folder))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_step(model, mixture, report, step, where, earlier)

        done = step + 1
        busy, counted = busy + time.time() - clock, counted + 1     # norm, loss read: device done
        val = (evaluate(model, held_out, where)
               if done % eval_interval == 0 or done == last_step else {})
        if val and not math.isfinite(val["val"]):
            raise ValueError(not_finite(f"held-out nats {val['val']}", step, folder))
        if val and rank == 0:
            state |= {"step": done, "minutes": before + (time.time() - begin) / 60}
            keep(model, optimizer, folder, state,
                 score=val["val"] + 1 - val["recall_8"])            # text and recall both count
        if val or done % log_interval == 0:
            log.step(done, max_steps,
                     {"loss": total, "nats": report.get("nats"), "lr": learning_rate(step),
                      "norm": norm.item(), "tick": report.get("read_tick"),
                      **{k: v for k, v in report.items() if k in EPISODE_FIGURES}, **val},
                     before + (time.time() - begin) / 60, busy / counted, tokens_read / busy)
            busy, counted, tokens_read = 0.0, 0, 0
    if world > 1:
        print(f"weights of rank {rank}: {fingerprint(learner(model))}", flush=True)
        dist.destroy_process_group()


def not_finite(found: str, step: int, folder: Path) -> str:
    kept = (f"{folder / 'last'} is the last good checkpoint: resume" if (folder / "last").exists()
            else "no checkpoint yet: start again")
    return f"expected a finite loss, found {found} at step {step}; {kept} with a lower lr or clip"


class Log:
    """One line per interval for people, the same record to log.jsonl;
    only the first process writes."""

    def __init__(self, path: Path, rank: int, append: bool):
        self.file = None
        if rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a" if append else "w")

    def say(self, line: str) -> None:
        if self.file:
            print(line, flush=True)

    def record(self, entry: dict) -> None:
        if self.file:
            print(json.dumps(entry), file=self.file, flush=True)

    def step(self, step: int, steps: int, values: dict, minutes: float, seconds: float,
             speed: float) -> None:
        said = {k: v for k, v in values.items() if v is not None and v == v}
        shown = " | ".join(f"{k} {v:.1e}" if k == "lr" else f"{k} {v:.4f}" for k, v in said.items())
        peak = (torch.cuda.max_memory_allocated() if torch.cuda.is_available()
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        self.say(f"step {step:05d}/{steps:05d} | {shown} | {seconds * 1e3:.0f} ms | "
                 f"{speed:,.0f} tok/s | mem {peak / 2**30:.1f} GiB")
        self.record({"step": step, **said, "minutes": minutes, "ms": seconds * 1e3,
                     "tokens_per_s": speed, "peak_bytes": peak})


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        configurator.stop(str(problem))
