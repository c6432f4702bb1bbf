"""Loader of `hf:DIR` and `hf:ORG/NAME` with the task sentence-similarity: a model of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.capture.hf import build, fetched_from, find_files, from_model, safe_keywords
from surgery.capture.hf_config import PREFIX, SENTENCE, model_class_of, require_transformers
from surgery.capture.hf_files import choose, weight_files
from surgery.capture.hub import Snapshot, fetch
from surgery.capture.sentence.layout import (
    CONFIG,
    MODULES,
    Part,
    files_of,
    list_parts,
    read_layout,
    weights_of,
)
from surgery.capture.sentence.modules import SentenceEncoder
from surgery.capture.types import LoadedModel, LoadOptions
from surgery.common.errors import LoadError
from surgery.common.readers import first_line, read_json, read_tensors

# Model types whose encoder the library loads alone -> its class.
_ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
    "switch_transformers": "SwitchTransformersEncoderModel",
}
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_TRANSFORMER = "transformer"


def load(ref: str, options: LoadOptions) -> LoadedModel:
    """Load a sentence-transformers directory, or a transformers model to be one, with the mean over its tokens.

    Raises:
        LoadError: a module is not supported, or a file is damaged.
        MissingExtraError: transformers is not installed.
    """
    name = ref.removeprefix(PREFIX)
    require_transformers()  # before anything is fetched
    keywords = safe_keywords(ref, options)
    fetched = find_files(ref, name, keywords, options, partial(_fetch, keywords=keywords, options=options))
    folder = Path(name) if fetched is None else fetched.folder
    layout = read_layout(folder, ref)
    keywords = {**layout.model_kwargs, **keywords}
    own = folder / layout.transformer.path
    model, _, unsourced = build(
        ref, own, keywords, replace(options, task="feature-extraction"), find_class=_class_of
    )
    files = () if options.random else weight_files(own, keywords)
    inner = from_model(model, SENTENCE, unsourced=unsourced, files=files, example=options.example)
    _check_inputs(ref, inner)
    stages = layout.stages()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    lacking: set[str] = set()
    for part in layout.parts[1:]:
        stage = stages[part.name]
        if options.random and part.has_weights:
            lacking |= {f"{part.name}.{key}" for key in stage.state_dict()}
        elif part.has_weights:
            files = (*files, _fill(stage, folder, part, ref))
        stage.to(dtype)
    encoder = SentenceEncoder(model, stages, layout.reads, layout.writes).eval()
    _check_widths(ref, encoder, inner)
    loaded = replace(
        inner,
        module=encoder,
        files=files,
        unsourced=frozenset({f"{_TRANSFORMER}.{key}" for key in inner.unsourced} | lacking),
        metadata={
            **inner.metadata,
            "source": name,
            "tokenizer": str(own),
            "folder": str(folder),
            "sentence": layout.text_settings(),
            "parts": [[part.kind, part.path, part.name] for part in layout.parts],
        },
        train_ready=_inner_train_ready(inner),
        cached=tuple((f"{_TRANSFORMER}.{path}".rstrip("."), number) for path, number in inner.cached),
    )
    return fetched_from(loaded, fetched)


def _class_of(transformers: Any, ref: str, config: Any, task: str | None) -> Any:
    """The class that the library loads: that of the encoder alone, if the model has a decoder too."""
    found = getattr(transformers, _ENCODERS.get(config.model_type, ""), None)
    return model_class_of(transformers, ref, config, task) if found is None else found


def _inner_train_ready(inner: LoadedModel) -> Callable[[nn.Module], None] | None:
    if inner.train_ready is None:
        return None
    return partial(_call_on_transformer, inner.train_ready)


def _call_on_transformer(work: Callable[[nn.Module], None], encoder: nn.Module) -> None:
    work(encoder.get_submodule(_TRANSFORMER))


def _check_inputs(ref: str, inner: LoadedModel) -> None:
    """Raise LoadError if the transformers model reads something else than text."""
    other = next((name for name in inner.kwargs if name not in _INPUTS), None)
    if other is not None or "input_ids" not in inner.kwargs:
        title = type(inner.module).__name__
        raise LoadError(
            f"{ref}: {title} reads {other or 'no tokens'}; a sentence embedding is made of "
            f"{', '.join(_INPUTS)}"
        )


def _check_widths(ref: str, encoder: SentenceEncoder, inner: LoadedModel) -> None:
    """Raise LoadError if the modules do not fit each other."""
    weights = next(encoder.parameters(), torch.empty(0))
    if weights.is_meta or isinstance(weights, torch._subclasses.FakeTensor):
        return
    try:
        with torch.no_grad():
            encoder(**inner.kwargs)
    except (KeyError, RuntimeError, IndexError, AttributeError) as error:
        raise LoadError(f"{ref}: its modules do not fit each other: {first_line(error)}") from error


def _fill(stage: nn.Module, folder: Path, part: Part, ref: str) -> Path:
    """Load the weights of a module.

    Returns:
        Their file.

    Raises:
        LoadError: there are none, or they do not fit.
    """
    file = weights_of(folder, part)
    if file is None:
        raise LoadError(f"{ref}: {part.kind} has no {part.path}/model.safetensors; restore it")
    found = read_tensors(file, LoadError) if file.suffix == ".safetensors" else _read_bin(file)
    wanted = stage.state_dict()
    for key in sorted({*wanted, *found}):
        shapes = [list(each[key].shape) if key in each else "none" for each in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise LoadError(f"{file}: {key[:100]} has shape {shapes[0]}, and {part.kind} needs {shapes[1]}")
    # The dtype of the file, as transformers keeps it.
    dtype = next(iter(found.values())).dtype
    stage.to(dtype).load_state_dict(found)
    return file


def _read_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, which may hold nothing else."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise LoadError(f"{file} cannot be read: {first_line(error)}; convert it to safetensors") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise LoadError(f"{file} holds more than tensors; convert it to safetensors")
    return found


def _fetch(
    ref: str, repo: str, revision: str | None, *, keywords: dict[str, Any], options: LoadOptions
) -> Snapshot:
    """Fetch the list of modules first, and then their files at the same commit.

    Args:
        ref: The reference, for messages.
        repo: Name of the repository.
        revision: Branch, tag or commit hash.
        keywords: Arguments of the transformers model.
        options: Load options.
    """
    plain = partial(choose, ref, repo, keywords=keywords, random=options.random)
    first = fetch(ref, repo, revision, lambda names: [n for n in names if n in (MODULES, CONFIG)])
    if not (first.folder / MODULES).is_file():
        return fetch(ref, repo, first.commit, plain)
    parts = list_parts(read_json(first.folder / MODULES, LoadError), ref)
    sub = {**keywords, "subfolder": parts[0].path} if parts[0].path else keywords

    def wanted(names: Any) -> list[str]:
        listed = list(names)
        own = choose(ref, repo, listed, keywords=sub, random=options.random)
        return [*own, *files_of(parts, listed, random=options.random)]

    return fetch(ref, repo, first.commit, wanted)
