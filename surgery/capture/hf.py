"""Loader of `hf:DIR_OR_ID`: a transformers model from a directory or the local cache."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.capture.budget import limited
from surgery.capture.inputs import hf_inputs
from surgery.capture.stored_options import DTYPES
from surgery.capture.types import LoadedModel, LoadOptions
from surgery.common.errors import LoadError, MissingExtraError, SurgeryError, nearest

PREFIX = "hf:"

# Auto classes by transformers task name. The first class that supports the architecture is used.
TASKS: dict[str, tuple[str, ...]] = {
    "audio-classification": ("AutoModelForAudioClassification",),
    "automatic-speech-recognition": ("AutoModelForCTC", "AutoModelForSpeechSeq2Seq"),
    "depth-estimation": ("AutoModelForDepthEstimation",),
    "feature-extraction": ("AutoModel",),
    "fill-mask": ("AutoModelForMaskedLM",),
    "image-classification": ("AutoModelForImageClassification",),
    "image-feature-extraction": ("AutoModel",),
    "image-segmentation": ("AutoModelForSemanticSegmentation", "AutoModelForImageSegmentation"),
    "image-text-to-text": ("AutoModelForImageTextToText",),
    "multiple-choice": ("AutoModelForMultipleChoice",),
    "next-sentence-prediction": ("AutoModelForNextSentencePrediction",),
    "object-detection": ("AutoModelForObjectDetection",),
    "question-answering": ("AutoModelForQuestionAnswering",),
    "text-classification": ("AutoModelForSequenceClassification",),
    "text-generation": ("AutoModelForCausalLM",),
    "text2text-generation": ("AutoModelForSeq2SeqLM",),
    "token-classification": ("AutoModelForTokenClassification",),
    "video-classification": ("AutoModelForVideoClassification",),
    "zero-shot-image-classification": ("AutoModelForZeroShotImageClassification",),
}
ALIASES = {
    "sentiment-analysis": "text-classification",
    "sequence-classification": "text-classification",
    "zero-shot-classification": "text-classification",
    "ner": "token-classification",
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "summarization": "text2text-generation",
    "translation": "text2text-generation",
    "speech-recognition": "automatic-speech-recognition",
    "semantic-segmentation": "image-segmentation",
}
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
    transformers = _transformers()
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
    _check_directory(ref, name, keywords)
    dtype = _dtype(keywords.pop("dtype", keywords.pop("torch_dtype", "auto")))
    with silenced(transformers):
        config, chosen = _config(transformers, ref, name, keywords)
        # A GGUF file does not name its model class.
        task = options.task or ("text-generation" if "gguf_file" in chosen else None)
        model_class = _model_class(transformers, ref, config, task)
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
            raise LoadError(f"{ref}: {_sentence(error)}") from error
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


def auto_classes(task: str) -> tuple[str, ...]:
    """Names of the transformers Auto classes for a task or its alias. Raises LoadError for an unknown task."""
    key = ALIASES.get(task, task)
    if key not in TASKS:
        raise LoadError(
            f"unknown task '{task}'{nearest(task, [*TASKS, *ALIASES]) or '; known: ' + ', '.join(TASKS)}"
        )
    return TASKS[key]


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name == "transformers":
            raise MissingExtraError("transformers", "hf") from None
        raise LoadError(f"transformers is installed but cannot be imported: {error}") from error
    return transformers


def _check_directory(ref: str, name: str, keywords: Mapping[str, Any]) -> None:
    """Raise LoadError for a local path that is no model directory; transformers would report a hub error instead."""
    path = Path(name).expanduser()
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if path.is_file():
        raise LoadError(f"{ref} is a file; name the directory that holds config.json")
    if looks_local and not path.is_dir():
        raise LoadError(f"{ref}: there is no directory {name}")
    if path.is_dir() and not (path / "config.json").exists() and "gguf_file" not in keywords:
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = (
            f"--model-kwarg gguf_file={ggufs[0]}"
            if ggufs
            else "name the directory of a saved transformers model"
        )
        raise LoadError(f"{ref}: {name} has no config.json; {hint}")


def _dtype(value: Any) -> Any:
    if isinstance(value, str) and value not in DTYPES:
        raise LoadError(f"unknown dtype '{value}'{nearest(value, DTYPES)}")
    return getattr(torch, value) if isinstance(value, str) and value != "auto" else value


def _config(
    transformers: Any, ref: str, name: str, keywords: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model's configuration, and the keywords that it does not consume."""
    try:
        config, unused = transformers.AutoConfig.from_pretrained(
            name, return_unused_kwargs=True, trust_remote_code=False, **keywords
        )
    except Exception as error:
        raise LoadError(f"{ref}: {_sentence(error)}") from error
    if not any(key.endswith("attn_implementation") for key in keywords):
        for part in configs(config):
            wanted = getattr(part, "_attn_implementation", None)
            if isinstance(wanted, str) and "/" in wanted:
                raise LoadError(
                    f"{ref}: its configuration asks for the kernel {wanted!r}, which is downloaded code; "
                    "give --model-kwarg attn_implementation=sdpa"
                )
    # AutoConfig consumes gguf_file, but from_pretrained needs it too.
    if "gguf_file" in keywords:
        unused["gguf_file"] = keywords["gguf_file"]
    unused.pop("trust_remote_code", None)
    return config, unused


def _model_class(transformers: Any, ref: str, config: Any, task: str | None) -> Any:
    """The class for the task, else the one named in the configuration, else AutoModel."""
    if task is not None:
        classes = auto_classes(task)
        for class_name in classes:
            auto = getattr(transformers, class_name, None)
            if auto is not None and type(config) in auto._model_mapping:
                return auto
        able = [
            known
            for known, names in TASKS.items()
            if any(
                type(config) in getattr(transformers, n)._model_mapping
                for n in names
                if hasattr(transformers, n)
            )
        ]
        raise LoadError(
            f"{ref}: {config.model_type} has no model for task '{task}'; it supports {', '.join(able) or 'none'}"
        )
    for architecture in getattr(config, "architectures", None) or ():
        found = getattr(transformers, architecture, None)
        if found is not None:
            return found
    return transformers.AutoModel


def _sentence(error: BaseException) -> str:
    """Shorten a multi-line error of transformers to one sentence with a remedy."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    lowered = text.lower()
    if "trust_remote_code" in lowered:
        return "this model needs code from its directory, which is never run; write a py: factory instead"
    if "does not recognize this architecture" in lowered or "unrecognized model" in lowered:
        found = text.split("model type `")[-1].split("`")[0] if "model type `" in text else None
        return (
            f"transformers does not know the model type{f' {found!r}' if found else ''}; "
            "upgrade transformers or write a py: factory"
        )
    if any(
        mark in lowered
        for mark in (
            "couldn't connect",
            "offline mode",
            "not a valid model identifier",
            "local_files_only",
            "cannot find the requested files",
            "is not a local folder",
        )
    ):
        return "it is not a directory, is not in the local cache, and the hub cannot be reached; name a directory"
    if "weights_only" in lowered or "unpickl" in lowered:
        return "its .bin files hold more than tensors, so reading them could run code; convert them to safetensors"
    if "no file named" in lowered or "does not appear to have a file" in lowered:
        return "it holds no weights that transformers reads (model.safetensors); check that the directory is complete"
    if "unexpected keyword argument" in lowered:
        return f"{text.split(' got an ')[-1]}: there is no such --model-kwarg; remove it"
    return f"{type(error).__name__}: {text[:240]}"


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
    if type(model).__name__.endswith("ForSequenceClassification"):
        _give_padding_token(model.config)
    # The default implementation routes tokens with data-dependent control flow, which cannot be traced.
    with contextlib.suppress(Exception):
        model.set_experts_implementation("batched_mm")
    return tuple((path, number) for path, number, _ in cached)


def _give_padding_token(config: Any) -> None:
    """Set a padding token if there is none: a decoder's classification head uses it to find the last token."""
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        end = getattr(text, "eos_token_id", None)
        end = end[0] if isinstance(end, list) else end
        text.pad_token_id = config.pad_token_id = 0 if end is None else end


def configs(config: Any) -> Iterator[Any]:
    """Yield a transformers configuration and the configurations nested in it; nothing for any other object."""
    if not hasattr(config, "model_type"):
        return
    yield config
    for key in getattr(config, "sub_configs", None) or {}:
        child = getattr(config, key, None)
        if child is not None:
            yield from configs(child)


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


@contextlib.contextmanager
def silenced(transformers: Any) -> Iterator[None]:
    """Silence load reports, progress bars and warnings; missing weights are reported as `unsourced` instead."""
    logger = transformers.utils.logging
    level = logger.get_verbosity()
    bars = logger.is_progress_bar_enabled()
    logger.set_verbosity(logging.CRITICAL)
    logger.disable_progress_bar()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.set_verbosity(level)
        if bars:
            logger.enable_progress_bar()
