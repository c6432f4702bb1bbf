"""Write a program as an ONNX file that keeps its weights' names, its adapters and where they came from."""

from __future__ import annotations

import contextlib
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

from surgery.common.errors import ExportError
from surgery.export import annotate, metadata_keys
from surgery.export.failure import explain, first_line
from surgery.export.lowerings.dequantize import check_kept
from surgery.export.opset import opset_for
from surgery.export.optional import require
from surgery.export.parity import ParityReport, check_parity
from surgery.export.postprocess import finish
from surgery.export.reexport import export_again
from surgery.export.source import ExportSource, InputSet, axis_names, tagged_copy

_INLINE_LIMIT = 1_500_000_000  # a protobuf file ends at 2 GiB, and the graph needs room too


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    files: the model file, and its data file where the weights are beside it.
    nodes, traced_nodes: ONNX nodes in the file, and before simplification.
    stored: every weight of the program by name, with the tensor that holds it (`x.weight` → `x.weight.T`).
    tied: names that share another's tensor.
    lost: tensors not in the file under any name: no output depends on them, or a buffer became a constant.
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


def export_onnx(
    source: ExportSource,
    path: Path,
    *,
    opset: int | None = None,
    provenance: annotate.Provenance | None = None,
    journal_json: str | None = None,
    lowerings: Mapping[Any, Callable[..., Any]] | None = None,
    external_data: bool | None = None,
    check: bool = True,
    parity: Sequence[InputSet] = (),
    optional: Sequence[str] = (),
) -> ExportReport:
    """Export `source` to `path`.

    provenance: parameter name to {"pass", "name", "site"}, for the tensors that must stay apart: nothing
        folds across them. An entry with "pinned": False is recorded only; its tensor may be stored transposed.
    lowerings: torch op to an onnxscript function, for ops that torch does not know how to write.
    external_data: the weights in `<path>.data`; None does so above 1.5 GB.
    check: run onnx's checker on the file.
    parity: input sets to compare with onnxruntime before the file takes its place.
    optional: tensors that are left as optional inputs; see surgery.export.adapter_inputs.

    Raises ExportError, and leaves what was at `path` as it was; MissingExtraError without the onnx extra.
    """
    onnx = require("onnx")
    require("onnxscript")
    if Path(path).is_dir():
        raise ExportError(f"'{path}' is a directory; name the ONNX file to write")
    started = time.perf_counter()
    provenance = provenance or {}
    program = _trace(source)
    opset = opset or opset_for(source.graph_module.graph)
    model = _translate(program, source, opset, lowerings)
    tensors = _tensors(program)
    traced_nodes = model.graph.num_nodes()
    finished = finish(
        model,
        tensors,
        [name for name, _ in program.named_parameters()],
        _all_names(source),
        provenance,
        journal_json,
        lambda model: _name_ends(model, program, source),
        optional,
    )
    stored, tied = finished.stored, finished.tied
    weight_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if external_data is None:
        external_data = weight_bytes > _INLINE_LIMIT
    with _staged(Path(path)) as staged:
        _save(model, staged, external_data)
        if check:
            _check(onnx, staged)
        if check and finished.quantized:
            check_kept(staged, finished.quantized)
        report = check_parity(staged, source, parity) if parity else None
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
        inputs=_ends([value for value in model.graph.inputs if value.name not in optional]),
        outputs=_ends(model.graph.outputs),
        stored=stored,
        tied=tied,
        lost=tuple(name for name in tensors if name not in stored),
        seconds=time.perf_counter() - started,
        parity=report,
    )


def _trace(source: ExportSource) -> torch.export.ExportedProgram:
    try:
        with sdpa_kernel(SDPBackend.MATH), quiet():
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
    """The onnx_ir.Model, nothing folded: with the fused attention kernels there is no ONNX form."""
    try:
        with sdpa_kernel(SDPBackend.MATH), quiet():
            exported = torch.onnx.export(
                program,
                tuple(source.args),
                kwargs=dict(source.kwargs),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=axis_names(source.dynamic_shapes),
                custom_translation_table=dict(lowerings) if lowerings else None,
            )
    except Exception as error:
        origins = {
            node.name: origin
            for node in program.graph.nodes
            if (origin := (node.meta.get("custom") or {}).get(metadata_keys.FX_NODE))
        }
        raise ExportError(explain(error, origins)) from error
    if exported is None:
        raise ExportError("torch.onnx.export returned nothing: this torch is older than 2.11")
    model = exported.model
    if opset is not None and model.opset_imports.get("") != opset:
        raise ExportError(
            f"the graph needs opset {model.opset_imports.get('')} and could not be converted to {opset}: "
            "leave the opset out"
        )
    return model


def _tensors(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and constant that the traced graph reads, by name."""
    signature = program.graph_signature
    used = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    found = {**program.state_dict, **program.constants}
    return {name: found[name] for name in used.values() if isinstance(found.get(name), torch.Tensor)}


def _all_names(source: ExportSource) -> dict[str, torch.Tensor]:
    """Tied names too, which `named_parameters` leaves out by default."""
    return dict(source.graph_module.named_parameters(remove_duplicate=False))


def _name_ends(model: Any, program: torch.export.ExportedProgram, source: ExportSource) -> None:
    # An output that is also another output or an input is one value with two names: give each its own.
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
    """The graph's returned nodes without the values of mutated buffers."""
    (returned,) = program.graph.output_node().args
    specs = program.graph_signature.output_specs
    kind = torch.export.graph_signature.OutputKind.USER_OUTPUT
    assert isinstance(returned, tuple | list)
    return [node for node, spec in zip(returned, specs, strict=True) if spec.kind == kind]


def _ends(values: Sequence[Any]) -> dict[str, tuple[int | str, ...]]:
    return {
        value.name: tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ())
        for value in values
    }


def _data_file(path: Path) -> Path:
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
    """A path in a fresh directory beside `path`, whose files take their place when the block succeeds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ExportError(f"'{path}' cannot be written: {error.strerror or error}") from error
    try:
        staged = directory / path.name
        yield staged
        # The data first: a model file must never name data that is not there yet.
        if _data_file(staged).exists():
            os.replace(_data_file(staged), _data_file(path))
        os.replace(staged, path)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the exporters' warnings: what matters is raised, or found by the parity check."""
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
