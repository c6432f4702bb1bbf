"""Loader of `hf:DIR` and `hf:ORG/NAME[@REVISION]`: a transformers model from a directory or the hub."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.capture.budget import limited
from surgery.capture.devices import device_of, on_device
from surgery.capture.hf_config import (
    ALIASES,
    PREFIX,
    check_directory,
    configs,
    model_class_of,
    one_sentence,
    parse_dtype,
    read_config,
    require_transformers,
    silenced,
)
from surgery.capture.hf_files import GGUF, choose, weight_files
from surgery.capture.hub import Snapshot, check_revision, fetch, split_revision
from surgery.capture.inputs import hf_inputs
from surgery.capture.types import LoadedModel, LoadOptions
from surgery.common.errors import LoadError, SurgeryError

# Dimensions that a model's code may make constants; the capture then fixes them at the example's size. State-space
# models unroll their scan over the length, and RT-DETR and Pixtral loop over the images of the batch.
_MAY_FIX = frozenset({"seq", "src_seq", "tgt_seq", "batch", "image_batch"})

# Arguments of from_pretrained that would be stored with a saved directory -> the switch of huggingface_hub.
OF_THE_HUB = {
    "token": "set HF_TOKEN, or log in with `hf auth login`",
    "use_auth_token": "set HF_TOKEN, or log in with `hf auth login`",
    "cache_dir": "set HF_HOME or HF_HUB_CACHE",
    "local_files_only": "set HF_HUB_OFFLINE=1",
    "force_download": "remove the model with `hf cache rm`",
}


def load(ref: str, options: LoadOptions) -> LoadedModel | None:
    """Load `hf:DIR` or `hf:ORG/NAME[@REVISION]`; return None for any other reference.

    Raises:
        LoadError: the model cannot be fetched or read.
        MissingExtraError: transformers is not installed.
    """
    if not ref.startswith(PREFIX):
        return None
    name = ref.removeprefix(PREFIX)
    require_transformers()  # before anything is fetched
    keywords = safe_keywords(ref, options)
    fetched = find_files(ref, name, keywords, options)
    folder = Path(name) if fetched is None else fetched.folder
    model, task, unsourced = build(ref, folder, keywords, options)
    loaded = from_model(
        model,
        task,
        unsourced=unsourced,
        files=() if options.random else weight_files(folder, keywords),
        metadata={"source": name, "tokenizer": str(folder)},
        example=options.example,
    )
    return fetched_from(loaded, fetched)


def safe_keywords(ref: str, options: LoadOptions) -> dict[str, Any]:
    """The arguments of the model's constructor, without those that do nothing.

    Raises:
        LoadError: an argument asks for code from the model's directory.
    """
    keywords = dict(options.model_kwargs)
    if keywords.pop("trust_remote_code", False):
        raise LoadError(
            f"{ref}: trust_remote_code is never used, because it runs code from the model's directory; "
            "write a py: factory that builds the model from your own code"
        )
    if not keywords.get("weights_only", True) or keywords.get("allow_all_kernels", False):
        raise LoadError(
            f"{ref}: weights_only=False and allow_all_kernels=True are never used, because they can run code; "
            "remove them"
        )
    return keywords


def build(
    ref: str,
    folder: Path,
    keywords: dict[str, Any],
    options: LoadOptions,
    find_class: Callable[[Any, str, Any, str | None], Any] = model_class_of,
) -> tuple[Any, str | None, frozenset[str] | None]:
    """Build the transformers model of a directory.

    Args:
        ref: The reference, for messages.
        folder: The directory.
        keywords: Arguments of the model's constructor.
        options: Load options.
        find_class: Function of transformers, reference, configuration and task that returns the model's class.

    Returns:
        The model, its task, and the names of its weights that the directory lacks; None if all are random.

    Raises:
        LoadError: The model cannot be read.
        MissingExtraError: transformers is not installed.
    """
    transformers = require_transformers()
    keywords = dict(keywords)
    dtype = parse_dtype(keywords.pop("dtype", keywords.pop("torch_dtype", "auto")))
    with silenced(transformers):
        config, chosen = read_config(transformers, ref, str(folder), keywords)
        # A GGUF file does not name its model class.
        task = options.task or ("text-generation" if GGUF in chosen else None)
        model_class = find_class(transformers, ref, config, task)
        try:
            if options.random:
                return _random(model_class, config, dtype, chosen), task, None
            with limited(_bytes_in(folder), ref):
                model, unsourced = _pretrained(model_class, config, folder, dtype, chosen)
            return model, task, unsourced
        except SurgeryError:
            raise
        except Exception as error:
            raise LoadError(f"{ref}: {one_sentence(error)}") from error


def fetched_from(loaded: LoadedModel, fetched: Snapshot | None) -> LoadedModel:
    """The model with the facts of the hub that its files were fetched from, if they were."""
    if fetched is None:
        return loaded
    notes = (*loaded.notes, fetched.note) if fetched.note else loaded.notes
    return replace(loaded, repo=fetched.repo, commit=fetched.commit, notes=notes)


def find_files(
    ref: str,
    name: str,
    keywords: dict[str, Any],
    options: LoadOptions,
    fetch_files: Callable[[str, str, str | None], Snapshot] | None = None,
) -> Snapshot | None:
    """The model's files in the cache of the hub, or None if the reference names a directory.

    Args:
        ref: The reference, for messages.
        name: The reference without its scheme.
        keywords: Arguments of the model's constructor; `revision` is taken out.
        options: Load options.
        fetch_files: Function of the reference, the repository and the revision that fetches the files.

    Raises:
        LoadError: There is no such directory, or no such model on the hub.
    """
    own = keywords.pop("revision", None)
    if options.commit is None:
        check_directory(ref, name, keywords)
        if Path(name).is_dir():
            return None
    for key in OF_THE_HUB:
        if key in keywords:
            raise LoadError(f"{ref}: --model-kwarg {key} is not used; {OF_THE_HUB[key]}")
    repo, revision = split_revision(ref, name)
    if own is not None:
        check_revision(ref, str(own))
        if revision is not None and revision != own:
            raise LoadError(
                f"{ref}: --model-kwarg revision={own} names another revision; leave one of them out"
            )
    wanted = options.commit or revision or own
    if fetch_files is not None:
        return fetch_files(ref, repo, wanted)
    return fetch(ref, repo, wanted, partial(choose, ref, repo, keywords=keywords, random=options.random))


def _pretrained(
    model_class: Any, config: Any, folder: Path, dtype: Any, keywords: Mapping[str, Any]
) -> tuple[Any, frozenset[str]]:
    """A model with the weights of a directory, and the names of its weights that the directory lacks."""
    model, info = model_class.from_pretrained(
        str(folder), config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False, **keywords
    )
    # transformers initializes missing and mismatched weights randomly.
    missing = {
        *info["missing_keys"],
        *(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]),
    }
    return model, _with_ties(model, missing)


def _random(model_class: Any, config: Any, dtype: Any, keywords: Mapping[str, Any]) -> Any:
    """A model with random weights. Raises LoadError for a GGUF file, which has the weights and no configuration."""
    if GGUF in keywords:
        raise LoadError(f"{keywords[GGUF]} is a file of weights; leave out --random")
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    # Auto classes and model classes name the same function differently.
    make = getattr(model_class, "from_config", None) or model_class._from_config
    return make(config, dtype=dtype, **keywords)


def from_model(
    model: nn.Module,
    task: str | None = None,
    *,
    unsourced: frozenset[str] | None = None,
    files: tuple[Path, ...] = (),
    metadata: Mapping[str, Any] | None = None,
    example: Mapping[str, int] | None = None,
) -> LoadedModel:
    """Build a LoadedModel from an existing transformers model.

    The model itself is used, not copied, and is prepared for capture: the cache is turned off and experts are made
    traceable.

    Args:
        model: the transformers model.
        task: task name or alias, recorded in the metadata.
        unsourced: names of weights that `files` do not contain; None means all weights.
        files: files that the weights and the configuration were read from.
        metadata: additional facts about the model.
        example: sizes of the example inputs by dimension name.

    Raises:
        LoadError: no example inputs are known for the model.
    """
    give_padding_token(model, (metadata or {}).get("tokenizer"))
    # Copy the configuration first, because make_traceable changes it.
    config = copy.deepcopy(model.config)
    cached = make_traceable(model)
    built = hf_inputs(model, example)
    facts: dict[str, Any] = {
        "loader": "hf",
        "model_type": model.config.model_type,  # type: ignore[union-attr]
        "class": type(model).__name__,
        "task": ALIASES.get(task or "", task),
        **(metadata or {}),
    }
    return LoadedModel(
        module=model.eval(),
        kwargs=on_device(built.inputs, device_of(model)),
        dynamic_shapes=built.shapes,
        files=files,
        unsourced=frozenset(model.state_dict(keep_vars=True)) if unsourced is None else unsourced,
        metadata=facts,
        train_ready=_train_ready,
        patches=partial(_patches, model),
        may_fix=_MAY_FIX,
        config=config,
        cached=cached,
    )


def _bytes_in(folder: Path) -> int:
    """Bytes of the files in a model's directory and directly below it, where a subfolder can hold the weights."""
    files = [*folder.glob("*"), *folder.glob("*/*")]
    return sum(path.stat().st_size for path in files if path.is_file())


def _with_ties(model: nn.Module, names: set[str]) -> frozenset[str]:
    """Remove from `names` the weights that are tied to a loaded weight."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(tensor) for name, tensor in tensors.items() if name not in names}
    return frozenset(name for name in names if name not in tensors or id(tensors[name]) not in loaded)


def make_traceable(model: Any) -> tuple[tuple[str, int], ...]:
    """Prepare a model for capture: turn the cache off, set a padding token, and make experts traceable.

    Returns:
        The configurations that had `use_cache` on, each as module path and index in `configs`.
    """
    cached = []
    # Submodules may hold copies of the configuration, as the stacks of T5 do.
    for path, holder in model.named_modules():
        for number, config in enumerate(configs(getattr(holder, "config", None))):
            if getattr(config, "use_cache", False):
                cached.append((path, number, config))
    for _, _, config in cached:
        config.use_cache = False
    give_padding_token(model)
    # The default implementation routes tokens with data-dependent control flow, which cannot be traced.
    with contextlib.suppress(Exception):
        model.set_experts_implementation("batched_mm")
    return tuple((path, number) for path, number, _ in cached)


def give_padding_token(model: Any, tokenizer: str | None = None) -> None:
    """Set a padding token if there is none: a decoder's classification head uses it to find the last token.

    Args:
        model: the transformers model.
        tokenizer: directory of its tokenizer, whose padding token is taken if it has one; else the end of a text.
    """
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    if not is_classifier or text is None or getattr(text, "pad_token_id", None) is not None:
        return
    end = getattr(text, "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    own = _padding_of(tokenizer) if tokenizer is not None else None
    text.pad_token_id = model.config.pad_token_id = next((i for i in (own, end) if i is not None), 0)


def _padding_of(folder: str) -> int | None:
    """The padding token of the tokenizer in a directory, or None."""
    if not list(Path(folder).glob("tokenizer*")):
        return None
    transformers = require_transformers()
    with silenced(transformers), contextlib.suppress(Exception):
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False).pad_token_id
    return None


def _train_ready(model: Any) -> None:
    """Turn off LayerDrop and SpecAugment before a capture in train mode.

    Both make random choices in Python code: a trace would fail, or repeat the choices of one draw.
    """
    for config in configs(model.config):
        for key in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            if hasattr(config, key):
                setattr(config, key, 0.0)
        if hasattr(config, "apply_spec_augment") or hasattr(config, "mask_time_prob"):
            config.apply_spec_augment = False
    for module in model.modules():
        for key in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)


@contextlib.contextmanager
def _patches(model: Any) -> Iterator[None]:
    """Apply transformers' patches for torch.export, and reset caches stored on modules, inside the block."""
    try:
        from transformers.exporters import exporter_dynamo
        from transformers.exporters.utils import apply_patches
    except ImportError:
        yield
        return
    with apply_patches("dynamo"), exporter_dynamo.reset_model_state(model):
        yield
