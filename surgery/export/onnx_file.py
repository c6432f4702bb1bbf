"""Export of a program to an ONNX file that keeps parameter names, adapters and their provenance."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from surgery.capture.recurrent import shape_rules
from surgery.capture.shapes import axis_names
from surgery.common.errors import ExportError
from surgery.common.progress import stage
from surgery.common.quantities import in_bytes
from surgery.common.summary import Summary
from surgery.export import annotate, metadata_keys
from surgery.export.failure import explain, first_line
from surgery.export.lowerings.dequantize import check_kept
from surgery.export.lowerings.linear_attention import CONVERTED, finish_opset
from surgery.export.opset import check_opset, opset_for
from surgery.export.optional import require
from surgery.export.parity import ParityReport, check_parity
from surgery.export.postprocess import finish
from surgery.export.reexport import export_again
from surgery.export.source import ExportSource, InputSet, tagged_copy
from surgery.graph.marks import mark_of

_INLINE_LIMIT = 1_500_000_000  # bytes of weights: a protobuf file is limited to 2 GiB, including the graph


@dataclass(frozen=True)
class ExportReport:
    """Result of an ONNX export.

    Attributes:
        path: the model file.
        files: the model file, and the data file if the weights are stored separately.
        size: total size of the files in bytes.
        opset: ONNX opset of the file.
        nodes: number of ONNX nodes in the file.
        traced_nodes: number of ONNX nodes before simplification.
        inputs: shapes of the inputs by name, with named dynamic axes.
        outputs: shapes of the outputs by name, with named dynamic axes.
        stored: tensor of the file that stores each weight of the program, by name (`x.weight` → `x.weight.T`).
        tied: names that share a tensor, with the name that was kept.
        lost: tensors missing from the file: no output depends on them, or a buffer became a constant.
        seconds: duration of the export.
        parity: result of the parity check; None if it was not requested.
    """

    path: Path
    files: tuple[Path, ...]
    size: int
    opset: int
    nodes: int
    traced_nodes: int
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    stored: Mapping[str, str] = field(repr=False)
    tied: Mapping[str, str]
    lost: tuple[str, ...]
    seconds: float
    parity: ParityReport | None = None

    def __repr__(self) -> str:
        return self._summary().text()

    def _repr_html_(self) -> str:
        return self._summary().html()

    def _summary(self) -> Summary:
        def ends(shapes: Mapping[str, tuple[int | str, ...]]) -> str:
            return ", ".join(f"{name}[{', '.join(map(str, shape))}]" for name, shape in shapes.items())

        parity = "not checked"
        if self.parity is not None:
            how = "" if self.parity.ok else ", which is more than its tolerance"
            parity = f"within {self.parity.error:.1e} of the outputs' scale{how}"
        return Summary(
            f"ONNX file {self.path}",
            (
                (
                    "size",
                    in_bytes(self.size) + (f" in {len(self.files)} files" if len(self.files) > 1 else ""),
                ),
                (
                    "nodes",
                    f"{self.nodes:,} ({self.traced_nodes:,} before simplification), opset {self.opset}",
                ),
                ("inputs", ends(self.inputs)),
                ("outputs", ends(self.outputs)),
                ("parity in onnxruntime", parity),
                ("tied", ", ".join(f"{name} = {kept}" for name, kept in self.tied.items()) or "nothing"),
                ("not in the file", ", ".join(self.lost) or "nothing"),
                ("seconds", f"{self.seconds:.1f}"),
            ),
        )


def export_onnx(
    source: ExportSource,
    path: Path,
    *,
    opset: int | None = None,
    provenance: annotate.Provenance | None = None,
    journal_json: str | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
    base_json: str | None = None,
    pixels: Mapping[str, Sequence[float]] | None = None,
    ranges: Mapping[str, Mapping[str, int]] | None = None,
    lowerings: Mapping[Any, Callable[..., Any]] | None = None,
    external_data: bool | None = None,
    check: bool = True,
    parity: Sequence[InputSet] = (),
    optional: Sequence[str] = (),
    cpu: str = "any",
    judged: Sequence[InputSet] = (),
    given: bool = False,
    tolerance: float | None = None,
) -> ExportReport:
    """Export `source` to an ONNX file.

    Args:
        source: the program.
        path: the file to write; an existing file is replaced only if the export succeeds.
        opset: ONNX opset; None uses torch's default, or a later one if an op of the graph needs it.
        provenance: {"pass", "name", "site"} by tensor name, for the tensors that have to stay separate in the file.
            With "pinned": False the provenance is recorded, but the tensor may be stored transposed.
        journal_json: the program's journal as JSON, stored in the file's metadata.
        labels: class names by output, stored in the file's metadata.
        base_json: facts about the base as JSON, stored in the file's metadata.
        pixels: mean and standard deviation of the pixels that an image model expects, stored in the metadata too.
        ranges: sizes that the dimensions may have (surgery.export.ranges), stored in the metadata too.
        lowerings: onnxscript function by torch op, for ops that torch.onnx cannot translate.
        external_data: True stores the weights in `<path>.data`; None does so above 1.5 GB.
        check: run onnx's checker on the file, and check that onnxruntime keeps quantized weights quantized.
        parity: input sets on which onnxruntime is compared with the program before `path` is replaced.
        optional: tensors that become optional inputs; see surgery.export.adapter_inputs.
        cpu: "vnni" allows integer products that saturate on processors without VNNI; see surgery.export.saturation.
        judged, given, tolerance: see surgery.export.parity.check_parity.

    Raises:
        ExportError: the export or a check fails; a file at `path` is left unchanged.
        MissingExtraError: the onnx extra is not installed.
    """
    onnx = require("onnx")
    require("onnxscript")
    if Path(path).is_dir():
        raise ExportError(f"'{path}' is a directory; name the ONNX file to write")
    started = time.perf_counter()
    provenance = provenance or {}
    with stage("export: tracing the graph"):
        program = _trace(source)
    if opset is not None:
        check_opset(source.graph_module.graph, opset)
    opset = opset or opset_for(source.graph_module.graph)
    with stage("export: translating to ONNX"):
        model = _translate(program, source, opset, lowerings)
    tensors = _tensors(program)
    traced_nodes = model.graph.num_nodes()
    with stage("export: simplifying and naming"):
        finished = finish(
            model,
            tensors,
            [name for name, _ in program.named_parameters()],
            _all_names(source),
            provenance,
            journal_json,
            lambda model: _rename_inputs_and_outputs(model, program, source),
            optional,
            cpu,
        )
    stored, tied = finished.stored, finished.tied
    if labels:
        listed = {output: list(names) for output, names in labels.items()}
        model.metadata_props[metadata_keys.LABELS] = json.dumps(listed)
    if base_json is not None:
        model.metadata_props[metadata_keys.BASE] = base_json
    if pixels:
        model.metadata_props[metadata_keys.PIXELS] = json.dumps({k: list(v) for k, v in pixels.items()})
    if ranges:
        model.metadata_props[metadata_keys.RANGES] = json.dumps(ranges)
    # The size limit of a protobuf file applies to the weights that are left after tying.
    weight_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if external_data is None:
        external_data = weight_bytes > _INLINE_LIMIT
    with _staged(Path(path)) as staged:
        with stage("export: writing the file"):
            _save(model, staged, external_data)
            if check:
                _check(onnx, staged)
            if check and finished.quantized:
                check_kept(staged, finished.quantized)
        with stage("export: comparing onnxruntime with the program"):
            report = (
                check_parity(staged, source, parity, judged=judged, given=given, tolerance=tolerance)
                if parity
                else None
            )
        if report is not None:
            _add_parity(onnx, staged, report)
    files = tuple(
        file
        for file in (Path(path), _data_file(Path(path)))
        if file.exists() and (file == Path(path) or external_data)
    )
    return ExportReport(
        path=Path(path),
        files=files,
        size=sum(file.stat().st_size for file in files),
        opset=model.opset_imports[""],
        nodes=model.graph.num_nodes(),
        traced_nodes=traced_nodes,
        inputs=_shapes([value for value in model.graph.inputs if value.name not in optional]),
        outputs=_shapes(model.graph.outputs),
        stored=stored,
        tied=tied,
        lost=tuple(name for name in tensors if name not in stored),
        seconds=time.perf_counter() - started,
        parity=report,
    )


def _add_parity(onnx: Any, path: Path, report: ParityReport) -> None:
    """Add the result of the parity check to the metadata of a file that is written already."""
    found: dict[str, dict[str, float]] = {}
    for output in report.outputs:
        worst = found.setdefault(output.name, {"error": 0.0, "optimised": 0.0})
        worst["error"] = max(worst["error"], output.error)
        worst["optimised"] = max(worst["optimised"], output.optimised_error)
    more = onnx.ModelProto()
    more.metadata_props.add(key=metadata_keys.PARITY, value=json.dumps(found))
    # Messages of protobuf are merged when they follow each other, and lists are joined.
    with path.open("ab") as stream:
        stream.write(more.SerializeToString())


def _trace(source: ExportSource) -> torch.export.ExportedProgram:
    """Export the edited graph again, with the math attention kernel, which decomposes into standard ops."""
    try:
        with sdpa_kernel(SDPBackend.MATH), shape_rules(), quiet():
            return export_again(
                tagged_copy(source.graph_module), tuple(source.args), source.kwargs, source.dynamic_shapes
            )
    except Exception as error:
        raise ExportError(f"the edited graph cannot be traced again: {first_line(error)}") from error


def _translate(
    program: torch.export.ExportedProgram,
    source: ExportSource,
    opset: int | None,
    lowerings: Mapping[Any, Callable[..., Any]] | None,
) -> Any:
    """Translate to an onnx_ir.Model without optimization. Fused attention kernels have no ONNX form."""
    try:
        with sdpa_kernel(SDPBackend.MATH), shape_rules(), quiet():
            exported = torch.onnx.export(
                program,
                tuple(source.args),
                kwargs=dict(source.kwargs),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset and min(opset, CONVERTED),
                # It uses strings as names of axes, but replaces Dims with its own symbols (`s43`).
                dynamic_shapes=axis_names(source.dynamic_shapes),
                custom_translation_table=dict(lowerings) if lowerings else None,
            )
    except Exception as error:
        # torch.onnx reports the traced node; users know the node of their own graph.
        origins = {
            node.name: origin
            for node in program.graph.nodes
            if (origin := (node.meta.get("custom") or {}).get(metadata_keys.FX_NODE))
        }
        entries = {node.name: mark_of(node).entry for node in source.graph_module.graph.nodes}
        raise ExportError(explain(error, origins, entries)) from error
    if exported is None:
        raise ExportError("torch.onnx.export returned nothing: this torch is older than 2.11; upgrade torch")
    model = exported.model
    # torch.onnx only warns if it cannot convert the model to the requested opset.
    if opset is not None and model.opset_imports.get("") != min(opset, CONVERTED):
        raise ExportError(
            f"the graph needs opset {model.opset_imports.get('')} and could not be converted to {opset}; "
            "do not set the opset"
        )
    finish_opset(model, opset)
    return model


def _tensors(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """Parameters, buffers and constants that the traced graph reads, by name."""
    signature = program.graph_signature
    used = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    found = {**program.state_dict, **program.constants}
    return {name: found[name] for name in used.values() if isinstance(found.get(name), torch.Tensor)}


def _all_names(source: ExportSource) -> dict[str, torch.Tensor]:
    """Parameters by every name, including tied names, which `named_parameters` omits by default."""
    return dict(source.graph_module.named_parameters(remove_duplicate=False))


def _rename_inputs_and_outputs(
    model: Any, program: torch.export.ExportedProgram, source: ExportSource
) -> None:
    """Rename the inputs and outputs of the ONNX graph as in the program."""
    # A value that is both an input and an output, or two outputs, would need two names. The pass inserts an Identity.
    require("onnx_ir.passes.common").OutputFixPass()(model)
    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    inputs = source.named_inputs(args, kwargs)
    values = [
        node.meta.get("val") if isinstance(node, torch.fx.Node) else node for node in _returned(program)
    ]
    spec = program.call_spec.out_spec
    assert spec is not None
    outputs = source.named_outputs(pytree.tree_unflatten(values, spec))
    annotate.rename_ends(model, list(inputs), list(outputs))


def _returned(program: torch.export.ExportedProgram) -> list[Any]:
    """The nodes that the graph returns to the user, without the new values of mutated buffers."""
    (returned,) = program.graph.output_node().args
    specs = program.graph_signature.output_specs
    kind = torch.export.graph_signature.OutputKind.USER_OUTPUT
    assert isinstance(returned, tuple | list)
    return [node for node, spec in zip(returned, specs, strict=True) if spec.kind == kind]


def _shapes(values: Sequence[Any]) -> dict[str, tuple[int | str, ...]]:
    """Shapes of inputs or outputs by name."""
    return {
        value.name: tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ())
        for value in values
    }


def _data_file(path: Path) -> Path:
    """Path of the external data file of a model file."""
    return path.with_name(f"{path.name}.data")


def _save(model: Any, path: Path, external_data: bool) -> None:
    ir = require("onnx_ir")
    try:
        ir.save(model, path, external_data=_data_file(path).name if external_data else None)
    except OSError as error:
        raise ExportError(f"'{path.name}' cannot be written: {error.strerror or error}") from error
    except ValueError as error:
        raise ExportError(f"'{path.name}' cannot be written: {error}; try external_data=True") from error


def _check(onnx: Any, path: Path) -> None:
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the ONNX file is not valid: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """Yield a path in a temporary directory next to `path`; move the files to `path` if the block succeeds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ExportError(f"'{path}' cannot be written: {error.strerror or error}") from error
    try:
        staged = directory / path.name
        yield staged
        # Move the data first, so that the model file never refers to data that does not exist yet.
        if _data_file(staged).exists():
            os.replace(_data_file(staged), _data_file(path))
        os.replace(staged, path)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' warnings and logs; failures are raised or found by the parity check."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
