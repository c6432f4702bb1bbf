"""Loader of `timm:NAME`: a timm image model with its pretrained weights, those of a file, or random ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.export import Dim

from surgery.capture.budget import limited
from surgery.capture.hub import Snapshot, fetch, split_revision
from surgery.capture.stored_options import DTYPES
from surgery.capture.types import LoadedModel, LoadOptions
from surgery.common.errors import LoadError, MissingExtraError, nearest

PREFIX = "timm:"
_RANDOM = "give --random for random weights, or --model-kwarg checkpoint_path=FILE.safetensors"
# timm's name of a file of weights -> names of the safetensors files that hold the same.
_SAFE = {
    "pytorch_model.bin": ("model.safetensors",),
    "open_clip_pytorch_model.bin": ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
}


@dataclass(frozen=True)
class _Weights:
    """Pretrained weights that were fetched.

    Attributes:
        file: The safetensors file.
        snapshot: Where it comes from.
        cfg: timm's facts of these weights.
    """

    file: Path
    snapshot: Snapshot
    cfg: Any


def load(ref: str, options: LoadOptions) -> LoadedModel | None:
    """Load `timm:NAME`; return None for any other reference.

    The input is `x` of shape (batch, channels, height, width). The weights are the pretrained ones of this name, which
    timm has on the hub; `--random` makes random ones, and `--model-kwarg checkpoint_path=...` names a file.

    Raises:
        LoadError: the name is unknown, the weights cannot be fetched, or the model does not take an option.
        MissingExtraError: timm is not installed.
    """
    if not ref.startswith(PREFIX):
        return None
    name, revision = split_revision(ref, ref.removeprefix(PREFIX))
    timm = _timm()
    if not timm.is_model(name):
        raise LoadError(f"timm has no model '{name}'{nearest(name, timm.list_models())}")
    keywords = dict(options.model_kwargs)
    dtype = keywords.pop("dtype", "float32")
    if isinstance(dtype, str) and dtype not in DTYPES[:-1]:
        raise LoadError(f"{ref}: unknown dtype '{dtype}'{nearest(dtype, DTYPES[:-1])}")
    checkpoint = keywords.get("checkpoint_path")
    if checkpoint and not str(checkpoint).endswith(".safetensors"):
        raise LoadError(f"{ref}: checkpoint {checkpoint} is not a .safetensors file; convert it first")
    # `pretrained` is timm's own argument for the same.
    pretrained = keywords.pop("pretrained", None)
    if options.random and (checkpoint or pretrained):
        raise LoadError(
            f"{ref}: --random makes random weights; leave it out, or the argument that names others"
        )
    if checkpoint or options.random or pretrained is False:
        model = _created(ref, name, keywords)
        loaded = _described(model, options, keywords, name, dtype)
        return replace(loaded, files=(Path(checkpoint),), unsourced=frozenset()) if checkpoint else loaded
    weights = _fetched(ref, name, options.commit or revision)
    # The file that was fetched, and not what timm would look for: the fingerprint is that of this file.
    overlay = {"file": str(weights.file), "custom_load": False}
    with limited(weights.file.stat().st_size, ref):
        model = _created(ref, name, {**keywords, "pretrained": True, "pretrained_cfg_overlay": overlay})
    heads, adapted = _differing(model, weights)
    loaded = _described(model, options, keywords, name, dtype)
    snapshot = weights.snapshot
    return replace(
        loaded,
        files=(weights.file,),
        unsourced=heads,
        stored=adapted,
        repo=snapshot.repo,
        commit=snapshot.commit,
        notes=(*loaded.notes, snapshot.note) if snapshot.note else loaded.notes,
    )


def _created(ref: str, name: str, keywords: dict[str, Any]) -> Any:
    """A model of timm. Raises LoadError if timm cannot make it with these arguments."""
    try:
        return _timm().create_model(name, **keywords)
    except LoadError:
        raise
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        raise LoadError(f"{ref}: {type(error).__name__}: {first[:200]}") from error


def _described(
    model: Any, options: LoadOptions, keywords: dict[str, Any], name: str, dtype: Any
) -> LoadedModel:
    """The LoadedModel of a model in the dtype that was asked for."""
    return from_model(
        model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype),
        batch=options.example.get("batch", 2),
        image_size=options.example.get("image_size") or keywords.get("img_size"),
        channels=keywords.get("in_chans"),
        metadata={"source": name},
    )


def _fetched(ref: str, name: str, revision: str | None) -> _Weights:
    """Fetch the pretrained weights of a name. Raises LoadError if there are none, or only in a pickle."""
    try:
        cfg = _timm().get_pretrained_cfg(name)
    except RuntimeError as error:
        known = _timm().list_pretrained(f"{name.partition('.')[0]}.*")
        raise LoadError(f"{ref}: {error}{nearest(name, known)}") from None
    if cfg is None or not cfg.has_weights:
        raise LoadError(f"{ref}: timm has no pretrained weights of this name; {_RANDOM}")
    if not cfg.hf_hub_id or cfg.custom_load == "hf":
        raise LoadError(f"{ref}: its pretrained weights are no safetensors file on the hub; {_RANDOM}")
    named = cfg.hf_hub_filename or "pytorch_model.bin"
    candidates = _SAFE.get(named, (str(Path(named).with_suffix(".safetensors")),))
    choose = partial(_choose, ref, cfg.hf_hub_id, candidates)
    snapshot = fetch(ref, cfg.hf_hub_id, revision, choose, _RANDOM)
    file = next(snapshot.folder / file for file in candidates if (snapshot.folder / file).is_file())
    return _Weights(file, snapshot, cfg)


def _choose(ref: str, repo: str, candidates: tuple[str, ...], names: Iterable[str]) -> list[str]:
    there = set(names)
    found = [name for name in candidates if name in there][:1]
    if not found:
        raise LoadError(f"{ref}: {repo} has no {candidates[0]}, and pickles are not read; {_RANDOM}")
    return found


def _differing(model: Any, weights: _Weights) -> tuple[frozenset[str], frozenset[str]]:
    """Names of weights that differ from the file: of a new head, which is random, and those that timm has adapted."""
    held = load_file(weights.file)
    names = weights.cfg.classifier or ()
    heads = (names,) if isinstance(names, str) else tuple(names)
    is_new = getattr(model, "num_classes", None) != weights.cfg.num_classes
    random, adapted = set[str](), set[str]()
    for name, tensor in model.state_dict().items():
        own = held.get(name)
        if own is not None and own.shape == tensor.shape and torch.equal(own.to(tensor.dtype), tensor):
            continue
        (random if is_new and name.rpartition(".")[0] in heads else adapted).add(name)
    return frozenset(random), frozenset(adapted)


def from_model(
    model: Any,
    *,
    batch: int = 2,
    image_size: Any = None,
    channels: int | None = None,
    metadata: dict[str, Any] | None = None,
) -> LoadedModel:
    """Build a LoadedModel from an existing timm model. The batch is dynamic and the image size is fixed.

    Args:
        model: the timm model; it is used itself, not copied.
        batch: batch size of the example input.
        image_size: height and width, or one number for both; None takes the model's configured size.
        channels: number of input channels; None takes the configured number.
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
        unsourced=frozenset(model.state_dict(keep_vars=True)),
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
