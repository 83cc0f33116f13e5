"""What a session carries from token to token: synchronisation sums, weighted by surprise, chunk by chunk.

    dopamine   = clamp(0.5 + 0.5 tanh(s / 2 s_mean), 0.5, 1)       s = -log p(next), surprise in nats
    alpha_hat <- gamma alpha_hat + dopamine_t dalpha_t              per token, beta_hat alike
    m          = alpha_hat / beta_hat                               a bounded weighted mean, renewed every C tokens

All tokens of a chunk think with the m that stood at its beginning. Training, prefill and decoding chunk alike, at
multiples of C tokens of the session. Left out so far: eligibility, compact_memory, snapshots and the store on disk.

Source: DESIGN.md section 3. Letters: B batch, T tokens, S sync channels, C carry chunk, n tokens of one call.
"""
import torch
from torch import Tensor

from model import Cache, NanoCTM, Thought


def dopamine(surprise: Tensor, mean_surprise: Tensor) -> Tensor:
    """surprise in nats (...) -> (...) in [0.5, 1]: 1 unexpected, 0.5 predictable. It dampens and never amplifies."""
    return (0.5 + 0.5 * torch.tanh(surprise / (2 * mean_surprise))).clamp(0.5, 1.0).detach()


class SessionMemory:
    """The carry of several sessions side by side, owned by the caller; the model itself only ever sees `m` (B, 2, S).

        session = SessionMemory(model, rows=len(tokens))
        thought = model(tokens[:, :n], cache, m=session.m)          # n <= session.room()
        session.observe(thought, next_tokens)                       # (B, n), -1 where nobody knows it yet
    """

    def __init__(self, model: NanoCTM, rows: int, chunk: int = 32):
        if model.ctm is None:
            raise ValueError("expected a model with a CTM block, found one without: a session has nothing to carry there")
        self.model, self.rows, self.chunk = model, rows, chunk
        self.start()

    def start(self, warm: Tensor | None = None) -> None:
        """Begin afresh, or from `warm`, an m (B, 2, S) kept earlier."""
        ctm = self.model.ctm
        self.m = ctm.fresh_sync().expand(self.rows, -1, -1) if warm is None else warm
        self.alpha = torch.zeros(self.rows, 2, ctm.config.sync, device=self.m.device)
        self.beta = torch.zeros_like(self.alpha)
        self.filled = torch.zeros(self.rows, dtype=torch.long, device=self.m.device)

    def room(self) -> int:
        """Positions that may be observed before some row's chunk is full."""
        return self.chunk - int(self.filled.max())

    def observe(self, thought: Thought, next_tokens: Tensor) -> None:
        """Take in what was thought about n positions; next_tokens (B, n), -1 where unknown, weighs nothing.

        Padding (as the cache has it) neither weighs nor advances. ValueError when it would reach past a chunk's end.
        """
        n, ctm = next_tokens.shape[1], self.model.ctm
        real = thought.cache.real[:, -n:]
        if int((self.filled + real.sum(1)).max()) > self.chunk:
            raise ValueError(f"expected at most {self.room()} more tokens in this chunk of {self.chunk}, found {n}: observe "
                             f"a session chunk by chunk")
        _, surprise = self.model.score(thought.at_read_tick(thought.hidden), next_tokens.clamp(min=0))
        weight = dopamine(surprise, ctm.mean_surprise) * (next_tokens >= 0)
        gamma = ctm.gamma()
        for j in range(n):
            now, w = real[:, j, None, None], weight[:, j, None, None]
            self.alpha = torch.where(now, gamma * self.alpha + w * thought.delta_alpha[:, j], self.alpha)
            self.beta = torch.where(now, gamma * self.beta + w * thought.delta_beta[:, j], self.beta)
        self.filled = self.filled + real.sum(1)
        self.close((self.filled == self.chunk))

    def close(self, rows: Tensor | None = None) -> None:
        """Renew m from the sums, in the rows given (B,) or, at a session's end, in all; what has not lived stays fresh."""
        rows = torch.ones_like(self.filled, dtype=torch.bool) if rows is None else rows
        lived = rows[:, None, None] & (self.beta > 0)
        self.m = torch.where(lived, self.alpha / self.beta.clamp(min=1e-9), self.m)
        self.filled = self.filled.masked_fill(rows, 0)


def read_session(model: NanoCTM, tokens: torch.Tensor, chunk: int = 32) -> SessionMemory:
    """Read one whole session per row, tokens (B, T) with padding < 0, chunk after chunk with carried sync, to its end."""
    session, cache, at = SessionMemory(model, len(tokens), chunk), Cache(), 0
    following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], 1)
    while at < tokens.shape[1]:
        n = session.room()
        thought = model(tokens[:, at:at + n], cache, m=session.m)
        session.observe(thought, following[:, at:at + n])
        cache, at = thought.cache, at + n
    session.close()
    return session
