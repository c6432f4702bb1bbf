"""Loader of `hf:DIR_OR_ID`: a transformers model from a directory or the local cache."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from surgery.capture.budget import limited
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
from surgery.capture.inputs import hf_inputs
from surgery.capture.types import LoadedModel, LoadOptions
from surgery.common.errors import LoadError, SurgeryError

# State-space models unroll their scan over these dimensions, so the capture may fix them at the example's length.
_LENGTHS = frozenset({"seq", "src_seq", "tgt_seq"})


def load(ref: str, options: LoadOptions) -> LoadedModel | None:
    """Load `hf:DIR_OR_ID`; return None for any other reference.

    Raises:
        LoadError: the model cannot be read.
        MissingExtraError: transformers is not installed.
    """
    if not ref.startswith(PREFIX):
        return None
    name = ref.removeprefix(PREFIX)
    transformers = require_transformers()
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
    check_directory(ref, name, keywords)
    dtype = parse_dtype(keywords.pop("dtype", keywords.pop("torch_dtype", "auto")))
    with silenced(transformers):
        config, chosen = read_config(transformers, ref, name, keywords)
        # A GGUF file does not name its model class.
        task = options.task or ("text-generation" if "gguf_file" in chosen else None)
        model_class = model_class_of(transformers, ref, config, task)
        folder = _folder(name)
        # Without a local directory the model is still to be downloaded, and its size is not known.
        room = contextlib.nullcontext() if folder is None else limited(_bytes_in(folder), ref)
        try:
            with room:
                model, info = model_class.from_pretrained(
                    name,
                    config=config,
                    dtype=dtype,
                    output_loading_info=True,
                    trust_remote_code=False,
                    **chosen,
                )
        except SurgeryError:
            raise
        except Exception as error:
            raise LoadError(f"{ref}: {one_sentence(error)}") from error
    # transformers initializes missing and mismatched weights randomly.
    unsourced = {
        *info["missing_keys"],
        *(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]),
    }
    metadata = {"source": name, "tokenizer": name if Path(name).is_dir() else None}
    return from_model(
        model,
        task,
        unsourced=_with_ties(model, unsourced),
        files=_files(name, keywords),
        metadata=metadata,
        example=options.example,
    )


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
        kwargs=built.inputs,
        dynamic_shapes=built.shapes,
        files=files,
        unsourced=frozenset(model.state_dict(keep_vars=True)) if unsourced is None else unsourced,
        metadata=facts,
        train_ready=_train_ready,
        patches=partial(_patches, model),
        may_fix=_LENGTHS,
        config=config,
        cached=cached,
    )


def _files(name: str, keywords: Mapping[str, Any]) -> tuple[Path, ...]:
    """Weight and configuration files that transformers reads, chosen in its order of preference."""
    folder = _folder(name)
    if folder is None:
        return ()
    folder = folder / str(keywords.get("subfolder", ""))
    if "gguf_file" in keywords:
        return tuple(path for path in (folder / str(keywords["gguf_file"]),) if path.exists())
    # Take only the first format that exists: transformers ignores the others, so they must not change the fingerprint.
    for pattern in ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin"):
        found = sorted(folder.glob(pattern))
        if found:
            break
    extra = [folder / "config.json", *folder.glob("model.safetensors.index.json")]
    return (*found, *(path for path in extra if path.exists()))


def _bytes_in(folder: Path) -> int:
    """Bytes of the files in a model's directory and directly below it, where a subfolder can hold the weights."""
    files = [*folder.glob("*"), *folder.glob("*/*")]
    return sum(path.stat().st_size for path in files if path.is_file())


def _folder(name: str) -> Path | None:
    """The model's directory: `name` itself, or its snapshot in the hub cache; None if neither exists."""
    if Path(name).is_dir():
        return Path(name)
    with contextlib.suppress(Exception):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached).parent
    return None


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
