"""Graphs of any size with the mix of nodes of a transformer: one traced layer, repeated.

The layer (transformers' BertLayer, width 32, sdpa) is captured by torch.export with dynamic batch and length. It has 41
nodes: 6 are linears and 16 are parameters of linears and norms. `written_out` is a layer with RMSNorm, attention and
GELU in elementary ops. Each copy reads the output of the one before. Every copy has its own parameters and module
paths, and the nodes keep the metadata of the capture. The ONNX stack repeats the same layer as torch.onnx.export writes
it.
"""

from __future__ import annotations

from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

import surgery
from surgery.capture import Captured, LoadedModel
from surgery.common.plugins import make_plugin_manager
from surgery.engine.base import Base

WIDTH = 32


class Block(nn.Module):
    def __init__(self, attention: str = "sdpa", activation: str = "gelu", rms: bool = False) -> None:
        super().__init__()
        from transformers import BertConfig
        from transformers.models.bert.modeling_bert import BertLayer
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        config = BertConfig(hidden_size=WIDTH, num_attention_heads=2, intermediate_size=2 * WIDTH)
        config.hidden_act = activation
        config._attn_implementation = attention
        self.norm = LlamaRMSNorm(WIDTH) if rms else nn.Identity()
        self.layer = BertLayer(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(self.norm(x))
        return out[0] if isinstance(out, tuple) else out


def _captured(module: nn.Module) -> surgery.Program:
    return surgery.capture(module, (torch.randn(2, 5, WIDTH),), {"x": {0: "batch", 1: "seq"}})


@cache
def block() -> surgery.Program:
    torch.manual_seed(0)
    return _captured(Block())


@cache
def written_out() -> surgery.Program:
    torch.manual_seed(0)
    return _captured(Block("eager", "gelu_new", rms=True))


@cache
def conv_norm() -> surgery.Program:
    """A convolution, a batch norm and a ReLU."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    return surgery.capture(layer, (torch.randn(2, 4, 6, 6),), {"input": {0: "batch"}})


def layers_for(nodes: int, one: surgery.Program | None = None) -> int:
    """Number of layers for a stack of about this many nodes."""
    return round(nodes / (len((one or block()).graph.nodes) - 2))


def fx_stack(layers: int, one: surgery.Program | None = None) -> surgery.Program:
    """A program of this many layers, as if it had been captured."""
    one = one or block()
    source = one.base.captured.graph_module
    root, graph = nn.Module(), fx.Graph()
    root.layers = nn.ModuleList(nn.Module() for _ in range(layers))
    nodes = list(source.graph.nodes)
    entry = next(node for node in nodes if node.op == "placeholder")
    value = graph.node_copy(entry)
    last_attribute = value
    for number, holder in enumerate(root.layers):
        mapping = {entry: value}
        for node in nodes:
            if node.op == "get_attr":
                _register(holder, node.target, attrgetter(node.target)(source))
                with graph.inserting_after(last_attribute):
                    copied = last_attribute = graph.get_attr(f"layers.{number}.{node.target}")
                copied.meta = dict(node.meta)
            elif node.op == "call_function":
                copied = graph.node_copy(node, mapping.__getitem__)
                stack = node.meta.get("nn_module_stack", {})
                copied.meta["nn_module_stack"] = {
                    f"{key}.{number}": (f"layers.{number}.{path}", kind)
                    for key, (path, kind) in stack.items()
                }
            else:
                continue
            mapping[node] = copied
        end = next(node for node in reversed(nodes) if node.op == "output")
        value = mapping[end.args[0][0]]
    graph.output((value,))
    graph._codegen = source.graph._codegen
    module = fx.GraphModule(root, graph)
    for spec in ("_in_spec", "_out_spec"):
        setattr(module, spec, getattr(source, spec))
    captured = Captured(module, one.base.captured.args, {}, one.base.captured.dynamic_shapes, False)
    return surgery.Program(Base(LoadedModel(module, captured.args), captured, make_plugin_manager()))


def _register(holder: nn.Module, path: str, tensor: torch.Tensor) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        if not hasattr(holder, part):
            holder.add_module(part, nn.Module())
        holder = getattr(holder, part)
    if isinstance(tensor, nn.Parameter):
        holder.register_parameter(leaf, nn.Parameter(tensor.detach().clone(), requires_grad=False))
    else:
        holder.register_buffer(leaf, tensor.detach().clone())


@cache
def _onnx_block(one: surgery.Program) -> Any:
    exported = torch.onnx.export(
        one.base.loaded.module,
        one.example_inputs[0],
        dynamo=True,
        verbose=False,
        dynamic_shapes={
            name: {axis: dim.__name__ for axis, dim in dims.items()}
            for name, dims in one.captured.dynamic_shapes.items()
        },
    )
    return exported.model


def onnx_stack(layers: int, one: surgery.Program | None = None) -> Any:
    """An onnx_ir model of this many layers."""
    import onnx_ir as ir

    one = one or block()
    source = _onnx_block(one).graph
    (entry,), (end,) = source.inputs, source.outputs
    first = ir.Value(name="x", type=entry.type, shape=entry.shape)
    value, nodes, initializers = first, [], []
    for number in range(layers):
        mapping: dict[Any, Any] = {None: None, entry: value}
        for name, old in source.initializers.items():
            fresh = ir.Value(name=f"layers.{number}.{name}", type=old.type, shape=old.shape)
            fresh.const_value = old.const_value
            mapping[old] = fresh
            initializers.append(fresh)
        for node in source:
            copied = ir.Node(
                node.domain,
                node.op_type,
                [mapping[v] for v in node.inputs],
                list(node.attributes.values()),
                num_outputs=len(node.outputs),
                name=f"{node.name}_{number}",
            )
            for old, fresh in zip(node.outputs, copied.outputs, strict=True):
                fresh.name, fresh.type, fresh.shape = f"{old.name}_{number}", old.type, old.shape
                mapping[old] = fresh
            nodes.append(copied)
        value = mapping[end]
    graph = ir.Graph(
        [first],
        [value],
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": source.opset_imports[""]},
        name="stack",
    )
    return ir.Model(graph, ir_version=_onnx_block(one).ir_version)
