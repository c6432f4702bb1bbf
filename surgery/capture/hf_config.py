"""The configuration of a transformers reference: tasks, model classes, and errors as one sentence."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from surgery.capture.stored_options import DTYPES
from surgery.common.errors import LoadError, MissingExtraError, nearest

PREFIX = "hf:"
SENTENCE = "sentence-similarity"  # the task of models of sentence-transformers on the hub

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
    SENTENCE: ("AutoModel",),
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
    "sentence-embedding": SENTENCE,
    "sentence-transformers": SENTENCE,
}


def auto_classes(task: str) -> tuple[str, ...]:
    """Names of the transformers Auto classes for a task or its alias. Raises LoadError for an unknown task."""
    key = ALIASES.get(task, task)
    if key not in TASKS:
        raise LoadError(
            f"unknown task '{task}'{nearest(task, [*TASKS, *ALIASES]) or '; known: ' + ', '.join(TASKS)}"
        )
    return TASKS[key]


def is_sentence_task(task: str | None) -> bool:
    """True for the task of models of sentence-transformers, by any of its names."""
    return ALIASES.get(task or "", task) == SENTENCE


def require_transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name == "transformers":
            raise MissingExtraError("transformers", "hf") from None
        raise LoadError(f"transformers is installed but cannot be imported: {error}") from error
    return transformers


def check_directory(ref: str, name: str, keywords: Mapping[str, Any]) -> None:
    """Raise LoadError for a local path that is no model directory; transformers would report a hub error instead."""
    path = Path(name).expanduser()
    repo = name.partition("@")[0]  # a revision may have slashes
    looks_local = path.is_absolute() or name.startswith((".", "~")) or repo.count("/") > 1
    if path.is_file():
        raise LoadError(f"{ref} is a file; name the directory that holds config.json")
    if looks_local and not path.is_dir():
        raise LoadError(f"{ref}: there is no directory {name}")
    # The transformers model of a sentence-transformers directory may be in a folder below.
    is_model = (path / "config.json").exists() or (path / "modules.json").exists()
    if path.is_dir() and not is_model and "gguf_file" not in keywords:
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = (
            f"--model-kwarg gguf_file={ggufs[0]}"
            if ggufs
            else "name the directory of a saved transformers model"
        )
        raise LoadError(f"{ref}: {name} has no config.json; {hint}")


def parse_dtype(value: Any) -> Any:
    if isinstance(value, str) and value not in DTYPES:
        raise LoadError(f"unknown dtype '{value}'{nearest(value, DTYPES)}")
    return getattr(torch, value) if isinstance(value, str) and value != "auto" else value


def read_config(
    transformers: Any, ref: str, name: str, keywords: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model's configuration, and the keywords that it does not consume."""
    try:
        config, unused = transformers.AutoConfig.from_pretrained(
            name, return_unused_kwargs=True, trust_remote_code=False, **keywords
        )
    except Exception as error:
        raise LoadError(f"{ref}: {one_sentence(error)}") from error
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


def auto_class_for(transformers: Any, config: Any, task: str) -> Any:
    """The first Auto class of a task that supports a configuration, or None. Raises LoadError for an unknown task."""
    autos = (getattr(transformers, name, None) for name in auto_classes(task))
    return next((a for a in autos if a is not None and type(config) in a._model_mapping), None)


def model_class_of(transformers: Any, ref: str, config: Any, task: str | None) -> Any:
    """The class for the task, else the one named in the configuration, else AutoModel."""
    if task is not None:
        auto = auto_class_for(transformers, config, task)
        if auto is not None:
            return auto
        able = [known for known in TASKS if auto_class_for(transformers, config, known) is not None]
        raise LoadError(
            f"{ref}: {config.model_type} has no model for task '{task}'; it supports {', '.join(able) or 'none'}"
        )
    for architecture in getattr(config, "architectures", None) or ():
        found = getattr(transformers, architecture, None)
        if found is not None:
            return found
    return transformers.AutoModel


def one_sentence(error: BaseException) -> str:
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


def configs(config: Any) -> Iterator[Any]:
    """Yield a transformers configuration and the configurations nested in it; nothing for any other object."""
    if not hasattr(config, "model_type"):
        return
    yield config
    for key in getattr(config, "sub_configs", None) or {}:
        child = getattr(config, key, None)
        if child is not None:
            yield from configs(child)


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
