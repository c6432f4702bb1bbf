"""Generation in onnxruntime with transformers' `generate`: greedy, sampling and beam search."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from surgery.capture.budget import limited
from surgery.common.errors import ExportError, SurgeryError, nearest
from surgery.common.readers import read_json
from surgery.export.failure import first_line
from surgery.export.optional import require
from surgery.export.runtime import ADAPTER, adapter_file
from surgery.export.untrusted import read_checked

_MANIFEST = "export.json"
PARTS = ("prefill", "decode")
# Containers of Python, and caches and outputs of transformers.
_TREE = re.compile(
    r"builtins\.(tuple|list|dict)|collections\.OrderedDict|transformers(\.\w+)*[.:]\w*(Cache|Output)\w*"
)


def open_generator(path: Any, **session: Any) -> Any:
    """Open a directory written by `surgery export --generate` as a model whose `generate` runs in onnxruntime.

    If the directory contains adapters, `with model.adapter("film"):` activates one, and `model.adapter("a", "b")`
    activates several.

    Args:
        path: the directory.
        session: `device`, `providers` and `session_options` of transformers' `ExportedModel.from_pretrained`.

    Raises:
        ExportError: the directory was not written by `surgery export --generate`, or cannot be opened.
    """
    ort = require("onnxruntime")
    import transformers
    from transformers.exporters.base import ExportedModel

    folder = Path(path)
    if not (folder / _MANIFEST).is_file():
        raise ExportError(f"{path} was not written by `surgery export --generate`; name a directory that was")
    _check_directory(folder)
    if "session_options" not in session:
        # Suppress the warning that onnxruntime logs for every input with a default value.
        session["session_options"] = ort.SessionOptions()
        session["session_options"].log_severity_level = 3
    try:
        exported = ExportedModel.from_pretrained(folder, **session)
    except Exception as error:
        raise ExportError(f"{path} cannot be opened ({first_line(error)}); export it again") from error
    title = str(exported.components["decode"].metadata.architecture)
    cls: Any = getattr(transformers, title, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ExportError(
            f"{path} was exported from {title}, which the installed transformers lacks; upgrade transformers"
        )
    # Only `generate` and the attributes it reads are needed, so the model is created without weights.
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    try:
        with torch.device("meta"), limited(size, str(path)):
            shell: Any = cls(exported.config)  # type: ignore[arg-type]
    except SurgeryError:
        raise
    except Exception as error:
        raise ExportError(f"{path} cannot be opened ({first_line(error)}); export it again") from error
    if exported.generation_config is not None:
        shell.generation_config = exported.generation_config
    shell.__class__ = type(title, (_Generator, cls), {"forward": _forward_like(cls)})
    shell.exported, shell.folder, shell.given = exported, folder, {}
    runners: dict[str, Any] = exported.runners
    inputs = runners["decode"].session.get_overridable_initializers()
    shell.slots = {value.name for value in inputs}
    for runner in runners.values():
        runner.session = _Session(runner.session, shell)
    return shell.eval()


def _check_directory(folder: Path) -> None:
    """Check a directory before transformers reads it: other formats than ONNX, and some trees of inputs, run code.

    Raises:
        ExportError: the manifest is damaged, or names another format, files elsewhere, or unknown types.
    """
    manifest = read_json(folder / _MANIFEST, ExportError, "export it again")
    parts = manifest.get("components") if isinstance(manifest, dict) else None
    if not isinstance(parts, dict) or set(parts) != set(PARTS) or manifest.get("export_format") != "onnx":
        raise ExportError(
            f"{folder / _MANIFEST} describes no ONNX graphs {' and '.join(PARTS)}; `surgery export --generate` wrote "
            "something else"
        )
    for part, entry in parts.items():
        if not isinstance(entry, dict) or entry.get("file") != f"{part}.onnx":
            raise ExportError(
                f"{folder / _MANIFEST}: the file of {part!r} has to be {part}.onnx; export it again"
            )
        metadata = entry.get("metadata")
        if not isinstance(metadata, dict) or not str(metadata.get("architecture")).isidentifier():
            raise ExportError(f"{folder / _MANIFEST}: {part!r} has damaged metadata; export it again")
        for key in ("in_spec", "out_spec"):
            if metadata.get(key) is not None and not _is_tree(metadata[key], 0):
                raise ExportError(f"{folder / _MANIFEST}: {key} of {part!r} has a type that is not read")
        read_checked(folder / f"{part}.onnx")


def _is_tree(text: Any, depth: int) -> bool:
    """True for a tree of inputs or outputs, as torch writes it, that is made of containers and model outputs.

    torch imports whatever module a defaultdict or an enum in it names.
    """
    try:
        value = json.loads(text) if isinstance(text, str) and depth < 8 else None
    except (ValueError, RecursionError):
        return False
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += item
        elif isinstance(item, dict):
            kind = item.get("type")
            if "__enum__" in item or (kind is not None and not _TREE.fullmatch(str(kind))):
                return False
            # The context of a container is a JSON text of its own.
            context = item.get("context")
            if isinstance(context, str) and context[:1] in "{[" and not _is_tree(context, depth + 1):
                return False
            waiting += item.values()
    return value is not None


class _Generator:
    """Mixin placed before a transformers class whose forward runs in onnxruntime.

    Attributes:
        exported: transformers' ExportedModel.
        folder: the exported directory.
        given: values of the LoRA inputs of the active adapters.
        slots: names of the LoRA inputs of the graphs.
    """

    exported: Any
    folder: Path
    given: dict[str, Any]
    slots: set[str]

    @property
    def device(self) -> torch.device:
        """Device of the onnxruntime sessions."""
        return self.exported.device

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' `generate` with the type of cache that the graphs need."""
        for name, cache in whole_cache(self).items():
            kwargs.setdefault(name, cache)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Raise ExportError: the weights are in the directory, not in this model."""
        raise ExportError(
            f"this model runs the graphs in {self.folder} and has no weights to save; copy that directory"
        )

    @contextlib.contextmanager
    def adapter(self, *names: str) -> Iterator[Any]:
        """Activate adapters in all graphs during the block.

        Raises:
            ExportError: an adapter is missing, unreadable or made for another model, or two adapters set the same
                input.
        """
        ort = require("onnxruntime")
        files = [adapter_file(self.folder, name) for name in names]
        for name, file in zip(names, files, strict=True):
            if not file.is_file():
                known = sorted(found.stem for found in self.folder.glob(f"*{ADAPTER}"))
                raise ExportError(
                    f"{self.folder} has no adapter {name!r}{nearest(name, known) or f'; it has {known}'}"
                )
        given: dict[str, Any] = {}
        for file in files:
            # A run with IO binding cannot take active adapters, so their tensors are bound like other inputs.
            try:
                values = ort.AdapterFormat.read_adapter(str(file)).get_parameters()
            except Exception as error:
                raise ExportError(f"{file} cannot be read as an adapter; export it again") from error
            if foreign := sorted(set(values) - self.slots):
                raise ExportError(
                    f"{file} is for another model: this one has no input {foreign[0]}; export the adapter again"
                )
            if both := sorted(set(values) & set(given)):
                raise ExportError(
                    f"the adapters {', '.join(names)} overlap: two of them set {both[0]}; combine them into one, or "
                    "activate only one"
                )
            given.update(values)
        before, self.given = self.given, given
        try:
            yield self
        finally:
            self.given = before


def sliding_window(model: Any) -> int:
    """Size of the largest sliding attention window in positions; 0 without sliding attention."""
    from transformers import DynamicCache

    layers: list[Any] = DynamicCache(config=model.config).layers
    return max((layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)), default=0)


def whole_cache(model: Any) -> dict[str, Any]:
    """Arguments of `generate` that set the cache of a model with sliding attention; empty for other models.

    The cache keeps every position, and the mask hides those outside the window. The default cache drops positions in
    Python code, which cannot be traced.
    """
    from transformers import DynamicCache

    return {"past_key_values": DynamicCache()} if sliding_window(model) else {}


def _forward_like(cls: Any) -> Callable[..., Any]:
    """Create a forward that runs in onnxruntime. It has the signature of `cls.forward`, which `generate` inspects."""

    def forward(self: Any, input_ids: Any = None, past_key_values: Any = None, **given: Any) -> Any:
        if input_ids is None:
            raise ExportError("the graphs take token ids; pass input_ids")
        input_ids = input_ids.long()
        uses_cache = given.get("use_cache") is not False
        filled = uses_cache and past_key_values is not None and past_key_values.get_seq_length() > 0
        runner = self.exported.runners["decode" if filled else "prefill"]
        inputs = {name: value for name, value in given.items() if name in runner.metadata.kwargs}
        # The graphs require int64 and all inputs; missing ones get the defaults of transformers.
        for name in ("attention_mask", "position_ids"):
            if isinstance(inputs.get(name), torch.Tensor):
                inputs[name] = inputs[name].long()
        past = past_key_values.get_seq_length() if filled else 0
        if inputs.get("attention_mask") is None:
            inputs["attention_mask"] = input_ids.new_ones(input_ids.shape[0], past + input_ids.shape[1])
        if inputs.get("position_ids") is None:
            positions = (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -input_ids.shape[1] :]
        if past_key_values is not None and uses_cache:
            # An empty cache is passed as well, because it holds the size of a sliding window.
            inputs["past_key_values"] = past_key_values
        outputs = runner(input_ids=input_ids, **inputs)
        if not uses_cache:
            outputs["past_key_values"] = None
        return outputs

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    return forward


class _Session:
    """Wrapper of an onnxruntime session that also binds the inputs of the model's active adapters."""

    def __init__(self, session: Any, model: Any) -> None:
        self._session, self._model = session, model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        """Bind the adapters' tensors and run the session."""
        for name, value in self._model.given.items():
            binding.bind_ortvalue_input(name, value)
        self._session.run_with_iobinding(binding, options)
