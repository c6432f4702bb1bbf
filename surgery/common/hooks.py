"""The hooks that a plugin can implement. docs/plugins.md documents each hook."""

from __future__ import annotations

from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("surgery")
hookimpl = pluggy.HookimplMarker("surgery")


@hookspec
def surgery_passes() -> list[type]:  # type: ignore[empty-body]
    """Classes of the passes that the plugin adds."""


@hookspec
def surgery_objectives() -> list[type]:  # type: ignore[empty-body]
    """Classes of the objectives that the plugin adds for `surgery train --objective`."""


@hookspec
def surgery_weight_ops() -> dict[Any, Any]:  # type: ignore[empty-body]
    """Ops with a weight: torch op overload -> `surgery.api.WeightOp`. Adapters can then be applied to these ops."""


@hookspec
def surgery_onnx_lowerings() -> dict[Any, Any]:  # type: ignore[empty-body]
    """ONNX forms of custom ops: torch op overload -> onnxscript function."""


@hookspec(firstresult=True)
def surgery_load_model(ref: str, options: Any) -> Any:
    """The model of a reference with the plugin's own scheme.

    Args:
        ref: model reference, such as "myhub:name".
        options: a `surgery.api.LoadOptions`.

    Returns:
        A `surgery.api.LoadedModel`, or None if the reference is not the plugin's; the next plugin is then asked.
    """


@hookspec
def surgery_load_schemes() -> list[str]:  # type: ignore[empty-body]
    """Schemes of the references that the plugin's `surgery_load_model` loads: ["myhub"] for "myhub:name".

    A loader is asked only for references of its schemes. One that declares none is asked for those that nobody
    declares.
    """


@hookspec
def surgery_capture_patches() -> list[Any]:  # type: ignore[empty-body]
    """Functions that make models traceable: nn.Module -> a context manager that is entered around the capture.

    A function is called for every model, so it looks whether the model is its own. Inside the block it may, for
    example, replace a loop by `surgery.api.programs.linear_attention`. It must restore what it replaced.
    """


@hookspec
def surgery_commands(cli: Any) -> None:
    """Add click commands to the group of the command line.

    The hook is called when a command needs plugins, so the commands work but `surgery --help` does not list them. To be
    listed, declare a command as an entry point of group `surgery.commands` instead: the name of the entry point is that
    of the command, its value a `click.Command`. No plugin can replace a built-in command.

    Args:
        cli: the `click.Group` of `surgery`.
    """


@hookspec
def surgery_after_pass(program: Any, result: Any) -> None:
    """Called after every applied pass. Raise a SurgeryError to refuse the result.

    Args:
        program: program with the pass.
        result: `surgery.api.PassReport` of the pass.
    """


@hookspec
def surgery_writers() -> dict[str, Any]:  # type: ignore[empty-body]
    """Output formats: name -> function (program, path, **options) that writes a program."""


@hookspec(firstresult=True)
def surgery_live(program: Any) -> Any:
    """The live module of the base with the passes of `program`, or None if another plugin is to make it."""
