"""A Qwen3 whose last feed-forward layer is a Continuous Thought Machine.

The last decoder layer computes  h = x + Attn(norm1(x)),  u = norm2(h)  and returns  h + CTM(u)  in
place of  h + FFN(u). The CTM block thinks K ticks about every token: a recurrent synapse network
mixes all D neurons, private two-layer networks read each neuron's own recent past, and what is
read out is not activity but *synchronisation*: how pairs of neurons have moved together over the
ticks. Every tick makes its own prediction; the most certain one is read.

Left out on purpose: training (train.py), what a session remembers and writes (memory.py), Triton
kernels. Nothing in the recurrence reads what the block puts out, so keys do not depend on `c_proj`
or on a memory written beside it.

Sources: Continuous Thought Machines (arXiv:2505.05522), Qwen3 (arXiv:2505.09388), rotary embeddings
(arXiv:2104.09864), arc-cosine kernels (Cho & Saul, NIPS 2009).

Letters: B batch, T tokens, D width = neurons, K ticks, M history, S sync channels, F features that
a memory reads, H heads, V vocabulary, N = B*T.
"""
import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from itertools import repeat
from pathlib import Path
from typing import Iterator, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


# -----------------------------------------------------------------------------
# the backbone: Qwen3, keyed like the Hugging Face checkpoint

@dataclass(frozen=True)
class BackboneConfig:
    """Shape of a Qwen3, under the names of its `config.json`; the defaults are Qwen3-0.6B."""
    vocab_size: int = 151936
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 40960

    @classmethod
    def from_json(cls, folder: Path) -> "BackboneConfig":
        """Read a Hugging Face `config.json`; RoPE's base may stand at its top or inside
        `rope_parameters`."""
        try:
            raw = json.loads((folder / "config.json").read_text())
        except ValueError as e:
            raise ValueError(f"{folder}: expected JSON in config.json, found a damaged file ({e}): "
                             "download it again") from None
        if raw.get("model_type") != "qwen3" or not raw.get("tie_word_embeddings", False):
            raise ValueError(f"{folder}: expected a qwen3 checkpoint with a tied head, found "
                             f"model_type {raw.get('model_type')!r}, tie_word_embeddings "
                             f"{raw.get('tie_word_embeddings')}")
        raw.setdefault("rope_theta",
                       (raw.get("rope_parameters") or {}).get("rope_theta", cls.rope_theta))
        return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})

    def to_json(self) -> dict:
        shape = {k: v for k, v in asdict(self).items() if k != "rope_theta"}
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
                "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta}, **shape}


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; the statistics in fp32, the product in x's own
    dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * rms(x.float(), self.eps).to(x.dtype)


class RMS(torch.autograd.Function):
    """x scaled to unit root mean square over its last axis. Its derivative is made by hand, since
    autograd's reads and writes twice as much, which is what such a thing costs."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(y := x * scale, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(scale), None


def rms(x: Tensor, eps: float) -> Tensor:
    return RMS.apply(x, eps)


def rope_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions (B, T) -> cos, sin, each (B, 1, T, head_dim) fp32. Frequencies are built in fp32,
    never rounded."""
    inverse = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
                        / head_dim)
    angles = (positions[:, None, :, None].float() * inverse).repeat(1, 1, 1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, H, T, head_dim), the two halves of a head paired as in Qwen."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


@dataclass(frozen=True)
class Places:
    """Where the tokens of one call stand: rotary angles and who may look at whom."""
    cos: Tensor                 # (B, 1, T, head_dim)
    sin: Tensor
    allowed: Tensor | None      # (B, 1, T, T_all) bool; None: all
    causal: bool = False        # only the past and oneself

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention of q (B, H, T, d) over k, v (B, H_kv, T_all, d) -> (B, T, H * d)."""
        out = F.scaled_dot_product_attention(q, k, v, self.allowed, is_causal=self.causal,
                                             enable_gqa=k.shape[1] != q.shape[1])
        return out.transpose(1, 2).flatten(2)

    def at(self, index: Tensor) -> "Places":
        """The same for a selection of the queries: index (B, n), of a call without a past."""
        B, n = index.shape
        def chosen(x: Tensor) -> Tensor:                            # (B, 1, T, d) -> (B, 1, n, d)
            return x.expand(B, -1, -1, -1).gather(
                2, index[:, None, :, None].expand(B, 1, n, x.shape[-1]))
        if self.allowed is None:
            allowed = (torch.arange(self.cos.shape[2], device=index.device)
                       <= index[:, None, :, None])
        else:
            allowed = chosen(self.allowed)
        return Places(chosen(self.cos), chosen(self.sin), allowed)


def heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, H * d) -> (B, T, H, d)"""
    return x.unflatten(-1, (-1, head_dim))


class Attention(nn.Module):
    """Qwen3's grouped-query attention with an RMSNorm on every query and key head."""

    def __init__(self, c: BackboneConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x: Tensor, places: Places, past: "KV | None") -> tuple[Tensor, "KV"]:
        q = self.q_norm(heads(self.q_proj(x), self.head_dim)).transpose(1, 2)
        k = self.k_norm(heads(self.k_proj(x), self.head_dim)).transpose(1, 2)
        v = heads(self.v_proj(x), self.head_dim).transpose(1, 2)
        kv = KV(rotate(k, places.cos, places.sin), v).after(past)
        return self.o_proj(places.attend(rotate(q, places.cos, places.sin), *kv)), kv


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: BackboneConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, c: BackboneConfig):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), FeedForward(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Backbone(nn.Module):
    """Qwen3 up to, but not including, the last layer's feed-forward half, which belongs to the
    graft's owner."""

    def __init__(self, c: BackboneConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def initialise(self) -> None:
        """Weights for training from nothing, with a head start on in-context recall.

        A small transformer is slow to find that it should look for the same name (the
        relation-level plateau). Both halves of that circuit are here from the start: the first
        layer's heads look 1, 2, 3, ... tokens back, and in later layers W_q = W_k, so that heads
        begin by matching tokens. Everything may be unlearned. Ideas: previous-token and induction
        heads (arXiv:2209.11895), mimetic initialisation (arXiv:2305.09828).
        """
        c = self.config
        for name, p in self.named_parameters():
            if p.dim() == 2:
                closing = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=(0.02 if "embed" in name
                                        else p.shape[1] ** -0.5 * (0.5 if closing else 1.0)))
        for layer in self.layers[1:]:
            k = layer.self_attn.k_proj.weight.data.view(
                c.num_key_value_heads, 1, c.head_dim, c.hidden_size)
            group = c.num_attention_heads // c.num_key_value_heads
            layer.self_attn.q_proj.weight.data.copy_(
                k.expand(-1, group, -1, -1).reshape(-1, c.hidden_size))
        # A constant first channel (which a tied softmax does not see) gives queries and keys a
        # fixed part in the fast half of the rotary frequencies; turning a query by -n positions
        # makes its head look n tokens back.
        self.embed_tokens.weight.data[:, 0] = 0.08
        fixed = torch.cat([torch.ones(c.head_dim // 4),
                           torch.zeros(c.head_dim - c.head_dim // 4)])[None, None, None]
        back = -torch.arange(1, c.num_attention_heads + 1)[None]
        turned = rotate(fixed, *rope_angles(back, c.head_dim, c.rope_theta))  # (1, 1, H, head_dim)
        first = self.layers[0].self_attn
        first.q_proj.weight.data[:, 0] = 2 * turned.flatten()
        first.k_proj.weight.data[:, 0] = 2 * fixed.flatten().repeat(c.num_key_value_heads)

    def forward(self, tokens: Tensor, places: Places, cache: "Cache"
                ) -> tuple[Tensor, Tensor, list["KV"]]:
        """tokens (B, T) -> h (B, T, D) after the last attention, u = norm2(h), and every layer's
        keys and values."""
        x, kept = self.embed_tokens(tokens.clamp(min=0)), []
        for i, layer in enumerate(self.layers):
            out, kv = layer.self_attn(layer.input_layernorm(x), places,
                                      cache.layers[i] if cache.layers else None)
            x = x + out
            u = layer.post_attention_layernorm(x)
            kept.append(kv)
            if i < len(self.layers) - 1:
                x = x + layer.mlp(u)
        return x, u, kept


# -----------------------------------------------------------------------------
# what decoding keeps

class KV(NamedTuple):
    k: Tensor                   # (B, H, T_all, d), rotated
    v: Tensor

    def after(self, past: "KV | None") -> "KV":
        return (self if past is None
                else KV(torch.cat([past.k, self.k], 2), torch.cat([past.v, self.v], 2)))


@dataclass(frozen=True)
class Cache:
    """Keys and values of the backbone and of the block's own attention, and which past tokens were
    real."""
    layers: list[KV] | None = None
    block: KV | None = None
    real: Tensor | None = None          # (B, T_past) bool; padding is False

    def places(self, tokens: Tensor, head_dims: tuple[int, int], theta: float
               ) -> tuple[Places, Places, Tensor]:
        """Positions count real tokens per row. -> for the backbone, for the block, the mask with
        these tokens added."""
        now = tokens >= 0
        real = now if self.real is None else torch.cat([self.real, now], 1)
        T, T_all = tokens.shape[1], real.shape[1]
        positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, -T:]
        allowed = None
        # of rows that end in padding nothing real looks at it, and what it sees itself is no matter
        follows = T == T_all and bool((real[:, 1:] <= real[:, :-1]).all())
        if not (follows or T == 1 and bool(real.all())):
            before = torch.ones(T, T_all, dtype=torch.bool, device=tokens.device).tril(T_all - T)
            itself = torch.eye(T, dtype=torch.bool, device=tokens.device)
            allowed = before & real[:, None, :]
            allowed[:, :, -T:] |= itself  # a pad sees itself, or its softmax would be empty
            allowed = allowed[:, None]
        causal = allowed is None and T > 1
        trunk, block = (Places(*rope_angles(positions, d, theta), allowed, causal)
                        for d in head_dims)
        return trunk, block, real


# -----------------------------------------------------------------------------
# the CTM block

@dataclass(frozen=True)
class ThoughtConfig:
    """Shape of the CTM block; the defaults are the graft of Qwen3-0.6B."""
    ticks: int = 32             # K
    history: int = 16           # M
    sync: int = 512             # S
    nlm_hidden: int = 32
    unet_step: int = 128        # widths of the synapse network fall by this much per layer
    bottleneck: int = 16
    head_dim: int = 128
    expand: int = 6             # F / S: features of a key that memory reads; 0: the key itself


class UNet(nn.Module):
    """Synapses: 2D -> ... -> bottleneck -> ... -> D; every layer up also reads the layer down of
    its own width.

    x (..., 2D) -> (..., D). SiLU throughout, LayerNorm after each layer up.
    """

    def __init__(self, width: int, c: ThoughtConfig):
        super().__init__()
        widths = [*range(2 * width, 0, -c.unet_step), c.bottleneck]
        rising = [*widths[-2:0:-1], width]  # mirrored, but the top layer returns to D
        self.down = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        entering = [c.bottleneck] + [2 * w for w in rising[:-1]]    # from below, and across
        self.up = nn.ModuleList(nn.Linear(a, b) for a, b in zip(entering, rising))
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in rising)
        for layer in [*self.down, *self.up]:                        # 1.7: what SiLU takes away
            nn.init.normal_(layer.weight, std=1.7 * layer.in_features ** -0.5)
            nn.init.zeros_(layer.bias)  # the input must show through 2 L layers, not biases

    def forward(self, x: Tensor) -> Tensor:
        across = []
        for layer in self.down:
            x = F.silu(layer(x))
            across.append(x)
        across.pop()                                                # the bottleneck itself
        for i, (layer, norm) in enumerate(zip(self.up, self.norms)):
            x = norm(F.silu(layer(x if i == 0 else torch.cat([x, across.pop()], -1))))
        return x


class NeuronLevelModel(nn.Module):
    """Private weights for every neuron: GLU(W2_d GLU(W1_d A_d)). A (D, M, N) -> (D, N)."""

    def __init__(self, neurons: int, c: ThoughtConfig):
        super().__init__()
        h = c.nlm_hidden
        self.w1 = nn.Parameter(private_uniform(neurons, c.history, 2 * h))
        self.b1 = nn.Parameter(torch.zeros(neurons, 1, 2 * h))
        self.w2 = nn.Parameter(private_uniform(neurons, h, 2))
        self.b2 = nn.Parameter(torch.zeros(neurons, 1, 2))

    def forward(self, trace: Tensor) -> Tensor:
        b1, w1, b2, w2 = (x.to(trace.dtype).mT for x in (self.b1, self.w1, self.b2, self.w2))
        hidden = F.glu(torch.baddbmm(b1, w1, trace), 1)
        return F.glu(torch.baddbmm(b2, w2, hidden), 1).squeeze(1)


def private_uniform(neurons: int, fan_in: int, fan_out: int) -> Tensor:
    """(D, in, out) uniform weights of variance 1 / in. The neuron axis is never a fan: it would
    make all neurons alike."""
    return (torch.rand(neurons, fan_in, fan_out) * 2 - 1) * math.sqrt(3 / fan_in)


class Sync(nn.Module):
    """One synchronisation read-out: S pairs of neurons, each with its decay r, prior weight rho and
    carried mean m.

        alpha_k = r alpha_{k-1} + z[left] z[right],   beta_k = r beta_{k-1} + 1
        y_k = (alpha_k + rho m) / sqrt(beta_k + rho)
    """

    def __init__(self, neurons: int, c: ThoughtConfig):
        super().__init__()
        for side in ("left", "right"):  # whole permutations: every neuron takes part alike
            turns = -(-c.sync // neurons)
            self.register_buffer(
                side, torch.cat([torch.randperm(neurons) for _ in range(turns)])[:c.sync])
        self.decay = nn.Parameter(torch.rand(c.sync) * 2)           # r from 1 down to 0.14
        self.rho_raw = nn.Parameter(torch.full((c.sync,), -1.0))    # softplus(-1) = 0.31

    def pair(self, z: Tensor) -> Tensor:
        """z (..., D) -> products of the S pairs (..., S), fp32: bf16 sums stop growing at 256.
        On a CPU, z of three axes costs ten times what z of two does."""
        return z.index_select(-1, self.left).float() * z.index_select(-1, self.right).float()

    def r(self) -> Tensor:
        return torch.exp(-self.decay.clamp(0, 15))

    def read(self, alpha: Tensor, beta: Tensor, m: Tensor) -> Tensor:
        rho = F.softplus(self.rho_raw)
        return (alpha + rho * m) * torch.rsqrt(beta + rho)


def coin_flips(number: int, size: int) -> Tensor:
    """(number, size) of 1 and -1 by chance, always the same ones."""
    chance = torch.Generator("cpu").manual_seed(0)
    return torch.randint(2, (number, size), generator=chance, device="cpu") * 2.0 - 1.0


class Hartley(torch.autograd.Function):
    """The orthogonal Hartley transform of x (..., n) over its last axis, in n log n: real and
    imaginary part of a Fourier transform, less one another (Bracewell 1983). It is symmetric and so
    its own derivative; that of the Fourier transform, through complex numbers, takes twice as long.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        if not x.numel():               # which MKL's FFT refuses
            return x.clone()
        y, n = torch.fft.rfft(x, norm="ortho"), x.shape[-1]
        return torch.cat([y.real - y.imag, (y.real + y.imag)[..., 1:(n + 1) // 2].flip(-1)], -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return Hartley.apply(grad)


class TickState(NamedTuple):
    """What lives within one token's thought. History is a tuple, so that ticks share what they
    remember."""
    z: Tensor                           # (B T, D) post-activations
    trace: tuple[Tensor, ...]           # M pre-activations (D, B T), oldest first
    alpha_out: Tensor                   # (B, T, S) fp32; before the first tick (B, 1, S) of zeros
    alpha_act: Tensor
    beta_out: Tensor                    # (S,) fp32, the same for every token
    beta_act: Tensor


DUE = 8.0                   # of a key where a value is due, in whitening, where text weighs 100


class CTMBlock(nn.Module):
    """The thought about each token: K ticks over u (B, T, D) -> one synchronisation key per
    tick."""

    def __init__(self, width: int, c: ThoughtConfig, eps: float):
        super().__init__()
        if width % c.head_dim:
            raise ValueError(f"the block's head_dim {c.head_dim} must divide the width {width}: "
                             f"choose a divisor of {width}")
        self.config, self.eps = c, eps
        self.q_proj = nn.Linear(c.sync, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(c.head_dim, eps), RMSNorm(c.head_dim, eps)
        self.synapse, self.nlm = UNet(width, c), NeuronLevelModel(width, c)
        self.tick_embedding = nn.Parameter(torch.randn(c.ticks, width) * 0.02)
        self.start_z = nn.Parameter(torch.randn(width) * 0.1)
        self.start_trace = nn.Parameter(torch.randn(c.history, width) * 0.1)
        self.sync_out, self.sync_act = Sync(width, c), Sync(width, c)
        self.c_proj = nn.Linear(c.sync, width, bias=False)
        nn.init.normal_(self.c_proj.weight, std=0.1 * c.sync ** -0.5)
        # what a blank slate would show, per tick: mean of y_out, and its variance, on training text
        self.register_buffer("baseline", torch.zeros(c.ticks, c.sync))
        self.register_buffer("variance", torch.ones(c.ticks, c.sync))
        self.register_buffer("mean_surprise", torch.tensor(3.0))  # nats per token of the same
        half_lives = torch.logspace(math.log2(16), math.log2(4096), c.sync, base=2).expand(2, -1)
        self.log_half_life = nn.Parameter(half_lives.log())  # of what a session carries, in tokens
        # what its key says about the text to come: measured when phase 3 ends (train.py)
        self.register_buffer("session_proj", torch.zeros(width, c.sync))
        # what phase 3 learns for memory.py: which tokens to tell the weights, and what about them
        self.salience_weight = nn.Parameter(torch.zeros(c.sync))
        self.salience_bias = nn.Parameter(torch.zeros(()))
        # U: from embedding space to the direction of what is added to h, and b, which only training
        # adds (train.telling); eta, its length
        self.engram = nn.Parameter(torch.eye(width))
        self.engram_bias = nn.Parameter(torch.zeros(width))
        self.log_eta = nn.Parameter(torch.tensor(2.0))
        # Sigma: second moment of kappa / sqrt(S) on text; the same where somebody's value is due
        self.register_buffer("key_moment", torch.eye(c.sync) / c.sync)
        self.register_buffer("due_moment", torch.eye(c.sync) / c.sync)
        self.register_buffer("ordinary", torch.zeros(4, 64, dtype=torch.long))  # judges a write
        # of what memory reads, see `whiten`: made from the two moments, so no file holds them
        self.register_buffer("white", torch.zeros(c.sync, c.sync), persistent=False)
        self.register_buffer("signs", coin_flips(c.expand, c.sync), persistent=False)
        self.register_load_state_dict_post_hook(lambda block, _: block.whiten())
        self.whiten()

    def fresh_sync(self) -> Tensor:
        """m of a fresh session: the start state's own pair products, (2, S): read-out, query."""
        return torch.stack([self.sync_out.pair(self.start_z), self.sync_act.pair(self.start_z)])

    def gamma(self, tokens: Tensor) -> Tensor:
        """Decay of the carried sums over so many tokens: (...) -> (..., 2, S)."""
        return torch.exp2(-tokens[..., None, None] * torch.exp(-self.log_half_life))

    def keys_values(self, u: Tensor, places: Places, past: KV | None) -> KV:
        k = self.k_norm(heads(self.k_proj(u), self.config.head_dim)).transpose(1, 2)
        v = heads(self.v_proj(u), self.config.head_dim).transpose(1, 2)
        return KV(rotate(k, places.cos, places.sin), v).after(past)

    def start(self, u: Tensor) -> TickState:
        B, T, D = u.shape
        # one for a whole row, so that its tokens, still alike, share the first tick's query
        zero = torch.zeros(B, 1, self.config.sync, device=u.device)
        z = self.start_z.to(u.dtype).expand(B * T, D).contiguous()
        trace = [x.to(u.dtype)[:, None].expand(D, B * T).contiguous() for x in self.start_trace]
        return TickState(z, tuple(trace), zero, zero.clone(), zero[0, 0], zero[0, 0])

    def think(self, mixed: Tensor, z: Tensor, *trace: Tensor) -> tuple[Tensor, Tensor]:
        """What N thoughts do by themselves in a tick, nearly all of its work: mixed (N, 2D),
        z (N, D), the last M - 1 pre-activations (D, N), oldest first -> the next of these, and z.

        Of two axes, whole tensors rather than views, and without what differs between ticks, rows
        and lengths, so that what `torch.compile` makes of it serves them all.
        """
        a = (z + self.synapse(mixed).to(z.dtype)).T.contiguous()
        return a, self.nlm(torch.stack([*trace, a], 1)).T.contiguous().to(a.dtype)

    def tick(self, e_k: Tensor, u: Tensor, s: TickState, kv: KV, m: Tensor,
             places: Places) -> TickState:
        """One tick, with its embedding e_k (D,), of every token's thought: for training, prefill
        and decoding alike.

        What is observed is what attention finds plus the token's own u (B, T, D): through attention
        alone, the block has to learn first to look at itself, and loses 50 steps over it (LOG.md).
        """
        y_act = self.sync_act.read(s.alpha_act, s.beta_act, m[:, 1])  # (B, T, S)
        q = self.q_norm(heads(self.q_proj(y_act.to(s.z.dtype)),
                              self.config.head_dim)).transpose(1, 2)
        seen = places.attend(rotate(q, places.cos, places.sin), *kv)  # (B, T, D)
        mixed = torch.cat([(u + seen).flatten(0, 1), s.z + e_k.to(s.z.dtype)], -1)
        a, z = self.think(mixed, s.z, *s.trace[1:])

        def paired(sync: Sync) -> Tensor:
            return sync.pair(z).view(*u.shape[:2], self.config.sync)
        return TickState(z, (*s.trace[1:], a),
                         self.sync_out.r() * s.alpha_out + paired(self.sync_out),
                         self.sync_act.r() * s.alpha_act + paired(self.sync_act),
                         self.sync_out.r() * s.beta_out + 1, self.sync_act.r() * s.beta_act + 1)

    def key(self, k: int, y_out: Tensor) -> Tensor:
        """The key kappa_k = rms((y_out - baseline_k) / sd_k): (..., S) fp32 with unit root mean
        square.

        Without the division a few loud neurons own the key: one channel of 512 had half of all its
        power (LOG.md).
        """
        steep = torch.rsqrt(self.variance[k] + 1e-4)
        return rms(torch.addcmul(-steep * self.baseline[k], y_out, steep), self.eps)

    def session_key(self, m: Tensor) -> Tensor:
        """What a session is about, m (B, 2, S) -> (B, S) fp32: the key of a thought that ends with
        the session's mean. 0 for a fresh session.

        DESIGN §2 lets m speak through rho alone, as one more tick of every thought; read beside
        c_proj, it lowers nats where that does not (LOG.md).
        """
        K, r, fresh = self.config.ticks, self.sync_out.r(), self.fresh_sync()
        beta = (r[:, None] ** torch.arange(K, device=r.device)).sum(1)
        lived = (m != fresh).flatten(1).any(1, keepdim=True)
        return self.key(K - 1, self.sync_out.read(m[:, 0] * beta, beta, fresh[0])) * lived

    def features(self, k: Tensor, white: bool = False) -> Tensor:
        """phi, what memory is written and read at: k = kappa / sqrt(S) (..., S) -> (..., F), of
        the precision of k; white: k is whitened already.

        |x| of the whitened key x, turned at random F / S times. What two phi have in common beside
        their mean falls with the square of the cosine of their keys and faster (Cho & Saul 2009:
        the even part of the arc-cosine kernel of order 1), so that a stranger whose key is half
        like somebody's reads a quarter of his fact and less; and there are F directions to tell
        facts apart in, not S. DESIGN §3 writes along k itself; LOG.md has what each is worth.
        """
        if not self.config.expand:
            return k
        with torch.autocast(k.device.type, enabled=False):  # whitening asks for fp32
            return self.turned(k if white else k @ self.white.to(k.dtype).T).abs()

    def read_along(self, expand: int) -> None:
        """From now on memory is written and read at so many features for each channel."""
        self.config = replace(self.config, expand=expand)
        self.signs = coin_flips(expand, self.config.sync).to(self.signs.device)
        self.whiten()

    def turned(self, x: Tensor) -> Tensor:
        """x (..., S) -> (..., F): F / S rotations, each a random flip of signs and a Hartley
        transform, as fast as an FFT (after orthogonal random features, arXiv:1610.09072, which do
        it three times; for S of 64 and more once is as good, LOG.md)."""
        return Hartley.apply(x[..., None, :] * self.signs.to(x.dtype)).flatten(-2)

    @torch.no_grad()
    def whiten(self, moments: tuple[Tensor, Tensor] | None = None) -> None:
        """Turn `white` (S, S) to these second moments of keys, by default the block's own as they
        are now; called when these change.

        It is L^-1, where L L' = 100 Sigma + DUE Sigma_due + 0.001 I: what all keys have in common
        would else be most of every feature. Its length makes |phi|^2 1 for a middling key.
        """
        self.whitened = tuple(m.clone() for m in moments or (self.key_moment, self.due_moment))
        self.projectors = {}            # memory.empty_projector of them, by its settings
        text, due = (m.double() for m in self.whitened)
        same = torch.eye(self.config.sync).to(text)
        white = torch.linalg.solve_triangular(
            torch.linalg.cholesky(100 * text + DUE * due + 0.001 * same), same, upper=False)
        power = ((white @ (text + due) / 2) * white).sum()
        self.white.copy_(white / torch.sqrt(max(self.config.expand, 1) * power))

    @torch.no_grad()
    def shared(self) -> tuple[Tensor, Tensor]:
        """Rows B (R, F), rest d (F,), fp64: B' B + diag d is the second moment of `features` on
        ordinary text.

        Computed from that of the keys as if these were normal, so that nothing of F x F need be
        measured, stored or inverted: E |x| |y| = s t (1 + rho^2 / 2 + ...) 2 / pi for standard
        deviations s, t and correlation rho. That is s^2 on the diagonal, and off it rho^2 / 2 is
        left out: half of 1 / S for two features turned at random. So R = 1, or S without features.
        """
        moment = self.whitened[0].to(self.white)                        # no buffer: stayed behind
        same = torch.eye(len(moment)).to(moment)
        if not self.config.expand:
            return (torch.linalg.cholesky(moment.double() + 1e-8 * same).T,
                    torch.zeros_like(moment[0], dtype=torch.float64))
        with torch.autocast(moment.device.type, enabled=False):
            seen = self.white @ moment @ self.white.T
            power = (self.turned(seen) * self.turned(same)).sum(0).double()     # s^2, (F,)
        return (power * (2 / math.pi)).sqrt()[None], power * (1 - 2 / math.pi)

    @torch.no_grad()
    def settle(self, mean: Tensor, square: Tensor, rate: float) -> None:
        """Move baseline and variance towards those of the y_out just seen, whose mean and mean
        square these are, (K, S)."""
        self.baseline.lerp_(mean, rate)
        self.variance.lerp_((square - mean * mean).clamp(min=0), rate)


# -----------------------------------------------------------------------------
# the graft

@dataclass
class Thought:
    """What the model made of (B, T) tokens. A model without the block thinks one tick, and has no
    keys.

    hidden       (B, T, K', D)  what the head reads at each tick; K' < K when halting ended every
                                thought early
    tick_nats    (B, T, K')     cross-entropy of the next token at each tick; NaN where it is
                                unknown or padding
    certainty    (B, T, K')     1 - entropy / log V; -1 for ticks after the halt
    read_tick    (B, T)         the most certain tick
    key          (B, T, S)      kappa at the read tick, unit RMS; keys: at every tick (B, T, K', S)
    delta_alpha, delta_beta     (B, T, 2, S) fp32 final sums of the token's thought: read-out, query
    real         (B, T)         False for padding
    alone                       the same thought read without the memory; None: there was none
    """
    hidden: Tensor
    tick_nats: Tensor
    certainty: Tensor
    read_tick: Tensor
    keys: Tensor | None
    delta_alpha: Tensor | None
    delta_beta: Tensor | None
    cache: Cache
    real: Tensor
    model: "NanoCTM"
    alone: "Thought | None" = None

    @property
    def unaided(self) -> "Thought":
        """What the base model makes of the text by itself: surprise, keys and what is written come
        from here."""
        return self.alone or self

    def at_read_tick(self, per_tick: Tensor) -> Tensor:
        return at_tick(per_tick, self.read_tick)

    @property
    def key(self) -> Tensor:
        return self.at_read_tick(self.keys)

    @property
    def nats(self) -> Tensor:
        """True nats per token (B, T), of the tick that is read."""
        return self.at_read_tick(self.tick_nats)

    @property
    def logits(self) -> Tensor:
        """(B, T, V) fp32 at the read tick; computed when asked for, since V is what costs
        memory."""
        return self.model.head(self.at_read_tick(self.hidden)).float()


def at_tick(per_tick: Tensor, tick: Tensor) -> Tensor:
    """per_tick (B, T, K, ...), tick (B, T) -> (B, T, ...); whole rows, since `gather` goes number by
    number."""
    first = torch.arange(tick.numel(), device=tick.device) * per_tick.shape[2]
    return (per_tick.flatten(0, 2).index_select(0, first + tick.flatten())
            .view(*tick.shape, *per_tick.shape[3:]))


def take(x: Tensor, where: Tensor) -> Tensor:
    """x (B, T, D), where (B, n) -> (B, n, D)"""
    return x.gather(1, where[:, :, None].expand(-1, -1, x.shape[-1]))


class Ticks(NamedTuple):
    """All ticks of a thought before anybody asks how good they are. K' < K when all have halted."""
    h: Tensor                           # (B, T, D) the residual stream that the block adds to
    out: Tensor         # (B, T, K', D) what it and its session add by themselves, without a memory
    keys: Tensor | None                 # (B, T, K', S) kappa
    y_out: list[Tensor] | None  # K' times (B, T, S), the same before centring, for the baseline
    delta_alpha: Tensor | None          # (B, T, 2, S) sums at a token's last tick: read-out, query
    delta_beta: Tensor | None
    cache: Cache
    real: Tensor                        # (B, T) bool, False for padding

    def at(self, some: slice) -> "Ticks":
        """Those of some of the T positions."""
        return Ticks(*(x[:, some] for x in self[:3]), None, self.delta_alpha[:, some],
                     self.delta_beta[:, some], self.cache, self.real[:, some])


@torch.no_grad()
def mean_and_square(ticks: Ticks) -> Tensor:
    """(2, K, S): mean of y_out over real tokens and of its square, for CTMBlock.settle."""
    share = (ticks.real / ticks.real.sum()).flatten()
    flat = [y.flatten(0, 1) for y in ticks.y_out]
    with torch.autocast(share.device.type, enabled=False):          # their difference is a variance
        return torch.stack([torch.stack([share @ y for y in flat]),
                            torch.stack([share @ y.square() for y in flat])])


def successors(tokens: Tensor) -> Tensor:
    """The token after each of tokens (B, T); -1 after the last one, and for padding."""
    following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], 1)
    return following.masked_fill(tokens < 0, -1)


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits (..., V) fp32 -> probabilities, and the log of what they are divided by, (..., 1):
    log p is logits - that. The exponential is what costs, here it is one."""
    p = logits.softmax(-1)
    return p, logits.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()


class FusedCrossEntropy(torch.autograd.Function):
    """`NanoCTM.reading_loss` from normed x (N, K', D), embedding (V, D) and what a teacher's head
    reads, normed (N, D), so many rows of logits at a time.

    Their derivative is made where they are and scaled backwards, so that logits are computed once
    and never kept (as Liger Kernel's fused linear cross-entropy, arXiv:2410.10989).
    """

    @staticmethod
    def forward(ctx, x: Tensor, embedding: Tensor, targets: Tensor, weight: Tensor,
                teacher: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
        loss, nats, of_x = 0.0, [], []
        of_embedding = torch.zeros_like(embedding) if ctx.needs_input_grad[1] else None
        hard = 1.0 if teacher is None else 0.5                      # share of what came
        n = max(1, rows // x.shape[1])
        for piece, came, share, taught in zip(
                x.split(n), targets[:, None, None].expand(*x.shape[:2], 1).split(n),
                (weight[:, None, None] / x.shape[1]).split(n),
                repeat(None) if teacher is None else teacher.split(n)):
            read = F.linear(piece.flatten(0, 1), embedding)
            logits = read.float().view(*piece.shape[:2], len(embedding))
            off, log_total = softmax(logits)                        # off: by how much, p - q
            nats.append((log_total - logits.gather(-1, came)).squeeze(-1))
            each = hard * nats[-1]
            off.scatter_add_(-1, came, torch.full_like(off[..., :1], -hard))
            if taught is not None:
                soft = F.linear(taught, embedding).float().softmax(-1)[:, None]
                each = each - (1 - hard) * ((soft * logits).sum(-1) - log_total.squeeze(-1))
                off.sub_(soft, alpha=1 - hard)
            loss = loss + (each * share[..., 0]).sum()
            off = off.mul_(share).flatten(0, 1).to(read.dtype)
            of_x.append((off @ embedding).to(x.dtype).view_as(piece))
            if of_embedding is not None:
                of_embedding.addmm_(off.T.to(embedding.dtype), piece.flatten(0, 1).to(embedding))
        nats = torch.cat(nats)
        ctx.mark_non_differentiable(nats)
        ctx.save_for_backward(torch.cat(of_x), of_embedding)
        return loss, nats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
        of_x, of_embedding = ctx.saved_tensors
        return (grad * of_x, None if of_embedding is None else grad * of_embedding,
                None, None, None, None)


class NanoCTM(nn.Module):
    """A Qwen3 backbone and what stands in its last layer: "ctm", its own "ffn", or "none" (the
    layer deleted)."""

    def __init__(self, backbone: BackboneConfig, thought: ThoughtConfig | None = None,
                 block: str = "ctm"):
        super().__init__()
        if block not in ("ctm", "ffn", "none"):
            raise ValueError(f"expected block 'ctm', 'ffn' or 'none', found {block!r}: choose one "
                             "of the three")
        self.backbone, self.block = Backbone(backbone), block
        self.ctm = CTMBlock(backbone.hidden_size, thought or ThoughtConfig(),
                            backbone.rms_norm_eps) if block == "ctm" else None
        self.checkpoint_ticks = False

    # -- the forward pass, in three steps: trunk, ticks, measure

    def trunk(self, tokens: Tensor, cache: Cache | None = None
              ) -> tuple[Tensor, Tensor, Places, Cache]:
        """tokens (B, T), padding < 0 -> h, u (B, T, D), the block's places, the cache with these
        tokens in it."""
        cache, c = cache or Cache(), self.backbone.config
        block_dim = self.ctm.config.head_dim if self.ctm else c.head_dim
        here, places, real = cache.places(tokens, (c.head_dim, block_dim), c.rope_theta)
        h, u, layers = self.backbone(tokens, here, cache)
        return h, u, places, Cache(layers, cache.block, real)

    def ticks(self, h: Tensor, u: Tensor, places: Places, cache: Cache, halt: float | None = None,
              m: Tensor | None = None, where: Tensor | None = None, number: int = 0) -> Ticks:
        """Think about u. m (B, 2, S): what the session has synchronised; None: a fresh session.
        number: of ticks, where that is not K.

        With `halt`, stops when every token has passed it; which ticks count per token is
        `measure`'s affair. With `where` (B, n), only these positions think: no thought reads
        another's ticks, so training can skip the rest.
        """
        real, asking = cache.real[:, -u.shape[1]:], u
        if where is not None:
            h, asking, real = take(h, where), take(u, where), real.gather(1, where)
        # the block's weights are fp32
        with torch.autocast(u.device.type, torch.bfloat16, enabled=u.dtype == torch.bfloat16):
            if self.ctm is None:
                out = (self.backbone.layers[-1].mlp(asking) if self.block == "ffn"
                       else torch.zeros_like(asking))
                return Ticks(h, out[:, :, None], None, None, None, None, cache, real)
            return self._ticks(h, asking, u, places, cache, real, halt, m, where,
                               number or self.ctm.config.ticks)

    def _ticks(self, h: Tensor, asking: Tensor, u: Tensor, places: Places, cache: Cache,
               real: Tensor, halt: float | None, m: Tensor | None, where: Tensor | None,
               number: int) -> Ticks:
        ctm = self.ctm
        of_session = (0.0 if m is None else                         # the same at every tick
                      F.linear(ctm.session_key(m), ctm.session_proj)[:, None].to(h.dtype))
        m = (ctm.fresh_sync().expand(len(u), -1, -1) if m is None else m)[:, :, None]
        kv = ctm.keys_values(u, places, cache.block)                # m: (B, 2, 1, S) from here on
        places = places if where is None else places.at(where)
        state, y_out, keys, outs, alpha, beta = ctm.start(asking), [], [], [], None, None
        running = real
        for k in range(number):
            if self.checkpoint_ticks and torch.is_grad_enabled():
                state = checkpoint(ctm.tick, ctm.tick_embedding[k], asking, state, kv, m, places,
                                   use_reentrant=False)
            else:
                state = ctm.tick(ctm.tick_embedding[k], asking, state, kv, m, places)
            y_out.append(ctm.sync_out.read(state.alpha_out, state.beta_out, m[:, 0]))
            keys.append(ctm.key(k, y_out[-1]))
            outs.append(ctm.c_proj(keys[-1].to(h.dtype)).to(h.dtype) + of_session)
            if halt is not None or k == number - 1:
                a = torch.stack([state.alpha_out, state.alpha_act], 2)
                b = torch.stack([state.beta_out, state.beta_act]).expand_as(a)
                on = running[..., None, None]
                alpha, beta = ((a, b) if alpha is None
                               else (torch.where(on, a, alpha), torch.where(on, b, beta)))
            if halt is not None:
                running = running & (self.score(h + outs[-1])[0] < halt)
                if not running.any():
                    break
        return Ticks(h, torch.stack(outs, 2), torch.stack(keys, 2), y_out, alpha, beta,
                     Cache(cache.layers, kv, cache.real), real)

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V) through the final norm and the tied embedding."""
        return F.linear(self.backbone.norm(hidden), self.backbone.embed_tokens.weight)

    def rows_at_once(self, hidden: Tensor) -> int:
        """How many rows of logits to hold at a time: what fits a CPU's cache, or 256 MB of a
        GPU."""
        return max(1, HEAD_ENTRIES[hidden.device.type] // self.backbone.config.vocab_size)

    @torch.no_grad()
    def score(self, hidden: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """hidden (..., D), targets (...) -> certainty and nats, both (...) fp32. In pieces: logits
        are never all there."""
        flat, V = hidden.reshape(-1, hidden.shape[-1]), self.backbone.config.vocab_size
        wanted = (torch.zeros(len(flat), dtype=torch.long, device=flat.device) if targets is None
                  else targets.reshape(-1))
        certainty, nats = [], []
        n = self.rows_at_once(flat)
        for piece, target in zip(flat.split(n), wanted.split(n)):
            logits = self.head(piece).float()
            p, log_total = softmax(logits)
            nats.append((log_total - logits.gather(1, target[:, None])).squeeze(1))
            certainty.append(1 + ((p * logits).sum(-1) - log_total.squeeze(1)) / math.log(V))
        return torch.cat(certainty).view(hidden.shape[:-1]), torch.cat(nats).view(hidden.shape[:-1])

    def measure(self, t: Ticks, targets: Tensor, plastic: Tensor | None = None,
                halt: float | None = None) -> Thought:
        """Ask every tick how certain it is, and read. targets (B, T), -1 unknown; plastic (D, F),
        or (B, D, F) with one for each row: W_m beside c_proj.

        Where thinking halts is decided without the memory, so that no sum and no key depends on
        what is stored.
        """
        alone = self._read(t, t.h[:, :, None] + t.out, targets, halt, None)
        if plastic is None or self.ctm is None:
            return alone
        read = self.ctm.features(t.keys.flatten(1, 2) / math.sqrt(self.ctm.config.sync))
        return self.aided(t, targets, alone, read @ plastic.mT)

    def aided(self, t: Ticks, targets: Tensor, alone: Thought, aid: Tensor) -> Thought:
        """The thought `alone`, read with what a memory adds at every tick, aid (B, T K', D)."""
        out = t.out + aid.view(t.out.shape).to(t.out.dtype)
        thought = self._read(t, t.h[:, :, None] + out, targets, None, alone.certainty < 0)
        thought.alone = alone
        return thought

    def _read(self, t: Ticks, hidden: Tensor, targets: Tensor, halt: float | None,
              unthought: Tensor | None) -> Thought:
        K = hidden.shape[2]
        targets = targets[:, :, None].expand(-1, -1, K)
        certainty, nats = self.score(hidden, targets.clamp(min=0))
        if halt is not None:
            passed = certainty >= halt
            last = torch.where(passed.any(-1), passed.int().argmax(-1), K - 1)
            unthought = torch.arange(K, device=hidden.device) > last[..., None]
        if unthought is not None:
            certainty = certainty.masked_fill(unthought, -1.0)
        return Thought(hidden, nats.masked_fill(targets < 0, float("nan")), certainty,
                       certainty.argmax(-1), t.keys,
                       t.delta_alpha, t.delta_beta, t.cache, t.real, self)

    def forward(self, tokens: Tensor, cache: Cache | None = None, plastic: Tensor | None = None,
                halt: float | None = None, m: Tensor | None = None,
                where: Tensor | None = None) -> Thought:
        """Read (B, T) tokens (padding < 0), after those in `cache`, and think about each. See
        Thought and DESIGN §2.

        plastic (D, F) or (B, D, F): a memory W_m written beside c_proj. halt in (0, 1): stop at the
        first tick at least that certain. m (B, 2, S): session sync to start from. where (B, n):
        only these positions think, and T below is n. Everything is per row; tokens are int64.
        """
        t = self.ticks(*self.trunk(tokens, cache), halt, m, where)
        targets = successors(tokens)
        return self.measure(t, targets if where is None else targets.gather(1, where),
                            plastic, halt)

    # -- learning signal

    def reading_loss(self, hidden: Tensor, targets: Tensor, weight: Tensor,
                     teacher: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What is read at K' ticks (N, K', D), the token that came (N,), weight (N,) -> the weighted
        sum of nats, each a mean over the ticks, with its gradient; and all nats (N, K') without one.

        teacher (N, D): what another head reads; half of the loss is then cross-entropy against its
        prediction. No gradient reaches weight or teacher.
        """
        return FusedCrossEntropy.apply(
            self.backbone.norm(hidden), self.backbone.embed_tokens.weight, targets, weight,
            None if teacher is None else self.backbone.norm(teacher), self.rows_at_once(hidden))

    def tick_loss(self, thought: Thought, targets: Tensor, weight: Tensor, other: str = "any",
                  teacher: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
        """Half the nats at the most certain tick, half those at another one, as a weighted mean
        over weight > 0.

        other "best": the tick of the lowest nats, as the CTM does it (eq. 12). On text, whose next
        token is never certain, eight guesses then learn to differ, and the tick that is read pays
        for it (LOG.md). other "any": a tick drawn by chance, so that in the mean every tick learns
        to predict.

        targets (B, T) int64, weight (B, T); teacher (B, T, D): what another head would read, taught
        half and half with the targets. Selection needs no gradient; it flows through the two chosen
        ticks. Returns the loss, and the unweighted nats and mean tick of reading.
        """
        where = weight > 0
        target, w, hidden, read = (targets[where], weight[where], thought.hidden[where],
                                   thought.read_tick[where])
        n, K = hidden.shape[:2]
        companion = (thought.tick_nats[where].argmin(-1) if other == "best"
                     else torch.randint(K, (n,)).to(hidden.device))
        chosen = torch.stack([companion, read], 1)[:, :K]           # of one tick, that one
        chosen = hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1]))
        loss, nats = self.reading_loss(chosen, target, w / w.sum(),
                                       None if teacher is None else teacher[where])
        return loss, {"nats": nats[:, -1].mean().item(), "read_tick": read.float().mean().item()}

    def sparse_tick_loss(self, ticks: Ticks, targets: Tensor, weight: Tensor, every: int,
                         teacher: Tensor | None = None) -> tuple[Tensor, dict[str, float], Thought]:
        """`tick_loss` ("any") in the mean, for less: of so many tokens one is asked how certain each
        tick is and learns at the most certain, the others at a tick by chance, none at two.

        every: 2 or more; which column is the first is drawn. -> loss and report as there, of those
        asked alone, and the thought about these, (B, T / every).
        """
        T, K = ticks.out.shape[1:3]
        first = int(torch.randint(min(every, T), ()))
        asked = slice(first, None, every)
        thought = self.measure(ticks.at(asked), targets[:, asked])
        tick = torch.randint(K, targets.shape).to(targets.device)
        tick[:, asked] = thought.read_tick
        share = torch.full((T,), every / (every - 1), device=weight.device) / 2
        share[asked] = every / 2
        where = weight > 0
        loss, _ = self.reading_loss((ticks.h + at_tick(ticks.out, tick))[where][:, None],
                                    targets[where], (weight * share)[where] / weight[where].sum(),
                                    None if teacher is None else teacher[where])
        learned = where[:, asked]
        report = {} if not learned.any() else {
            "nats": thought.nats[learned].mean().item(),
            "read_tick": thought.read_tick[learned].float().mean().item()}
        return loss, report, thought


HEAD_ENTRIES = {"cpu": 2**18, "cuda": 2**26}        # logits held at once


def flops_per_token(b: BackboneConfig, c: ThoughtConfig, T: int) -> dict[str, int]:
    """FLOPs of one token's forward pass in a window of T: matrix products only, 2 per multiply-add,
    attention over all T positions (a causal kernel does half). `block_*` are the parts of `block`.
    Certainty is read off the LM head at every tick: the block's cost, but for the one reading,
    `head`, that every model needs. The first tick's query counts, too, though a row that is read at
    once makes it only once. `memory`: what reading one adds, at every tick."""
    D, K, S, h = b.hidden_size, c.ticks, c.sync, c.nlm_hidden
    q, kv = b.num_attention_heads * b.head_dim, b.num_key_value_heads * b.head_dim
    with torch.device("meta"):
        synapse = sum(2 * p.numel() for n, p in UNet(D, c).named_parameters() if p.dim() == 2)
    parts = {"block_synapse": K * synapse, "block_nlm": K * D * 4 * (c.history * h + h),
             "block_attention": K * 4 * T * D,
             "block_projections": K * 4 * S * D + 4 * D * D,
             "block_reading": (K - 1) * 2 * D * b.vocab_size}
    ffn = 6 * D * b.intermediate_size
    trunk = (b.num_hidden_layers * (4 * D * (q + kv) + 4 * T * q)
             + (b.num_hidden_layers - 1) * ffn)
    return {"trunk": trunk, "ffn": ffn, "block": sum(parts.values()), **parts,
            "head": 2 * D * b.vocab_size,
            "memory": K * 2 * S * (S + c.expand * D if c.expand else D)}


# -----------------------------------------------------------------------------
# generation

class Spoken(NamedTuple):
    """One generated token per row, with the tick it was read at and how certain the model was; -1
    after a row's end."""
    token: Tensor               # (B,)
    tick: Tensor                # (B,)
    certainty: Tensor           # (B,)
    cache: Cache  # everything read before this token: with it, the conversation can go on
    hidden: Tensor              # (B, D) what the head read
    unaided: Tensor             # (B, D) the same without a memory
    key: Tensor | None          # (B, S) kappa


@torch.no_grad()
def generate(model: NanoCTM, tokens: Tensor, max_new_tokens: int, temperature: float = 0.0,
             top_k: int = 0, stop: int | None = None, halt: float | None = None,
             plastic: Tensor | None = None, generator: torch.Generator | None = None,
             cache: Cache | None = None, session=None, own: int = 0) -> Iterator[Spoken]:
    """Continue each row of tokens (B, T), padded on the left with -1, after those in `cache`; yield
    one Spoken per step.

    session: a SessionMemory (memory.py) that reads along, however long; the first `own` tokens are
    what the model had said itself. Temperature 0 is greedy. Ends when every row has said `stop`.
    Raises ValueError when the context is too short.
    """
    if max_new_tokens < 1 or temperature < 0 or top_k < 0:
        raise ValueError("expected max_new_tokens > 0, temperature >= 0 and top_k >= 0, found "
                         f"{max_new_tokens}, {temperature} and {top_k}: change them")
    read = 0 if cache is None or cache.real is None else cache.real.shape[1]
    room = model.backbone.config.max_position_embeddings - read
    longest = int((tokens >= 0).sum(1).max())
    if not longest or (session is None and longest + max_new_tokens > room):
        raise ValueError(f"expected a prompt of 1 to {room - max_new_tokens} tokens (room for "
                         f"{room} in the context, {max_new_tokens} to generate), found {longest}: "
                         "shorten the prompt or lower max_new_tokens")
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        if session is not None:
            thought = session.read(tokens, cache or Cache(), plastic, halt, own)
        else:  # nothing is carried: only the last token thinks
            at_end = (torch.full_like(tokens[:, :1], tokens.shape[1] - 1) if tokens.shape[1] > 1
                      else None)
            thought = model(tokens, cache, plastic, halt, where=at_end)
        last = thought.read_tick[:, -1:]
        hidden, unaided, key = (x if x is None else at_tick(x[:, -1:], last)[:, 0]
                                for x in (thought.hidden, thought.unaided.hidden, thought.keys))
        logits = model.head(hidden).float()
        token = pick(logits, temperature, top_k, generator).masked_fill(ended, -1)
        yield Spoken(token, last[:, 0], at_tick(thought.certainty[:, -1:], last)[:, 0],
                     thought.cache, hidden, unaided, key)
        ended = ended | (token == stop) if stop is not None else ended
        if ended.all():
            return
        tokens, cache, own = token.masked_fill(ended, -1)[:, None], thought.cache, 1


def pick(logits: Tensor, temperature: float, top_k: int,
         generator: torch.Generator | None) -> Tensor:
    """logits (B, V) -> token ids (B,)"""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


def replies(model: NanoCTM, tokenizer, prompts: list[str], max_new_tokens: int = 24,
            **settings) -> list[str]:
    """Greedy answers to many prompts at once, up to the end of the turn."""
    ids = [tokenizer.encode(p) for p in prompts]
    width, device = max(map(len, ids)), model.backbone.embed_tokens.weight.device
    tokens = torch.tensor([[-1] * (width - len(i)) + i for i in ids], device=device)
    steps = [spoken.token for spoken in
             generate(model, tokens, max_new_tokens, stop=tokenizer.im_end, **settings)]
    return [tokenizer.decode([t for t in row if t >= 0 and t != tokenizer.im_end])
            for row in torch.stack(steps, 1).tolist()]


# -----------------------------------------------------------------------------
# loading and saving

def choose_device(name: str) -> str:
    """"cpu" or "cuda", the latter by itself where there is one. ValueError in one line for anything
    else."""
    if name not in ("", "cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"expected device cpu, or cuda where there is one, found {name!r}: leave "
                         "it empty to choose by itself")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def load_backbone(name: str, **settings) -> NanoCTM:
    """A Hugging Face Qwen3 folder or hub name -> NanoCTM around it (settings as NanoCTM's; block
    "ffn" by default).

    Weights keep the checkpoint's dtype. Raises ValueError with one line when it is missing, foreign
    or damaged.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(name)
    if not (folder / "config.json").is_file() or not list(folder.glob("model*.safetensors")):
        raise ValueError(f"expected config.json and model*.safetensors in {folder}, found neither "
                         "or one: run `python train.py config/tiny_phase1.py` first, or name a "
                         "Qwen3 checkpoint")
    model = NanoCTM(BackboneConfig.from_json(folder), **({"block": "ffn"} | settings))
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= read_tensors(path)[0]
    tensors = {k.removeprefix("model."): v for k, v in tensors.items() if k != "lm_head.weight"}
    model.backbone.to(next(iter(tensors.values())).dtype)
    _put(model.backbone, tensors, str(folder))
    return model


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "model*.safetensors"]))
    except (OSError, HFValidationError, ValueError) as e:
        raise ValueError("expected a Qwen3 folder or a reachable Hugging Face name, found "
                         f"{name!r} ({type(e).__name__}): check the path or the network; for the "
                         "tiny world run `python train.py config/tiny_phase1.py` first") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """-> tensors by name, metadata. One line on a missing or damaged file."""
    if not path.is_file():
        raise ValueError(f"expected a safetensors file at {path}, found none: check the path; "
                         "README says how weights are trained")
    try:
        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}
    except SafetensorError as e:
        raise ValueError(f"{path}: expected a whole safetensors file, found a damaged one ({e}): "
                         "download, train or export it again") from None


def _put(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy tensors into a module and insist that names and shapes agree exactly."""
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [f"{k} {tuple(tensors[k].shape)} for {tuple(own[k].shape)}"
              for k in own.keys() & tensors.keys()
              if own[k].shape != tensors[k].shape]
    if missing or unexpected or shapes:
        raise ValueError(f"{where}: expected the keys and shapes of this model, found missing "
                         f"{missing[:4]}, unexpected {unexpected[:4]}, misshaped {shapes[:4]}: "
                         "these weights belong to another model")
    module.load_state_dict(tensors)


def save_backbone(model: NanoCTM, folder: Path) -> None:
    """Write a Hugging Face Qwen3 folder that `transformers` reads as well; the tied head is not
    written twice."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"model.{k}": v.contiguous() for k, v in model.backbone.state_dict().items()},
              folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.backbone.config.to_json(), indent=1))


def fingerprint(module: nn.Module, without: str = " ") -> str:
    """A short hash of a module's weights, but for names that start with `without`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.startswith(without):
            flat = tensor.detach().cpu().contiguous().view(-1)
            digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def backbone_hash(model: NanoCTM) -> str:
    """Fingerprint of the frozen weights below the block, so that a graft finds its own base."""
    return fingerprint(model.backbone,
                       without=f"layers.{model.backbone.config.num_hidden_layers - 1}.mlp")


def block_module(model: NanoCTM) -> nn.Module:
    return model.ctm if model.block == "ctm" else model.backbone.layers[-1].mlp


SYMMETRIC = ("key_moment", "due_moment")  # a file has a triangle, or the diagonal till measured


def save_graft(model: NanoCTM, path: Path, **notes: str) -> None:
    """Write what stands in the last layer, alone, with its shape and its base's fingerprint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = asdict(model.ctm.config) if model.ctm else {}
    about = {"block": model.block, "thought": json.dumps(shape), "backbone": backbone_hash(model),
             **notes}
    tensors = {k: v.contiguous() for k, v in block_module(model).state_dict().items()}
    for name in tensors.keys() & set(SYMMETRIC):
        whole, diagonal = tensors[name], tensors[name].diag()
        tensors[name] = (diagonal.contiguous() if torch.equal(whole, diagonal.diag())
                         else whole[*torch.tril_indices(*whole.shape)])
    save_file(tensors, path, about)


def load_graft(base: str, path: Path, block: str = "") -> NanoCTM:
    """A backbone with a saved graft (or a saved FFN) in its last layer; ValueError when they do not
    belong together, or when it is not the `block` that the caller needs."""
    tensors, about = read_tensors(Path(path))
    if not {"block", "thought", "backbone"} <= about.keys():
        raise ValueError(f"{path}: expected a graft of this project, found other weights: "
                         f"run `python train.py config/tiny_phase2.py` first")
    if block and about["block"] != block:
        raise ValueError(f"{path}: expected a {block} block, found a {about['block']} block: name "
                         "another file")
    try:
        thought = ThoughtConfig(**json.loads(about["thought"])) if about["block"] == "ctm" else None
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path}: expected a thought of this version, found another ({e}): use "
                         "the version that wrote it, or train it again") from None
    model = load_backbone(base, thought=thought, block=about["block"])
    if (found := backbone_hash(model)) != about["backbone"]:
        raise ValueError(f"{path}: expected the base it was trained on ({about['backbone']}), "
                         f"found {found} in {base}: use the backbone that belongs to it")
    for name in tensors.keys() & set(SYMMETRIC):
        tensors[name] = symmetric(tensors[name], thought.sync if thought else 0)
    # what was trained is fp32, whatever its base is
    _put(block_module(model).float(), tensors, str(path))
    return model


def symmetric(packed: Tensor, n: int) -> Tensor:
    """(n,), a diagonal, or (n (n + 1) / 2,), a lower triangle row by row -> (n, n); anything else
    as it is."""
    if packed.shape == (n,):
        return packed.diag()
    if packed.shape != (n * (n + 1) // 2,):
        return packed
    rows, columns = torch.tril_indices(n, n)
    whole = packed.new_zeros(n, n)
    whole[rows, columns] = whole[columns, rows] = packed
    return whole
