"""Export of a language model for generation: one ONNX graph for the prompt, one for later tokens, and a KV cache.

    prefill.onnx       input_ids, attention_mask, position_ids -> logits and the keys and values of every layer
    decode.onnx        the same with the cached keys and values as inputs, for one or several new tokens
    decode.onnx.data   weights shared by both graphs
    export.json, config.json, generation_config.json, tokenizer files

transformers' exporter splits and traces the model. surgery adds names, provenance and simplification. Open the
directory with `transformers.exporters.ExportedModel.from_pretrained` or `open_generator`, or open each graph in
onnxruntime.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.capture.devices import HOME
from surgery.capture.hf_config import silenced
from surgery.common.errors import ExportError, MissingExtraError
from surgery.common.files import staged_directory
from surgery.common.progress import stage, track
from surgery.engine.contract.base import RewritePass
from surgery.engine.registry import lowerings
from surgery.engine.replay import live_entries, pass_of
from surgery.export import metadata_keys
from surgery.export.adapter_inputs import slots, write_adapters
from surgery.export.failure import first_line
from surgery.export.generator import PARTS, open_generator, sliding_window, whole_cache
from surgery.export.lowerings.dequantize import Weight, check_kept
from surgery.export.onnx_file import quiet
from surgery.export.opset import opset_for
from surgery.export.optional import require
from surgery.export.parity import difference, scale_of, tolerance_of
from surgery.export.postprocess import finish
from surgery.export.program import check_written, cpu_of, parity_inputs, provenance_of, source_of
from surgery.export.rounded_parity import RUNTIME_TOLERANCE, TOLERANCE, own_error, rounds
from surgery.export.runtime import adapter_file
from surgery.export.source import ExportSource, InputSet
from surgery.live.model import live
from surgery.store.hf import write_companions
from surgery.store.provenance import origin_of

if TYPE_CHECKING:
    from surgery.engine.program import Program

WEIGHTS = "decode.onnx.data"
_INLINE = 1024  # bytes: smaller tensors stay in the graph, where shape inference can read them
_TOKENS = 32  # new tokens that the check generates
_LONGEST = 8192  # positions: the longest prompt that the check of a sliding window runs
_AXES: dict[str, tuple[str, ...]] = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "total_sequence"),
}


@dataclass(frozen=True)
class GenerationReport:
    """Result of an export for generation.

    Attributes:
        path: the directory.
        size: total size of its files in bytes.
        opset: ONNX opset of the graphs.
        nodes: number of ONNX nodes of each graph.
        inputs: input names of each graph.
        error: largest difference of the logits in any step, as a fraction of their scale.
        tokens: number of greedy tokens that are equal.
        ties: number of rows in which a token differs although the logits agree within rounding (a tie).
        sampled: number of sampled tokens that are equal.
        seconds: duration of the export.
        adapters: adapter files by adapter name.
    """

    path: Path
    size: int
    opset: int
    nodes: Mapping[str, int]
    inputs: Mapping[str, Sequence[str]]
    error: float
    tokens: int
    ties: int
    sampled: int
    seconds: float
    adapters: Mapping[str, Path]


def export_generation(
    program: Program,
    path: Any,
    *,
    opset: int | None = None,
    adapters_as_inputs: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    cpu: str | None = None,
    data: Sequence[InputSet] = (),
    tolerance: float | None = None,
) -> GenerationReport:
    """Write a directory for generation, and compare the tokens of onnxruntime with those of the live model.

    The check covers greedy and sampled generation.

    Args:
        program: the program of a decoder-only language model.
        path: the directory to write.
        opset: ONNX opset; None uses the default, or a later one if an op of the graph needs it.
        adapters_as_inputs: True writes each LoRA to its own file, for graphs that take LoRA weights as optional inputs;
            see surgery.export.adapter_inputs. The base and every adapter are checked.
        seed: seed of the prompts and of sampling.
        overwrite: True replaces an existing directory.
        cpu: processors that integer products must be correct on; see surgery.export.program.export_program.
        data: inputs on which the program's own rounding of activations is measured; random ones if empty.
        tolerance: how much rounded activations may change the logits beyond twice the program's own rounding.

    Raises:
        ExportError: the program is not a supported language model, cannot be translated, or generates other tokens.
    """
    started = time.perf_counter()
    program = program.to(HOME)
    slotted = slots(program) if adapters_as_inputs else None
    optional = slotted.names if slotted else ()
    program = slotted.program if slotted else program
    model = _language_model(program)
    with staged_directory(Path(path), overwrite) as folder:
        with stage("export: translating two graphs"):
            exported = _translated(program, model, opset, seed)
        provenance = provenance_of(program)
        journal = json.dumps(program.journal.to_json())
        names = dict(model.named_parameters(remove_duplicate=False))
        tensors = {**names, **dict(model.named_buffers(remove_duplicate=False))}
        held: dict[str, set[str]] = {}
        quantized: dict[str, tuple[Weight, ...]] = {}
        for part in PARTS:
            graph = exported.components[part].program
            finished = finish(
                graph,
                tensors,
                names,
                names,
                provenance,
                journal,
                optional=optional,
                cpu=cpu or cpu_of(program),
            )
            graph.metadata_props[metadata_keys.BASE] = origin_of(program.base).model_dump_json()
            held[part] = set(finished.stored.values())
            quantized[part] = finished.quantized
            _name_axes(graph)
        _write(exported, model, held, folder)
        write_companions(program.base, folder)
        for part, weights in quantized.items():
            if weights:
                check_kept(folder / f"{part}.onnx", weights)
        source = source_of(program)
        allowed = _allowed(source, data or parity_inputs(program, seed), tolerance)
        onnx = _opened(folder, fast=rounds(source) or not any(quantized.values()))
        exact = None if rounds(source) else tolerance_of(_dtype(model))
        strict = allowed if exact is None else exact
        with stage("export: comparing generated tokens"):
            found = [_tokens(model, onnx, seed, strict, exact is None)]
        # onnxruntime rounds the inputs of quantized products in a default session, which is what users run.
        if exact is not None and any(quantized.values()):
            _tokens(model, _opened(folder, fast=True), seed, allowed, True)
        if slotted:
            write_adapters(slotted.adapters, {name: name for name in slotted.names}, folder)
            found += [
                _tokens(live(p), onnx, seed, strict, exact is None, name)
                for name, p in track(slotted.alone.items(), "export: comparing adapters")
            ]
    files = [file for file in Path(path).rglob("*") if file.is_file()]
    graphs = {part: exported.components[part].program for part in PARTS}
    return GenerationReport(
        path=Path(path),
        size=sum(file.stat().st_size for file in files),
        opset=graphs["decode"].opset_imports[""],
        nodes={part: graph.graph.num_nodes() for part, graph in graphs.items()},
        inputs={
            part: [value.name for value in graph.graph.inputs if value.name not in optional]
            for part, graph in graphs.items()
        },
        seconds=time.perf_counter() - started,
        error=max(each.error for each in found),
        tokens=sum(each.tokens for each in found),
        ties=sum(each.ties for each in found),
        sampled=sum(each.sampled for each in found),
        adapters={name: adapter_file(Path(path), name) for name in (slotted.adapters if slotted else ())},
    )


def _language_model(program: Program) -> Any:
    """The live model of a program. Raises ExportError if it cannot be exported for generation."""
    check_written(program)
    for entry in live_entries(program.journal):
        pass_ = pass_of(entry, program.base.plugins)
        if isinstance(pass_, RewritePass) and not pass_.effect.one_layer:
            raise ExportError(
                f"--generate: {entry.id} changes more than single layers, so it can only be exported as one graph; "
                f"export without --generate, or disable the pass (--without {entry.id})"
            )
    model: Any = live(program)
    can = getattr(model, "can_generate", None)
    if can is None or not can():
        raise ExportError(
            f"--generate: {type(model).__name__} does not generate; load it as a language model "
            f"(--task text-generation)"
        )
    # State-space models such as Mamba take `cache_params` instead of `past_key_values`.
    if "cache_params" in inspect.signature(model.forward).parameters:
        raise ExportError(
            f"--generate: {type(model).__name__} keeps a recurrent state instead of a key-value cache, which is not "
            f"supported; export its graph without --generate"
        )
    if model.config.is_encoder_decoder or model.config.get_text_config() is not model.config:
        raise ExportError(
            f"--generate supports models with a single decoder, but {type(model).__name__} has other parts; export "
            f"its graph without --generate"
        )
    return model


def _translated(program: Program, model: Any, opset: int | None, seed: int) -> Any:
    """Export the model with transformers' exporter, without optimization."""
    require("onnxscript")
    import transformers

    try:
        from transformers.exporters import OnnxConfig, OnnxExporter
    except ImportError:
        raise MissingExtraError("transformers>=5.23", "hf") from None
    config = OnnxConfig(dynamic=True, optimize=False, opset_version=opset or opset_for(program.graph))
    try:
        with quiet(), silenced(transformers), _lowerings(program):
            inputs = {**_prompts(model, 2, 7, seed), **whole_cache(model)}
            exported = OnnxExporter().export_for_generation(model, inputs, config, multi_token_decode=True)
    except Exception as error:
        # The exporter wraps errors several times; only the innermost one names the problem.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(
            f"--generate: {type(model).__name__} cannot be translated: {first_line(cause)}"
        ) from error
    if set(exported.components) != set(PARTS):
        raise ExportError(
            f"--generate: {type(model).__name__} is split into {', '.join(exported.components)}, but only "
            f"{' and '.join(PARTS)} are supported; export its graph without --generate"
        )
    return exported


@contextlib.contextmanager
def _lowerings(program: Program) -> Iterator[None]:
    """Add the ONNX lowerings of surgery and its plugins to transformers' exporter during the block."""
    from transformers.exporters import exporter_onnx

    table = exporter_onnx._ONNX_TRANSLATION_TABLE
    before = dict(table)
    table.update(lowerings(program.base.plugins))
    try:
        yield
    finally:
        table.clear()
        table.update(before)


def _prompts(model: Any, rows: int, length: int, seed: int) -> dict[str, Any]:
    """Random tokens. Every second row is padded on the left, because an all-ones mask would be optimized away."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, : length // 2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _name_axes(model: Any) -> None:
    """Rename the symbolic axes of the trace: batch, sequence, total_sequence and past_sequence."""
    ir = require("onnx_ir")
    known: dict[str, str] = {}
    for value in model.graph.inputs:
        cached = "past_key_values" in value.name
        axes = ("batch", "", "past_sequence", "") if cached else _AXES.get(value.name, ())
        for dim, name in zip(value.shape or (), axes, strict=False):
            if not isinstance(dim, int) and name:
                known.setdefault(str(dim.value), name)
    pattern = re.compile(r"\bs\d+\b")
    for value in [*model.graph.inputs, *model.graph.outputs]:
        shape = [
            dim if isinstance(dim, int) else pattern.sub(lambda m: known.get(m[0], m[0]), str(dim.value))
            for dim in value.shape
        ]
        value.shape = ir.Shape(shape)
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None and not value.is_graph_output():
                # Inner shapes refer to the old symbols, and shape inference can compute them again.
                value.shape = None


def _write(exported: Any, model: Any, held: Mapping[str, set[str]], folder: Path) -> None:
    """Write the graphs with one shared weight file, and the manifest that transformers reads.

    Args:
        exported: result of transformers' exporter.
        model: the live model.
        held: names of the initializers of each graph that store tensors of the program. Initializers of both graphs
            with the same name are the same tensor.
        folder: the directory to write to.
    """
    ir = require("onnx_ir")
    graphs = {part: exported.components[part].program for part in PARTS}
    # Only tensors of the program are shared. Constants of the two graphs can have the same name and different values.
    shared: dict[str, Any] = {}
    for part, graph in graphs.items():
        for name in held[part]:
            value = graph.graph.initializers[name]
            if value.const_value.nbytes > _INLINE:
                shared.setdefault(name, value.const_value)
    try:
        outside = ir.external_data.convert_tensors_to_external([*shared.values()], folder, WEIGHTS)
        stored = dict(zip(shared, outside, strict=True))
        for part, graph in graphs.items():
            for name in held[part] & set(stored):
                graph.graph.initializers[name].const_value = stored[name]
            ir.save(graph, folder / f"{part}.onnx")
    except (OSError, ValueError) as error:
        raise ExportError(f"the graphs cannot be written: {error}") from error
    # The reader of transformers requires a data file next to each graph.
    (folder / "prefill.onnx.data").touch()
    _manifest(exported, model, folder)


def _manifest(exported: Any, model: Any, folder: Path) -> None:
    """Write the manifest and configurations that `ExportedModel.from_pretrained` reads."""
    from transformers.exporters import base

    entries = {
        part: {"file": f"{part}.onnx", "metadata": dataclasses.asdict(exported.components[part].metadata)}
        for part in PARTS
    }
    manifest = {
        "schema_version": base.EXPORT_SCHEMA_VERSION,
        "export_format": str(exported.export_format),
        "components": entries,
    }
    (folder / base.EXPORT_MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
    exported.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


@dataclass(frozen=True)
class TokensReport:
    """Result of comparing generated tokens; the attributes are those of GenerationReport."""

    error: float
    tokens: int
    ties: int
    sampled: int


def check_tokens(model: Any, folder: Path, seed: int) -> TokensReport:
    """Compare greedy and sampled generation of an exported directory with the model.

    Args:
        model: the live model.
        folder: the exported directory.
        seed: seed of the prompts and of sampling.

    Raises:
        ExportError: the logits differ by more than rounding, or a model cannot generate.
    """
    return _tokens(model, _opened(folder, fast=True), seed, tolerance_of(_dtype(model)), False)


def _dtype(model: Any) -> torch.dtype:
    """The dtype in which a model computes. `generate` returns logits in float32 whatever it is."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _allowed(source: ExportSource, sets: Sequence[InputSet], tolerance: float | None) -> float:
    """Largest relative difference of logits where activations are rounded; see surgery.export.rounded_parity."""
    own = own_error(source, sets)
    if tolerance is None:
        tolerance = TOLERANCE if rounds(source) else RUNTIME_TOLERANCE
    return 2 * own + tolerance


def _opened(folder: Path, fast: bool) -> Any:
    """Open the exported directory.

    `fast` enables onnxruntime's optimizations. With quantized weights these also round the activations, which would
    hide errors of the export.
    """
    if fast:
        return open_generator(folder)
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return open_generator(folder, session_options=options)


def _tokens(model: Any, other: Any, seed: int, allowed: float, rounded: bool, *adapters: str) -> TokensReport:
    """Compare the model with an open generator, at a shape other than the traced one.

    Args:
        model: the live model.
        other: the generator.
        seed: seed of the prompts and of sampling.
        allowed: largest difference of the logits, as a fraction of their scale.
        rounded: True compares root mean squares, because single values may move by a whole level.
        adapters: adapters that the generator uses.
    """
    settings = {"num_beams": 1, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}

    def both(prompts: dict[str, Any], tokens: int, **more: Any) -> tuple[Any, Any]:
        outputs = []
        # A fixed number of tokens keeps the two outputs comparable step by step, even if an end token is drawn.
        more |= {"max_new_tokens": tokens, "min_new_tokens": tokens}
        for each in (model, other):
            # The same seed makes both sample the same random numbers.
            torch.manual_seed(seed)
            with other.adapter(*adapters):
                try:
                    outputs.append(each.generate(**prompts, **settings, **more))
                except Exception as error:
                    who = "onnxruntime" if each is other else type(model).__name__
                    raise ExportError(f"--generate: {who} cannot generate: {first_line(error)}") from error
        return outputs[0], outputs[1]

    with quiet(), torch.no_grad():
        prompts = _prompts(model, 3, 11, seed + 1)
        greedy = _compared(*both(prompts, _TOKENS, do_sample=False), allowed, rounded)
        sampled = _compared(
            *both(prompts, _TOKENS, do_sample=True, temperature=0.9, top_p=0.95), allowed, rounded
        )
        error = max(greedy.error, sampled.error)
        # A wrong sliding window shows only if the prompt is longer than the window.
        if (window := sliding_window(model)) > 11:
            if window > _LONGEST:
                raise ExportError(
                    f"--generate: the sliding window of {window} positions is longer than the {_LONGEST} that can be "
                    f"checked; use a configuration with a smaller sliding_window, or without one"
                )
            long = both(_prompts(model, 1, window + 3, seed + 2), 2, do_sample=False)
            error = max(error, _compared(*long, allowed, rounded).error)
    return TokensReport(error, greedy.tokens, greedy.ties + sampled.ties, sampled.tokens)


def _compared(model: Any, onnx: Any, allowed: float, rounded: bool) -> TokensReport:
    """Compare two outputs of `generate` step by step.

    A row is compared up to its first different token. A different token is allowed if the logits agree within rounding:
    two tokens can be tied, or a random draw can fall between them.
    """
    worst, equal = 0.0, 0
    moved, size = 0.0, 1e-30
    first = model.sequences.shape[1] - len(model.logits)
    same = torch.ones(len(model.sequences), dtype=torch.bool)
    # After a row's first different token its inputs differ, so its later logits cannot be compared.
    for step, (a, b) in enumerate(zip(model.logits, onnx.logits, strict=True)):
        if same.any() and rounded:
            moved += float((a[same].double() - b[same].double()).square().sum())
            size += float(a[same].double().square().sum())
            worst = (moved / size) ** 0.5
        elif same.any():
            worst = max(worst, difference(a[same], b[same]) / scale_of(a))
        if worst > allowed:
            raise ExportError(_too_far(step + 1, worst, allowed, rounded))
        same &= model.sequences[:, first + step] == onnx.sequences[:, first + step]
        equal += int(same.sum())
    return TokensReport(worst, equal, int((~same).sum()), equal)


def _too_far(step: int, error: float, allowed: float, rounded: bool) -> str:
    """The message for logits that differ too much."""
    said = f"--generate: in step {step} the logits of onnxruntime differ from the model's by {error:.1e} of their scale"
    if not rounded:
        return f"{said}; rounding explains at most {allowed:.0e}"
    return (
        f"{said}; rounded activations explain at most {allowed:.1e}; quantize with --per-token, leave the most "
        "sensitive layers out (surgery select), or accept it with --tolerance"
    )
