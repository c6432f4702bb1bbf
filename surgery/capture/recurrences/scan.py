"""Chunked computation of linear recurrences in plain torch ops, which autograd differentiates.

The state S of a head is a (dk, dv) matrix. Time is cut into chunks. Inside a chunk, all steps are computed at once as
masked matrix products; only the states at the chunks' ends are computed one after the other. Sources: gated linear
attention (Yang et al. 2023, arXiv:2312.06635), the state-space duality of Mamba 2 (Dao and Gu 2024, arXiv:2405.21060),
the delta rule in WY form (Yang et al. 2024, arXiv:2406.06484) and gated (arXiv:2412.06464).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RULES = ("linear", "gated", "delta", "gated_delta")

# Steps that are computed at once. A decay for each key dimension needs a (chunk, chunk, dk) tensor for each chunk, so
# its chunks are shorter.
_CHUNK, _CHUNK_BY_KEY = 64, 16
# Steps of Mamba 1 whose states are in memory at once.
_PIECE = 1024


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    rule: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence over the sequence. `operators.linear_attention` describes the arguments and the result."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, steps, heads, width = v.shape
    groups, size = k.shape[2], k.shape[3]
    if state is None:
        state = q.new_zeros((batch, heads, size, width), dtype=wide)
    carry = state.to(wide).reshape(batch, groups, heads // groups, size, width)
    by_key = decay is not None and decay.dim() == 4
    if decay is not None and by_key and "delta" not in rule and width == 1:
        parts, last = [], carry
        pieces = zip(*(x.split(_PIECE, 1) for x in (q, k, v, decay)), strict=True)
        for queries, keys, values, rates in pieces:
            part, last = _elementwise(queries, keys, values, rates, last, wide)
            parts.append(part)
        out = torch.cat(parts, 1)
    else:
        chunk = min(_CHUNK_BY_KEY if by_key else _CHUNK, max(steps, 1))
        cut = _Chunks(q, k, v, decay, beta, chunk, wide)
        out, last = cut.delta(carry) if "delta" in rule else cut.additive(carry)
        out = out.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, heads, width)[:, :steps]
    return (out * scale).to(q.dtype), last.reshape(batch, heads, size, width)


def _elementwise(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, carry: Tensor, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The additive rule for value width 1 (Mamba 1): a state is a vector, and each of its entries decays by itself.

    All chunks advance together by one step at a time; then the states at their ends are joined. So the number of
    Python steps is the chunk plus the number of chunks, not the length.
    """
    batch, steps, heads, _ = v.shape
    groups, size = k.shape[2], k.shape[3]
    chunk = max(1, min(32, steps))
    pad = -steps % chunk
    rates = F.pad(decay.to(wide), (0, 0, 0, 0, 0, pad)).exp().unflatten(1, (-1, chunk))
    # Keys are shared by the heads of a group: (batch, steps, group, 1, dk) times (batch, steps, group, head, 1).
    added = (k.to(wide).unsqueeze(3) * v.to(wide).unflatten(2, (groups, -1))).flatten(2, 3)
    added = F.pad(added, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, chunk))
    # Unbound once: the gradient of an index would fill a whole tensor with zeros for each step.
    first, *others = zip(added.unbind(2), rates.unbind(2), strict=True)
    local, product = [first[0]], [first[1]]
    for new, rate in others:
        local.append(torch.addcmul(new, rate, local[-1]))
        product.append(rate * product[-1])
    state, starts = carry.reshape(batch, heads, size), []
    for new, rate in zip(local[-1].unbind(1), product[-1].unbind(1), strict=True):
        starts.append(state)
        state = torch.addcmul(new, rate, state)
    states = torch.stack(local, 2)
    states = torch.addcmul(states, torch.stack(product, 2), torch.stack(starts, 1).unsqueeze(2))
    states = states.flatten(1, 2)[:, :steps].unflatten(2, (groups, -1))
    out = (states @ q.to(wide).unsqueeze(-1)).flatten(2, 3)
    return out, state


class _Chunks:
    """Operands cut into chunks.

    Axes are (batch, group, chunk number, head of the group, step, features). Queries and keys have one head for each
    group, so their fourth axis has size 1.

    Attributes:
        q, k, v: operands; v is multiplied by beta where there is one.
        beta: update rates (…, step), or None.
        total: sum of the decays from the start of the chunk, of features 1 or dk; None without a decay.
        after: the places after each step, (step, step).
        wide: dtype of the computation.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        chunk: int,
        wide: torch.dtype,
    ) -> None:
        groups = k.shape[2]
        pad = -v.shape[1] % chunk

        def cut(x: Tensor) -> Tensor:
            # Steps of padding have no key, no value and no decay, so they leave the state as it is.
            x = F.pad(x.to(wide), (0, 0, 0, 0, 0, pad)) if pad else x.to(wide)
            x = x.unflatten(2, (groups, -1)).unflatten(1, (-1, chunk))
            return x.permute(0, 3, 1, 4, 2, 5)

        self.q, self.k, self.v = cut(q), cut(k), cut(v)
        self.beta = None if beta is None else cut(beta.unsqueeze(-1))
        self.total = None
        if decay is not None:
            # Two steps are told apart by the difference of two sums, which can be a thousand times as large.
            exact = torch.float32 if q.device.type == "mps" else torch.float64
            given = cut(decay if decay.dim() == 4 else decay.unsqueeze(-1))
            self.total = given.to(exact).cumsum(-2)
        self.wide = wide
        self.after = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)

    def additive(self, carry: Tensor) -> tuple[Tensor, Tensor]:
        """S = exp(decay) S + k vᵀ; returns the outputs by chunk, and the last state."""
        starts = []
        for added, last in zip((self._at_end() @ self.v).unbind(2), self._last(), strict=True):
            starts.append(carry)
            carry = added + carry if last is None else torch.addcmul(added, carry, last)
        return self._read(torch.stack(starts, 2)) + self._products(self.q) @ self.v, carry

    def delta(self, carry: Tensor) -> tuple[Tensor, Tensor]:
        """S = exp(decay) S + beta k (v - (exp(decay) S)ᵀ k)ᵀ; returns the outputs by chunk, and the last state."""
        assert self.beta is not None
        # Each step's correction depends on those before it in the chunk: a triangular system, whose right sides are
        # the values and the keys that read the state at the chunk's start.
        system = self._products(self.k) * self.beta
        keys = self.k if self.total is None else self.k * self._exp(self.total)
        values = self.v * self.beta
        right = torch.cat([values, (keys * self.beta).expand(*values.shape[:-1], -1)], -1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        width = self.v.shape[-1]
        starts, corrections = [], []
        for new, read, key, last in zip(
            solved[..., :width].unbind(2),
            solved[..., width:].unbind(2),
            self._at_end().unbind(2),
            self._last(),
            strict=True,
        ):
            starts.append(carry)
            corrections.append(new - read @ carry)
            added = key @ corrections[-1]
            carry = added + carry if last is None else torch.addcmul(added, carry, last)
        return self._read(torch.stack(starts, 2)) + self._products(self.q) @ torch.stack(
            corrections, 2
        ), carry

    def _products(self, left: Tensor) -> Tensor:
        """Products of each step of `left` with the keys up to this step, decayed in between; zero after it."""
        if self.total is None:
            return (left @ self.k.mT).masked_fill(self.after, 0.0)
        total = self.total
        if total.shape[-1] == 1:
            between = (total - total.mT).to(self.wide).masked_fill(self.after, float("-inf")).exp()
            return (left @ self.k.mT) * between
        # The difference is formed before the exponential, because the exponential of either sum alone can overflow.
        between = (total.unsqueeze(-2) - total.unsqueeze(-3)).to(self.wide)
        between = between.masked_fill(self.after.unsqueeze(-1), float("-inf")).exp()
        return torch.einsum("...id,...jd,...ijd->...ij", left, self.k, between)

    def _read(self, starts: Tensor) -> Tensor:
        """Outputs that each step reads from the state at the start of its chunk."""
        if self.total is None:
            return self.q @ starts
        if self.total.shape[-1] == 1:
            return (self.q @ starts) * self._exp(self.total)
        return (self.q * self._exp(self.total)) @ starts

    def _at_end(self) -> Tensor:
        """Keys as they act on the state at the end of the chunk, (…, dk, step)."""
        if self.total is None:
            return self.k.mT
        return (self.k * self._exp(self.total[..., -1:, :] - self.total)).mT

    def _last(self) -> Sequence[Tensor | None]:
        """Factors of the state over each chunk, (batch, group, head, 1 or dk, 1)."""
        if self.total is None:
            return [None] * self.v.shape[2]
        return self._exp(self.total[..., -1:, :]).mT.unbind(2)

    def _exp(self, x: Tensor) -> Tensor:
        return x.to(self.wide).exp()
