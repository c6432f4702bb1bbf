"""LoRA: a trained low-rank update beside a frozen weight, with its variants rsLoRA, DoRA and PiSSA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx, nn

from surgery.common.errors import PassError
from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.effect import ADAPTER, Effect
from surgery.engine.contract.expectations import Expectations
from surgery.engine.contract.folds import Fold
from surgery.engine.contract.numerics import EXACT, Numerics, rounded
from surgery.engine.contract.specs import TensorSpec
from surgery.graph.ops import CONV, EMBEDDING, EXPERTS, LINEAR
from surgery.graph.rewrite.current import replaced_at
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.passes.algebra import low_rank, packed
from surgery.passes.algebra.scale import part_index
from surgery.passes.lora import combine as lora_combining
from surgery.passes.lora import dora, pissa

if TYPE_CHECKING:
    from surgery.engine.contract.base import Place, Source
    from surgery.engine.contract.combination import Combination

aten = torch.ops.aten

# At insertion on every linear map of MiniLM (6 layers), SmolLM2 (30) and tiny T5 and ViT, at ranks 4 to 64, outputs
# moved by at most 3.9e-6 of their scale in fp32, 6.7e-15 in fp64, 5.5e-3 in fp16 and 3.6e-2 in bf16. A unit in the
# last place of each layer, grown by the layers above it: five times the worst in fp32, twice that in half precision.
PISSA_MOVES = rounded(
    2e-5,
    "the residual is rounded to the weight's dtype, and two products are summed in the place of one",
    {torch.float64: 5e-14, torch.float16: 1e-2, torch.bfloat16: 8e-2},
)


def _kaiming(tensor: Tensor) -> None:
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


class Lora(RewritePass):
    """LoRA: y = W x + b becomes y + s·B(A x), with s = α/r (Hu et al. 2021, arXiv:2106.09685).

    Start. A (r × in) is Kaiming-uniform, or normal with deviation 1/r (`--init gaussian`), and B (out × r) zero, so
    insertion is exact. A convolution takes A with its own kernel, stride and groups (r filters per group) and B
    pointwise; an embedding takes A (r × vocabulary) zero and B (dim × r) normal, as PEFT does; stacked experts
    take one pair per expert, A (experts × r × in) and B (experts × out × r). On a fused qkv, parts get a pair each.
    Merge: W + s·B A. A weight w scales s.

    `--rslora`. s = α/√r, so that what the update learns does not shrink as the rank grows (Kalajdzievski 2023,
    arXiv:2312.03732).

    `--dropout p`. Drops what enters the branch, in train mode only; the eval graph has none. Of an embedding's
    token numbers nothing can be dropped, as in PEFT. The parts of one projection share a mask.

    `--dora`. The weight becomes magnitude times direction, m ⊙ (W + s·B A)/‖W + s·B A‖, with one trained magnitude
    m (out; experts × out) for each output, which starts at its norm (Liu et al. 2024, arXiv:2402.09353). The graph
    computes c = m/‖W + s·B A‖ and adds (c − 1) ⊙ W x + c ⊙ s·B A x to the output: insertion is exact, earlier
    adapters keep what they add, and the bias stays as it is. The norm is a constant to the gradient, as in the
    paper's section 4.3, unless there is `--full-gradient`. In train mode with dropout, W reads the same
    dropped input as the branch, as in PEFT. At weight w the op computes with W + w·(c ⊙ (W + s·B A) − W), which is
    also the merge.

    `--init pissa`. A and B start as the part of W along its r largest singular values, split evenly between them,
    and the op reads the frozen residual W − s·B A in the place of W (Meng et al. 2024, arXiv:2404.02948). The
    residual (as large as W) is stored, so that loading computes no SVD. Insertion is exact but for rounding: 2e-5
    of the outputs' scale is allowed in fp32 (5e-14 in fp64, 1e-2 in fp16, 8e-2 in bf16). `--svd-iterations n` takes
    a randomised SVD, which is fast. W itself does not train there, even where the base is not frozen. Merge:
    residual + s·B A; undo gives W back bit for bit, and other uses of a tied weight go on reading W. It has to come
    before other passes than plain LoRA that act on the same op.

    On an op that keeps its weight packed (a plugin's `WeightOp` with `dequantize`) all of these stand beside it: its
    codes stay, nothing as large as W is stored, and nothing is folded. `--dora` unpacks W in the graph for the norms
    (not of stacked experts), and W x is the op's own. `--init pissa` takes the SVD of the unpacked weight and adds
    s·(B A − B₀ A₀) x with the frozen factors at the start, A₀ and B₀: insertion is exact there, whatever else acts on
    the op.
    """

    name: ClassVar[str] = "lora"
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV, EMBEDDING, EXPERTS)

    rank: int = Field(8, gt=0, description="inner dimension r of the update")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")
    parts: str | None = Field(
        None, description="of a fused projection, the parts to adapt: q,k,v (default: all, as one)"
    )
    rslora: bool = Field(False, description="scale by alpha / √rank instead")
    dora: bool = Field(False, description="train a magnitude for each output beside the direction")
    full_gradient: bool = Field(False, description="with --dora: let the gradient pass through the norm too")
    init: Literal["kaiming", "gaussian", "pissa"] = Field(
        "kaiming", description="how A and B start: A at random and B zero, or W's largest singular values"
    )
    svd_iterations: int = Field(
        0, ge=0, description="with --init pissa: power iterations of a randomised SVD (0: the full one)"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="probability to drop what enters the branch, in training"
    )

    @model_validator(mode="after")
    def _together(self) -> Lora:
        if self.full_gradient and not self.dora:
            raise PassError(
                "pass 'lora': --full-gradient is about the norm of DoRA; add --dora, or leave it out"
            )
        if self.svd_iterations and self.init != "pissa":
            raise PassError("pass 'lora': --svd-iterations is for --init pissa; add that, or leave it out")
        if self.dora and self.init == "pissa":
            raise PassError(
                "pass 'lora': --dora normalises the weight that --init pissa takes apart; choose one of them"
            )
        return self

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def numerics(self) -> Numerics:
        return PISSA_MOVES if self.init == "pissa" else EXACT

    @property
    def effect(self) -> Effect:
        return replace(ADAPTER, scalable=True, partial=True, reads_weight=self.dora)

    @property
    def expectations(self) -> Expectations:
        held = self.dora and not self.full_gradient
        return Expectations(
            detached="DoRA's norm is a constant to the gradient (section 4.3 of the paper)" if held else "",
            redirected=(
                "the norm takes out of a weight's gradient what lies along it" if self.full_gradient else ""
            ),
        )

    def check(self, site: Site) -> str | None:
        if site.kind == CONV and site.layout == "io":
            return "a transposed convolution has no low-rank branch here; target its neighbours"
        if not site.float_dtype.is_floating_point:
            return f"its weight is {site.dtype}; LoRA needs a floating-point base or an op that dequantizes"
        if site.weight is None:
            return f"its weight is computed from {', '.join(site.computed_from)}; target those"
        if self.parts is not None and not site.parts:
            return "it is no fused projection, so parts cannot be chosen; leave out --parts"
        unknown = [part for part in self._parts(site) if part not in site.parts]
        if unknown:
            return f"it has no part {unknown[0]!r}; its parts are {', '.join(site.parts)}"
        if site.packed and site.kind == CONV and (lacking := low_rank.lacks(site)):
            return (
                f"its op {site.op} has no argument {lacking}, so the shape of a branch beside it is not known"
            )
        if self._parts(site) and site.kind == CONV and site.groups > 1:
            return "a part of a grouped convolution has no branch of its own; target all of it"
        return self._check_weight(site) if self.dora or self.init == "pissa" else None

    def _check_weight(self, site: Site) -> str | None:
        """What DoRA and PiSSA need of the weight itself."""
        option = "--dora" if self.dora else "--init pissa"
        if site.packed and (unread := packed.refusal(site)):
            return f"{unread}; leave {option} out"
        gone = replaced_at(site)
        if gone:
            return f"{gone} has put another op in its place; leave {option} out, or undo {gone!r}"
        if self.dora:
            there = site.probe.in_memory
            dead = dora.zero_output(site, site.probe.dequantized(site), self._rows(site)) if there else None
            if dead is not None:
                return f"the weight of its output {dead} is zero, which has no direction; leave --dora out"
            return None
        rows: Mapping[str, list[int] | None] = self._rows(site) or {"": None}
        largest = min(pissa.largest_rank(site, own) for own in rows.values())
        if self.rank > largest:
            return f"its weight has no more than {largest} singular values; give --rank {largest} or less"
        if site.packed:  # its op goes on computing with all of it
            return None
        journal = {entry.id: entry for entry in site.probe.journal}
        for name in pissa.entries_at(site):
            if journal[name].pass_name != self.name or journal[name].options.get("dora"):
                return f"{name} acts on what its op computes, of which PiSSA takes a part away; apply it after this"
        return None

    def _parts(self, site: Site) -> tuple[str, ...]:
        asked = tuple(part.strip() for part in self.parts.split(",")) if self.parts is not None else ()
        if site.selected_parts:
            return tuple(p for p in site.selected_parts if not asked or p in asked) or asked
        return asked

    def _rows(self, site: Site) -> dict[str, list[int]]:
        return {part: list(site.parts[part]) for part in self._parts(site)}

    def decide(self, site: Site) -> dict[str, Any]:
        return {"rows": self._rows(site)}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        rows = site.decided.get("rows") or {}
        specs: dict[str, TensorSpec] = {}
        split = pissa.Split(site, self.rank, self.scale, rows or {"": None}, self.svd_iterations)
        for part, own in (rows or {"": None}).items():
            end = f"_{part}" if part else ""
            specs[f"A{end}"], specs[f"B{end}"] = self._pair(site, split, part, own)
            if self.init == "pissa" and site.packed:
                pair = (specs[f"A{end}"], specs[f"B{end}"])
                specs[f"A0{end}"], specs[f"B0{end}"] = (replace(spec, trainable=False) for spec in pair)
            if self.dora:
                specs[f"m{end}"] = self._magnitude(site, own)
            if own is not None and not low_rank.is_run(own):
                specs[f"rows_{own[0]}"] = _index(low_rank.gather_index(own, site.out_features))
                if self.dora:
                    specs[f"index{end}"] = _index(torch.tensor(own))
        if self.dora and rows:
            specs["rows"] = _index(part_index(list(rows.values()), site.out_features))
        if self.dora:
            for number, value in enumerate(packed.constants(site)):
                specs[f"constant_{number}"] = TensorSpec(
                    tuple(value.shape), trainable=False, dtype=value.dtype, value=value.clone()
                )
        if self.init == "pissa" and not site.packed:
            specs["residual"] = TensorSpec(site.shape, lambda t: t.copy_(split.residual), trainable=False)
        return specs

    def _pair(
        self, site: Site, split: pissa.Split, part: str, rows: list[int] | None
    ) -> tuple[TensorSpec, TensorSpec]:
        a, b = low_rank.factor_shapes(site, self.rank, None if rows is None else len(rows))
        if self.init == "pissa":
            return (
                TensorSpec(a, lambda t: t.copy_(split.factors[part][0])),
                TensorSpec(b, lambda t: t.copy_(split.factors[part][1])),
            )
        if site.kind == EMBEDDING:
            return TensorSpec(a), TensorSpec(b, nn.init.normal_)
        if self.init == "gaussian":
            return TensorSpec(a, lambda t: nn.init.normal_(t, std=1 / self.rank)), TensorSpec(b)
        return TensorSpec(a, _kaiming), TensorSpec(b)

    def _magnitude(self, site: Site, rows: list[int] | None) -> TensorSpec:
        """m at the start: what the graph computes as the norm while B A is zero, to the bit."""

        def fill(magnitude: Tensor) -> None:
            weight = site.probe.stored(site)
            if rows is not None:
                index = torch.tensor(rows, device=weight.device)
                weight = dora.part_of(dora.eagerly, site, weight, rows, index)
            a, b = (
                weight.new_zeros(shape)
                for shape in low_rank.factor_shapes(site, self.rank, None if rows is None else len(rows))
            )
            magnitude.copy_(dora.norms(dora.eagerly, site, weight, a, b, self.scale))

        return TensorSpec(dora.magnitudes(site, None if rows is None else len(rows)), fill)

    def rewrite(self, site: Site, g: Rewriter) -> fx.Node:
        rows = site.decided.get("rows") or {}
        if self.init == "pissa" and not site.packed:
            pissa.read_residual(g, g["residual"])
        dropped = None
        if g.training and self.dropout and site.kind != EMBEDDING:
            dropped = g.call(aten.dropout.default, g.x, self.dropout, True)
        if self.dora:
            parts = [
                dora.Part(g[f"A{end}"], g[f"B{end}"], g[f"m{end}"], own, index)
                for end, own, index in self._placed(rows, g)
            ]
            return dora.rewrite(site, g, parts, self.scale, dropped, self.full_gradient)
        scale = self.scale * g.weight
        if not rows:
            if self.init == "pissa" and site.packed:
                return g.call(aten.add.Tensor, g.output, self._branch(site, g, "", dropped), alpha=scale)
            return low_rank.add_branch(site, g, g["A"], g["B"], scale, dropped)
        updates = [(self._branch(site, g, f"_{part}", dropped), features) for part, features in rows.items()]
        return low_rank.add_rows(site, g, updates, scale)

    def _branch(self, site: Site, g: Rewriter, end: str, dropped: fx.Node | None) -> fx.Node:
        """What one pair adds, before it is scaled. end: of the names of its tensors."""
        own = low_rank.branch(site, g, g[f"A{end}"], g[f"B{end}"], x=dropped)
        if self.init != "pissa" or not site.packed:
            return own
        return g.call(aten.sub.Tensor, own, low_rank.branch(site, g, g[f"A0{end}"], g[f"B0{end}"]))

    @staticmethod
    def _placed(rows: Mapping[str, list[int]], g: Rewriter) -> list[tuple[str, tuple[int, ...] | None, Any]]:
        """Ending of the tensors' names, output features and, where these have gaps, their index, by part."""
        if not rows:
            return [("", None, None)]
        return [
            (f"_{part}", tuple(own), None if low_rank.is_run(own) else g[f"index_{part}"])
            for part, own in rows.items()
        ]

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> Mapping[str, Fold]:
        ops: dict[str, Fold] = {}
        if self.init == "pissa":
            ops["weight:residual"] = pissa.Displace(tensors["residual"], weight)
        for part, own in (site.decided.get("rows") or {"": None}).items():
            end, rows = (f"_{part}", tuple(own)) if own is not None else ("", None)
            a, b = tensors[f"A{end}"], tensors[f"B{end}"]
            if self.dora:
                whole = dora.Part(a, b, tensors[f"m{end}"], rows)
                ops[f"weight:{part}"] = dora.Magnify(site, whole, self.scale, weight)
            else:
                ops[f"weight:{part}"] = low_rank.AddLowRank(site, a, b, self.scale * weight, rows)
        return ops

    @classmethod
    def carrier(cls, places: Sequence[Place], rank: int, label: str) -> Lora:
        """A LoRA of scale 1 at these places."""
        target = ",".join(dict.fromkeys(f"path:{place.site.path}" for place in places))
        parts = {tuple(place.site.decided.get("rows") or ()) for place in places}
        chosen = ",".join(parts.pop()) or None if len(parts) == 1 else None
        made = cls.parse({"target": target, "rank": rank, "alpha": float(rank), "parts": chosen, "as": label})
        assert isinstance(made, Lora)
        return made


def _combine(places: Sequence[Place], how: Combination, label: str) -> tuple[Lora, list[dict[str, Tensor]]]:
    """One LoRA of scale 1 and of one rank; where a source has a smaller rank it is padded with zeros."""
    generator = torch.Generator().manual_seed(how.seed)
    found: list[dict[str, lora_combining.Pair]] = []
    for place in places:
        weights = [source.weight * cast(Lora, source.pass_).scale for source in place.sources]
        pairs = [plain_pairs(place.site, source, "combine") for source in place.sources]
        found.append(
            {
                end: lora_combining.combined(
                    place.site.path, [own[end] for own in pairs], weights, how, generator
                )
                for end in pairs[0]
            }
        )
    rank = max(a.shape[1] for own in found for a, _ in own.values())
    return Lora.carrier(places, rank, label), [lora_combining.named(own, rank) for own in found]


Lora.combiner = staticmethod(_combine)


def plain_pairs(site: Site, source: Source, what: str) -> dict[str, lora_combining.Pair]:
    """A and B of a source by the ending of their names (of the parts of a fused projection), as matrices.

    Raises PassError where they are no plain low-rank update.
    """
    lora = source.pass_
    assert isinstance(lora, Lora)
    for option, on in (("--dora", lora.dora), ("--init pissa", lora.init == "pissa")):
        if on:
            raise PassError(
                f"{what} at {site.path}: {source.entry} has {option}, which is no plain low-rank update; "
                f"{'merge it' if lora.dora else 'make it one with export-peft and import-peft'}"
            )
    ends = [f"_{part}" for part in site.decided.get("rows") or {}] or [""]
    return {
        end: lora_combining.as_matrices(site, source.tensors[f"A{end}"], source.tensors[f"B{end}"])
        for end in ends
    }


def _index(value: Tensor) -> TensorSpec:
    return TensorSpec(tuple(value.shape), trainable=False, dtype=torch.int64, value=value)
