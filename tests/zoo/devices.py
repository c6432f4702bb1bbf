"""Runs programs on a device of their own: every pass and form, compared with the same on the CPU.

    python -m tests.zoo.devices [--forms=lora,int8] [NAME ...]

The device is `tests.shared.device`, which computes on the CPU and refuses to mix its tensors with others. A form is a
program made twice from one base, once on each device, with the same seed. Both must have the same journal, the same
tensors and the same outputs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import surgery
from surgery.common.errors import CaptureError, SurgeryError
from surgery.common.plugins import make_plugin_manager
from surgery.engine.registry import find_pass
from tests.shared.device import DEVICE, register

# The device splits composite ops (attention, linear) other than the CPU does: sums are rounded in another order. A
# rounded activation that lies between two codes can then get the other one.
CLOSE, ROUNDED = 1e-4, 2e-2


def of(name: str, **options: Any) -> Any:
    """Pass of that name, built as the command line builds it."""
    return find_pass(make_plugin_manager(), name).cls.parse(options)


def passes(target: str) -> dict[str, tuple[Any, ...]]:
    """Passes of each form, for a target with a few linear weights."""
    return {
        "lora": (of("lora", target=target, rank=2),),
        "dora": (of("lora", target=target, rank=2, dora=True),),
        "pissa": (of("lora", target=target, rank=2, init="pissa"),),
        "int8": (of("quantize", target=target, format="int8", group=0),),
        "nf4 and lora": (
            of("quantize", target=target, format="nf4", group=0),
            of("lora", target=target, rank=2),
        ),
        "gptq": (of("quantize", target=target, format="int4", group=0, method="gptq"),),
        "smooth": (of("quantize", target=target, format="int8-dynamic", smooth=0.5, activation_budget=0.2),),
        "wanda": (of("sparse", target=target, criterion="wanda"),),
        "fisher": (of("sparse-tune", target=target, density=0.05, by="gradient"),),
        "pruned": (of("prune-filters", ratio=0.5, importance="taylor"),),
        "low-rank": (of("low-rank", target=target, rank=2),),
        "wider": (of("expand", wider=1.5, target="mlp.up"),),
        "fused and split": (of("fuse-qkv"), of("split-qkv")),
        "resized head": (of("head", mode="resize", labels=3),),
    }


def difference(a: Any, b: Any, close: float = CLOSE) -> str:
    """Reason why two outputs differ by more than `close` of their scale, or ""."""
    for one, other in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        if not isinstance(one, Tensor):
            continue
        other = other.cpu()
        if one.shape != other.shape or one.dtype != other.dtype:
            return (
                f"{one.dtype} {list(one.shape)} on the CPU, {other.dtype} {list(other.shape)} on the device"
            )
        if not one.is_floating_point():
            continue
        scale = max(float(one.abs().max()), 1e-6) if one.numel() else 1.0
        far = float((one.double() - other.double()).abs().max()) / scale if one.numel() else 0.0
        if not far <= close:
            return f"outputs differ by {far:.1e} of their scale"
    return ""


def made(base: surgery.Program, chosen: tuple[Any, ...]) -> surgery.Program:
    """The base with passes applied, from a fixed seed; new tensors that are zero get values."""
    torch.manual_seed(0)
    program = base.apply(*chosen, verify=False) if chosen else base
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in program.tensors.values():
            if isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
                tensor.add_(
                    (torch.randn(tensor.shape, generator=generator) * 0.02).to(tensor.device, tensor.dtype)
                )
    return program


def journal_of(program: surgery.Program) -> Any:
    """The journal, with measured values rounded: they have the rounding of the device."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.2g}")
        if isinstance(value, dict):
            return {name: rounded(each) for name, each in value.items() if name != "numerics"}
        return list(map(rounded, value)) if isinstance(value, (list, tuple)) else value

    return rounded(program.journal.to_json())


def check_form(own: surgery.Program, there: surgery.Program, name: str) -> str:
    """Reason why a form made on the device differs from the same on the CPU, or "".

    Args:
        own: The program on the CPU.
        there: The program on the device.
        name: Name of the form.
    """
    if there.device.type == "cpu":
        return "it is on the CPU"
    stray = next((n for n, t in there.state().items() if t.device != there.device), None)
    if stray is not None:
        return f"{stray} is not on the device"
    if journal_of(own) != journal_of(there):
        return "the journals differ"
    return difference(own.run(), there.run(), ROUNDED if name == "smooth" else CLOSE)


def train(program: surgery.Program) -> Mapping[str, Tensor]:
    """Gradients of a step in train mode, by name."""
    module = program.module().train()
    args, kwargs = program.example_inputs
    torch.manual_seed(0)
    total: Any = 0.0
    for leaf in pytree.tree_leaves(module(*args, **kwargs)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad:
            total = total + leaf.float().square().mean()
    total.backward()
    module.eval()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def check(
    base: surgery.Program, only: Callable[[str], bool] = lambda form: True, device: str = DEVICE
) -> dict[str, str]:
    """Result of each form on a base: "" if it is the same on the device, else the reason.

    Args:
        base: The program on the CPU, without passes.
        only: Forms to check.
        device: The device; by default the one of `tests.shared.device`.
    """
    if device == DEVICE:
        register()
    roles = {site.role for site in base.sites}
    target = "attn.*" if any(role.startswith("attn.") for role in roles) else "all"
    # Captured before the move: some models index with lists, which torch cannot trace on a device written in Python.
    with suppress(CaptureError):
        base.base.train_capture()
    moved = base.to(device)
    found = {"base": _attempt(lambda: _check_base(base, moved))}
    for form, chosen in passes(target).items():
        if only(form):
            _check_passes(base, moved, form, chosen, found)
    return found


def _check_passes(
    base: surgery.Program,
    moved: surgery.Program,
    form: str,
    chosen: tuple[Any, ...],
    found: dict[str, str],
) -> None:
    """Add the results of a form to `found`; for LoRA, those of its merge and of its training too."""
    try:
        own = made(base, chosen)
    except SurgeryError as error:
        found[form] = f"n/a: {str(error)[:60]}"
        return
    found[form] = _attempt(lambda: check_form(own, made(moved, chosen), form))
    if form == "lora":
        found["merged"] = _attempt(lambda: check_form(own.merge(), made(moved, chosen).merge(), form))
        found["trained"] = _attempt(lambda: _same_gradients(made(base, chosen), made(moved, chosen)))
        found["follows"] = _attempt(lambda: _follows(made(base, chosen), own, moved.device))


def _check_base(base: surgery.Program, moved: surgery.Program) -> str:
    if moved.base.graph_hash != base.base.graph_hash:
        return "the hash of the graph differs"
    return check_form(base, moved, "base")


def _same_gradients(own: surgery.Program, there: surgery.Program) -> str:
    """The train graph runs forward and backward; without dropout the gradients are the same."""
    dropped = any("dropout" in str(node.target) for node in own.train_graph.nodes)
    mine, got = train(own), train(there)
    if mine.keys() != got.keys() or not mine:
        return "other parameters get a gradient"
    wrong = "" if dropped else difference(list(mine.values()), [got[n] for n in mine], 1e-3)
    return f"gradients: {wrong}" if wrong else ""


def _follows(program: surgery.Program, like: surgery.Program, device: torch.device) -> str:
    """The program follows its module to the device and back."""
    module = program.module().to(device)
    where = check_form(like, program, "follows")
    module.to("cpu")
    return where or difference(like.merge().run(), program.merge().run())


def _attempt(act: Callable[[], str]) -> str:
    """The result of a check, or the error that it raised."""
    try:
        return act()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def main(arguments: list[str]) -> int:
    from tests.zoo.sweep import load
    from tests.zoo.zoo import NAMES

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    asked = next((a.removeprefix("--forms=") for a in arguments if a.startswith("--forms=")), "")
    names = [a for a in arguments if not a.startswith("--")] or NAMES
    failed: list[str] = []
    for name in names:
        try:
            found = check(load(f"zoo:{name}"), lambda form: not asked or form in asked.split(","))
        except SurgeryError as error:  # a model that cannot be captured on the CPU either
            print(name, f"not captured: {str(error)[:100]}", flush=True)
            continue
        wrong = {form: why for form, why in found.items() if why and not why.startswith("n/a")}
        refused = [form for form, why in found.items() if why.startswith("n/a")]
        failed += [name] if wrong else []
        print(name, wrong or "ok", f"refused: {', '.join(refused)}" if refused else "", flush=True)
    print(f"{len(names) - len(failed)} of {len(names)} are the same on the device; failed: {failed}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
