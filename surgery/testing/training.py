"""Check of gradients: they reach exactly the parameters that should train, in both modes, and are correct."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from surgery.common.errors import CaptureError
from surgery.engine.contract.base import RewritePass
from surgery.engine.contract.observe import relative_difference, shared
from surgery.engine.module import ProgramModule
from surgery.engine.program import Program
from surgery.engine.replay import live_entries, pass_of
from surgery.graph.graphs import live_nodes
from surgery.graph.marks import mark_of
from surgery.testing.case import Case, Inputs, tensors_of
from surgery.testing.graph import learning_parameters

_STEPS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
# In fp64 steps can be small, and the difference of a gradient is exact to about 1e-6; in fp32 to a few percent.
# The last steps are for models with many ReLUs, whose kinks lie within a longer one.
_FINE = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
_SLOPE, _ROUGH = 1e-3, 0.05
# Scale of random parameters at which nothing saturates.
_SMALL = 0.05
_HALF = (torch.float16, torch.bfloat16)


def gradients(case: Case) -> str:
    """Check the gradients of a program with the pass.

    They must reach exactly the parameters that should train, in eval and train mode. Those of inserted tensors must
    agree with finite differences. A pass with exact numerics must not change the gradients of the base.
    """
    notes = []
    program = case.to_train(case.random)
    module = program.module()
    got = grads(module, case.exercised)
    _check_reached(case, program, module, got, "eval")
    _check_not_zero(case, got)
    if isinstance(case.pass_, RewritePass) and case.trainable:
        held = held_gradient(case)
        notes.append(f"slope not compared: {held}" if held else _check_slope(case, program, module, got))
        notes.append(_check_base(case))
    try:
        module.train()
    except CaptureError as error:
        notes.append(f"no train mode: {error}")
    else:
        _check_reached(case, program, module, grads(module, case.exercised), "train")
        notes.append("train mode too")
    return (
        f"{len(got)} parameters, {len(case.trainable)} of them inserted; {'; '.join(n for n in notes if n)}"
    )


def held_gradient(case: Case) -> str:
    """Reason why gradients differ from the true ones, given by the pass or by an adapter at the same site; or ""."""
    owners = {record.key.owner for record in case.entry.sites}
    for entry in (case.entry, *live_entries(case.program.journal)):
        pass_ = pass_of(entry, case.program.base.plugins)
        if isinstance(pass_, RewritePass) and owners & {record.key.owner for record in entry.sites}:
            why = pass_.expectations.detached
            if why:
                return why if entry is case.entry else f"at {entry.id}, {why}"
    return ""


def loss_of(outputs: Any) -> Tensor:
    """Fixed random linear functional of the floating-point outputs, in float64.

    If some of them require a gradient, only these are used.
    """
    generator = torch.Generator().manual_seed(0)
    terms = []
    for tensor in tensors_of(outputs):
        if tensor.is_floating_point():
            mix = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            terms.append((tensor.double() * mix).mean())
    return torch.stack([t for t in terms if t.requires_grad] or terms).sum()


def grads(module: nn.Module, inputs: Inputs, like: Any = None) -> dict[str, Tensor]:
    """Gradients by parameter name; outputs of the module that `like` does not have are ignored."""
    args, kwargs = inputs
    outputs = module(*args, **kwargs)
    loss = loss_of(outputs if like is None else shared(like, outputs))
    if not loss.requires_grad:
        return {}
    loss.backward()
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def _check_reached(
    case: Case, program: Program, module: ProgramModule, got: Mapping[str, Tensor], mode: str
) -> None:
    """Check that gradients reach exactly the parameters that should train."""
    names = program.base.names
    live = learning_parameters(module.graph_module().graph)
    base = {
        name
        for name in program.parameter_names()
        if name in program.base.tensors
        and program.trains(name, step=0)
        and any(n in live for n in names.get(name, (name,)))
    }
    older = {n for n in program.tensors if n in live and program.trains(n) and n not in case.trainable}
    wanted = base | older | {n for n in case.trainable if program.trains(n)}
    reached = {names.get(name, (name,))[0] for name in got}
    for name in sorted(wanted - reached):
        raise case.error(
            "gradients", f"none reaches {name} in {mode} mode, but it should train", _site(case, name)
        )
    for name in sorted(reached - wanted):
        raise case.error(
            "gradients", f"one reaches {name} in {mode} mode, but it should not train", _site(case, name)
        )


def _check_not_zero(case: Case, got: Mapping[str, Tensor]) -> None:
    """Check that the gradients of inserted tensors are finite and not zero everywhere."""
    for name in case.trainable:
        gradient = got.get(name)
        if gradient is not None and not gradient.isfinite().all():
            raise case.error("gradients", f"that of {name} is not finite", _site(case, name))
        if gradient is not None and not gradient.any() and not _reaches_at_small_scale(case, name):
            raise case.error(
                "gradients", f"that of {name} is zero everywhere at random parameters", _site(case, name)
            )


def _reaches_at_small_scale(case: Case, name: str) -> bool:
    """True if the gradient of a tensor is not zero near its initial value: large values saturate a tanh, say."""
    if case.scale <= _SMALL:
        return False
    small = Case(case.pass_, case.program, case.seed, _SMALL, case.folder)
    gradient = grads(small.to_train(small.random).module(), small.exercised).get(name)
    return gradient is not None and bool(gradient.any())


def _site(case: Case, name: str) -> str:
    """Path of the site of an inserted tensor, or ""."""
    if not isinstance(case.pass_, RewritePass):
        return ""
    return next((r.path for r in case.entry.sites if name in r.tensors.values()), "")


def _check_slope(case: Case, program: Program, module: ProgramModule, got: Mapping[str, Tensor]) -> str:
    """Compare the directional derivative along the gradient plus a random direction with central differences.

    Both are taken on the graph in fp64, where the differences are exact at any scale of the random parameters. A graph
    that does not run in fp64 is compared in its own dtype, as far as neighbouring steps agree.
    """
    tensors = {name: program.tensors[name] for name in case.trainable}
    if any(t.dtype in _HALF for t in tensors.values()):
        return "slopes not compared in half precision"
    steps: tuple[float, ...] = _STEPS
    wide = in_double(module, case.exercised, tensors)
    if wide is not None:
        tensors, run, steps = {n: wide.tensors[n] for n in tensors}, wide.loss, _FINE
        got = dict(
            zip(tensors, torch.autograd.grad(run(), list(tensors.values()), allow_unused=True), strict=True)
        )
        got = {name: g for name, g in got.items() if g is not None}
    else:

        def run() -> Tensor:
            return loss_of(module(*case.exercised[0], **case.exercised[1]))

    generator = torch.Generator().manual_seed(case.seed + 2)
    norm = sum(float(got[n].double().square().sum()) for n in tensors) ** 0.5
    if not norm:
        return "slope not compared: it is zero at this scale"
    size = sum(float(t.detach().double().square().sum()) for t in tensors.values()) ** 0.5
    count = sum(t.numel() for t in tensors.values())
    along = {
        name: (got[name].double() / norm + 0.5 * torch.randn(t.shape, generator=generator) / count**0.5)
        * size
        for name, t in tensors.items()
    }
    expected = sum(float((got[n].double() * d).sum()) for n, d in along.items())
    slopes = [slope(run, tensors, along, step) / expected for step in steps]
    error = min(abs(each - 1) for each in slopes)
    # Neighbouring steps that agree are as exact as they agree.
    spread = 0.0 if wide is not None else min(abs(a - b) for a, b in pairwise(slopes))
    if error > (_SLOPE if wide is not None else max(_ROUGH, 3 * spread)):
        raise case.error(
            "gradients",
            f"they differ from finite differences by {error:.1%}: something is detached, or a gradient is wrong",
        )
    return f"slope within {error:.1e}{' in fp64' if wide is not None else ''}"


@dataclass
class InDouble:
    """A program's graph in fp64.

    Attributes:
        tensors: Copies of the tensors to differentiate by, in fp64.
        loss: The loss of `loss_of` at the present values of `tensors`.
    """

    tensors: dict[str, Tensor]
    loss: Callable[[], Tensor]


def in_double(module: ProgramModule, inputs: Inputs, tensors: Mapping[str, Tensor]) -> InDouble | None:
    """The eval graph of a module in fp64; None if an op does not run in it, or computes something else.

    Args:
        module: The module.
        inputs: Inputs to run it on.
        tensors: Tensors of the module to differentiate by.
    """
    graph_module = module.variant(False, _widen)
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    wide = {n: t.detach().double() if t.is_floating_point() else t for n, t in held.items()}
    own = {name: wide[name].clone().requires_grad_() for name in tensors if name in wide}
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, (tuple(inputs[0]), dict(inputs[1]))
    )

    def outputs() -> Any:
        return torch.func.functional_call(graph_module, {**wide, **own}, args, kwargs)

    try:
        with torch.no_grad():
            plain, found = module(*inputs[0], **inputs[1]), outputs()
        pairs = list(zip(tensors_of(plain), tensors_of(found), strict=True))
    except Exception:  # An op of a plugin can raise anything.
        return None
    if len(own) < len(tensors) or any(relative_difference(a, b) > _ROUGH for a, b in pairs):
        return None
    return InDouble(own, lambda: loss_of(outputs()))


def _widen(graph: fx.Graph) -> None:
    """Replace every narrower floating dtype among the arguments of a graph's ops by float64."""

    def wide(value: Any) -> Any:
        return torch.float64 if value in (torch.float32, *_HALF) else value

    for node in graph.nodes:
        if node.op == "call_function":
            node.args = tuple(wide(a) if isinstance(a, torch.dtype) else a for a in node.args)
            node.kwargs = {k: wide(a) if isinstance(a, torch.dtype) else a for k, a in node.kwargs.items()}


def slope(
    loss: Callable[[], Tensor], tensors: Mapping[str, Tensor], along: Mapping[str, Tensor], step: float
) -> float:
    """Central difference of a loss along a direction; the tensors are restored.

    Args:
        loss: The loss at the present values of the tensors.
        tensors: Tensors to move.
        along: Direction, by the names of the tensors.
        step: Step size.
    """
    kept = {name: t.detach().clone() for name, t in tensors.items()}
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            for name, tensor in tensors.items():
                tensor.copy_(kept[name] + sign * step * along[name])
            losses.append(float(loss()))
        for name, tensor in tensors.items():
            tensor.copy_(kept[name])
    return (losses[0] - losses[1]) / (2 * step)


def _add_stand_ins(program: Program, gradients: dict[str, Tensor]) -> None:
    """Add the gradients of copies that a pass put instead of a tensor to the gradient of that tensor."""
    for node in live_nodes(program.graph):
        name, mark = str(node.target), mark_of(node)
        if node.op == "get_attr" and mark.wraps is not None and name in gradients and name in program.tensors:
            before = str(program.view.node(str(mark.wraps)).target)
            owner = program.base.names.get(before, (before,))[0]
            if owner != name:
                gradients[owner] = gradients.get(owner, 0) + gradients[name]


def _check_base(case: Case) -> str:
    """Check that a pass with exact numerics does not change the gradients of the base at insertion."""
    if case.pass_.numerics.tolerance:
        return "the base's gradients are not compared, as the pass rounds"
    redirected = case.rewrite.expectations.redirected
    if redirected:
        return f"the base's gradients are not compared: {redirected}"
    unfrozen = case.apply(case.program, case.pass_, freeze_base=False)
    like = case.reference if case.pass_.expectations.adds_outputs else None
    with_pass = grads(case.to_train(unfrozen).module(), case.inputs[0], like)
    _add_stand_ins(unfrozen, with_pass)
    without = grads(case.to_train(case.program).module(), case.inputs[0])
    worst = 0.0
    for name, gradient in without.items():
        if name not in with_pass:
            raise case.error("gradients", f"none reaches {name} of the base any more, unfrozen")
        if gradient.any():
            worst = max(worst, relative_difference(gradient, with_pass[name]))
        if worst > (1e-1 if gradient.dtype in _HALF else 1e-3):
            raise case.error("gradients", f"that of {name} of the base is off by {worst:.1e} of its scale")
    return f"the base's own, unfrozen, within {worst:.1e}"
