"""The hooks that a plugin may implement. Every one is documented in README.md and tested."""

from __future__ import annotations

from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("surgery")
hookimpl = pluggy.HookimplMarker("surgery")


@hookspec
def surgery_passes() -> list[type]:  # type: ignore[empty-body]
    """Pass classes that this plugin adds."""


@hookspec
def surgery_objectives() -> list[type]:  # type: ignore[empty-body]
    """Classes of objectives that this plugin adds, for `surgery train --objective`."""


@hookspec
def surgery_weight_ops() -> dict[Any, Any]:  # type: ignore[empty-body]
    """Ops that hold a weight: torch op overload -> `surgery.api.WeightOp`. Adapters then work on them."""


@hookspec
def surgery_onnx_lowerings() -> dict[Any, Any]:  # type: ignore[empty-body]
    """How custom ops are written in ONNX: torch op overload -> onnxscript function."""


@hookspec(firstresult=True)
def surgery_load_model(ref: str, options: Any) -> Any:
    """A `surgery.api.LoadedModel` for a reference of yours, or None to let another plugin try."""


@hookspec
def surgery_commands(cli: Any) -> None:
    """Add click commands to the command line's group."""


@hookspec
def surgery_after_pass(program: Any, result: Any) -> None:
    """Called after every applied pass with the new program and its PassReport; raise a SurgeryError to refuse it."""


@hookspec
def surgery_writers() -> dict[str, Any]:  # type: ignore[empty-body]
    """Formats that a program can be written in: name -> function (program, path, **options)."""


@hookspec(firstresult=True)
def surgery_live(program: Any) -> Any:
    """The base's own module with the program's passes in place, or None to let another plugin answer."""
