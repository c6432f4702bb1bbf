"""Check of training: a few optimizer steps change exactly the parameters that should train, when they should."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from surgery.common.errors import PassError
from surgery.engine.program import Program
from surgery.testing.case import Case, Skip, fingerprint
from surgery.testing.graph import learning_parameters
from surgery.testing.training import loss_of

_STEPS = 3
_RATE, _DECAY = 1e-3, 0.1
_HALF = (torch.float16, torch.bfloat16)


def held(case: Case) -> str:
    """Train three steps with AdamW and weight decay at the start of the schedule, and three more after its last change.

    It uses `parameter_groups` and `advance`, and one optimizer for both parts, so that the optimizer has momentum for
    parameters that no longer train. The decisions of the pass itself are the expectation. All values that should not
    train must stay equal bit for bit.
    """
    program = case.to_train(case.random)
    module = program.module()
    try:
        groups = program.parameter_groups(_RATE, weight_decay=_DECAY)
    except PassError:
        wanted = [n for n in program.parameter_names() if _trains(case, program, n, 0)]
        if wanted or any(p.requires_grad for p in module.parameters()):
            raise case.error("held", "a parameter trains, but there is no parameter group for it") from None
        raise Skip("nothing trains in this program") from None
    _check_groups(case, program, groups)
    # The rates have been checked. All groups now get the same rate: with a steep decay by depth, steps of the lowest
    # layers could be too small to change a value.
    for group in groups:
        group["lr"] = _RATE
    optimizer = torch.optim.AdamW(groups, eps=1e-30)  # type: ignore[arg-type]
    # In half precision the square of a gradient, which AdamW keeps, underflows to 0.
    if any(p.dtype in _HALF for g in groups for p in g["params"]):
        optimizer = torch.optim.SGD(groups, momentum=0.9)  # type: ignore[arg-type,assignment]
    counts = []
    moments = [0, *program.schedule.changes[-1:]]
    for step in moments:
        module.advance(step)
        before = {name: tensor.detach().clone() for name, tensor in _all(module).items()}
        pulled = _train(case, module, optimizer)
        counts.append(_check_moved(case, program, module, before, pulled, step))
    unit = program.schedule.unit
    return "; ".join(f"{n} tensors moved at {unit} {step}" for n, step in zip(counts, moments, strict=True))


def _all(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _trains(case: Case, program: Program, name: str, step: int) -> bool:
    """True if a parameter should train at a step, by the decision of the pass itself if it made one."""
    said = case.plan.selection
    first = program.names.get(name, (name,))[0]
    if first not in said.trains:
        return program.trains(name, step)
    begin, end = said.windows.get(first, (0, None))
    return said.trains[first] and begin <= step and (end is None or step < end)


def _mask(case: Case, program: Program, name: str) -> Tensor | None:
    """Mask that the pass decided for a parameter, or None."""
    return case.plan.selection.masks.get(program.names.get(name, (name,))[0])


def _check_groups(case: Case, program: Program, groups: list) -> None:
    """Check that every parameter that trains is in one group, with the rate that the pass decided."""
    said = case.plan.selection
    where = {}
    for group in groups:
        for name in group["names"]:
            first = program.names.get(name, (name,))[0]
            if first in where:
                raise case.error("held", f"{first} is in two parameter groups")
            where[first] = group
            rate = said.rates.get(first, 1.0)
            if first in said.trains and abs(group["lr"] - _RATE * rate) > 1e-9 * _RATE:
                raise case.error(
                    "held",
                    f"{first} should train at {_RATE * rate:g}, but its group has the rate {group['lr']:g}",
                )
    for name in said.trains:
        ever = said.trains[name] and name in dict(program.module().named_parameters())
        if ever != (name in where):
            raise case.error("held", f"{name} is {'in no' if ever else 'in a'} parameter group")


def _train(case: Case, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Take the steps. Returns, by parameter name, a bool tensor of the values that had a nonzero gradient."""
    args, kwargs = case.exercised
    pulled: dict[str, Tensor] = {}
    for _ in range(_STEPS):
        optimizer.zero_grad()
        loss = loss_of(module(*args, **kwargs))
        if loss.requires_grad:
            loss.backward()
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                pulled[name] = pulled.get(name, torch.tensor(False)) | (parameter.grad != 0)
        optimizer.step()
    optimizer.zero_grad()
    return pulled


def _check_moved(
    case: Case,
    program: Program,
    module: nn.Module,
    before: Mapping[str, Tensor],
    pulled: Mapping[str, Tensor],
    step: int,
) -> int:
    """Compare the parameters after the steps with those before; returns the number of tensors that moved."""
    live = learning_parameters(program.graph)
    moved = 0
    when = f"at {program.schedule.unit} {step}"
    parameters = dict(module.named_parameters())
    for name, tensor in _all(module).items():
        same = fingerprint(tensor) == fingerprint(before[name])
        trains = name in parameters and _trains(case, program, name, step)
        if not trains and not same:
            raise case.error("held", f"{name} moves {when}, but should not train")
        if not trains:
            continue
        if name not in pulled and not live.isdisjoint(program.names.get(name, (name,))):
            raise case.error("held", f"no gradient reaches {name} {when}, but it should train")
        mask = _mask(case, program, name)
        if mask is not None:
            rest = ~mask.expand_as(tensor)
            if fingerprint(tensor[rest]) != fingerprint(before[name][rest]):
                raise case.error("held", f"{name} moves {when} where its mask is False")
        if same and name in pulled and pulled[name].any() and tensor.dtype not in _HALF:
            raise case.error("held", f"{name} has a gradient {when} but does not move")
        moved += not same
    return moved
