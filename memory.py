"""A memory of its own: what a session carries, what it tells the weights, and the store that
outlives the process.

Carry, from token to token, renewed every C tokens (SessionMemory):

    dopamine  = clamp(0.5 + 0.5 tanh(s / 2 s_mean), 0.5, 1)  s = -log p(next), surprise in nats
    alpha_hat <- gamma alpha_hat + dopamine_t dalpha_t              per token, beta_hat alike
    m          = alpha_hat / beta_hat                               a bounded weighted mean
    out_k     += session_proj session_key(m)                        at every tick, CTMBlock

Eligibility, what a token has to tell the weights (engrams), and the write itself (compact_memory):

    k   = kappa / sqrt(S) at the read tick                          where memory should answer
    f   = phi(k), CTMBlock.features                                 in F directions instead of S
    v   = eta dopamine U e / |U e|                                  what it should add there,
    e   = g (E[next] - sum_v p(v) E[v])                             what came - what was expected
    W  <- W + (v - W f) (P f / f'P f)',   P = (n0 Sigma + ridge I + past f f')^-1

No backpropagation and no optimizer: a delta rule with unit gain at its own key and the least
disturbance of ordinary text (Sigma, second moment of its f) and of what was written before. What a
later session tells anew, at nearly the same key, is left out (superseded). Factors (k, v) depend on
the base model and the text alone, never on the store, so W is a function of the living sessions:
forgetting one is deleting it and computing W again.

Left out on purpose: anything a session generated itself is carried but never written; the base
model's files never change; text is not stored; folding W into c_proj, since the two read different
things (with expand=0 they do not). Source: DESIGN.md section 3; Sherman & Morrison 1950 for P,
Widrow & Hoff 1960 for the rule.

Letters: B batch, T tokens, S sync channels, F features, D width, C carry chunk, n tokens of one
call or factors of one session.
"""
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load as from_bytes, save as to_bytes
from torch import Tensor

from model import (Cache, CTMBlock, NanoCTM, Spoken, Thought, backbone_hash, fingerprint,
                   read_tensors, successors)


# -----------------------------------------------------------------------------
# surprise, and what a token has to tell

def dopamine(surprise: Tensor, mean_surprise: Tensor) -> Tensor:
    """surprise in nats (...) -> (...) in [0.5, 1]: 1 unexpected, 0.5 predictable. It dampens and
    never amplifies."""
    return (0.5 + 0.5 * torch.tanh(surprise / (2 * mean_surprise))).clamp(0.5, 1.0).detach()


def salience(ctm: CTMBlock, key: Tensor) -> Tensor:
    """kappa (..., S) -> (...) in [0, 1]: is this something to keep? Surprise alone cannot tell a
    fact from noise."""
    return torch.sigmoid(salience_logit(ctm, key))


def salience_logit(ctm: CTMBlock, key: Tensor) -> Tensor:
    return key @ ctm.salience_weight + ctm.salience_bias


def engrams(model: NanoCTM, hidden: Tensor, next_tokens: Tensor, reward: Tensor) -> Tensor:
    """What memory should add to h: eta dopamine, in the direction of U e. DESIGN §3 has no unit
    length: there some tokens of a value are written thirty times as loud as others, and the quiet
    ones are not heard. It weighs by salience too: that did nothing, salience only chooses (LOG.md).

    hidden (n, D) that the head read without a memory, next_tokens (n,), reward (n,) dopamine
    -> (n, D).
    """
    toward = prediction_error(model, hidden, next_tokens) @ model.ctm.engram.T
    return (torch.exp(model.ctm.log_eta) * reward[:, None]
            * torch.nn.functional.normalize(toward, dim=1))


@torch.no_grad()
def prediction_error(model: NanoCTM, hidden: Tensor, next_tokens: Tensor) -> Tensor:
    """e = g (what came - what was expected) in embedding space:
    hidden (n, D) that the head read without a memory, next_tokens (n,) -> (n, D) fp32."""
    embedding, gain = model.backbone.embed_tokens.weight, model.backbone.norm.weight
    expected = torch.cat([model.head(h).float().softmax(-1).to(embedding.dtype) @ embedding
                          for h in hidden.split(model.rows_at_once(hidden))])
    return (gain * (embedding[next_tokens] - expected)).float()


class Factors(NamedTuple):
    """What one session tells the weights, in the order lived."""
    keys: Tensor                # (n, S) fp32, unit length; in a store int8, as large as fits
    values: Tensor              # (n, D) fp32; in a store fp16
    surprise: Tensor            # (n,) nats
    dopamine: Tensor            # (n,)
    salience: Tensor            # (n,)
    position: Tensor            # (n,) int64, of the token in its session
    tick: Tensor                # (n,) int64, at which it was read

    def rows(self, chosen: Tensor) -> "Factors":
        return Factors(*(x[chosen] for x in self))

    def rounded(self) -> "Factors":
        """As a store holds them, and writes them: a third of the bytes. A key is a direction, so it
        needs no scale."""
        keys = self.keys.float()  # int8 would overflow: what was rounded stays as it is
        largest = keys.abs().amax(1, keepdim=True).clamp(min=1e-9)
        return self._replace(keys=(127 * keys / largest).round().to(torch.int8),
                             values=self.values.half())

    def unit_keys(self) -> Tensor:
        """(n, S) fp64, of unit length."""
        return torch.nn.functional.normalize(self.keys.double(), dim=1)


# -----------------------------------------------------------------------------
# minutes: what a session carries

class Lived(NamedTuple):
    """What is kept of n thoughts until their successors are known."""
    hidden: Tensor              # (B, n, D) at the read tick, without the memory
    key: Tensor                 # (B, n, S)
    tick: Tensor                # (B, n)
    delta_alpha: Tensor         # (B, n, 2, S)
    delta_beta: Tensor
    real: Tensor                # (B, n) bool: no padding

    @classmethod
    def of(cls, thought: Thought) -> "Lived":
        alone = thought.unaided
        return cls(alone.at_read_tick(alone.hidden), alone.key, alone.read_tick, alone.delta_alpha,
                   alone.delta_beta, alone.real)

    def columns(self, begin: int, end: int | None) -> "Lived":
        return Lived(*(x[:, begin:end] for x in self))


class Marked(NamedTuple):
    """Salient tokens, n of one row or of each, until their session ends."""
    hidden: Tensor              # (..., n, D) as Lived has it
    came: Tensor                # (..., n) the token that followed
    key: Tensor                 # (..., n, S) kappa
    surprise: Tensor            # (..., n), and the following: as Factors has them
    dopamine: Tensor
    salience: Tensor
    position: Tensor
    tick: Tensor


class Carry(NamedTuple):
    """What sessions have synchronised: their sums, whose quotient is m."""
    alpha: Tensor               # (B, 2, S) fp32: read-out, query
    beta: Tensor

    def faded(self, by: Tensor) -> "Carry":
        return Carry(by * self.alpha, by * self.beta)

    def plus(self, other: "Carry") -> "Carry":
        return Carry(self.alpha + other.alpha, self.beta + other.beta)

    def m(self, before: Tensor) -> Tensor:
        """alpha / beta, a weighted mean; `before` where nothing was lived."""
        return torch.where(self.beta > 0, self.alpha / self.beta.clamp(min=1e-9), before)


class SessionMemory:
    """The carry of several sessions side by side, and what they leave; owned by the caller.

        session = SessionMemory(model, rows=len(tokens))
        thought = session.read(tokens, Cache(), plastic)    # the last token waits for its successor
        thought = session.read(reply, thought.cache, own=reply.shape[1])    # own: never eligible
        factors = session.close()                           # one Factors per row

    The model itself only ever sees `m` (B, 2, S). With gradients on, they flow through m across
    chunks.
    """

    def __init__(self, model: NanoCTM, rows: int, chunk: int = 32, threshold: float = 0.5,
                 expected: float = 0.1, budget: int = 64):
        """threshold of salience; expected: a token of fewer nats is no news, though it may be
        salient, unless the next one is salient, too; budget: factors at most."""
        if model.ctm is None:
            raise ValueError("expected a model with a CTM block, found one without: a session has "
                             "nothing to carry there")
        self.model, self.rows, self.chunk = model, rows, chunk
        self.threshold, self.expected, self.budget = threshold, expected, budget
        self.start()

    def start(self, warm: Carry | None = None) -> None:
        """Begin afresh, or go on from what earlier sessions had synchronised. That fades beside the
        session's own sums and never enters them, so that a snapshot holds one session alone."""
        fresh = self.model.ctm.fresh_sync().expand(self.rows, -1, -1)
        self.sums = Carry(torch.zeros_like(fresh), torch.zeros_like(fresh))
        self.warm = warm or self.sums
        self.m = self.warm.m(fresh)
        self.filled = torch.zeros(self.rows, dtype=torch.long, device=fresh.device)
        self.position = torch.zeros_like(self.filled)
        self.waiting: Lived | None = None
        self.kept: list[list[Marked]] = [[] for _ in range(self.rows)]

    def room(self, ahead: Tensor | None = None) -> int:
        """Positions that may be observed before some row's chunk is full; ahead (B, n): only rows
        with a real token there count."""
        going = (torch.ones_like(self.filled, dtype=torch.bool) if ahead is None
                 else (ahead >= 0).any(1))
        return self.chunk - int(self.filled.masked_fill(~going, 0).max())

    def read(self, tokens: Tensor, cache: Cache, plastic: Tensor | None = None,
             halt: float | None = None, own: int = 0) -> Thought:
        """Read tokens (B, T), padding < 0, chunk by chunk, after those in `cache`; -> the thought
        about the last piece, or, with a memory `plastic`, about the last token alone: nowhere else
        does reading it change anything.

        A session may be longer than the context: see _within_context. The first `own` tokens were
        said by the model: what precedes them is carried and never written. The last token is not
        observed before the next call brings its successor.
        """
        if self.waiting is not None:
            # an interruption below must not take it in twice
            waiting, self.waiting = self.waiting, None
            first = tokens.gather(1, (tokens >= 0).int().argmax(1, keepdim=True))
            self._take_in(waiting, first, torch.full_like(first, own == 0, dtype=torch.bool))
        following, at, T = successors(tokens), 0, tokens.shape[1]
        # is its successor from outside?
        outside = (torch.arange(T, device=tokens.device) >= own - 1).expand_as(tokens)
        while at < T:
            n, cache = self.room(tokens[:, at:]), self._within_context(cache)
            piece = slice(at, at + n)
            ticks = self.model.ticks(*self.model.trunk(tokens[:, piece], cache), halt, self.m)
            thought = self.model.measure(ticks, successors(tokens[:, piece]), halt=halt)
            lived, cache, at = Lived.of(thought), thought.cache, at + n
            if at >= T:
                self.waiting = lived.columns(-1, None)
                lived, piece = lived.columns(0, -1), slice(piece.start, T - 1)
            self._take_in(lived, following[:, piece], outside[:, piece])
        return (thought if plastic is None else
                self.model.measure(ticks.at(slice(-1, None)), following[:, -1:], plastic, halt))

    def _within_context(self, cache: Cache) -> Cache:
        """At a chunk's beginning, drop keys and values that leave no room for another chunk; the
        sync goes on alone."""
        longest = self.model.backbone.config.max_position_embeddings
        full = (cache.real is not None and not self.filled.any()
                and cache.real.shape[1] + self.chunk > longest)
        return Cache() if full else cache

    def observe(self, thought: Thought, next_tokens: Tensor,
                eligible: Tensor | None = None) -> None:
        """Take in n positions at once; next_tokens (B, n), -1 where unknown, weighs nothing;
        eligible (B, n) bool.

        Padding (as the cache has it) neither weighs nor advances. ValueError when it would reach
        past a chunk's end.
        """
        nothing = torch.zeros_like(next_tokens, dtype=torch.bool)
        self._take_in(Lived.of(thought), next_tokens, nothing if eligible is None else eligible)

    def _take_in(self, lived: Lived, next_tokens: Tensor, eligible: Tensor) -> None:
        real = lived.real.long()
        n = real.sum(1)
        if int((self.filled + n).max()) > self.chunk:
            raise ValueError(f"expected at most {self.room()} more tokens in this chunk of "
                             f"{self.chunk}, found {next_tokens.shape[1]}: observe a session chunk "
                             "by chunk")
        ctm, known = self.model.ctm, (next_tokens >= 0) & lived.real
        _, surprise = self.model.score(lived.hidden, next_tokens.clamp(min=0))
        reward = dopamine(surprise, ctm.mean_surprise)
        if not torch.isfinite(lived.delta_alpha).all() or not torch.isfinite(surprise).all():
            raise ValueError("expected finite activations, found some that are not: the session "
                             "ends here and nothing of it is written")
        after = real.flip(1).cumsum(1).flip(1) - real  # (B, n) tokens lived since, within this call
        share = (reward * known)[:, :, None, None] * ctm.gamma(after)
        self._mark(lived, next_tokens, eligible & known, surprise, reward)
        self._pass(n)
        self.sums = self.sums.plus(Carry((share * lived.delta_alpha).sum(1),
                                         (share * lived.delta_beta).sum(1)))
        self._renew(self.filled == self.chunk)

    def _pass(self, n: Tensor) -> None:
        """n (B,) tokens go by: what was lived before fades."""
        fade = self.model.ctm.gamma(n)
        self.sums, self.warm = self.sums.faded(fade), self.warm.faded(fade)
        self.filled, self.position = self.filled + n, self.position + n

    @torch.no_grad()
    def _mark(self, lived: Lived, next_tokens: Tensor, eligible: Tensor, surprise: Tensor,
              reward: Tensor) -> None:
        """Keep what is salient."""
        salient = salience(self.model.ctm, lived.key)
        eligible = eligible & (salient > self.threshold)
        position = self.position[:, None] + lived.real.long().cumsum(1) - 1
        marked = Marked(lived.hidden, next_tokens, lived.key, surprise, reward, salient, position,
                        lived.tick)
        for b in eligible.any(1).nonzero()[:, 0].tolist():
            here = eligible[b].nonzero()[:, 0]
            self.kept[b].append(Marked(*(x[b, here] for x in marked)))

    def _renew(self, rows: Tensor) -> None:
        """Renew m from the sums in the given rows (B,); what has not lived stays fresh."""
        self.m = torch.where(rows[:, None, None], self.sums.plus(self.warm).m(self.m), self.m)
        self.filled = self.filled.masked_fill(rows, 0)

    def close(self) -> list[Factors]:
        """End the session: the open chunk closes, and what was salient and came as news comes out,
        at most `budget` a row, strongest first."""
        if self.waiting is not None:  # a token without a successor weighs nothing
            self._pass(self.waiting.real.long().sum(1))
            self.waiting = None
        self._renew(torch.ones_like(self.filled, dtype=torch.bool))
        return [self._bounded(pieces) for pieces in self.kept]

    def snapshot(self, row: int, tokens: Tensor) -> "Snapshot":
        """How this row was thinking at its end; tokens (n,): all it read."""
        return Snapshot(*(x[row] for x in self.sums), about(self.model, tokens))

    @torch.no_grad()
    def _bounded(self, pieces: list[Marked]) -> Factors:
        ctm, device = self.model.ctm, self.m.device
        if not pieces:
            (D, S), none = ctm.c_proj.weight.shape, torch.zeros(0, device=device)
            return Factors(none.view(0, S), none.view(0, D), none, none, none, none.long(),
                           none.long())
        whole = Marked(*map(torch.cat, zip(*pieces)))
        # a value that was half expected ("pea", then "cock") is kept whole, and its end is not
        goes_on = torch.nn.functional.pad(whole.position.diff() == 1, (0, 1))
        news = ((whole.surprise >= self.expected) | goes_on).nonzero()[:, 0]
        strength = (whole.salience * whole.dopamine)[news]
        strongest = news[strength.topk(min(self.budget, len(news))).indices].sort().values
        hidden, came, key, *figures = (x[strongest] for x in whole)
        return Factors(key / math.sqrt(key.shape[1]),
                       engrams(self.model, hidden, came, whole.dopamine[strongest]), *figures)


def about(model: NanoCTM, tokens: Tensor) -> Tensor:
    """What a session is about: the mean of its token embeddings, centred on that of all words,
    tokens (n,) -> (D,)."""
    embedding = model.backbone.embed_tokens.weight
    return (embedding[tokens].float().mean(0) - embedding.float().mean(0)).detach()


def read_session(model: NanoCTM, tokens: Tensor, chunk: int = 32,
                 **settings) -> tuple[SessionMemory, list[Factors]]:
    """Read one whole session per row, tokens (B, T) with padding < 0, to its end, all of it from
    outside."""
    session = SessionMemory(model, len(tokens), chunk, **settings)
    session.read(tokens, Cache())
    return session, session.close()


# -----------------------------------------------------------------------------
# permanent: the write

@dataclass(frozen=True)
class WriteRule:
    """How sessions are written; the defaults are what `python bench.py memory` measures."""
    n0: float = 100.0           # protection of ordinary text: as many keys as this weigh on P
    ridge: float = 0.001        # lambda
    fade: float = 1.0  # mu: how much of the protection of past keys is left a session later
    cap: float = math.inf  # homeostasis: output power on ordinary text, W_m's over W_c's, at most
    norm_cap: float = math.inf  # the same for the weights: |W_m| / |W_c| (the seeds' 0.01)
    delta: bool = True          # subtract what the memory already says there
    project: bool = True        # write through P, not along the bare key
    near: float = 0.83          # a key as near a later session's (cosine, whitened) is superseded
    # of W_m and all else that is F wide: half the time of fp64, which a ridge under 1e-5 asks for
    wide: torch.dtype = torch.float32


class Projector(NamedTuple):
    """P (F, F), what of the feature space is still free to write along, as diag(free) minus t' t
    of every row t that something has taken: F x F numbers are never held."""
    free: Tensor                # (F,)
    text: Tensor                # (R, F), taken by ordinary text
    past: Tensor                # (N, F), by what was written before

    def along(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """keys (m, F) -> keys P (m, F), and how much of each row of the past they have (m, N)."""
        shared = keys @ self.past.T
        found = (keys * self.free).addmm_(keys @ self.text.T, self.text, alpha=-1)
        return found.addmm_(shared, self.past, alpha=-1), shared

    def without(self, rows: Tensor) -> "Projector":
        """What is left when these rows (n, F) are taken, too. Of more than 2 F, their triangle is
        kept: it takes the same."""
        past = torch.cat([self.past, rows])
        return self._replace(past=past if len(past) <= 2 * rows.shape[1]
                             else torch.linalg.qr(past, mode="r").R)


def text_part(ctm: CTMBlock, rule: WriteRule) -> tuple[Tensor, Tensor]:
    """n0 Sigma of features, as rows and a diagonal (CTMBlock.shared)."""
    rows, rest = ctm.shared()
    return math.sqrt(rule.n0) * rows, rule.n0 * rest


@torch.no_grad()
def empty_projector(ctm: CTMBlock, rule: WriteRule) -> Projector:
    """P of an empty memory: (D + B' B)^-1 = D^-1 - D^-1 B' (I + B D^-1 B')^-1 B D^-1
    (Woodbury 1950) of B' B + D = n0 Sigma + ridge I. fp64, on the block's device; made once for
    all memories of a rule."""
    known = rule.n0, rule.ridge
    if known not in ctm.projectors:
        rows, rest = text_part(ctm, rule)
        free = 1 / (rest + rule.ridge)
        inner = torch.eye(len(rows)).to(rows) + (rows * free) @ rows.T
        ctm.projectors[known] = Projector(free, torch.linalg.solve_triangular(
            torch.linalg.cholesky(inner), rows * free, upper=False), rows[:0])
    return ctm.projectors[known]


@dataclass(frozen=True)
class Plastic:
    """A written memory: W_m, and the P that it leaves. Both on the CPU."""
    weight: Tensor              # (D, F)
    projector: Projector | None = None  # None: to be read, not written to
    said: Tensor | None = None  # (N, D), W_m = said' past; None: it is not (fades, caps, no P)

    @classmethod
    def blank(cls, ctm: CTMBlock, rule: WriteRule = WriteRule()) -> "Plastic":
        """Nothing written yet."""
        weight = torch.zeros(len(ctm.start_z), max(ctm.config.expand, 1) * ctm.config.sync,
                             dtype=rule.wide)
        return cls(weight, Projector(*(x.to(weight) for x in empty_projector(ctm, rule))),
                   weight.T[:0])


def compact_memory(ctm: CTMBlock, plastic: Plastic, factors: Factors,
                   rule: WriteRule = WriteRule(), seen: Tensor | None = None) -> Plastic:
    """Write one session into W_m, as if token by token in the order lived; -> a new Plastic, the
    old one stays as it was. seen: `whitened` of the factors, where that is known.

    Sherman-Morrison, one key after another, is the factorisation I + K P K' = C C': row i of
    C^-1 K P is P_i k_i / C_ii, with P as it stood when token i was written, and C_ii^2 = 1 + k_i'
    P_i k_i. What key j reads of what was written along key i before it is C_ji C_ii / (C_ii^2 - 1),
    so the delta rule is one triangular solve more. ValueError, and nothing written, when anything
    is not finite.
    """
    weight = plastic.weight
    keys = addresses(ctm, factors, seen).to(weight)
    values = factors.values.double().cpu()
    if plastic.projector is None:
        raise ValueError("expected a memory with its projector, found W_m alone: it can be read and "
                         "not written to")
    same, p = torch.eye(len(keys), dtype=torch.float64), faded(ctm, plastic.projector, rule)
    toward, shared = p.along(keys)                                  # (n, F), (n, N)
    root, flawed = torch.linalg.cholesky_ex(same + keys @ toward.T)
    toward = torch.linalg.solve_triangular(root, same, upper=False).to(weight) @ toward
    gain = root.diagonal() / (root.diagonal() ** 2 - 1)
    if rule.delta:  # what earlier sessions, and earlier tokens, say there already
        told = root * gain if rule.project else (keys @ keys.T).double()
        earlier = keys @ weight.T if plastic.said is None else shared @ plastic.said
        values = torch.linalg.solve_triangular(
            same + told.tril(-1), values - earlier, upper=False, unitriangular=True)
    if rule.project:  # unit gain at its own key
        values, along = values * gain[:, None], toward
    else:
        along = keys
    values = values.to(weight)
    whole = torch.addmm(weight, values.T, along)
    weight, left = homeostasis(ctm, whole, rule), p.without(toward)
    if flawed or not torch.isfinite(weight.sum()):  # of all at once: faster than each
        raise ValueError("expected a finite memory, found one that is not: the session is not "
                         "written, all others are as before")
    as_said = (plastic.said is not None and weight is whole and rule.project and rule.fade == 1
               and len(left.past) == len(plastic.said) + len(values))
    return Plastic(weight, left, torch.cat([plastic.said, values]) if as_said else None)


def whitened(ctm: CTMBlock, factors: Factors) -> Tensor:
    """The keys, whitened: (n, S) fp32, on the block's device; addresses and bearings ask for it."""
    return factors.unit_keys().float().to(ctm.white.device) @ ctm.white.T


def addresses(ctm: CTMBlock, factors: Factors, seen: Tensor | None = None) -> Tensor:
    """Where the write finds each factor, as a question reads it: phi (n, F), fp32."""
    if not ctm.config.expand:
        return factors.unit_keys().float()
    return ctm.features(whitened(ctm, factors) if seen is None else seen, white=True).cpu()


def faded(ctm: CTMBlock, p: Projector, rule: WriteRule) -> Projector:
    """P at the beginning of a session: earlier keys, which P^-1 holds beside what text shares (L),
    count `fade` times what they did.

    P = P_0 - T' T becomes P_0 - fade T' (I - (1 - fade) T L T')^-1 T (Woodbury, twice)."""
    if rule.fade == 1 or not len(p.past):
        return p
    if not rule.fade:
        return p._replace(past=p.past[:0])
    rows, rest = (x.cpu() for x in text_part(ctm, rule))
    past = p.past.double()
    taken = (past @ rows.T) @ (past @ rows.T).T + (past * (rest + rule.ridge)) @ past.T
    left = torch.eye(len(past)).to(past) - (1 - rule.fade) * taken
    return p._replace(past=math.sqrt(rule.fade) * torch.linalg.solve_triangular(
        torch.linalg.cholesky(left), past, upper=False).to(p.free))


def bearings(seen: Tensor) -> Tensor:
    """Where each whitened key of a session points: (n, S) whole numbers in fp32, so that a product
    of two is exact in any order (S <= 4,200) and every way to the same sessions finds the same told
    anew."""
    seen = seen.cpu()
    return (63 * seen / seen.abs().amax(1, keepdim=True)).round()


def superseded(pointing: list[Tensor], near: float, since: int = 0) -> list[Tensor]:
    """Which keys of each session a later one, number `since` or after, has again: bearings (n, S)
    per session -> (n,) bool per session.

    A fact that changed is at nearly the same key and says otherwise: with both in the memory, a
    question reads some of each. A fact that is told again would take as much room as a new one.
    DESIGN §3 has no such rule, it protects them like any other; LOG.md has what that costs. Later
    means after it in the store, so what is imported counts as told last; and a key counts also
    where it is superseded in turn.
    """
    size = [len(p) for p in pointing]
    if not sum(size):
        return [torch.zeros(0, dtype=torch.bool) for _ in size]
    whole, first, gone = torch.cat(pointing), sum(size[:since]), []
    owner = torch.arange(len(size)).repeat_interleave(torch.tensor(size))
    length = whole.pow(2).sum(1).sqrt()                             # whole numbers still, and exact
    for at in range(0, len(whole), 512):
        rows, later = slice(at, at + 512), slice(max(first, at), None)
        again = whole[rows] @ whole[later].T > near * torch.outer(length[rows], length[later])
        gone.append((again & (owner[later] > owner[rows, None])).any(1))
    return list(torch.cat(gone).split(size))


def compact_sessions(ctm: CTMBlock, sessions: list[Factors],
                     rule: WriteRule = WriteRule()) -> Plastic:
    """The memory that sessions make, one after the other, without what is told anew later."""
    plastic = Plastic.blank(ctm, rule)
    seen = [whitened(ctm, f) for f in sessions]
    gone = superseded([bearings(x) for x in seen], rule.near)
    for factors, x, again in zip(sessions, seen, gone):
        plastic = compact_memory(ctm, plastic, factors.rows(~again), rule, x[~again])
    return plastic


def homeostasis(ctm: CTMBlock, weight: Tensor, rule: WriteRule) -> Tensor:
    """The weight, as much shorter as its caps ask for, its direction unchanged."""
    louder = output_change(ctm, weight) / rule.cap if math.isfinite(rule.cap) else 0.0
    larger = norm_ratio(ctm, weight) / rule.norm_cap if math.isfinite(rule.norm_cap) else 0.0
    excess = max(math.sqrt(louder), larger)
    return weight / excess if excess > 1 else weight


def output_change(ctm: CTMBlock, weight: Tensor) -> float:
    """E |W_m phi|^2 / E |W_c kappa|^2 on ordinary text: how loud the memory is next to the thought
    it is added to."""
    rows, rest = (x.cpu() for x in ctm.shared())
    own, sigma = ctm.c_proj.weight.detach().double().cpu(), ctm.key_moment.double().cpu()
    heard = (weight.double() @ rows.T).pow(2).sum() + (weight.double().pow(2) * rest).sum()
    return float(heard / (ctm.config.sync * ((own @ sigma) * own).sum()))


def norm_ratio(ctm: CTMBlock, weight: Tensor) -> float:
    """|W_m / sqrt(S)| / |W_c|: the two as they stand beside each other."""
    return float(weight.norm() / math.sqrt(ctm.config.sync)
                 / ctm.c_proj.weight.detach().double().cpu().norm())


class OrdinaryText:
    """The text by which a write is judged: a few windows of training text that come with the
    block's weights.

    Keys do not depend on the memory, so the text is thought about once, and judging a memory costs
    one product with it and the head.
    """

    def __init__(self, model: NanoCTM, tokens: Tensor | None = None):
        self.model, tokens = model, model.ctm.ordinary if tokens is None else tokens
        with torch.no_grad():
            self.ticks, self.targets = model.ticks(*model.trunk(tokens)), successors(tokens)
            self.alone = model.measure(self.ticks, self.targets)
            self.read = model.ctm.features(self.ticks.keys / math.sqrt(model.ctm.config.sync))

    @torch.no_grad()
    def by_window(self, weight: Tensor | None) -> Tensor:
        """(B,) mean nats per token of each window, at the tick read, with W_m (D, F) beside W_c,
        or without a memory."""
        thought = self.alone if weight is None else self.model.aided(
            self.ticks, self.targets, self.alone, self.read @ weight.to(self.read).T)
        return thought.nats.nanmean(1)

    def nats(self, weight: Tensor | None) -> float:
        """The same of all windows."""
        return float(self.by_window(weight).mean())


def why(store: "Store", said: list[Spoken]) -> list[dict]:
    """Who made the model say these tokens (one row): an exact split of each one's logit at the tick
    read.

    logit = E[token] . (g h / rms(h)), and h is what was thought without a memory plus what each
    session adds: over one rms, that is a sum. -> {"logit", "by_itself", "sessions": {id: share}},
    in logits.
    """
    if not said:
        return []
    backbone, root, splits = store.model.backbone, math.sqrt(said[0].key.shape[-1]), []
    parts = store.told_by(torch.cat([s.key for s in said]) / root).double()     # (sessions, n, D)
    for i, s in enumerate(said):
        heard = s.hidden[0].double()
        gain = (backbone.norm.weight * backbone.embed_tokens.weight[int(s.token)]).double()
        read = gain * torch.rsqrt(heard.pow(2).mean() + backbone.norm.eps)
        shares = (parts[:, i].to(read) @ read).tolist()
        splits.append({"logit": float(heard @ read),
                       "by_itself": float(s.unaided[0].double() @ read),
                       "sessions": dict(zip((e["id"] for e in store.entries), shares))})
    return splits


# -----------------------------------------------------------------------------
# the store: what outlives the process

FORMAT = 3                                  # of the manifest and of exported files
BLOCK = 256
UNFINISHED = ("memory.safetensors.new", "manifest.json.new")        # before they are put in place
# what JSON raises that is not what it claims; ValueError: UTF-8 too
DAMAGE = (KeyError, TypeError, ValueError, OverflowError, RecursionError)


class Snapshot(NamedTuple):
    """How a session was thinking when it ended, and what it was about."""
    alpha: Tensor               # (2, S) fp32
    beta: Tensor                # (2, S)
    about: Tensor               # (D,) mean embedding of its tokens


class Written(NamedTuple):
    """A memory, and what going on from it takes."""
    plastic: Plastic
    pointing: list[Tensor] | tuple = ()     # of each session, its bearings (n, S)
    anew: list[Tensor] | tuple = ()         # (n,) bool: which of its keys a later session has again
    done: int = 0               # so many sessions fill whole blocks;
    full: Plastic | None = None  # the memory that these make


class Store:
    """Sessions on disk, and the memory W_m that they make; the only way to the disk.

        folder/manifest.json                format, base model, living sessions in order, the sha256
                                            of their files and its own
        folder/sessions/ID.safetensors      Factors;  folder/snapshots/ID.safetensors  Snapshot;  no
                                            text anywhere
        folder/memory.safetensors           W_m, so that a reader need not compute it; one that is
                                            not as the manifest says is computed from the factors

    The manifest is the only commit point: files are written and flushed first, then it is replaced,
    so that a crash at any instant leaves the old store or the new one. One writer at a time
    (flock); read_only takes no lock and writes nothing. ValueError in one line for a folder that is
    not a store, another model's store, a damaged file, a second writer.
    """

    def __init__(self, folder: str | Path, model: NanoCTM, read_only: bool = False,
                 rule: WriteRule = WriteRule(), max_drift: float = 0.5,
                 text: OrdinaryText | None = None, forget: str = ""):
        """forget: sessions to drop unread, damaged ones too: an id, an unambiguous beginning of it,
        or "all"."""
        self.folder, self.model, self.read_only = Path(folder), model, read_only
        self.rule, self.max_drift = rule, max_drift
        self.base = f"{backbone_hash(model)}-{fingerprint(model.ctm)}"
        self._text, self._lock = text, None
        self._memory, self._nats, self._weight = None, None, None
        if self._holds_something() and not (self.folder / "manifest.json").is_file():
            raise ValueError(f"expected a memory or a new folder at {self.folder}, found other "
                             "files: choose another --memory_dir")
        if read_only and not self._holds_something():
            raise ValueError(f"expected a memory at {self.folder}, found none: tell it something "
                             "with --memory on first")
        if not read_only:
            self._take_lock()
        try:
            # asked again, now that nobody else can write
            if not read_only and not self._holds_something():
                self._replace_manifest([], None)
            written = self._read_all(forget)
            if self.dropped:
                self._replace_manifest(self.entries, self._now)
            else:
                self._weight = self._read_weight(written)
            if not read_only:  # only once all that is named was found whole
                self._remove_orphans()
        except BaseException:
            self.close()
            raise

    def _read_all(self, forget: str) -> str:
        """Manifest and sessions, but for those to forget; -> the seal of the W_m they make. Where a
        writer has replaced the manifest meanwhile, a reader begins again."""
        self.entries, written = manifest = self._read_manifest()
        self.dropped = self._chosen(forget) if forget else []
        self.entries = [e for e in self.entries if e not in self.dropped]
        try:
            pairs = [(self._read(Factors, e), self._read(Snapshot, e)) for e in self.entries]
        except ValueError:
            if self.read_only and self._read_manifest() != manifest:
                return self._read_all(forget)
            raise
        self.factors = [factors for factors, _ in pairs]
        return written

    def _holds_something(self) -> bool:
        return (self.folder.is_dir()
                and any(p.name not in ("lock", *UNFINISHED) for p in self.folder.iterdir()))

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()                                      # releases the flock
            self._lock = None

    @property
    def text(self) -> OrdinaryText:
        """Thought about when the first write is to be judged: a reader never pays for it."""
        self._text = self._text or OrdinaryText(self.model)
        return self._text

    # -- what it knows

    def plastic(self) -> Tensor | None:
        """W_m (D, F) fp32 on the model's device; None where nothing is told."""
        if not self.entries:
            return None
        unread = self._memory is not None or self._weight is None
        weight = self._now.plastic.weight.float() if unread else self._weight
        return weight.to(self.model.ctm.start_z.device)

    @property
    def _now(self) -> "Written":
        """What the living sessions make, computed when somebody asks for more than W_m."""
        if self._memory is None:
            self._memory = self._written(self.factors)
        return self._memory

    def nearest(self, about: Tensor, top_k: int = 1, half_life_s: float = 30 * 86400.0,
                threshold: float = 0.5) -> Carry | None:
        """What a session that begins like `about` (D,) may go on from, sums (1, 2, S): the mean of
        the nearest snapshots', weighted by the softmax of cosine similarity x 2^(-age / half-life);
        None when nothing is as near as the threshold."""
        snapshots = [self._read(Snapshot, e) for e in self.entries]
        if not snapshots:
            return None
        near = torch.stack([torch.cosine_similarity(s.about, about.float().cpu(), dim=0)
                            for s in snapshots])
        age = torch.tensor([max(0.0, time.time() - e["told_at"]) for e in self.entries])
        score, index = (near * torch.exp2(-age / half_life_s)).topk(min(top_k, len(snapshots)))
        kept = score >= threshold
        if not kept.any():
            return None
        weight, chosen = score[kept].softmax(0)[:, None, None], index[kept].tolist()
        return Carry(*((weight * torch.stack([getattr(snapshots[i], name) for i in chosen]))
                       .sum(0, keepdim=True).to(self.model.ctm.start_z.device)
                       for name in Carry._fields))

    def told_by(self, keys: Tensor) -> Tensor:
        """What each living session adds where memory reads keys (n, S) of unit length: (sessions,
        n, D), whose sum is W_m phi(k)."""
        plastic, parts = Plastic.blank(self.model.ctm, self.rule), []
        read = self.model.ctm.features(keys).cpu()
        for factors, anew in zip(self.factors, self._now.anew):
            after = compact_memory(self.model.ctm, plastic, factors.rows(~anew), self.rule)
            parts.append(read @ (after.weight - plastic.weight).to(read).T)
            plastic = after
        return torch.stack(parts) if parts else read.new_zeros(0, len(read), len(plastic.weight))

    # -- what changes it

    def commit(self, factors: Factors, snapshot: Snapshot, tokens: int) -> dict:
        """Write one session of `tokens` tokens into the memory and onto the disk; -> its manifest
        entry. All or nothing.

        ValueError, and the store as before, for an empty session, a value that is not finite, or a
        memory that would cost ordinary text more than `max_drift` nats.
        """
        if not tokens:
            raise ValueError("expected a session with something in it, found an empty one: nothing "
                             "is written")
        factors = Factors(*(x.detach().cpu() for x in factors)).rounded()
        snapshot = Snapshot(*(x.detach().float().cpu() for x in snapshot))
        if not all(torch.isfinite(x).all() for x in (*factors, *snapshot)):
            raise ValueError("expected a finite session, found values that are not: nothing is "
                             "written, the store is as before")
        now = self._written([*self.factors, factors], self._memory)
        before, after = self._judged(now)
        entry = {"id": "", "told_at": time.time(), "tokens": tokens, "factors": len(factors.keys),
                 "text_nats": [round(before, 4), round(after, 4)]}
        self._add([(entry, factors, snapshot)], now)
        self._memory, self._nats = now, after
        return entry

    def _judged(self, now: "Written") -> tuple[float, float]:
        """Nats of ordinary text with the memory as it is, and as it would be. ValueError where
        `max_drift` is passed."""
        if self._nats is None:
            self._nats = self.text.nats(self.plastic())
        before = self._nats
        after = self.text.nats(now.plastic.weight)
        if not after - before <= self.max_drift:
            raise ValueError("expected sessions that cost ordinary text at most "
                             f"{self.max_drift} nats, found {after - before:+.2f} "
                             f"({before:.2f} to {after:.2f}): nothing is written; raise "
                             "--max_drift to insist")
        return before, after

    def forget(self, which: str) -> int:
        """Forget one session by its id (or an unambiguous beginning of it), or "all"; -> how many.
        The rest is written anew."""
        gone = self._chosen(which)
        living = [(e, f) for e, f in zip(self.entries, self.factors) if e not in gone]
        now = self._written([f for _, f in living])
        self._replace_manifest([e for e, _ in living], now)
        self.entries, self.factors, self._memory, self._nats = (
            [e for e, _ in living], [f for _, f in living], now, None)
        self._remove_orphans()
        return len(gone)

    def _chosen(self, which: str) -> list[dict]:
        return self.entries if which == "all" else [self.find(which)]

    def find(self, which: str) -> dict:
        """The manifest entry of a session. ValueError when there is none, or more than one that
        begins so."""
        found = [e for e in self.entries if which and e["id"].startswith(which)]
        exact = [e for e in found if e["id"] == which]
        if len(exact or found) != 1:
            known = ", ".join(e["id"] for e in self.entries[-5:]) or "none yet"
            raise ValueError(f"expected the id of a remembered session, found {which!r} "
                             f"({len(found)} begin so): known are {known}")
        return (exact or found)[0]

    def show(self, which: str) -> tuple[dict, Factors, Tensor]:
        """-> a session's entry, its n factors, and (n,) bool: which of them were told anew since"""
        at = self.entries.index(self.find(which))
        return self.entries[at], self.factors[at], self._now.anew[at]

    def export(self, file: str | Path) -> int:
        """Write all living sessions into one safetensors file; -> how many. What the file held
        before stays until the new one is whole."""
        file = Path(file)
        if file.resolve().is_relative_to(self.folder.resolve()) or not file.parent.is_dir():
            raise ValueError(f"expected a file to export to, in a folder that exists and outside "
                             f"{self.folder}, found {file}: name another")
        tensors = {}
        for i, (entry, factors) in enumerate(zip(self.entries, self.factors)):
            for name, part in (("factors", factors), ("snapshot", self._read(Snapshot, entry))):
                tensors |= {f"{i}.{name}.{k}": v.contiguous() for k, v in part._asdict().items()}
        about = {"format": str(FORMAT), "base": self.base, "sessions": json.dumps(self.entries)}
        fresh = file.with_name(f"{file.name}.new")
        try:
            _write_durably(fresh, to_bytes(tensors, about))
            fresh.replace(file)
        finally:
            fresh.unlink(missing_ok=True)
        return len(self.entries)

    def import_from(self, file: str | Path) -> int:
        """Add the sessions of an exported file, after those that are here, as what was told last;
        -> how many were new. All or nothing."""
        tensors, about = read_tensors(Path(file))
        if (not about.get("format", "").isdecimal() or int(about["format"]) > FORMAT
                or "sessions" not in about):
            raise ValueError(f"{file}: expected an exported memory of format {FORMAT}, found "
                             f"{about.get('format')!r}: export it with this version, or update")
        if about.get("base") != self.base:
            raise ValueError(f"{file}: expected a memory of these weights ({self.base}), found one "
                             f"of {about.get('base')}: keys of another model mean nothing here")
        try:                                                        # list.copy: nothing but a list
            entries = [_checked_entry(e) for e in list.copy(json.loads(about["sessions"]))]
        except DAMAGE as e:
            raise ValueError(f"{file}: expected the list of its sessions, found a damaged one "
                             f"({type(e).__name__}): export it again") from None
        new, present = [], {(e["sha256"], e["snapshot_sha256"]) for e in self.entries}
        for i, entry in enumerate(entries):
            factors, snapshot = (
                self._checked(kind, {k: tensors[name].clone() for k in kind._fields
                                     if (name := f"{i}.{part}.{k}") in tensors},
                              f"{file}, session {i}")
                for kind, part in ((Factors, "factors"), (Snapshot, "snapshot")))
            found = tuple(map(sha256, _blobs(factors, snapshot)))
            if found != (entry["sha256"], entry["snapshot_sha256"]):
                raise ValueError(f"{file}, session {i}: expected it as it was exported, found it "
                                 "changed: export it again")
            if found not in present:
                fresh = {k: entry[k] for k in ("told_at", "tokens", "text_nats")}
                new.append(({"id": "", **fresh, "factors": len(factors.keys)}, factors, snapshot))
        now = self._written([*self.factors, *(f for _, f, _ in new)], self._memory)
        _, after = self._judged(now)
        self._add(new, now)
        self._memory, self._nats = now, after
        return len(new)

    # -- the disk

    def _written(self, sessions: list[Factors], before: "Written | None" = None) -> "Written":
        """The memory that these sessions make; those in `before` came first.

        A block is one factorisation, of BLOCK factors or more, or a session where the rule looks at
        each: opening a thousand sessions takes seconds, and every way to the same sessions ends in
        the same bits. Goes on from the blocks of `before`, unless what they hold is told anew.
        """
        blank = Plastic.blank(self.model.ctm, self.rule)
        before = before or Written(blank)
        if not sessions:
            return before
        known = len(before.anew)
        pointing = [*before.pointing,
                    *(bearings(whitened(self.model.ctm, f)) for f in sessions[known:])]
        anew = superseded(pointing, self.rule.near, known)
        for i, gone in enumerate(before.anew):
            anew[i] = anew[i] | gone
        same = all(map(torch.equal, anew[:before.done], before.anew))
        done, full = (before.done, before.full or blank) if same else (0, blank)
        each = (self.rule.fade < 1 or math.isfinite(self.rule.cap)
                or math.isfinite(self.rule.norm_cap))
        block: list[Factors] = []
        for i in range(done, len(sessions)):
            block.append(sessions[i].rows(~anew[i]))
            if each or sum(len(f.keys) for f in block) >= BLOCK:
                full, done, block = self._compacted(full, block), i + 1, []
        plastic = self._compacted(full, block) if block else full
        return Written(plastic, pointing, anew, done, full)

    def _compacted(self, plastic: Plastic, block: list[Factors]) -> Plastic:
        return compact_memory(self.model.ctm, plastic, Factors(*map(torch.cat, zip(*block))),
                              self.rule)

    def _add(self, sessions: list[tuple[dict, Factors, Snapshot]], now: "Written") -> None:
        """Files first, flushed; then the manifest; then what this object knows. now: the memory
        that all of them make."""
        if self.read_only:
            raise ValueError("expected a store open for writing, found --memory=read-only: use "
                             "--memory=on to keep this")
        entries, taken = list(self.entries), {e["id"] for e in self.entries}
        for entry, factors, snapshot in sessions:
            blobs = dict(zip(("sessions", "snapshots"), _blobs(factors, snapshot)))
            entry["sha256"], entry["snapshot_sha256"] = map(sha256, blobs.values())
            name = sha256(blobs["sessions"] + blobs["snapshots"])[:12]
            entry["id"] = (name if name not in taken else next(
                n for i in itertools.count(2) if (n := f"{name}-{i}") not in taken))
            taken.add(entry["id"])
            for kind, blob in blobs.items():
                (self.folder / kind).mkdir(mode=0o700, exist_ok=True)
                _write_durably(self.folder / kind / f"{entry['id']}.safetensors", blob)
                _flush(self.folder / kind)
            entries.append(entry)
        self._replace_manifest(entries, now)
        self.entries, self.factors = entries, self.factors + [f for _, f, _ in sessions]

    def _replace_manifest(self, entries: list[dict], now: "Written | None") -> None:
        if self.read_only:
            raise ValueError("expected a store open for writing, found --memory=read-only: use "
                             "--memory=on to change it")
        blob = to_bytes({"weight": now.plastic.weight.float()}) if entries else b""
        about = {"format": FORMAT, "base": self.base, "sessions": entries,
                 "memory": self._seal_of(blob)}
        fresh, manifest = (self.folder / name for name in UNFINISHED)
        for path, content in ((fresh, blob), (manifest, _sealed(about))):
            _write_durably(path, content)
        # before what is forgotten is gone from the manifest, it is gone from W_m
        (self.folder / "memory.safetensors").unlink(missing_ok=True)
        manifest.replace(self.folder / "manifest.json")
        with contextlib.suppress(OSError):  # the session is kept; its W_m will be computed again
            fresh.replace(self.folder / "memory.safetensors")
        _flush(self.folder)

    def _seal_of(self, blob: bytes) -> str:
        """By which W_m is known again: its file, the rule, what it is read along, and FORMAT, to be
        raised when the same rule comes to mean another W_m."""
        ctm = self.model.ctm
        read = b"".join(x.cpu().numpy().tobytes() for x in (ctm.white, ctm.signs))
        return sha256(repr((FORMAT, self.rule)).encode() + read + blob)

    def _read_weight(self, seal: str) -> Tensor | None:
        """W_m as the manifest has it; None where there is none, or another."""
        path = self.folder / "memory.safetensors"
        blob = path.read_bytes() if path.is_file() else b""
        return from_bytes(blob)["weight"] if blob and self._seal_of(blob) == seal else None

    def _read_manifest(self) -> tuple[list[dict], str]:
        """-> the living sessions, and the seal of the W_m that they make."""
        path = self.folder / "manifest.json"
        try:
            raw = path.read_bytes()
            manifest = json.loads(raw)
            del manifest["sha256"]
            known, base = int(manifest["format"]), str(manifest["base"])
            entries = [_checked_entry(e) for e in manifest["sessions"]]
        except (OSError, *DAMAGE) as e:
            raise ValueError(f"{path}: expected a whole manifest, found a damaged one "
                             f"({type(e).__name__}): restore it from a copy") from None
        if raw != _sealed(manifest):  # not a byte is otherwise than it was written
            raise ValueError(f"{path}: expected the manifest as it was written, found it changed: "
                             "restore it from a copy")
        if known != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT}, found {known}: update nanoCTM, or "
                             "export the memory with the version that made it")
        if base != self.base:
            raise ValueError(f"{path}: expected a memory of these weights ({self.base}), found one "
                             f"of {base}: name another --memory_dir, or the weights it belongs to")
        return entries, str(manifest.get("memory", ""))

    def _read(self, kind: type, entry: dict) -> Factors | Snapshot:
        """A session's Factors or Snapshot, from the very bytes that the manifest names."""
        folder, seal = {Factors: ("sessions", "sha256"),
                        Snapshot: ("snapshots", "snapshot_sha256")}[kind]
        path = self.folder / folder / f"{entry['id']}.safetensors"
        if not path.is_file() or sha256(blob := path.read_bytes()) != entry[seal]:
            raise ValueError(f"{path}: expected the file that the manifest names, found "
                             f"{'another' if path.is_file() else 'none'}: it is damaged; restore "
                             f"it from a copy, or give it up with --forget={entry['id']}")
        return self._checked(kind, from_bytes(blob), str(path))

    def _checked(self, kind: type, tensors: dict[str, Tensor], where: str
                 ) -> Factors | Snapshot:
        """Tensors of a file as what they claim to be: names, shapes and types agree, and all is
        finite."""
        D, S = self.model.ctm.c_proj.weight.shape
        n = tensors["keys"].numel() // S if "keys" in tensors else 0
        shapes = ({"keys": (n, S), "values": (n, D), **{k: (n,) for k in Factors._fields[2:]}}
                  if kind is Factors else {"alpha": (2, S), "beta": (2, S), "about": (D,)})
        types = {"keys": torch.int8, "values": torch.float16, "position": torch.int64,
                 "tick": torch.int64}
        right = tensors.keys() == shapes.keys() and all(
            tuple(tensors[k].shape) == shapes[k]
            and tensors[k].dtype == types.get(k, torch.float32) for k in shapes)
        if not right or not all(torch.isfinite(x).all() for x in tensors.values()):
            raise ValueError(f"{where}: expected finite tensors of this model's shapes, found "
                             "others: it is damaged or foreign")
        return kind(**tensors)

    def _remove_orphans(self) -> None:
        """Files that no manifest names: left by a crash before it was replaced, or forgotten."""
        living = {f"{e['id']}.safetensors" for e in self.entries}
        for kind in ("sessions", "snapshots"):
            for path in (self.folder / kind).glob("*"):
                if path.name not in living:
                    path.unlink()
        for name in UNFINISHED:
            (self.folder / name).unlink(missing_ok=True)

    def _take_lock(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            self._lock = open(self.folder / "lock", "a+")
        except OSError as e:
            raise ValueError(f"expected a folder to write to at {self.folder}, found {e.strerror}: "
                             "choose another --memory_dir, or --memory=read-only") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self.close()
            raise ValueError(f"expected to be the only writer of {self.folder}, found process "
                             f"{holder} writing: end it, or use --memory=read-only") from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()


def sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def _checked_entry(entry: dict) -> dict:
    """A session's line in the manifest, as it should be; one of DAMAGE otherwise."""
    right = (all(isinstance(entry[k], str) for k in ("id", "sha256", "snapshot_sha256"))
             and re.fullmatch("[0-9a-f]+(-[0-9]+)?", entry["id"])
             and all(type(entry[k]) is int and entry[k] >= 0 for k in ("tokens", "factors"))
             and len(entry["text_nats"]) == 2
             and all(math.isfinite(x) for x in (entry["told_at"], *entry["text_nats"])))
    if not right:
        raise ValueError("a session's entry is not as it was written")
    return entry


def _sealed(about: dict) -> bytes:
    """A manifest as it stands on the disk, with the sha256 of what it says."""
    return json.dumps({"sha256": sha256(json.dumps(about).encode())} | about, indent=1).encode()


def _blobs(factors: Factors, snapshot: Snapshot) -> tuple[bytes, bytes]:
    """A session's two files."""
    return tuple(to_bytes({k: v.contiguous() for k, v in part._asdict().items()})
                 for part in (factors, snapshot))


def _write_durably(path: Path, blob: bytes) -> None:
    with open(path, "wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
