"""An ONNX file as something that runs on torch tensors."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from surgery.common.errors import ExportError, nearest
from surgery.export import metadata_keys
from surgery.export.failure import first_line
from surgery.export.optional import require

ADAPTER = ".onnx_adapter"  # what onnxruntime calls its files


@dataclass(frozen=True)
class OnnxNode:
    """A node of the file, with the program's node (`origin`) and module that it came from, where known.

    is_value: its first output is the value of `origin`, not a step towards it.
    """

    name: str
    op: str
    outputs: tuple[str, ...]
    origin: str
    module_path: str
    is_value: bool


class OnnxModel:
    """An onnxruntime session on CPU.

    optimised: onnxruntime's default graph optimisations; False runs the file as it is written.
    threads: intra-op threads; None leaves it to onnxruntime. config: entries of the session's configuration, such as
    {"session.qdq_matmulnbits_accuracy_level": "1"}.

    Raises ExportError where the file cannot be read or run; MissingExtraError without onnxruntime.
    """

    def __init__(
        self,
        path: Path,
        *,
        optimised: bool = True,
        threads: int | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.optimised = optimised
        self.threads = threads
        self.config = dict(config or {})
        if not self.path.is_file():
            raise ExportError(f"there is no ONNX file '{path}'")
        self._session = self._open(str(self.path))
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def run(
        self, inputs: Mapping[str, torch.Tensor], adapters: Sequence[Path] = ()
    ) -> dict[str, torch.Tensor]:
        """The outputs by name. Inputs that the file lacks are ignored; a missing one is an ExportError.

        adapters: `.onnx_adapter` files that are active in this run.
        """
        if not adapters:
            return self._run(self._session, self.outputs, inputs)
        options, held = open_adapters(adapters)
        try:
            return self._run(self._session, self.outputs, inputs, options)
        finally:
            del held  # they have to outlive the run

    def intermediate(
        self, names: Iterable[str], inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Inner values by name, computed by the file as it is written, never by an optimised form of it.

        Raises ExportError for a name that no node produces.
        """
        wanted = list(dict.fromkeys(names))
        produced = {output for node in self.nodes for output in node.outputs}
        for name in wanted:
            if name not in produced:
                raise ExportError(f"'{self.path.name}' has no value '{name}'{nearest(name, produced)}")
        if not wanted:
            return {}
        onnx = require("onnx")
        proto = onnx.load(str(self.path), load_external_data=False)
        existing = {value.name for value in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in existing)
        if any(onnx.external_data_helper.uses_external_data(tensor) for tensor in proto.graph.initializer):
            # External data is found relative to the file, and only beside it.
            with tempfile.NamedTemporaryFile(suffix=".onnx", dir=self.path.parent) as beside:
                beside.write(proto.SerializeToString())
                beside.flush()
                session = self._open(beside.name, optimised=False)
        else:
            session = self._open(proto.SerializeToString(), optimised=False)
        return self._run(session, wanted, inputs)

    @property
    def signature(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Input name -> (element type as onnxruntime names it, shape with named axes)."""
        return {value.name: (value.type, tuple(value.shape)) for value in self._session.get_inputs()}

    @cached_property
    def nodes(self) -> tuple[OnnxNode, ...]:
        """The file's nodes in order."""
        proto = require("onnx").load(str(self.path), load_external_data=False)
        found = []
        for node in proto.graph.node:
            meta = {entry.key: entry.value for entry in node.metadata_props}
            found.append(
                OnnxNode(
                    name=node.name,
                    op=node.op_type,
                    outputs=tuple(node.output),
                    origin=meta.get(metadata_keys.FX_NODE, ""),
                    module_path=meta.get(metadata_keys.MODULE, ""),
                    is_value=metadata_keys.FX_OUTPUT in meta,
                )
            )
        return tuple(found)

    @property
    def size(self) -> int:
        """Bytes on disk, the weights beside the file included."""
        ir = require("onnx_ir")
        model = ir.load(self.path)
        tensors = [value.const_value for value in model.graph.initializers.values()]
        beside = {tensor.path for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
        return self.path.stat().st_size + sum(Path(file).stat().st_size for file in beside)

    def latency(self, inputs: Mapping[str, torch.Tensor], repeats: int = 20, warmup: int = 3) -> float:
        """The median of `repeats` runs, in seconds."""
        for _ in range(warmup):
            self.run(inputs)
        times = []
        for _ in range(max(repeats, 1)):
            started = time.perf_counter()
            self.run(inputs)
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def _open(self, model: str | bytes, optimised: bool | None = None) -> Any:
        runtime = require("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        for key, value in self.config.items():
            options.add_session_config_entry(key, value)
        if not (self.optimised if optimised is None else optimised):
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(
                f"onnxruntime cannot load '{self.path.name}': {first_line(error)}; export in float32, or with "
                "another opset, if the CPU lacks a kernel"
            ) from error

    def _run(
        self,
        session: Any,
        names: Iterable[str],
        inputs: Mapping[str, torch.Tensor],
        options: Any = None,
    ) -> dict[str, torch.Tensor]:
        wanted = list(names)
        for name in self.inputs:
            if name not in inputs:
                raise ExportError(f"'{self.path.name}' needs the input '{name}'{nearest(name, inputs)}")
        try:
            feed = {name: inputs[name].detach().cpu().contiguous().numpy() for name in self.inputs}
            values = session.run(wanted, feed, options)
        except Exception as error:
            raise ExportError(f"onnxruntime cannot run '{self.path.name}': {first_line(error)}") from error
        return {name: torch.as_tensor(value) for name, value in zip(wanted, values, strict=True)}


def adapter_file(folder: Path, name: str) -> Path:
    return folder / f"{name}{ADAPTER}"


def open_adapters(files: Sequence[Path]) -> tuple[Any, list[Any]]:
    """RunOptions with adapters active, and the adapters, which have to outlive the runs."""
    ort = require("onnxruntime")
    options, held = ort.RunOptions(), []
    for file in files:
        adapter = ort.LoraAdapter()
        adapter.Load(str(file))
        options.add_active_adapter(adapter)
        held.append(adapter)
    return options, held
