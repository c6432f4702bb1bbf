"""Execution of an ONNX file on torch tensors with onnxruntime."""

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
from surgery.export.ranges import outside_of_file
from surgery.export.untrusted import read_checked

ADAPTER = ".onnx_adapter"  # suffix of onnxruntime's adapter files


@dataclass(frozen=True)
class OnnxNode:
    """A node of an ONNX file.

    Attributes:
        name: name of the node.
        op: its op type.
        outputs: names of its outputs.
        origin: the graph node of the program that it came from; "" if unknown.
        module_path: path of the module that node was traced in; "" if unknown.
        is_value: True if its first output is the value of `origin` rather than an intermediate result.
    """

    name: str
    op: str
    outputs: tuple[str, ...]
    origin: str
    module_path: str
    is_value: bool


class OnnxModel:
    """An ONNX file in an onnxruntime session on the CPU.

    Args:
        path: the ONNX file.
        optimised: True applies onnxruntime's default graph optimizations; False runs the file as written.
        threads: number of intra-op threads; None lets onnxruntime choose.
        config: entries of the session's configuration, for example
            {"session.qdq_matmulnbits_accuracy_level": "1"}.

    Raises:
        ExportError: the file cannot be read or run, or names data outside its directory.
        MissingExtraError: onnxruntime is not installed.
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
            raise ExportError(f"there is no ONNX file '{path}'; check the path")
        read_checked(self.path)
        self._session = self._open(str(self.path))
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def run(
        self, inputs: Mapping[str, torch.Tensor], adapters: Sequence[Path] = ()
    ) -> dict[str, torch.Tensor]:
        """Run the model and return its outputs by name.

        Args:
            inputs: input tensors by name; names that the file does not have are ignored.
            adapters: `.onnx_adapter` files to activate in this run.

        Raises:
            ExportError: an input is missing, or the run fails.
        """
        if not adapters:
            return self._run(self._session, self.outputs, inputs)
        options, held = open_adapters(adapters)
        try:
            return self._run(self._session, self.outputs, inputs, options)
        finally:
            # onnxruntime does not own the adapters, so they have to outlive the run.
            del held

    def intermediate(
        self, names: Iterable[str], inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Run the unoptimized model and return inner values by name.

        Args:
            names: names of node outputs.
            inputs: input tensors by name.

        Raises:
            ExportError: no node produces one of the names.
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
            # onnxruntime looks for external data next to the model file, so the temporary file has to be there.
            with tempfile.NamedTemporaryFile(suffix=".onnx", dir=self.path.parent) as beside:
                beside.write(proto.SerializeToString())
                beside.flush()
                session = self._open(beside.name, optimised=False)
        else:
            session = self._open(proto.SerializeToString(), optimised=False)
        return self._run(session, wanted, inputs)

    @property
    def signature(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Element type (as named by onnxruntime) and shape (with named dynamic axes) of each input."""
        return {value.name: (value.type, tuple(value.shape)) for value in self._session.get_inputs()}

    @property
    def output_shapes(self) -> dict[str, tuple[int | str, ...]]:
        """Shape of each output, with named dynamic axes. An output whose rank the file does not give has no shape."""
        return {
            value.name: tuple(value.shape) for value in self._session.get_outputs() if value.shape is not None
        }

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the file, by key.

        Raises:
            ExportError: the metadata are no text.
        """
        try:
            return dict(self._session.get_modelmeta().custom_metadata_map)
        except UnicodeDecodeError:
            raise ExportError(
                f"'{self.path}': the file's metadata are no text; the file is damaged"
            ) from None

    @cached_property
    def nodes(self) -> tuple[OnnxNode, ...]:
        """The nodes of the file in order."""
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
        """Size on disk in bytes, including external data files."""
        ir = require("onnx_ir")
        model = ir.load(self.path)
        tensors = [value.const_value for value in model.graph.initializers.values()]
        beside = {tensor.path for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
        return self.path.stat().st_size + sum(Path(file).stat().st_size for file in beside)

    def latency(self, inputs: Mapping[str, torch.Tensor], repeats: int = 20, warmup: int = 3) -> float:
        """Measure the median time of a run in seconds.

        Args:
            inputs: input tensors by name.
            repeats: number of timed runs.
            warmup: number of untimed runs before them.
        """
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
            if options is None:
                options = require("onnxruntime").RunOptions()
            # onnxruntime would also print the error that is raised below.
            options.log_severity_level = 4
            values = session.run(wanted, feed, options)
            return {name: torch.as_tensor(value) for name, value in zip(wanted, values, strict=True)}
        except Exception as error:
            shapes = {name: shape for name, (_, shape) in self.signature.items()}
            if found := outside_of_file(self.metadata.get(metadata_keys.RANGES, "{}"), shapes, inputs):
                raise ExportError(f"'{self.path.name}' cannot run: {found}") from error
            raise ExportError(f"onnxruntime cannot run '{self.path.name}': {first_line(error)}") from error


def session_threads(threads: int | None) -> dict[str, Any]:
    """Arguments of `open_generator` for a number of intra-op threads; empty to let onnxruntime choose."""
    if threads is None:
        return {}
    options = require("onnxruntime").SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return {"session_options": options}


def adapter_file(folder: Path, name: str) -> Path:
    """Path of an adapter's file in a directory."""
    return folder / f"{name}{ADAPTER}"


def open_adapters(files: Sequence[Path]) -> tuple[Any, list[Any]]:
    """Load adapters into RunOptions. Also returns the adapters, which the caller must keep alive during the runs."""
    ort = require("onnxruntime")
    options, held = ort.RunOptions(), []
    for file in files:
        adapter = ort.LoraAdapter()
        try:
            adapter.Load(str(file))
            options.add_active_adapter(adapter)
        except Exception as error:
            raise ExportError(f"'{file}' cannot be read as an adapter: {first_line(error)}") from error
        held.append(adapter)
    return options, held
