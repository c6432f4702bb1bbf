"""low-rank: replaces a weight by the product of two smaller ones."""

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
from surgery.graph.rewrite.refusals import not_floating, scaled_op
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra import factor, low_rank

aten = torch.ops.aten


class LowRank(RewritePass):
    """Low-rank factors: y = x Wᵀ + b becomes y = (x Aᵀ) Bᵀ + b, A (r × in) and B (out × r) from W's SVD.

    A convolution becomes r filters per group with its own kernel, stride and groups, followed by a pointwise
    convolution. An embedding becomes a table (V × r) and a map (d × r). Stacked experts get one pair each, of one rank.
    Both factors train and the bias stays. W is neither run nor counted nor exported; it is kept for `undo`.

    The rank is given, or it is the smallest that keeps a fraction of the squared singular values (`energy`), or the
    smallest at which the relative error of the op's outputs on the data is within a `budget`. `basis` chooses the
    directions to keep. `weight` keeps those of the weight (truncated SVD: Denton et al. 2014, arXiv:1404.0736).
    `outputs` keeps those of its outputs on the data: U of Y Yᵀ (Zhang et al. 2015, arXiv:1505.06798), which is the SVD
    of W·L with L Lᵀ = X Xᵀ (SVD-LLM, Wang et al. 2024, arXiv:2403.07378); a hundredth of W Wᵀ is added to order
    directions that the data does not reach. In both, the error at a rank is known exactly and needs no search. The
    journal and the plan have it for each site: `error` of the weight, and `output_error` where outputs were measured.

    The outputs change by this error. A weight is refused if two factors would not be smaller, if something else reads
    it, or if it has adapters (apply this pass before them). The pass cannot be merged.
    """

    name: ClassVar[str] = "low-rank"
    example: ClassVar[str] = (
        'surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass low-rank --target "mlp.*" --energy 0.8 -o '
        "factored/"
    )
    before: ClassVar[tuple[str, ...]] = ("lora", "ia3", "sparse-tune", "bitfit")
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS)
    numerics: ClassVar[Numerics] = changes("approximates weights by products of two smaller ones")

    rank: int | None = Field(default=None, gt=0, description="inner dimension r (per group of a convolution)")
    energy: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="instead of a rank: the fraction of the squared singular values to keep",
    )
    budget: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="instead of a rank: the largest relative error of each op's outputs on the data",
    )
    basis: Literal["weight", "outputs"] | None = Field(
        default=None,
        description="keep the largest directions of the weight, or of its outputs on the data (default: outputs with "
        "--budget, else weight)",
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
            return (
                f"it carries {adapter!r}, trained for the whole weight; factor first, then apply the adapter"
            )
        if scaled := scaled_op(site, "leave it out, since only a plain linear map is factored"):
            return scaled
        weight = standing[0]
        if read_elsewhere(site, weight, site.probe.names.get(weight, ())):
            return (
                f"{weight} is read in another place too and would have to stay, so nothing is saved; give the "
                f"other place a copy with --pass untie, or leave this weight out"
            )
        return self._refused_by_size(site)

    def _refused_by_size(self, site: Site) -> str | None:
        each = sum(torch.Size(shape).numel() for shape in factor.stored_shapes(site, 1))
        most = (site.parameters - 1) // each
        if not most:
            return f"no rank is smaller: even rank 1 takes {each:,} values, and the weight has {site.parameters:,}"
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
            # B is filled last; the factors are as large as the new weights, so they are not kept.
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
    """The factor in the dtype that the op computes in, which differs where the model casts its weight."""
    wanted = g.site_call.node.meta["val"].dtype
    return tensor if tensor.meta["val"].dtype == wanted else g.call(aten.to.dtype, tensor, wanted)


def _outputs(site: Site) -> Iterable[tuple[Tensor, Tensor | None]]:
    """The output of each call on each set of data, without its bias, and the expert number of each row or None."""
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
    """The bias, shaped to be subtracted from the output."""
    if site.kind == CONV:
        return bias.reshape(-1, *(1 for _ in site.shape[2:]))
    return bias
