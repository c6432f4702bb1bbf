"""Patterns of several ops: matches on ten architectures, and time against the rewriters of fx and onnxscript.

The timed part is that of match.py, on stacks of one traced layer: find every match and insert the new op. Ours indexes
the graph, tries all alternatives of the pass's patterns, and fills in metadata. The peers match the single form that
the layer has, written for them, and insert the same op without metadata. Weights that a pass computes are not timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from time import process_time
from typing import Any

import torch
from torch import fx

import surgery
from benchmarks.match import AIM, MIDDLE
from benchmarks.models import MissingPeer, require
from benchmarks.stack import conv_norm, fx_stack, layers_for, onnx_stack, written_out
from benchmarks.timing import Row, Variant, compare, measure
from surgery.capture import hf, hf_config, trace
from surgery.common.plugins import make_plugin_manager
from surgery.engine import replay
from surgery.engine.base import Base
from surgery.engine.contract.pattern import PatternPass
from surgery.graph.fake import MetaCache
from surgery.graph.graphs import copy_graph
from surgery.graph.view import View

aten = torch.ops.aten

_TEXT = {"vocab_size": 99, "max_position_embeddings": 64}
_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_SEQ2SEQ = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
_GROUPED = {**_WIDTHS, **_TEXT, "num_key_value_heads": 2, "head_dim": 8}

# Task and settings of tiny random models with two blocks; models of timm ("timm:") keep their size unless set.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("fill-mask", {**_WIDTHS, **_TEXT}),
    "albert": ("fill-mask", {**_WIDTHS, **_TEXT, "embedding_size": 16}),
    "gpt2": ("text-generation", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 99}),
    "llama": ("text-generation", _GROUPED),
    "gemma": ("text-generation", _GROUPED),
    "gemma2": ("text-generation", _GROUPED),
    "mt5": ("text2text-generation", {**_SEQ2SEQ, "decoder_start_token_id": 0}),
    "vit": ("image-classification", {**_WIDTHS, "image_size": 32, "patch_size": 8}),
    "timm:resnet18": ("", {"num_classes": 10}),
    "timm:vit_tiny_patch16_224": ("", {"img_size": 64, "num_classes": 10, "depth": 2}),
}  # fmt: skip
PASSES: tuple[type[PatternPass], ...] = (
    surgery.FuseQkv, surgery.SplitQkv, surgery.FoldBatchnorm, surgery.FuseRmsnorm, surgery.FuseGelu,
    surgery.FuseAttention,
)  # fmt: skip


def run(quick: bool) -> Iterator[Row]:
    yield from _counts(list(ARCHITECTURES)[:2] if quick else list(ARCHITECTURES))
    yield from _times(1_300 if quick else MIDDLE, rounds=2 if quick else 3)


# -- number of matches


def _counts(names: Sequence[str]) -> Iterator[Row]:
    require("transformers", "the count of matches")
    for name in names:
        try:
            program = _program(name)
        except MissingPeer:
            yield Row("patterns", f"{name}: left out", note="timm is not installed")
            continue
        found, seconds, misses = {}, 0.0, 0
        for kind in PASSES:
            pass_ = kind()
            view = View(program.graph, program.names, program.base.plugins.weight_ops)
            _ = view.roles
            begun = process_time()
            found[pass_.name] = len(pass_.candidates(view))
            seconds += process_time() - begun
            misses += len(pass_.misses(view))
        said = ", ".join(f"{name} {count}" for name, count in found.items() if count) or "none"
        what = f"{name}: {len(program.graph.nodes)} nodes, all patterns"
        yield Row("patterns", what, ours=seconds, note=f"{said}; {misses} near misses")


def _program(name: str) -> surgery.Program:
    torch.manual_seed(0)
    task, settings = ARCHITECTURES[name]
    if name.startswith("timm:"):
        require("timm", "the count of matches")
        return surgery.load(name, model_kwargs=settings, random=True)
    import transformers

    config = transformers.AutoConfig.for_model(name, **settings)
    auto = next(
        c for c in hf_config.auto_classes(task) if type(config) in getattr(transformers, c)._model_mapping
    )
    model = getattr(transformers, auto).from_config(config, attn_implementation="eager").eval()
    loaded = hf.from_model(model, task)
    return surgery.Program(Base(loaded, trace(loaded), make_plugin_manager(entry_points=False)))


# -- time


@dataclass(frozen=True)
class Task:
    """One pattern, for all libraries.

    Attributes:
        pass_: Pass of surgery.
        layer: Function that returns a program of one layer with one match.
        fx_pattern: Pattern for torch.fx.
        fx_new: Replacement for torch.fx.
        onnx_pattern: Pattern for onnxscript.
        onnx_new: Replacement for onnxscript.
        without: Peers that are left out: name -> reason.
    """

    pass_: PatternPass
    layer: Callable[[], surgery.Program]
    fx_pattern: Callable[..., Any]
    fx_new: Callable[..., Any]
    onnx_pattern: Callable[..., Any]
    onnx_new: Callable[..., Any]
    without: dict[str, str] = field(default_factory=dict)


def _times(nodes: int, rounds: int) -> Iterator[Row]:
    require("onnxscript", "the comparison with onnxscript's rewriter")
    for task in tasks():
        one = task.layer()
        layers = layers_for(nodes, one)
        program = fx_stack(layers, one)
        adapted = program.apply(task.pass_, freeze_base=False, verify=False)
        assert len(adapted.journal.entries[-1].sites) == layers
        count = len(program.graph.nodes)
        what = f"{count:,} nodes: {task.pass_.name}"
        variants = {
            "ours": _ours(program, adapted, task.pass_),
            "fx.replace_pattern": _fx(program, task, layers),
            "onnxscript": _onnxscript(task, layers, one),
        }
        times = measure({n: v for n, v in variants.items() if n not in task.without}, rounds)
        for peer in list(variants)[1:]:
            if peer in task.without:
                yield Row(
                    "patterns", what, peer, times.median("ours"), note=f"peer left out: {task.without[peer]}"
                )
            else:
                yield compare(
                    "patterns",
                    what,
                    times,
                    "ours",
                    peer,
                    AIM if count > 5_000 else None,
                    f"{layers:,} places",
                )


def _ours(program: surgery.Program, adapted: surgery.Program, pass_: PatternPass) -> Variant:
    (entry,) = adapted.journal
    base = program.base

    def rewrite(graph: fx.Graph) -> None:
        view = View(graph, base.names, base.plugins.weight_ops)
        sites = replay.find_sites(entry, replay.places_of(pass_, view))
        replay.rewrite_entry(entry, pass_, graph, MetaCache(graph), sites, adapted.tensors, view)

    return Variant(rewrite, lambda: copy_graph(program.graph))


def _fx(program: surgery.Program, task: Task, expected: int) -> Variant:
    source = program.base.captured.graph_module

    def prepare() -> fx.GraphModule:
        module = fx.GraphModule(source, copy_graph(source.graph))
        module.__dict__["recompile"] = lambda: None
        return module

    def rewrite(module: fx.GraphModule) -> None:
        found = fx.replace_pattern(module, task.fx_pattern, task.fx_new)
        assert len(found) == expected, f"{len(found)} of {expected}"

    return Variant(rewrite, prepare)


def _onnxscript(task: Task, layers: int, one: surgery.Program) -> Variant:
    from onnxscript.rewriter import RewriteRule, RewriteRuleSet

    rules = RewriteRuleSet([RewriteRule(task.onnx_pattern, task.onnx_new)])

    def rewrite(model: Any) -> None:
        found = rules.apply_to_model(model)
        assert found == layers, f"{found} of {layers}"

    return Variant(rewrite, lambda: onnx_stack(layers, one))


@cache
def tasks() -> list[Task]:
    root = math.sqrt(2 / math.pi)

    def gelu(x: Any) -> Any:
        half = aten.mul.Tensor(x, 0.5)
        cube = aten.mul.Tensor(aten.pow.Tensor_Scalar(x, 3.0), 0.044715)
        tanh = aten.tanh.default(aten.mul.Tensor(aten.add.Tensor(x, cube), root))
        return aten.mul.Tensor(half, aten.add.Tensor(tanh, 1.0))

    def onnx_gelu(op: Any, x: Any) -> Any:
        cube = op.Mul(op.Pow(x, 3.0), 0.044715)
        return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(op.Mul(op.Add(x, cube), root)), 1.0))

    def norm(x: Any, w: Any) -> Any:
        cast = aten.to.dtype(x, torch.float32)
        mean = aten.mean.dim(aten.pow.Tensor_Scalar(cast, 2), [-1], True)
        root = aten.rsqrt.default(aten.add.Tensor(mean, 1e-6))
        return aten.mul.Tensor(w, aten.to.dtype(aten.mul.Tensor(cast, root), torch.float32))

    def onnx_norm(op: Any, x: Any, w: Any, axes: Any) -> Any:
        mean = op.ReduceMean(op.Pow(x, 2), axes, _allow_other_attributes=True)
        return op.Mul(w, op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, 1e-6)))))

    def attention(q: Any, k: Any, v: Any) -> Any:
        scores = aten.mul.Tensor(aten.matmul.default(q, aten.transpose.int(k, 2, 3)), 0.25)
        return aten.matmul.default(aten.dropout.default(aten.softmax.int(scores, -1), 0.0, False), v)

    def onnx_attention(op: Any, q: Any, k: Any, v: Any) -> Any:
        scores = op.Mul(op.MatMul(q, op.Transpose(k, _allow_other_attributes=True)), 0.25)
        return op.MatMul(op.Softmax(scores, _allow_other_attributes=True), v)

    def qkv(x: Any, wq: Any, bq: Any, wk: Any, bk: Any, wv: Any, bv: Any) -> Any:
        return tuple(aten.linear.default(x, w, b) for w, b in ((wq, bq), (wk, bk), (wv, bv)))

    def fused(x: Any, wq: Any, bq: Any, wk: Any, bk: Any, wv: Any, bv: Any) -> Any:
        both = aten.linear.default(x, aten.cat.default([wq, wk, wv]), aten.cat.default([bq, bk, bv]))
        return tuple(aten.slice.Tensor(both, -1, 32 * i, 32 * i + 32) for i in range(3))

    def onnx_qkv(op: Any, x: Any, wq: Any, bq: Any, wk: Any, bk: Any, wv: Any, bv: Any) -> Any:
        return tuple(op.Add(op.MatMul(x, w), b) for w, b in ((wq, bq), (wk, bk), (wv, bv)))

    def onnx_fused(op: Any, x: Any, wq: Any, bq: Any, wk: Any, bk: Any, wv: Any, bv: Any) -> Any:
        both = op.MatMul(x, op.Concat(wq, wk, wv, axis=1))
        return op.Split(op.Sum(both, op.Concat(bq, bk, bv, axis=0)), num_outputs=3, axis=-1, _outputs=3)

    def batch_norm(x: Any, w: Any, b: Any, s: Any, t: Any, m: Any, v: Any) -> Any:
        made = aten.conv2d.default(x, w, b, [1, 1], [1, 1])
        return aten.batch_norm.default(made, s, t, m, v, False, 0.1, 1e-5, False)

    def onnx_batch_norm(op: Any, x: Any, w: Any, b: Any, s: Any, t: Any, m: Any, v: Any) -> Any:
        made = op.Conv(x, w, b, _allow_other_attributes=True)
        return op.BatchNormalization(made, s, t, m, v, _allow_other_attributes=True)

    return [
        Task(
            surgery.FuseGelu(), written_out,
            gelu, lambda x: aten.gelu.default(x, approximate="tanh"),
            onnx_gelu, lambda op, x: op.Gelu(x, approximate="tanh"),
        ),
        Task(
            surgery.FuseRmsnorm(), written_out,
            norm, lambda x, w: aten.rms_norm.default(x, [32], w, 1e-6),
            onnx_norm, lambda op, x, w, axes: op.RMSNormalization(x, w, epsilon=1e-6),
        ),
        Task(
            surgery.FuseAttention(), written_out,
            attention, lambda q, k, v: aten.scaled_dot_product_attention.default(q, k, v),
            onnx_attention, lambda op, q, k, v: op.Attention(q, k, v),
        ),
        Task(
            surgery.FuseQkv(), written_out, qkv, fused, onnx_qkv, onnx_fused,
            {"onnxscript": "it finds six matches per layer, because its pattern cannot tell the three products apart"},
        ),
        Task(
            surgery.FoldBatchnorm(), conv_norm,
            batch_norm, lambda x, w, b, s, t, m, v: aten.conv2d.default(x, w, t, [1, 1], [1, 1]),
            onnx_batch_norm, lambda op, x, w, b, s, t, m, v: op.Conv(x, w, t, pads=[1, 1, 1, 1]),
            {"onnxscript": "torch.onnx folds it in the model that onnxscript gets"},
        ),
    ]  # fmt: skip
