"""Generation in onnxruntime with transformers' own `generate`: greedy, sampled, beams."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from surgery.common.errors import ExportError, nearest
from surgery.export.failure import first_line
from surgery.export.optional import require
from surgery.export.runtime import ADAPTER, adapter_file


def open_generator(path: Any, **session: Any) -> Any:
    """A model whose `generate` runs what `surgery export --generate` wrote in onnxruntime.

    session: `device`, `providers`, `session_options`, as for transformers' `ExportedModel.from_pretrained`. Where
    the directory holds adapters, `with model.adapter("film"):` lets one in (several: `model.adapter("a", "b")`).
    Raises ExportError where the directory is none of these.
    """
    ort = require("onnxruntime")
    import transformers
    from transformers.exporters.base import ExportedModel

    folder = Path(path)
    if not (folder / "export.json").is_file():
        raise ExportError(f"{path} is no directory that `surgery export --generate` wrote")
    if "session_options" not in session:
        # It warns of every input that has a default.
        session["session_options"] = ort.SessionOptions()
        session["session_options"].log_severity_level = 3
    try:
        exported = ExportedModel.from_pretrained(folder, **session)
    except Exception as error:
        raise ExportError(f"{path} cannot be opened ({first_line(error)}); export it again") from error
    title = str(exported.components["decode"].metadata.architecture)
    cls = getattr(transformers, title, None)
    if cls is None:
        raise ExportError(f"{path} was made of {title}, which this transformers has not")
    with torch.device("meta"):  # its generate, and what that asks of the model, without the weights
        shell = cls(exported.config)
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


class _Generator:
    """Put before a transformers class, whose forward is then in onnxruntime."""

    exported: Any
    folder: Path
    given: dict[str, Any]
    slots: set[str]

    @property
    def device(self) -> torch.device:
        return self.exported.device

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it, with the kind of cache that the graphs take."""
        for name, cache in whole_cache(self).items():
            kwargs.setdefault(name, cache)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        raise ExportError(
            f"this model runs what is in {self.folder}, and has no weights to save; copy that directory"
        )

    @contextlib.contextmanager
    def adapter(self, *names: str) -> Iterator[Any]:
        """These adapters are in while the block runs, in every graph."""
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
            # A run with bound inputs has no place for active adapters: their tensors are bound like other inputs.
            try:
                values = ort.AdapterFormat.read_adapter(str(file)).get_parameters()
            except Exception as error:
                raise ExportError(f"{file} is no adapter that can be read; export it again") from error
            if foreign := sorted(set(values) - self.slots):
                raise ExportError(f"{file} is for another model: this one has no input {foreign[0]}")
            if both := sorted(set(values) & set(given)):
                raise ExportError(
                    f"{names} both give {both[0]}; combine them into one, or let in one of them"
                )
            given.update(values)
        before, self.given = self.given, given
        try:
            yield self
        finally:
            self.given = before


def sliding_window(model: Any) -> int:
    """How far sliding attention looks back; 0 where there is none."""
    from transformers import DynamicCache

    layers: list[Any] = DynamicCache(config=model.config).layers
    return max((layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)), default=0)


def whole_cache(model: Any) -> dict[str, Any]:
    """For `generate`, where attention slides: a cache that keeps every position, and the mask hides them. The default
    drops some, by Python arithmetic that no graph can hold."""
    from transformers import DynamicCache

    return {"past_key_values": DynamicCache()} if sliding_window(model) else {}


def _forward_like(cls: Any) -> Callable[..., Any]:
    """A forward in onnxruntime that says it takes what the class's own does: `generate` asks for that."""

    def forward(self: Any, input_ids: Any = None, past_key_values: Any = None, **given: Any) -> Any:
        if input_ids is None:
            raise ExportError("the graphs take tokens: give input_ids")
        input_ids = input_ids.long()
        uses_cache = given.get("use_cache") is not False
        filled = uses_cache and past_key_values is not None and past_key_values.get_seq_length() > 0
        runner = self.exported.runners["decode" if filled else "prefill"]
        inputs = {name: value for name, value in given.items() if name in runner.metadata.kwargs}
        # As the graphs have them, and as transformers fills them in.
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
            # An empty one too: of a sliding window it holds the size.
            inputs["past_key_values"] = past_key_values
        outputs = runner(input_ids=input_ids, **inputs)
        if not uses_cache:
            outputs["past_key_values"] = None
        return outputs

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    return forward


class _Session:
    """An onnxruntime session whose runs also get what the model has been given."""

    def __init__(self, session: Any, model: Any) -> None:
        self._session, self._model = session, model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        for name, value in self._model.given.items():
            binding.bind_ortvalue_input(name, value)
        self._session.run_with_iobinding(binding, options)
