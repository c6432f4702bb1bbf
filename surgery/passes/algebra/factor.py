"""Factoring a weight into B A: its matrices, the most important directions of its outputs, and the error at a rank.

Every kind of weight is seen as stacked matrices W (stack × out × in): one for a linear map or an embedding (whose
table is the transpose), one per group of a convolution (in = channels × kernel), one per expert. With the first r
columns U of an orthonormal basis of the outputs, W ≈ U (Uᵀ W), so B = U and A = Uᵀ W. With the eigenvectors of W Wᵀ as
basis, this is the truncated SVD. With those of Y Yᵀ = W X Xᵀ Wᵀ, it is the rank-r weight of least error on the inputs
X, the same as the SVD of W L with L Lᵀ = X Xᵀ. In both bases the squared error at rank r is exactly the sum of the
shares of the directions after r.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.graph.ops import CONV, EMBEDDING, EXPERTS
from surgery.graph.sites import Site
from surgery.passes.algebra.low_rank import factor_shapes

# Few inputs leave most directions of the outputs at zero. A hundredth of the weight's own share orders these.
DAMPING = 1e-2


@dataclass(frozen=True)
class Directions:
    """Orthonormal directions of the outputs, the most important first.

    Attributes:
        basis: The directions as columns (stack × out × at most in).
        weight: Share of the weight's squared norm along each, summed over the stack.
        outputs: The same for the outputs on the data; None where no outputs were measured.
    """

    basis: Tensor
    weight: Tensor
    outputs: Tensor | None

    def error(self, rank: int, of_outputs: bool = False) -> float:
        """Relative error at a rank: ‖W − W_r‖/‖W‖, or ‖Y − Y_r‖/‖Y‖ of the outputs."""
        shares = self.outputs if of_outputs else self.weight
        assert shares is not None
        return float(shares[rank:].sum().clamp(min=0).sqrt())

    def rank_within(self, error: float, of_outputs: bool = False) -> int:
        """The smallest rank, at least 1, with at most this relative error."""
        return next(
            (r for r in range(1, self.basis.shape[2]) if self.error(r, of_outputs) <= error),
            self.basis.shape[2],
        )


def matrices(site: Site, weight: Tensor) -> Tensor:
    """The weight as (stack × out × in), in float64."""
    return stacked(site, weight.detach().double())


def stacked(site: Site, weight: Tensor) -> Tensor:
    """The weight as (stack × out × in), in its own dtype."""
    if site.kind == CONV:
        if site.layout == "io":  # transposed, with one group: several would lie along the input axis
            weight = weight.transpose(0, 1)
        return weight.reshape(site.groups, weight.shape[0] // site.groups, -1)
    if site.kind == EXPERTS:
        return weight if site.layout == "eoi" else weight.transpose(1, 2)
    return (weight if site.layout == "oi" else weight.t()).unsqueeze(0)


def output_products(site: Site, outputs: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Y Yᵀ (stack × out × out) of the outputs of an op without its bias, in float64.

    Args:
        site: The site.
        outputs: Values of the op, each with the expert number of each row where experts are gathered.
    """
    total: Tensor | float = 0.0
    for value, experts in outputs:
        value = value.double()
        if site.kind == CONV:
            channels = value.movedim(-(len(site.float_shape) - 2) - 1, 0)
            rows = channels.reshape(site.groups, channels.shape[0] // site.groups, -1)
            total = total + rows @ rows.transpose(1, 2)
        elif site.kind == EXPERTS:
            rows = value.reshape(value.shape[0], -1, site.out_features)
            each = rows.transpose(1, 2) @ rows
            if experts is None:
                total = total + each
            else:
                stacked = torch.zeros(site.size("e"), *each.shape[1:], dtype=each.dtype, device=each.device)
                total = total + stacked.index_add_(0, experts, each)
        else:
            rows = value.reshape(-1, value.shape[-1])
            total = total + (rows.t() @ rows).unsqueeze(0)
    assert isinstance(total, Tensor)
    return total


def directions(weight: Tensor, products: Tensor | None, by_outputs: bool) -> Directions:
    """Directions of the outputs of a weight, the most important first.

    Args:
        weight: The weight from `matrices`.
        products: Y Yᵀ from `output_products`, or None.
        by_outputs: Order the directions by the outputs instead of the weight.
    """
    rows, columns = weight.shape[1:]
    # All outputs lie in the column space of the weight. In its basis the problem is as small as the input.
    span = torch.linalg.qr(weight)[0] if rows > columns else None
    inner = span.transpose(1, 2) @ weight if span is not None else weight
    gram = inner @ inner.transpose(1, 2)
    if products is not None and span is not None:
        products = span.transpose(1, 2) @ products @ span
    chosen = gram
    if by_outputs:
        assert products is not None
        chosen = products / _trace(products).clamp(min=1e-300) + DAMPING * gram / _trace(gram).clamp(
            min=1e-300
        )
    basis = torch.linalg.eigh(chosen)[1].flip(-1)
    return Directions(
        span @ basis if span is not None else basis,
        _shares(basis, gram),
        None if products is None else _shares(basis, products),
    )


def _trace(products: Tensor) -> Tensor:
    return products.diagonal(dim1=1, dim2=2).sum()


def _shares(basis: Tensor, products: Tensor) -> Tensor:
    along = (basis * (products @ basis)).sum(1).clamp(min=0).sum(0)
    return along / along.sum().clamp(min=1e-300)


def factors(weight: Tensor, found: Directions, rank: int) -> tuple[Tensor, Tensor]:
    """A (stack × rank × in) and B (stack × out × rank), with the norm of each direction split evenly between them.

    Args:
        weight: The weight from `matrices`.
        found: Its directions.
        rank: Number of directions to keep.
    """
    b = found.basis[:, :, :rank]
    a = b.transpose(1, 2) @ weight
    scale = a.norm(dim=2, keepdim=True).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return a / scale, b * scale.transpose(1, 2)


def as_stored(site: Site, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors from `factors` in the shapes that their ops take.

    Args:
        site: The site.
        a: A (stack × rank × in).
        b: B (stack × out × rank).
    """
    if site.kind == CONV:
        kernel = site.float_shape[2:]
        return a.reshape(-1, site.float_shape[1], *kernel), b.reshape(
            site.float_shape[0], -1, *(1 for _ in kernel)
        )
    if site.kind == EXPERTS:
        return a, b
    return (a[0].t() if site.kind == EMBEDDING else a[0]), b[0]


def stored_shapes(site: Site, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `as_stored`."""
    a, b = factor_shapes(site, rank)
    return (a[::-1] if site.kind == EMBEDDING else a), b
