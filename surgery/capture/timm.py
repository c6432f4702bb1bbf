"""Loader of `timm:NAME`: a timm image model with random weights or with weights from a local checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from surgery.capture.stored_options import DTYPES
from surgery.capture.types import LoadedModel, LoadOptions
from surgery.common.errors import LoadError, MissingExtraError, nearest

PREFIX = "timm:"


def load(ref: str, options: LoadOptions) -> LoadedModel | None:
    """Load `timm:NAME`; return None for any other reference.

    The input is `x` of shape (batch, channels, height, width). `--model-kwarg checkpoint_path=...` names the weights.

    Raises:
        LoadError: the name is unknown, or the model does not take an option.
        MissingExtraError: timm is not installed.
    """
    if not ref.startswith(PREFIX):
        return None
    name = ref.removeprefix(PREFIX)
    timm = _timm()
    if not timm.is_model(name):
        raise LoadError(f"timm has no model '{name}'{nearest(name, timm.list_models())}")
    keywords = dict(options.model_kwargs)
    dtype = keywords.pop("dtype", "float32")
    if keywords.pop("pretrained", False):
        raise LoadError(
            f"{ref}: pretrained=True is not supported, because it downloads weights; download the checkpoint and "
            "give --model-kwarg checkpoint_path=FILE.safetensors"
        )
    checkpoint = keywords.get("checkpoint_path")
    if checkpoint and not str(checkpoint).endswith(".safetensors"):
        raise LoadError(f"{ref}: checkpoint {checkpoint} is not a .safetensors file; convert it first")
    try:
        model = timm.create_model(name, pretrained=False, **keywords)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        raise LoadError(f"{ref}: {type(error).__name__}: {first[:200]}") from error
    if isinstance(dtype, str) and dtype not in DTYPES[:-1]:
        raise LoadError(f"{ref}: unknown dtype '{dtype}'{nearest(dtype, DTYPES[:-1])}")
    return from_model(
        model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype),
        batch=options.example.get("batch", 2),
        image_size=options.example.get("image_size") or keywords.get("img_size"),
        channels=keywords.get("in_chans"),
        files=(Path(checkpoint),) if checkpoint else (),
        sourced=bool(checkpoint),
        metadata={"source": name},
    )


def from_model(
    model: Any,
    *,
    batch: int = 2,
    image_size: Any = None,
    channels: int | None = None,
    files: tuple[Path, ...] = (),
    sourced: bool = False,
    metadata: dict[str, Any] | None = None,
) -> LoadedModel:
    """Build a LoadedModel from an existing timm model. The batch is dynamic and the image size is fixed.

    Args:
        model: the timm model; it is used itself, not copied.
        batch: batch size of the example input.
        image_size: height and width, or one number for both; None takes the model's configured size.
        channels: number of input channels; None takes the configured number.
        files: checkpoint files that the weights were read from.
        sourced: True if `files` contain all weights.
        metadata: additional facts about the model.
    """
    settings = getattr(model, "pretrained_cfg", None) or {}
    default_channels, height, width = settings.get("input_size") or (3, 224, 224)
    if image_size is not None:
        height, width = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    weight = next(model.parameters())
    shape = (batch, channels or default_channels, int(height), int(width))
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    return LoadedModel(
        module=model.eval(),
        args=(images,),
        dynamic_shapes={"x": {0: Dim("batch")}},
        files=files,
        unsourced=frozenset() if sourced else frozenset(model.state_dict(keep_vars=True)),
        metadata={"loader": "timm", "task": "image-classification", **(metadata or {})},
    )


def _timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name == "timm":
            raise MissingExtraError("timm", "timm") from None
        raise LoadError(f"timm is installed but cannot be imported: {error}") from error
    return timm
