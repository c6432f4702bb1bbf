"""fold-batchnorm: folds a batch norm into the convolution or linear layer before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from surgery.engine.contract.base import attribute_of
from surgery.engine.contract.effect import Effect
from surgery.engine.contract.numerics import Numerics, rounded
from surgery.engine.contract.pattern import ADAPTERS, PatternPass, read_elsewhere, stored
from surgery.engine.contract.specs import Outcome, TensorSpec
from surgery.graph.patterns import Match, Pattern, any_of, constant, number, ops, pattern, shape_of, value
from surgery.graph.rewrite.rewriter import Rewriter
from surgery.graph.sites import Site
from surgery.graph.view import View

aten = torch.ops.aten

# Each folded weight is rounded once more, by half an ulp (6e-8 in fp32), and dozens of layers follow.
FOLDED = rounded(
    1e-4,
    "weights times scales are rounded to the weights' dtype",
    {torch.float64: 1e-12, torch.float16: 5e-2, torch.bfloat16: 2e-1},
)
_HELD = ("weight", "bias", "scale", "shift", "mean", "variance")


class FoldBatchnorm(PatternPass):
    """Batch-norm folding: y = BN(W x + b) becomes y = W' x + b', with W' = s ⊙ W and b' = s ⊙ (b − μ) + β.

    The factor s = γ / √(σ² + ε) has one value for each output channel; μ and σ² are the running mean and variance at
    the time the pass is applied. A batch norm is folded into the convolution (also grouped, depthwise or dilated) or
    linear layer before it, if nothing else reads the output of that layer. Transposed convolutions, and norms without
    running statistics, are left as they are.

    W' and b' are new tensors in the dtype of W, computed in fp64. They train. The tensors that they replace are no
    longer read, and no longer count as parameters. The folded op also runs in train mode, where it acts like a frozen
    batch norm: it computes no batch statistics and does not update the running ones. The outputs stay the same up to
    rounding: 1e-4 of their scale in fp32, 1e-12 in fp64, 5e-2 in fp16, 2e-1 in bf16. Undo restores the norm. There is
    no merged form.
    """

    name: ClassVar[str] = "fold-batchnorm"
    example: ClassVar[str] = "surgery apply timm:resnet18 --pass fold-batchnorm -o folded/"
    on: ClassVar[tuple[str, ...]] = ("batchnorm",)
    role: ClassVar[str] = "conv"
    numerics: ClassVar[Numerics] = FOLDED
    before: ClassVar[tuple[str, ...]] = ADAPTERS

    @property
    def effect(self) -> Effect:
        return replace(super().effect, adds_weights=True)

    def patterns(self, view: View) -> Sequence[Pattern]:
        return (folded,)

    def check(self, site: Site) -> str | None:
        view = site.probe.view
        match = self.match(site, view)
        shared = read_elsewhere(match, view, ("weight", "bias"))
        if shared:
            return shared
        if not site.probe.in_memory:
            return "its weights are not in memory, and folding has to read them"
        variance = site.probe.tensor(str(match["variance"].target))
        if not bool((variance.double() + match["eps"] > 0).all()):
            return "its running variance plus eps is not positive everywhere; fix the model first"
        return super().check(site)

    def decide(self, site: Site) -> dict[str, Any]:
        match = self.match(site, site.probe.view)
        held = {name: str(match[name].target) for name in _HELD if name in match}
        return {"reads": held, "eps": match["eps"], "shape": list(shape_of(match["weight"]))}

    def outcome(self, site: Site) -> Outcome:
        names = site.probe.names
        read = site.decided["reads"].values()
        return Outcome(unused=frozenset(name for name in read if name in names))

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        shape = tuple(site.decided["shape"])
        return {
            "weight": TensorSpec(shape, self._filled(site, "weight")),
            "bias": TensorSpec(shape[:1], self._filled(site, "bias")),
        }

    def _filled(self, site: Site, name: str) -> Callable[[Tensor], Any]:
        return lambda tensor: tensor.copy_(fold(site.decided["eps"], self._held(site))[name])

    def _held(self, site: Site) -> dict[str, Tensor]:
        return {name: site.probe.tensor(full) for name, full in site.decided["reads"].items()}

    def names(self, site: Site, tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
        # The new tensors belong to the layer, not to the norm.
        owner = str(site.decided["reads"]["weight"]).rpartition(".")[0]
        return {name: f"{owner}.{attribute_of(self)}.{name}".lstrip(".") for name in tensors}

    def replacement(self, site: Site, match: Match, g: Rewriter) -> fx.Node:
        op = match["op"]
        args = [match["x"], g["weight"], g["bias"], *op.args[3:]]
        return g.model_op(
            op.target, *args, **{k: v for k, v in op.kwargs.items() if k not in ("weight", "bias")}
        )


def fold(eps: float, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute weight and bias of the folded op, in fp64.

    Args:
        eps: ε of the batch norm.
        held: Tensors by role: weight, mean and variance; bias, scale (γ) and shift (β) where they exist.
    """
    wide = {name: tensor.double() for name, tensor in held.items()}
    # One factor for each output channel, which is the first axis of the weight. Absent γ is 1; absent β and b are 0.
    factor = (wide["variance"] + eps).rsqrt() * wide.get("scale", torch.ones(()).double())
    weight = wide["weight"] * factor.reshape(-1, *(1 for _ in wide["weight"].shape[1:]))
    bias = (wide.get("bias", torch.zeros(()).double()) - wide["mean"]) * factor + wide.get("shift", 0)
    return {"weight": weight, "bias": bias}


def _one_row_a_channel(match: Match) -> str | None:
    channels, last = shape_of(match["mean"]), shape_of(match["op"])
    if shape_of(match["weight"])[:1] != channels:
        return "the number of outputs of the op before it differs from the number of channels"
    if "linear" in str(match["op"].target) and len(last) != 2:
        return "the normalized axis is not the output axis of the linear layer"
    return None


@pattern(condition=_one_row_a_channel)
def folded() -> Any:
    bias = any_of(stored("bias"), None)
    made = ops["conv1d", "conv2d", "conv3d", "linear"](value("x"), stored("weight"), bias, ...).named("op")
    training, momentum = constant("training"), number("momentum")
    scale, shift = any_of(stored("scale"), None), any_of(stored("shift"), None)
    return ops.batch_norm(
        made, scale, shift, stored("mean"), stored("variance"), training, momentum, number("eps"), ...
    )
