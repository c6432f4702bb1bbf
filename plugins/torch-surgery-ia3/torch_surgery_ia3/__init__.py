"""IA³: learned vectors that rescale keys, values and the inner activations of the feed-forward layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from surgery.api import (
    ADAPTER,
    CONV,
    LINEAR,
    Effect,
    Field,
    Fold,
    PassError,
    RewritePass,
    Rewriter,
    ScaleAxis,
    Site,
    TensorSpec,
    hookimpl,
    scale_input,
    scale_output,
)
from surgery.api.algebra import Combination, Place, channels, computed_weight, ones_elsewhere, part_index


def combine(
    places: Sequence[Place], how: Combination, label: str
) -> tuple[RewritePass, list[dict[str, Tensor]]]:
    """Combine vectors l to one at each place: 1 plus the combination of the differences l − 1.

    Args:
        places: The places, with the sources at each.
        how: Method of combination; the one for ranks ("cat") does not apply.
        label: Label of the result.

    Returns:
        The combined pass, and its tensors at each place.

    Raises:
        PassError: The method needs ranks.
    """
    if how.method == "cat" or how.by_svd:
        raise PassError(
            f"combine: ia3 has no ranks, which {how.method} needs; use linear, ties or dare_linear"
        )
    generator = torch.Generator().manual_seed(how.seed)
    values = []
    for place in places:
        weights = [source.weight for source in place.sources]
        # "rows" is an index of the fused projection, not a trained vector.
        names = [name for name in place.sources[0].tensors if name != "rows"]
        values.append(
            {
                name: 1 + how.of([s.tensors[name] - 1 for s in place.sources], weights, generator)
                for name in names
            }
        )
    target = ",".join(f"path:{place.site.path}" for place in places)
    made = IA3.parse({"target": target, "as": label})
    assert isinstance(made, IA3)
    return made, values


class IA3(RewritePass):
    """IA³: y = W x + b becomes l ⊙ (W x + b), or W (l ⊙ x) + b (Liu et al. 2022, arXiv:2205.05638).

    The learned vector l has one value for each feature (each channel of a convolution). It starts at one, so the
    outputs do not change at insertion. By default, as in the paper, the pass scales keys and values (the outputs of
    attn.k and attn.v, or these parts of a fused projection) and the inner activation of the feed-forward layer (the
    input of mlp.down). `--scale` sets input or output for all targets.

    A vector on an input also scales the input of adapters that were applied before it; adapters applied later read the
    unscaled input. A weight w of the application gives the factor 1 + w·(l − 1). Merge: W becomes diag(l) W and b
    becomes l ⊙ b for an output; W becomes W diag(l) for an input.
    """

    name: ClassVar[str] = "ia3"
    example: ClassVar[str] = (
        "surgery apply hf:HuggingFaceTB/SmolLM2-135M --pass ia3 --target attn.k,attn.v,mlp.down -o adapted/"
    )
    on: ClassVar[tuple[str, ...]] = (LINEAR, CONV)
    default_target: ClassVar[str | None] = "attn.k,attn.v,mlp.down"

    combiner: ClassVar[Any] = staticmethod(combine)

    scale: Literal["auto", "input", "output"] = Field(
        default="auto",
        description="value that the vector scales; auto: the input of mlp.down, the output of other targets",
    )

    @property
    def effect(self) -> Effect:
        return replace(ADAPTER, scalable=True, partial=True)

    def check(self, site: Site) -> str | None:
        computed = computed_weight(site)
        if computed:
            return computed
        if site.bias_is_computed and self._axis(site) == "o":
            return "its bias is computed, so a scaled output could not be merged; use --scale input"
        if site.selected_parts and self._axis(site) == "i":
            return (
                f"the parts of a fused projection share one input; target {site.role}, or use --scale output"
            )
        return None

    def _axis(self, site: Site) -> str:
        """Return the axis of the weight that is scaled: "i" for its input, "o" for its output."""
        if self.scale == "auto":
            return "i" if site.role == "mlp.down" else "o"
        return self.scale[0]

    def decide(self, site: Site) -> dict[str, Any]:
        rows = {part: list(site.parts[part]) for part in site.selected_parts}
        return {"axis": self._axis(site), "rows": rows}

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        rows = site.decided["rows"]
        if not rows:
            return {"scale": TensorSpec((channels(site, site.decided["axis"]),), nn.init.ones_)}
        specs = {f"scale_{part}": TensorSpec((len(own),), nn.init.ones_) for part, own in rows.items()}
        index = part_index(list(rows.values()), channels(site, "o"))
        specs["rows"] = TensorSpec(tuple(index.shape), trainable=False, dtype=torch.int64, value=index)
        return specs

    def rewrite(self, site: Site, g: Rewriter):
        rows = site.decided["rows"]
        # Parts of a fused projection have vectors of their own; other rows are multiplied by one.
        if rows:
            vector = ones_elsewhere(g, [g[f"scale_{part}"] for part in rows], g["rows"])
        else:
            vector = g["scale"]
        act = scale_input if site.decided["axis"] == "i" else scale_output
        return act(site, g, vector)

    def merge(self, site: Site, tensors: Mapping[str, Tensor], weight: float) -> dict[str, Fold]:
        rows = site.decided["rows"]
        if not rows:
            axis, factor = site.decided["axis"], _factor(tensors["scale"], weight)
            ops: dict[str, Fold] = {"weight": ScaleAxis(site, factor, axis)}
            if axis == "o":
                ops["bias"] = ScaleAxis(site, factor, bias=True)
            return ops
        ops = {}
        for part, own in rows.items():
            factor = _factor(tensors[f"scale_{part}"], weight)
            ops[f"weight:{part}"] = ScaleAxis(site, factor, rows=tuple(own))
            ops[f"bias:{part}"] = ScaleAxis(site, factor, bias=True, rows=tuple(own))
        return ops


def _factor(vector: Tensor, weight: float) -> Tensor:
    """Return 1 + weight · (vector − 1), exactly the vector for weight 1."""
    return vector if weight == 1 else vector * weight + (1 - weight)


@hookimpl
def surgery_passes() -> list[type]:
    """Return the pass of this plugin."""
    return [IA3]
