"""Trust region policy optimization (TRPO)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgery.api import SurgeryError
from torch_surgery_rl.estimates import masked_mean
from torch_surgery_rl.experience import Experience
from torch_surgery_rl.kl import categorical_kl
from torch_surgery_rl.policy import evaluating, log_probs_of, trained


@dataclass(frozen=True)
class TRPO:
    """TRPO (Schulman et al. 2015, arXiv:1502.05477): the step that improves the surrogate most within a KL bound.

        maximize L(θ) = mean π_θ(a|s) / π_old(a|s) · A  subject to  mean KL(π_old ‖ π_θ) ≤ δ (`max_kl`)

    The direction x solves (F + damping · I) x = ∇L by conjugate gradients. F is the Fisher matrix, the Hessian of the
    mean KL at θ_old, and is used only in products. The step starts at sqrt(2δ / xᵀ(F + damping · I)x) · x. It is
    multiplied by `shrink` until the measured KL is within the bound and the surrogate has grown by at least
    `improvement` times the growth predicted by the gradient. If `backtracks` tries fail, the policy is restored bit
    for bit.

    Means are over all actions of the batch. The KL is exact over all possible actions. Dropout is off. Trainable
    parameters that do not reach the logits (a value head) are not changed; fit them with `fit_values`.

    Attributes:
        max_kl: δ.
        damping: damping of the Fisher matrix.
        iterations: iterations of conjugate gradients.
        backtracks: maximum tries of the line search.
        shrink: factor of the step between tries.
        improvement: required share of the predicted growth.
        minibatch: rows per forward pass. Gradient, surrogate and the bounded KL always use the whole batch.
        fisher_rows: number of evenly spaced rows for F (None: all). A product costs more than a gradient, and F
            affects only the direction, not the bound (appendix C of the paper subsamples too).
    """

    max_kl: float = 0.01
    damping: float = 0.1
    iterations: int = 10
    backtracks: int = 15
    shrink: float = 0.7
    improvement: float = 0.1
    minibatch: int = 32
    fisher_rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_kl", "iterations", "backtracks", "minibatch"):
            if getattr(self, name) <= 0:
                raise SurgeryError(f"TRPO: {name} is {getattr(self, name)}; pass a number above 0")
        if self.fisher_rows is not None and self.fisher_rows <= 0:
            raise SurgeryError(f"TRPO: fisher_rows is {self.fisher_rows}; pass a number above 0")
        for name in ("shrink", "improvement"):
            if not 0 < getattr(self, name) < 1:
                raise SurgeryError(f"TRPO: {name} is {getattr(self, name)}; pass a number between 0 and 1")
        if self.damping < 0:
            raise SurgeryError(f"TRPO: damping is {self.damping}; pass at least 0")

    def update(self, policy: nn.Module, experience: Experience) -> dict[str, float]:
        """Do one step of the policy on a batch of experience.

        Returns:
            kl: mean KL of the step. improvement: growth of the surrogate. step: accepted fraction of the full step
            (0: none).

        Raises:
            SurgeryError: no trainable parameter reaches the logits, or a gradient is not finite.
        """
        with evaluating(policy):
            parameters, gradient, surrogate, old = self._gradient(policy, experience)
            curvature = self.fisher(policy, self._some(experience), parameters)
            direction = conjugate_gradient(curvature, gradient, self.iterations)
            bend = float(direction @ curvature(direction))
            if not math.isfinite(bend):
                raise SurgeryError(
                    f"the curvature of TRPO's KL is {bend}; the policy is unchanged; check its weights"
                )
            if bend <= 0:  # the gradient is zero, so there is no direction
                return {"kl": 0.0, "improvement": 0.0, "step": 0.0}
            full = (2 * self.max_kl / bend) ** 0.5 * direction
            promised = float(gradient @ full)
            start = [parameter.detach().clone() for parameter in parameters]
            part, accepted = 1.0, False
            try:
                for _ in range(self.backtracks):
                    _put(parameters, start, part * full)
                    reached, kl = self._measure(policy, experience, old)
                    grown = reached - surrogate
                    accepted = kl <= self.max_kl and grown > 0 and grown >= self.improvement * part * promised
                    if accepted:
                        return {"kl": kl, "improvement": grown, "step": part}
                    part *= self.shrink
            finally:
                if not accepted:
                    _put(parameters, start)
            return {"kl": 0.0, "improvement": 0.0, "step": 0.0}

    def fisher(
        self, policy: nn.Module, experience: Experience, parameters: Sequence[nn.Parameter]
    ) -> Callable[[Tensor], Tensor]:
        """Return the product v → (F + damping · I) v, by differentiating the mean KL from the policy to itself twice.

        If one minibatch holds all rows, the graph of the first derivative is kept for all products.

        Args:
            policy: the policy.
            experience: experience to average over.
            parameters: parameters of the policy.
        """
        count = experience.mask.sum()
        chunks = list(experience.chunks(self.minibatch))
        once = len(chunks) == 1

        # The fused attention kernels have no second derivative.
        @sdpa_kernel(SDPBackend.MATH)
        def slope(part: Experience) -> tuple[Tensor, ...]:
            logits, _ = policy(**part.inputs)
            new = logits.log_softmax(-1)
            kl = torch.where(part.mask, categorical_kl(new.detach(), new), 0).sum() / count
            return torch.autograd.grad(
                kl, parameters, create_graph=True, allow_unused=True, materialize_grads=True
            )

        kept = slope(chunks[0]) if once else None

        def product(vector: Tensor) -> Tensor:
            total = self.damping * vector
            pieces = _split(vector, parameters)
            for part in chunks:
                slopes = kept or slope(part)
                along = sum((s * v).sum() for s, v in zip(slopes, pieces, strict=True))
                bent = torch.autograd.grad(
                    along, parameters, retain_graph=once, allow_unused=True, materialize_grads=True
                )
                total = total + _flat(bent)
            return total

        return product

    def _some(self, experience: Experience) -> Experience:
        """Select the rows for F."""
        if self.fisher_rows is None or self.fisher_rows >= len(experience):
            return experience
        spaced = torch.arange(self.fisher_rows, device=experience.actions.device) * len(experience)
        return experience.rows(spaced // self.fisher_rows)

    def fit_values(
        self, policy: nn.Module, experience: Experience, optimizer: torch.optim.Optimizer, *, epochs: int = 4
    ) -> float:
        """Fit the values to the returns by least squares.

        Only parameters that do not reach the logits are changed (`value_parameters`), even if the optimizer has more.
        Other changes would move the policy out of its KL bound.

        Args:
            policy: the policy.
            experience: experience with returns.
            optimizer: optimizer of the value parameters.
            epochs: epochs over the experience.

        Returns:
            The mean squared error of the last epoch.

        Raises:
            SurgeryError: the optimizer has no value parameter, or there is none.
        """
        own = self.value_parameters(policy, experience)
        if {id(p) for group in optimizer.param_groups for p in group["params"]}.isdisjoint(map(id, own)):
            raise SurgeryError(
                "the optimizer has no parameter of the value head; pass TRPO().value_parameters(policy, experience)"
            )
        with evaluating(policy):
            for _ in range(epochs):
                errors = []
                for part in experience.chunks(self.minibatch):
                    _, values = policy(**part.inputs)
                    error = masked_mean((values - part.returns) ** 2, part.mask)
                    optimizer.zero_grad()
                    error.backward(inputs=own)
                    optimizer.step()
                    errors.append(error.detach())
        return float(torch.stack(errors).mean())

    def value_parameters(self, policy: nn.Module, experience: Experience) -> list[nn.Parameter]:
        """Return the trainable parameters that do not reach the logits: the value head.

        Raises:
            SurgeryError: there are none.
        """
        parameters = trained(policy)
        logits, _ = policy(**experience.rows(slice(0, 1)).inputs)
        slopes = _slopes(logits.sum(), parameters)
        found = [p for p, slope in zip(parameters, slopes, strict=True) if slope is None]
        if not found:
            raise SurgeryError("every trainable parameter reaches the logits; add a value head")
        return found

    def _gradient(
        self, policy: nn.Module, experience: Experience
    ) -> tuple[list[nn.Parameter], Tensor, float, list[Tensor]]:
        """Return the policy's parameters, the surrogate's gradient and value, and the old log-probabilities.

        The log-probabilities of all actions are a list with one tensor per minibatch.
        """
        parameters, count = trained(policy), experience.mask.sum()
        gradient, surrogate, old = None, 0.0, []
        for part in experience.chunks(self.minibatch):
            logits, _ = policy(**part.inputs)
            value = _surrogate(logits, part) / count
            if gradient is None:
                slopes = _slopes(value, parameters)
                parameters = [p for p, slope in zip(parameters, slopes, strict=True) if slope is not None]
                if not parameters:
                    raise SurgeryError(
                        "no trainable parameter reaches the policy's logits; train one, such as an adapter"
                    )
                slope = _flat([slope for slope in slopes if slope is not None])
            else:
                slope = _flat(torch.autograd.grad(value, parameters))
            gradient = slope if gradient is None else gradient + slope
            surrogate += float(value.detach())
            old.append(logits.detach().log_softmax(-1))
        assert gradient is not None
        if not gradient.isfinite().all():
            raise SurgeryError(
                "the gradient of TRPO's surrogate is not finite; the policy is unchanged; check the rewards"
            )
        return parameters, gradient, surrogate, old

    @torch.no_grad()
    def _measure(
        self, policy: nn.Module, experience: Experience, old: Sequence[Tensor]
    ) -> tuple[float, float]:
        """Return the surrogate and the mean KL from the old policy, at the current parameters."""
        count, surrogate, kl = experience.mask.sum(), 0.0, 0.0
        for part, before in zip(experience.chunks(self.minibatch), old, strict=True):
            logits, _ = policy(**part.inputs)
            surrogate += float(_surrogate(logits, part) / count)
            moved = categorical_kl(before, logits.log_softmax(-1))
            kl += float(torch.where(part.mask, moved, 0).sum() / count)
        return surrogate, kl


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """Solve A x = b by conjugate gradients, for a positive definite A.

    Args:
        product: function v → A v.
        b: right-hand side.
        iterations: maximum number of iterations.
        tolerance: stop when |b − A x|² ≤ tolerance · |b|².
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, square = residual.clone(), residual @ residual
    enough = tolerance * square
    for _ in range(iterations):
        if square <= enough:
            break
        ahead = product(direction)
        bend = direction @ ahead
        if bend <= 0:  # the matrix is singular along this direction, which happens without damping
            break
        length = square / bend
        x = x + length * direction
        residual = residual - length * ahead
        before, square = square, residual @ residual
        direction = residual + square / before * direction
    return x


def _surrogate(logits: Tensor, part: Experience) -> Tensor:
    ratio = torch.where(part.mask, log_probs_of(logits, part.actions) - part.log_probs, 0).exp()
    return torch.where(part.mask, ratio * part.advantages, 0).sum()


def _slopes(value: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Return the gradient of a value for each parameter, or None if the value does not depend on it."""
    if not value.requires_grad:
        return [None] * len(parameters)
    return list(torch.autograd.grad(value, parameters, allow_unused=True))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors to one vector, in float32 at least, as conjugate gradients need it."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def _split(vector: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    pieces = vector.split([p.numel() for p in parameters])
    return [piece.view_as(p).to(p.dtype) for piece, p in zip(pieces, parameters, strict=True)]


@torch.no_grad()
def _put(parameters: Sequence[nn.Parameter], start: Sequence[Tensor], step: Tensor | None = None) -> None:
    """Set the parameters to their start, or to a step away from it, in their own storage."""
    ends = start
    if step is not None:
        ends = [origin + piece for origin, piece in zip(start, _split(step, parameters), strict=True)]
    for parameter, end in zip(parameters, ends, strict=True):
        parameter.copy_(end)
