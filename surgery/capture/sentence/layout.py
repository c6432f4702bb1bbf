"""The modules of a sentence-transformers directory as its files describe them. Nothing that they name is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from surgery.capture.sentence.kinds import build_part, check_part
from surgery.capture.sentence.modules import EMBEDDING, HIDDEN, TOKENS
from surgery.capture.sentence.text_options import TextOptions
from surgery.common.errors import LoadError
from surgery.common.readers import read_json

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# The configuration of the module Transformer, by the names that it has had.
OF_TRANSFORMER = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_LIBRARY = "sentence_transformers."
_SUPPORTED = ("Transformer", "Pooling", "Dense", "LayerNorm", "Dropout", "Normalize")
_MOST = 64  # modules of a directory


@dataclass(frozen=True)
class Part:
    """A module of a directory.

    Attributes:
        kind: name of its class.
        path: its folder, "" for the directory itself.
        name: its name in the encoder, such as `dense_2`.
        config: its configuration.
    """

    kind: str
    path: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_weights(self) -> bool:
        """True for a module with a file of weights."""
        return self.kind in ("Dense", "LayerNorm")


@dataclass(frozen=True)
class Layout:
    """The modules of a directory and what the library does with a text before them.

    Attributes:
        parts: the modules; the first is the transformers model.
        longest: maximum number of tokens, or None.
        lowercase: texts are made lower case before they are split.
        prompts: texts to put before a text, by name.
        default_prompt: name of the one that is always put there, or None.
        similarity: name of the function that compares embeddings, or None.
        model_kwargs: arguments of the transformers model's constructor.
    """

    parts: tuple[Part, ...]
    longest: int | None = None
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def transformer(self) -> Part:
        """The transformers model."""
        return self.parts[0]

    @property
    def reads(self) -> str:
        """Name of the transformers output that the next module reads."""
        text = self.transformer.config.get("modality_config", {}).get("text", {})
        return str(text.get("method_output_name", HIDDEN))

    @property
    def writes(self) -> str:
        """Name of the feature that it becomes."""
        return str(self.transformer.config.get("module_output_name", TOKENS))

    def stages(self) -> dict[str, nn.Module]:
        """New modules after the transformers model, by name, with random weights."""
        return {part.name: build_part(part.kind, part.config) for part in self.parts[1:]}

    def text_settings(self) -> dict[str, Any]:
        """What happens to a text before the model, as JSON-compatible values for the metadata of a model."""
        return {
            "longest": self.longest,
            "lowercase": self.lowercase,
            "prompt": self.prompts.get(self.default_prompt or "", ""),
            "prompts": dict(self.prompts),
            "similarity": self.similarity,
        }


# Used for a transformers directory, as the library does.
DEFAULT = Layout(
    (
        Part("Transformer", "", "transformer"),
        Part("Pooling", "1_Pooling", "pooling_1", {"pooling_mode": "mean"}),
    )
)


def is_sentence_directory(folder: Path) -> bool:
    """True for a directory with the list of modules of sentence-transformers."""
    return (folder / MODULES).is_file()


def read_layout(folder: Path, ref: str) -> Layout:
    """Read the modules of a directory; DEFAULT if it lists none.

    Args:
        folder: the directory.
        ref: its reference, for messages.

    Raises:
        LoadError: a file is damaged, or a module or an option is not supported; the message names it.
    """
    if not is_sentence_directory(folder):
        return DEFAULT
    parts = tuple(
        Part(part.kind, part.path, part.name, _config_of(folder, part, ref))
        for part in list_parts(read_json(folder / MODULES, LoadError), ref)
    )
    own = TextOptions(parts[0].config, f"{ref}: {_named_config(folder, parts[0])}")
    settings = _settings(folder, ref)
    prompts = settings.get("prompts") or {}
    default = settings.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise LoadError(f"{ref}: {SETTINGS}: 'prompts' is no mapping of texts; restore it")
    if default is not None and default not in prompts:
        raise LoadError(f"{ref}: {SETTINGS}: there is no prompt {str(default)[:60]!r}; restore it")
    layout = Layout(
        parts,
        longest=own.longest(),
        lowercase=bool(own.config.get("do_lower_case", False)),
        prompts=prompts,
        default_prompt=default,
        similarity=settings.get("similarity_fn_name"),
        model_kwargs=own.model_kwargs(),
    )
    own.check()
    _check_order(layout, ref)
    return layout


def list_parts(listed: Any, ref: str) -> list[Part]:
    """The modules in a modules.json, without their configurations.

    Raises:
        LoadError: the list is damaged, or a module is not supported; the message names it.
    """
    if not isinstance(listed, list) or not 0 < len(listed) <= _MOST:
        raise LoadError(f"{ref}: {MODULES} is no list of modules; restore it")
    found: list[Part] = []
    for number, each in enumerate(listed):
        kind, path = (each.get("type"), each.get("path")) if isinstance(each, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise LoadError(f"{ref}: module {number} of {MODULES} has no type or path; restore it")
        if not _is_inside(path):
            raise LoadError(f"{ref}: module {number} of {MODULES} is at {path[:60]!r}, outside the directory")
        title = kind.rpartition(".")[2]
        if not kind.startswith(_LIBRARY):
            raise LoadError(
                f"{ref}: module {number} is {kind[:80]!r}, which is code of its own and never run; write a py: factory"
            )
        if title not in _SUPPORTED:
            raise LoadError(
                f"{ref}: module {number} is {title[:60]!r}, which surgery does not capture; it captures "
                f"{', '.join(_SUPPORTED)}"
            )
        if (title == "Transformer") != (number == 0):
            raise LoadError(
                f"{ref}: module {number} is {title!r}; a Transformer has to be the first, and the only one"
            )
        if each.get("kwargs"):
            raise LoadError(
                f"{ref}: module {number} ({title}) reads {each['kwargs']}, which surgery does not pass"
            )
        name = "transformer" if number == 0 else f"{title.lower()}_{number}"
        found.append(Part(title, "" if path in ("", ".") else path.strip("/"), name))
    return found


def files_of(parts: Iterable[Part], names: Iterable[str], *, random: bool = False) -> list[str]:
    """Names of the files of a repository that the modules after the transformers model need, and of its own options.

    Args:
        parts: the modules.
        names: names of all files.
        random: leave out the weights.
    """
    there = set(names)
    found = [name for name in (MODULES, SETTINGS) if name in there]
    for number, part in enumerate(parts):
        start = f"{part.path}/" if part.path else ""
        if number == 0:
            found += [start + name for name in OF_TRANSFORMER if start + name in there][:1]
            continue
        found += [start + CONFIG] if start + CONFIG in there else []
        if part.has_weights and not random:
            found += [start + name for name in WEIGHTS if start + name in there][:1]
    return found


def weights_of(folder: Path, part: Part) -> Path | None:
    """The file with the weights of a module after the transformers model, or None."""
    return next((folder / part.path / n for n in WEIGHTS if (folder / part.path / n).is_file()), None)


def _is_inside(path: str) -> bool:
    pure = PurePosixPath(path)
    return not pure.is_absolute() and ".." not in pure.parts and "\\" not in path and ":" not in path


def _named_config(folder: Path, part: Part) -> str:
    """Name of the file with the configuration of the module Transformer."""
    there = (name for name in OF_TRANSFORMER if (folder / part.path / name).is_file())
    return next(there, OF_TRANSFORMER[0])


def _config_of(folder: Path, part: Part, ref: str) -> dict[str, Any]:
    name = _named_config(folder, part) if part.kind == "Transformer" else CONFIG
    file = folder / part.path / name
    if not file.is_file():
        if part.kind in ("Transformer", "Normalize"):
            return {}
        raise LoadError(f"{ref}: {part.kind} has no {part.path}/{name}; restore it")
    found = read_json(file, LoadError)
    if not isinstance(found, dict):
        raise LoadError(f"{file} is no configuration; restore it")
    if part.kind != "Transformer":
        check_part(part.kind, found, f"{ref}: {part.path}/{name}")
    return found


def _settings(folder: Path, ref: str) -> dict[str, Any]:
    file = folder / SETTINGS
    found = read_json(file, LoadError) if file.is_file() else {}
    if not isinstance(found, dict):
        raise LoadError(f"{file} is no configuration; restore it")
    kind = found.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise LoadError(f"{ref}: it is a {str(kind)[:60]}; surgery captures a SentenceTransformer")
    return found


def _check_order(layout: Layout, ref: str) -> None:
    """Raise LoadError if a module reads what none before it writes, or if the last feature is no embedding."""
    known = {layout.writes}
    for part, stage in zip(layout.parts[1:], layout.stages().values(), strict=True):
        source: Any = stage.source
        if source not in known:
            raise LoadError(
                f"{ref}: {part.kind} ({part.path}) reads {source!r}, which no module before it makes"
            )
        known.add(str(stage.target))
    if EMBEDDING not in known:
        raise LoadError(f"{ref}: its modules make no {EMBEDDING}; add a Pooling")
    prompted = layout.prompts.get(layout.default_prompt or "", "")
    if prompted and any(part.config.get("include_prompt") is False for part in layout.parts):
        raise LoadError(
            f"{ref}: its Pooling leaves out the tokens of the prompt {layout.default_prompt!r}, which surgery does not"
        )
