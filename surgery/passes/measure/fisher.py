"""Diagonal Fisher information of weights on data without labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from surgery.capture.devices import device_of, on_device
from surgery.common.errors import PassError
from surgery.engine.probe import InputSet
from surgery.engine.state import State
from surgery.graph.graphs import flat_inputs
from surgery.graph.ops import LINEAR, arguments
from surgery.graph.sites import Measurements, Site


def fisher(probe: Measurements, name: str, samples: int = 4, seed: int = 0) -> Tensor:
    """Diagonal Fisher information of a base parameter, of its shape, in fp32; see `fisher_of`.

    For a packed weight of a linear op, it is the information of the unpacked values. It is computed for all parameters
    in one run and kept by the probe.

    Args:
        probe: Measurements of the program (`site.probe`).
        name: Name of the parameter.
        samples: Number of answers drawn for each set of data.
        seed: Seed of the draws.

    Raises:
        PassError: The program has no gradient on the data, or one that is not finite.
    """
    return probe.once(("fisher", samples, seed), lambda: _measured(probe, samples, seed))[name]


def _measured(probe: Measurements, samples: int, seed: int) -> dict[str, Tensor]:
    # This raises a clear error if the data do not fit the program's inputs.
    for _ in probe.inputs_of_graph():
        pass
    found = fisher_of(probe.program, probe.data, samples, seed)
    wrong = next((name for name, value in found.items() if not bool(value.isfinite().all())), None)
    if wrong is not None:
        raise PassError(f"on the data the gradient of {wrong} contains inf or NaN; clean the data")
    return found


def fisher_of(program: State, data: Sequence[InputSet], samples: int, seed: int) -> dict[str, Tensor]:
    """The mean over data and drawn answers y ~ p(y|x) of (∂ log p(y|x) / ∂θ)², for every base parameter by its name.

    p is the softmax over the last axis of the program's first floating-point output, or a normal distribution of
    variance 1 around it if that axis has one channel. So no labels are needed (Sung et al. 2021, arXiv:2111.09839).

    Args:
        program: The program, an `engine.state.State`.
        data: Pairs of (args, kwargs).
        samples: Number of answers drawn for each pair.
        seed: Seed of the draws.

    Returns:
        Tensors in float32 of each parameter's shape; of the unpacked shape for a packed weight of a linear op.

    Raises:
        PassError: An output is not finite, or an op has no gradient.
    """
    # A copy without selections of trainable parameters in its journal, so that every parameter gets a gradient.
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
    for given in data:
        args, kwargs = on_device(tuple(given), program.device)
        for _ in range(samples):
            module.zero_grad(set_to_none=True)
            run = packed if packed.weights else module
            leaves = pytree.tree_leaves(run(*args, **kwargs))
            output = next(t for t in leaves if isinstance(t, Tensor) and t.is_floating_point())
            if not bool(output.isfinite().all()):
                raise PassError("on the data the program's output contains inf or NaN; clean the data")
            loss = _surprise(output.float(), generator)
            try:
                loss.backward()
            except RuntimeError as error:  # an op of a plugin may have no gradient
                raise PassError(
                    f"on the data there is no gradient: {str(error).splitlines()[0]}; choose by another criterion, or "
                    "register an autograd formula for the op"
                ) from error
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if parameter.grad is not None:
                    squared[name] += parameter.grad.float() ** 2
            for name, gradient in packed.taken().items():
                squared[name] += gradient**2
            count += 1
    return {name: value / max(count, 1) for name, value in squared.items()}


class _Packed(fx.Interpreter):
    """Runs a graph and sums ∂L/∂W = Σ gᵀ x for packed linear weights, whose ops have no gradient for them."""

    def __init__(self, module: fx.GraphModule, sites: Iterable[Site]) -> None:
        super().__init__(module)
        self.weights = {
            call.node.name: (str(call.weight.target), call, site.float_shape)
            for site in sites
            if site.packed and site.kind == LINEAR
            for call in site.calls
            if call.weight is not None
        }
        self.device = device_of(module)
        self._gradients: dict[str, Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*flat_inputs(self.module, args, kwargs), enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name not in self.weights:
            return value
        name, call, _ = self.weights[n.name]
        x = self.env[arguments(n)[call.op.x]].detach()
        # The gradient g of the output arrives in the hook below, so the output must require one.
        value = value if value.requires_grad else value.detach().requires_grad_()

        def add(gradient: Tensor) -> None:
            rows, given = (t.reshape(-1, t.shape[-1]).float() for t in (gradient, x))
            own = rows.T @ given if call.layout == "oi" else given.T @ rows
            self._gradients[name] = self._gradients[name] + own if name in self._gradients else own

        value.register_hook(add)
        return value

    def zeros(self) -> dict[str, Tensor]:
        """A tensor of zeros for each packed weight, by its name."""
        return {name: torch.zeros(shape, device=self.device) for name, call, shape in self.weights.values()}

    def taken(self) -> dict[str, Tensor]:
        """The gradients of the last run by the weight's name; they are cleared."""
        found, self._gradients = self._gradients, {}
        return found


def _surprise(output: Tensor, generator: torch.Generator) -> Tensor:
    """−log p of a drawn answer, as a mean over rows."""
    if output.shape[-1] == 1:
        drawn = output.detach() + torch.randn(output.shape, generator=generator).to(output.device)
        return ((output - drawn) ** 2 / 2).mean()
    logits = output.reshape(-1, output.shape[-1])
    # Drawn on the CPU, so that a seed gives the same answers on every device.
    drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(1)
    return torch.nn.functional.cross_entropy(logits, drawn.to(logits.device))
