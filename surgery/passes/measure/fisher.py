"""Fisher information of the weights on data, which needs no labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from surgery.common.errors import PassError
from surgery.engine.probe import InputSet
from surgery.engine.state import State
from surgery.graph.graphs import flat_inputs
from surgery.graph.ops import LINEAR, arguments
from surgery.graph.sites import Measurements, Site


def fisher(probe: Measurements, name: str, samples: int = 4, seed: int = 0) -> Tensor:
    """Diagonal Fisher information of a base parameter, of its shape, in fp32; see `fisher_of`.

    For the packed weight of a linear op it is that of the floats that the weight stands for. It is computed for all
    parameters in one run and kept by the probe.

    Args:
        probe: what the pass may measure (`site.probe`).
        name: the parameter's name.
        samples: answers drawn for each set of data.
        seed: of the draws.

    Raises:
        PassError: a gradient on the data is not finite.
    """
    return probe.once(("fisher", samples, seed), lambda: _measured(probe, samples, seed))[name]


def _measured(probe: Measurements, samples: int, seed: int) -> dict[str, Tensor]:
    for _ in probe.inputs_of_graph():  # raises where the data do not fit
        pass
    found = fisher_of(probe.program, probe.data, samples, seed)
    wrong = next((name for name, value in found.items() if not bool(value.isfinite().all())), None)
    if wrong is not None:
        raise PassError(f"on the data the gradient of {wrong} is infinite or no number; mend the data")
    return found


def fisher_of(program: State, data: Sequence[InputSet], samples: int, seed: int) -> dict[str, Tensor]:
    """E over data and y ~ p(y|x) of (∂ log p(y|x) / ∂θ)², for every parameter of the base, by name.

    Of a packed weight of a linear op: for the floats that it stands for, θ of their shape.

    p is the softmax over the last axis of the program's first floating output (a unit-variance normal around it
    where that has one channel), so no labels are needed (Sung et al. 2021, arXiv:2111.09839).
    """
    free = program.derive(program.journal, *program.copies())
    free.journal = type(program.journal)(tuple(e for e in program.journal if e.kind == "rewrite"))
    module = free.module()
    packed = _Packed(module.graph_module(), free.sites)
    generator = torch.Generator().manual_seed(seed)
    squared = {
        name: torch.zeros_like(p, dtype=torch.float32)
        for name, p in module.named_parameters(remove_duplicate=False)
    } | packed.zeros()
    count = 0
    for args, kwargs in data:
        for _ in range(samples):
            module.zero_grad(set_to_none=True)
            run = packed if packed.weights else module
            leaves = pytree.tree_leaves(run(*args, **kwargs))
            output = next(t for t in leaves if isinstance(t, Tensor) and t.is_floating_point())
            if not bool(output.isfinite().all()):
                raise PassError(
                    "on the data the program gives values that are infinite or no numbers; mend the data"
                )
            loss = _surprise(output.float(), generator)
            try:
                loss.backward()
            except RuntimeError as error:  # an op of a plugin need not have a gradient
                raise PassError(
                    f"on the data no gradient can be had: {str(error).splitlines()[0]}; choose by something else, or "
                    "give the op its autograd formula"
                ) from error
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if parameter.grad is not None:
                    squared[name] += parameter.grad.float() ** 2
            for name, gradient in packed.taken().items():
                squared[name] += gradient**2
            count += 1
    return {name: value / max(count, 1) for name, value in squared.items()}


class _Packed(fx.Interpreter):
    """Runs a graph, and adds up gradients of packed linear weights, to which their ops give none: ∂L/∂W = Σ gᵀ x."""

    def __init__(self, module: fx.GraphModule, sites: Iterable[Site]) -> None:
        super().__init__(module)
        self.weights = {
            call.node.name: (str(call.weight.target), call, site.float_shape)
            for site in sites
            if site.packed and site.kind == LINEAR
            for call in site.calls
            if call.weight is not None
        }
        self._gradients: dict[str, Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*flat_inputs(self.module, args, kwargs), enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name not in self.weights:
            return value
        name, call, _ = self.weights[n.name]
        x = self.env[arguments(n)[call.op.x]].detach()
        value = value if value.requires_grad else value.detach().requires_grad_()

        def add(gradient: Tensor) -> None:
            rows, given = (t.reshape(-1, t.shape[-1]).float() for t in (gradient, x))
            own = rows.T @ given if call.layout == "oi" else given.T @ rows
            self._gradients[name] = self._gradients[name] + own if name in self._gradients else own

        value.register_hook(add)
        return value

    def zeros(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros(shape, device=call.node.meta["val"].device)
            for name, call, shape in self.weights.values()
        }

    def taken(self) -> dict[str, Tensor]:
        """The gradients of the run before, by the weight's name, which are forgotten with this."""
        found, self._gradients = self._gradients, {}
        return found


def _surprise(output: Tensor, generator: torch.Generator) -> Tensor:
    """−log p of a drawn answer, averaged over rows."""
    if output.shape[-1] == 1:
        drawn = output.detach() + torch.randn(output.shape, generator=generator)
        return ((output - drawn) ** 2 / 2).mean()
    logits = output.reshape(-1, output.shape[-1])
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
    return torch.nn.functional.cross_entropy(logits, drawn)
