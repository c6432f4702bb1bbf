"""low-rank: a weight becomes the product of two smaller ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx

from surgery.common.errors import PassError
from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.effect import SWAP, Effect
from surgery.engine.contract.numerics import Numerics, changes
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR, Call, arguments
from surgery.graph.rewrite.current import adapted_by, bias_now, read_elsewhere, tensors_now
from surgery.graph.rewrite.refusals import not_floating
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra import factor, low_rank

aten = torch.ops.aten

_ADDS = frozenset(("1", "1.0", "None"))  # alpha and beta of an addmm that is a linear


class LowRank(RewritePass):
    """Low-rank factors: y = x Wᵀ + b becomes y = (x Aᵀ) Bᵀ + b, A (r × in) and B (out × r) from W's SVD.

    A convolution becomes r filters per group with its own kernel, stride and groups, then a pointwise one; an
    embedding a table (V × r) and a map (d × r); stacked experts one pair each, of one rank. Both factors train, the
    bias stays, and W is neither run nor counted nor exported. It is kept for `undo`, which restores it.

    The rank is given, or the smallest that keeps a fraction of the squared singular values (`energy`), or the
    smallest whose relative error of the op's outputs on the data is at most a `budget`. `basis` says which
    directions are kept: of the weight (truncated SVD: Denton et al. 2014, arXiv:1404.0736), or of its outputs on
    the data: U of Y Yᵀ (Zhang et al. 2015, arXiv:1505.06798), the same as the SVD of W·L with L Lᵀ = X Xᵀ (SVD-LLM,
    Wang et al. 2024, arXiv:2403.07378), plus a hundredth of W Wᵀ to order what the data does not reach. In both the
    error left at a rank is known exactly, without a search; the journal and the plan have it for each site: `error`
    of the weight, `output_error` where outputs were measured.

    It changes what the model computes by that much. A weight is refused where two would not be smaller, where
    something else reads it, and under adapters (factor first, adapt then). There is no merged form.
    """

    name: ClassVar[str] = "low-rank"
    before: ClassVar[tuple[str, ...]] = ("lora", "ia3", "sparse-tune", "bitfit")
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS)
    numerics: ClassVar[Numerics] = changes("approximates weights by products of two smaller ones")

    rank: int | None = Field(None, gt=0, description="inner dimension r (of a convolution, for each group)")
    energy: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="in place of a rank: the fraction of the squared singular values to keep",
    )
    budget: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="in place of a rank: the largest relative error of each op's outputs on the data",
    )
    basis: Literal["weight", "outputs"] | None = Field(
        None,
        description="keep the directions that matter to the weight, or to its outputs on the data (default: outputs "
        "with --budget, else weight)",
    )

    @model_validator(mode="after")
    def _one_measure(self) -> LowRank:
        given = [name for name in ("rank", "energy", "budget") if getattr(self, name) is not None]
        if len(given) != 1:
            had = " and ".join(f"--{name}" for name in given) or "none"
            raise PassError(f"pass 'low-rank': give one of --rank, --energy and --budget; it has {had}")
        return self

    @property
    def effect(self) -> Effect:
        return SWAP

    @property
    def _by_outputs(self) -> bool:
        return (self.basis or ("outputs" if self.budget is not None else "weight")) == "outputs"

    def check(self, site: Site) -> str | None:
        packed = not_floating(site, "factor before quantizing")
        if packed:
            return packed
        if site.kind == CONV and site.layout == "io":
            return "a transposed convolution is not factored; target its neighbours"
        standing = tensors_now(site)
        if isinstance(standing, str):
            return standing
        adapter = next((a for a in map(adapted_by, site.calls) if a), None)
        if adapter:
            return f"it carries {adapter!r}, trained for the whole weight; factor first and adapt then"
        if any(not {str(arguments(c.node).get(k)) for k in ("alpha", "beta")} <= _ADDS for c in site.calls):
            return "its op scales what it adds; only a plain sum is factored"
        weight = standing[0]
        if read_elsewhere(site, weight, site.probe.names.get(weight, ())):
            return (
                f"{weight} is read in another place too, which would keep it: nothing is saved; give the other "
                f"place a copy with --pass untie, or leave it out"
            )
        return self._refused_by_size(site)

    def _refused_by_size(self, site: Site) -> str | None:
        each = sum(torch.Size(shape).numel() for shape in factor.stored_shapes(site, 1))
        most = (site.parameters - 1) // each
        if not most:
            return f"no rank saves: even 1 takes {each:,} values, and the weight has {site.parameters:,}"
        rank = self._found(site)["rank"] if self.rank is None else self.rank
        if rank > most:
            asked = "" if self.rank is not None else self._measure() + " asks for "
            return (
                f"{asked}rank {rank}, which takes {rank * each:,} values, and the weight has {site.parameters:,}; "
                f"it saves up to rank {most}"
            )
        return None

    def _measure(self) -> str:
        return f"--energy {self.energy:g}" if self.energy is not None else f"--budget {self.budget:g}"

    def _found(self, site: Site) -> dict[str, Any]:
        """The rank, its errors, and the factors, computed once for a site."""
        return site.probe.once((self, site.key), lambda: self._factor(site))

    def _factor(self, site: Site) -> dict[str, Any]:
        standing = tensors_now(site)
        assert not isinstance(standing, str)
        weight = factor.matrices(site, site.probe.tensor(standing[0]))
        measured = self._by_outputs or self.budget is not None
        products = factor.output_products(site, _outputs(site)) if measured else None
        found = factor.directions(weight, products, self._by_outputs)
        if self.rank is not None:
            rank = self.rank
        elif self.energy is not None:
            rank = found.rank_within((1 - self.energy) ** 0.5, of_outputs=self._by_outputs)
        else:
            assert self.budget is not None
            rank = found.rank_within(self.budget, of_outputs=True)
        a, b = factor.as_stored(site, *factor.factors(weight, found, rank))
        decided = {"rank": rank, "error": round(found.error(rank), 6)}
        if measured:
            decided["output_error"] = round(found.error(rank, of_outputs=True), 6)
        return {"rank": rank, "decided": decided, "A": a.float(), "B": b.float()}

    def decide(self, site: Site) -> dict[str, Any]:
        if self.rank is not None and not site.probe.in_memory:
            return {"rank": self.rank}
        return dict(self._found(site)["decided"])

    def outcome(self, site: Site) -> Outcome:
        standing = tensors_now(site)
        return Outcome() if isinstance(standing, str) else Outcome(unused=frozenset({standing[0]}))

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        a, b = factor.stored_shapes(site, site.decided["rank"])
        return {"A": TensorSpec(a, self._filled(site, "A")), "B": TensorSpec(b, self._filled(site, "B"))}

    def _filled(self, site: Site, name: str) -> Callable[[Tensor], Any]:
        def fill(tensor: Tensor) -> None:
            tensor.copy_(self._found(site)[name])
            if name == "B":
                site.probe.forget((self, site.key))

        return fill

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node:
        bias = bias_now(g.site_call)
        a, b = (_cast(g, g[name]) for name in ("A", "B"))
        if site.kind == EMBEDDING:
            padding = arguments(g.site_call.node).get("padding_idx", -1)
            return g.call(aten.linear.default, g.call(aten.embedding.default, a, g.x, padding), b)
        if bias is None or site.kind == CONV or bias.meta["val"].dim() == 1:
            return low_rank.branch(site, g, a, b, bias)
        return g.call(aten.add.Tensor, low_rank.branch(site, g, a, b), bias)


def _cast(g: Rewriter, tensor: fx.Node) -> fx.Node:
    """A factor in the dtype that the op computes in, where the model casts its weight."""
    wanted = g.site_call.node.meta["val"].dtype
    return tensor if tensor.meta["val"].dtype == wanted else g.call(aten.to.dtype, tensor, wanted)


def _outputs(site: Site) -> Iterable[tuple[Tensor, Tensor | None]]:
    """What each call of the site gives on each set of data, less its bias, with experts' numbers."""
    nodes = {n for call in site.calls for n in (call.node, call.gather, bias_now(call)) if n is not None}
    values = site.probe.values(nodes)
    for call in site.calls:
        bias, gather = bias_now(call), call.gather
        for index, value in enumerate(values[call.node.name]):
            if bias is not None:
                value = value.double() - _spread(site, call, values[bias.name][index].double())
            if site.kind in (LINEAR, EXPERTS) and call.x_axis == "column":
                value = value.transpose(-2, -1)
            yield value, values[gather.name][index] if gather is not None else None


def _spread(site: Site, call: Call, bias: Tensor) -> Tensor:
    if site.kind == CONV:
        return bias.reshape(-1, *(1 for _ in site.shape[2:]))
    return bias
