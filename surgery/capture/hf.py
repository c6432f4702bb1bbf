"""`hf:DIR_OR_ID`: a transformers model from a directory or the local cache."""

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

from surgery.capture.inputs import hf_inputs
from surgery.capture.types import LoadedModel, LoadOptions
from surgery.common.errors import LoadError, MissingExtraError, nearest

PREFIX = "hf:"

# transformers' task names, first class that has the architecture wins.
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
# State-space models unroll their scan over these: captured at the example's length, which is noted.
_LENGTHS = frozenset({"seq", "src_seq", "tgt_seq"})
_DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")


def load(ref: str, options: LoadOptions) -> LoadedModel | None:
    """Load `hf:DIR_OR_ID`; None for any other reference.

    Raises LoadError where the model cannot be read, MissingExtraError without transformers.
    """
    if not ref.startswith(PREFIX):
        return None
    name = ref.removeprefix(PREFIX)
    transformers = _transformers()
    keywords = dict(options.model_kwargs)
    if keywords.pop("trust_remote_code", False):
        raise LoadError(
            f"{ref}: trust_remote_code is never used, because it runs code from the model's directory; "
            "write a py: factory that builds the model from code of your own"
        )
    _check_directory(ref, name, keywords)
    dtype = _dtype(keywords.pop("dtype", keywords.pop("torch_dtype", "auto")))
    with silenced(transformers):
        config, chosen = _config(transformers, ref, name, keywords)
        task = options.task or ("text-generation" if "gguf_file" in chosen else None)  # GGUF names no class
        model_class = _model_class(transformers, ref, config, task)
        try:
            model, info = model_class.from_pretrained(
                name, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False, **chosen
            )
        except Exception as error:
            raise LoadError(f"{ref}: {_sentence(error)}") from error
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
    """A LoadedModel of a transformers model in hand, set up to be captured (no cache, traceable experts).

    unsourced: None means all of its weights. The model is taken over, not copied.
    Raises LoadError where no example inputs are known for it.
    """
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
    """The names of the transformers classes for a task or its alias; LoadError for an unknown one."""
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
        raise LoadError(f"transformers is installed, but cannot be imported: {error}") from error
    return transformers


def _check_directory(ref: str, name: str, keywords: Mapping[str, Any]) -> None:
    path = Path(name).expanduser()
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if path.is_file():
        raise LoadError(f"{ref} is a file: name the directory that holds config.json")
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
    if isinstance(value, str) and value not in _DTYPES:
        raise LoadError(f"unknown dtype '{value}'{nearest(value, _DTYPES)}")
    return getattr(torch, value) if isinstance(value, str) and value != "auto" else value


def _config(
    transformers: Any, ref: str, name: str, keywords: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    try:
        config, unused = transformers.AutoConfig.from_pretrained(
            name, return_unused_kwargs=True, trust_remote_code=False, **keywords
        )
    except Exception as error:
        raise LoadError(f"{ref}: {_sentence(error)}") from error
    # AutoConfig eats gguf_file, which the weights need too.
    if "gguf_file" in keywords:
        unused["gguf_file"] = keywords["gguf_file"]
    unused.pop("trust_remote_code", None)
    return config, unused


def _model_class(transformers: Any, ref: str, config: Any, task: str | None) -> Any:
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
            f"{ref}: {config.model_type} has no model for task '{task}'; it has {', '.join(able) or 'none'}"
        )
    for architecture in getattr(config, "architectures", None) or ():
        found = getattr(transformers, architecture, None)
        if found is not None:
            return found
    return transformers.AutoModel


def _sentence(error: BaseException) -> str:
    """transformers explains itself over many lines; the user needs the first and a remedy."""
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
        return (
            "it is no directory and not in the local cache, and the hub cannot be reached; give a directory"
        )
    if "weights_only" in lowered or "unpickl" in lowered:
        return "its .bin weights hold more than tensors, so reading them could run code; convert them to safetensors"
    if "no file named" in lowered or "does not appear to have a file" in lowered:
        return "it holds no weights that transformers reads (model.safetensors); check that the directory is complete"
    if "unexpected keyword argument" in lowered:
        return f"{text.split(' got an ')[-1]}: no such --model-kwarg"
    return f"{type(error).__name__}: {text[:240]}"


def _files(name: str, keywords: Mapping[str, Any]) -> tuple[Path, ...]:
    """The weight files that transformers reads, in its order of preference, and the configuration."""
    folder = _folder(name)
    if folder is None:
        return ()
    folder = folder / str(keywords.get("subfolder", ""))
    if "gguf_file" in keywords:
        return tuple(path for path in (folder / str(keywords["gguf_file"]),) if path.exists())
    for pattern in ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin"):
        found = sorted(folder.glob(pattern))
        if found:
            break
    extra = [folder / "config.json", *folder.glob("model.safetensors.index.json")]
    return (*found, *(path for path in extra if path.exists()))


def _folder(name: str) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    with contextlib.suppress(Exception):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def _with_ties(model: nn.Module, names: set[str]) -> frozenset[str]:
    """`names` without those that are tied to a weight that was loaded."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(tensor) for name, tensor in tensors.items() if name not in names}
    return frozenset(name for name in names if name not in tensors or id(tensors[name]) not in loaded)


def make_traceable(model: Any) -> tuple[tuple[str, int], ...]:
    """Set a model up to be captured. Returns where its cache was on: module path and number in `configs`."""
    cached = []
    # T5's stacks hold copies of the configuration.
    for path, holder in model.named_modules():
        for number, config in enumerate(configs(getattr(holder, "config", None))):
            if getattr(config, "use_cache", False):
                cached.append((path, number, config))
    for _, _, config in cached:
        config.use_cache = False
    if type(model).__name__.endswith("ForSequenceClassification"):
        _give_padding_token(model.config)
    # The default dispatches tokens to experts by their values, which no graph can hold.
    with contextlib.suppress(Exception):
        model.set_experts_implementation("batched_mm")
    return tuple((path, number) for path, number, _ in cached)


def _give_padding_token(config: Any) -> None:
    """A classification head on a decoder finds each row's last token by the padding token."""
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        end = getattr(text, "eos_token_id", None)
        end = end[0] if isinstance(end, list) else end
        text.pad_token_id = config.pad_token_id = 0 if end is None else end


def configs(config: Any) -> Iterator[Any]:
    """A transformers configuration and those nested in it; nothing for what is none."""
    if not hasattr(config, "model_type"):
        return
    yield config
    for key in getattr(config, "sub_configs", None) or {}:
        child = getattr(config, key, None)
        if child is not None:
            yield from configs(child)


def _train_ready(model: Any) -> None:
    """Random skipping of whole layers and of time spans is Python control flow: off in a train capture."""
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
    """transformers' own fixes for torch.export, and caches kept on modules set aside."""
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
    """No load report, progress bar or warning: what was not loaded is told through `unsourced`."""
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
