"""`surgery.load` and `surgery.capture`: create a Program from a reference or a module."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from surgery.capture import LoadOptions, from_module, trace
from surgery.capture.devices import find_device
from surgery.capture.hf_config import SENTENCE
from surgery.capture.loaders import OF_A_LIBRARY
from surgery.capture.reference import load_model, with_patches
from surgery.capture.sentence.layout import is_sentence_directory
from surgery.common.errors import LoadError
from surgery.common.plugins import Plugins, make_plugin_manager
from surgery.engine.base import Base
from surgery.engine.program import Program
from surgery.graph.ops import BUILTIN_WEIGHT_OPS, arguments
from surgery.store.saved import is_saved, load_saved


def load(
    ref: str,
    *,
    task: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    trust: bool = False,
    base: str | Program | None = None,
    example: Mapping[str, int] | None = None,
    plugins: Plugins | None = None,
    dtype: str | None = None,
    random: bool = False,
    input: str | Sequence[str] = (),
    device: torch.device | str | None = None,
    part: str | None = None,
) -> Program:
    """Load a model by its reference, or a directory that surgery saved, as a Program.

    Args:
        ref: `hf:DIR`, `hf:ORG/NAME[@REVISION]`, `timm:NAME`, `diffusers:DIR`, `diffusers:ORG/NAME[@REVISION]`,
            `py:package.module:callable`, `FILE.pt2` (with trust=True), a scheme of a plugin, or a saved directory.
        task: Name of a transformers task, which selects the model class; "sentence-similarity" for a model of
            sentence-transformers with its pooling.
        model_kwargs: Keyword arguments of the model's constructor.
        trust: Allow a reference that can run code, such as a `.pt2` file.
        base: Only for a saved directory: reference of its base, if the base has moved, or the base as a Program.
            Required for a base of the kind `py:`, as a confirmation that its code may run.
        example: Sizes of the example inputs, by dimension name.
        plugins: Plugin manager; by default that of a `base` that is a Program, or one with all installed plugins.
        dtype: Dtype to load the weights in, such as "float32"; not for a saved directory whose base is a `py:`
            or `.pt2` model. The adapters of a saved directory are converted too. None keeps the stored dtype.
        random: Random weights instead of the pretrained ones, for `hf:`, `timm:` and `diffusers:` models.
        input: Example inputs as text, for a `py:` reference whose callable returns a bare module. Named dimensions are
            dynamic: "x=float32[batch=2,3,h=224,w=224]"; with a range of sizes, "h=224:32..512/32". Several inputs are
            separated by ";", or a sequence.
        device: Device to put the program on, such as "cuda"; None for the CPU. See Program.to.
        part: Model of a pipeline of diffusers, such as "unet"; the same as model_kwargs={"part": "unet"}.

    Returns:
        The program; of a saved directory, with its passes applied.

    Raises:
        LoadError: The reference cannot be loaded, or this machine has no such device.
        CaptureError: The model cannot be captured by torch.export.
        JournalError: The saved directory is damaged, or does not fit its base.
        MissingExtraError: An optional library is not installed.
    """
    if plugins is None:
        plugins = base.base.plugins if isinstance(base, Program) else make_plugin_manager()
    place = find_device("cpu" if device is None else device)
    if part is not None:
        model_kwargs = {**(model_kwargs or {}), "part": part}
    if "://" not in ref and Path(ref).is_dir():
        if is_saved(Path(ref)):
            if input:
                raise LoadError(f"{ref} was saved with its example inputs; leave out --input")
            if random:
                raise LoadError(f"{ref} was saved with its weights; leave out --random")
            given = dict(model_kwargs or {})
            dtype = dtype or given.pop("dtype", given.pop("torch_dtype", None))
            if given:
                raise LoadError(
                    f"{ref} was saved with the arguments of its model; leave out {', '.join(map(str, given))} "
                    f"(--model-kwarg), or apply the passes again"
                )
            program = load_saved(Path(ref), base=base, trust=trust, plugins=plugins, into=False, dtype=dtype)
            return _noting(ref, program.to(place))
        kind, more = ("sentence-transformers", f" with the task {SENTENCE}")
        if not is_sentence_directory(Path(ref)):
            kind, more = "transformers", ""
        raise LoadError(
            f"{ref} is a directory that surgery did not save; for a {kind} model write hf:{ref}{more}"
        )
    if random and not ref.startswith(OF_A_LIBRARY):
        raise LoadError(
            f"{ref}: random weights can be asked for hf:, timm: and diffusers: models; leave out --random"
        )
    if input and not ref.startswith("py:"):
        raise LoadError(f"{ref}: the loader knows the inputs; --input is for py: models, leave it out")
    # These loaders take a dtype; any other model is converted after it was loaded.
    converts = dtype is not None and not ref.startswith(OF_A_LIBRARY)
    own = {"dtype": dtype} if dtype is not None and not converts else {}
    options = LoadOptions(
        task=task,
        model_kwargs={**(model_kwargs or {}), **own},
        trust=trust,
        example=dict(example or {}),
        random=random,
        input=(input,) if isinstance(input, str) else tuple(input),
    )
    loaded = load_model(ref, options, plugins)
    program = Program(Base(loaded, trace(loaded), plugins, ref, options))
    if converts:
        program = program.to(_dtype(ref, str(dtype)))
    return _noting(ref, program.to(place), _random(program))


def _dtype(ref: str, name: str) -> torch.dtype:
    """The dtype of a name. Raises LoadError if it is no floating-point dtype."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise LoadError(f"{ref}: {name[:40]} is no floating-point dtype; give float32, float16 or bfloat16")
    return found


def _noting(ref: str, program: Program, more: tuple[str, ...] = ()) -> Program:
    """The program, after a warning for each note of its capture and each further note."""
    program.base.notes = (*program.base.captured.notes, *_buffers(program), *more)
    for note in program.base.notes:
        warnings.warn(f"{ref}: {note}", stacklevel=3)
    return program


def _random(program: Program) -> tuple[str, ...]:
    """A note if weights of a model that is loaded by name are random."""
    base = program.base
    if base.ref.startswith(OF_A_LIBRARY) and not base.loaded.files:
        return ("all weights are random",)
    fresh = base.fresh
    if not fresh:
        return ()
    more = f" and {len(fresh) - 1} more" if len(fresh) > 1 else ""
    return (f"{fresh[0]}{more}: not in the checkpoint, so random",)


def _buffers(program: Program) -> list[str]:
    """Notes on ops of plugins whose weight is a buffer: no pass finds a weight that is not a parameter."""
    found, base = [], program.base
    for node in base.captured.graph.nodes:
        op = None if node.target in BUILTIN_WEIGHT_OPS else base.plugins.weight_ops.get(node.target)
        weight = arguments(node).get(op.weights[0]) if op is not None else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and str(weight.target) not in base.names:
            found.append(
                f"{weight.target}, the weight of {node.target}, is a buffer, so no pass acts on it; register it as "
                "nn.Parameter(…, requires_grad=False)"
            )
    return found


def capture(
    module: nn.Module, example_inputs: Any, dynamic: Any = None, *, plugins: Plugins | None = None
) -> Program:
    """Capture a module as a Program. The module is copied and never changed.

    Args:
        module: The module.
        example_inputs: A tensor, a tuple or a dict of inputs, with a batch of at least 2.
        dynamic: Dynamic dimensions, as `{input: {axis: "batch"}}`, with a range as in "h=8..512" or "h=32..512/32", or
            torch.export Dims. A range that the model's code requires is derived, and a warning states it. None makes
            axis 0 of every input the dimension `batch`, if all inputs have the same size of at least 2 there;
            otherwise everything is static, and a warning says so.
        plugins: Plugin manager; by default one with all installed plugins.

    Raises:
        CaptureError: The module cannot be captured; the message names the input or the operation.
    """
    plugins = plugins or make_plugin_manager()
    loaded = with_patches(from_module(module, example_inputs, dynamic), plugins)
    program = Program(Base(loaded, trace(loaded), plugins))
    return _noting(type(module).__name__, program)
