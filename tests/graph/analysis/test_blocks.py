"""Residual branches, rows of blocks and depth, on architectures whose configuration gives their structure."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import surgery
from surgery.capture import LoadedModel, from_module, trace
from surgery.graph.analysis.blocks import Block, Branch, find_blocks, find_branches
from surgery.graph.analysis.dataflow import trace_origins
from surgery.graph.analysis.depth import depth_of
from surgery.graph.analysis.roles import find_roles
from surgery.graph.marks import is_aux
from surgery.graph.ops import BUILTIN_WEIGHT_OPS, NORM, Call, find_calls
from tests.graph.analysis.test_roles import Net, deep
from tests.shared.counting import lines_run
from tests.zoo import architectures, zoo

pytest.importorskip("transformers")

LETTER = {"attention": "A", "cross-attention": "X", "feed-forward": "F", "conv": "C", "other": "O"}


@dataclass
class Found:
    gm: fx.GraphModule
    calls: list[Call]
    branches: list[Branch]
    rows: list[tuple[Block, ...]]
    depth: dict[str, int]

    @property
    def letters(self) -> str:
        return "".join(LETTER[branch.kind] for branch in self.branches)

    @property
    def row_letters(self) -> str:
        """Rows as text: `AF AF | AXF AXF`; an exclamation mark follows a block that cannot be repeated."""
        return " | ".join(
            " ".join(
                "".join(LETTER[branch.kind] for branch in block.branches) + "!" * (not block.repeatable)
                for block in row
            )
            for row in self.rows
        )

    def parameter(self, node: fx.Node) -> str:
        call = next(call for call in self.calls if call.node is node)
        return str(call.weight.target) if call.weight is not None else call.computed_from[0]


def analyse(gm: fx.GraphModule, names: set[str] | None = None) -> Found:
    names = names or {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    nodes = [node for node in gm.graph.nodes if not is_aux(node)]
    calls = find_calls(nodes, BUILTIN_WEIGHT_OPS, lambda node: node.target in names)
    flow = trace_origins(gm.graph.nodes, calls)
    branches = find_branches(gm.graph, calls, flow, find_roles(gm.graph, calls))
    rows = find_blocks(gm.graph, calls, flow, branches)
    return Found(gm, calls, branches, rows, depth_of(gm.graph, calls, rows))


def capture(module: nn.Module, *inputs: Tensor, training: bool = False) -> Found:
    loaded = from_module(module, inputs, {}, copy_module=False)
    return analyse(trace(loaded, training=training, check=False).graph_module)


@cache
def built(name: str) -> LoadedModel:
    return zoo.build(name)


@cache
def found(name: str, training: bool = False) -> Found:
    return analyse(trace(built(name), training=training, check=False).graph_module)


def configured(monkeypatch: pytest.MonkeyPatch, name: str, **settings: Any) -> LoadedModel:
    """An architecture of the zoo with other settings."""
    arch = architectures.ARCHITECTURES[name]
    changed = replace(arch, config={**arch.config, **settings})
    monkeypatch.setitem(architectures.ARCHITECTURES, name, changed)
    return zoo.build(name)


# By architecture: all branches in graph order, and the rows. Two layers each, so two blocks of attention and
# feed-forward, if nothing else is said.
EXPECTED = {
    "bert": ("AFAF", "AF AF"),
    "albert": ("AFAF", "AF AF"),
    "deberta-v2": ("AFAF", "AF AF"),
    "mpnet": ("AFAF", "AF AF"),
    # A layer is a branch of its own around its bottleneck, with four feed-forwards in it.
    "mobilebert": ("AFFFFOAFFFFO", "AFFFFO AFFFFO"),
    # Its Fourier transform has no weights.
    "fnet": ("FF", "F F"),
    "gpt2": ("AFAF", "AF AF"),
    "llama": ("AFAF", "AF AF"),
    "gemma2": ("AFAF", "AF AF"),
    "olmo2": ("AFAF", "AF AF"),
    "mixtral": ("AFAF", "AF AF"),
    "qwen2_moe": ("AFAF", "AF AF"),
    # x + mlp(x) + attention(x)
    "gpt_neox": ("FAFA", "FA FA"),
    "falcon": ("FAFA", "FA FA"),
    "cohere": ("AFAF", "AF AF"),
    "t5": ("AFAFAXFAXF", "AF AF | AXF AXF"),
    "whisper": ("AFAFAXFAXF", "AF AF | AXF AXF"),
    # x + convolution(x) gives the positions.
    "wav2vec2": ("CAFAF", "AF AF"),
    "clip": ("AFAFAFAF", "AF AF | AF AF"),
    "vit": ("AFAF", "AF AF"),
    # Two stages of one block.
    "swin": ("AFAF", "AF | AF"),
    "convnext": ("CCCC", "C | C | C | C"),
    # Two blocks of patches, then two in which a class token attends to them.
    "timm:cait_xxs24_224": ("AFAFAFAF", "AF AF | AF AF"),
    # Four stages of two; strides are in the first block of the last three.
    "timm:resnet18": ("CCCCCCCC", "C C C! C C! C C! C"),
    # Eight blocks that mix tokens, then features.
    "timm:mixer_s32_224": ("OFOFOFOFOFOFOFOF", "OF OF OF OF OF OF OF OF"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_branches_and_rows(name: str) -> None:
    result = found(name)
    assert (result.letters, result.row_letters) == EXPECTED[name]
    for branch in result.branches:
        holds_branch(result, branch)
    for row in result.rows:
        for block, following in pairwise(row):
            assert block.output is following.input
        for block in row:
            holds_block(result, block)
    read = {str(n.target) for n in result.gm.graph.nodes if n.op == "get_attr" and n.users}
    assert set(result.depth) == read


def holds_branch(result: Found, branch: Branch) -> None:
    order = {node: i for i, node in enumerate(result.gm.graph.nodes)}
    kinds = {call.node: call.kind for call in result.calls}
    assert branch.end in branch.add.all_input_nodes
    assert branch.skip in branch.join.all_input_nodes
    assert branch.last in branch.ops
    assert kinds[branch.last] != NORM
    assert (
        order[branch.start]
        <= order[branch.inner]
        < order[branch.last]
        <= order[branch.end]
        < order[branch.add]
    )
    assert branch.inner.meta["val"].shape == branch.start.meta["val"].shape
    assert list(branch.ops) == sorted(branch.ops, key=order.__getitem__)


def holds_block(result: Found, block: Block) -> None:
    """Check that a block has exactly the nodes between its input and output."""
    assert block.output in block.nodes
    assert {call.node for call in block.calls} <= set(block.nodes)
    rests: set[fx.Node] = {block.input}
    for node in result.gm.graph.nodes:
        if not rests.isdisjoint(node.all_input_nodes):
            rests.add(node)
    for node in block.nodes:
        outside = [n for n in node.all_input_nodes if n in rests and n not in block.nodes]
        assert all(n is block.input for n in outside)
    for branch in block.branches:
        assert {branch.join, branch.add, branch.end, *branch.ops} <= set(block.nodes)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "wav2vec2", "timm:resnet18", "timm:cait_xxs24_224"])
def test_a_train_capture_has_the_same(name: str) -> None:
    result, evaluated = found(name, training=True), found(name)
    assert (result.letters, result.row_letters) == EXPECTED[name]
    shared = evaluated.depth.keys() & result.depth.keys()
    assert {n: result.depth[n] for n in shared} == {n: evaluated.depth[n] for n in shared}


def test_drop_path_and_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = configured(monkeypatch, "swin", depths=[2, 3], drop_path_rate=0.2)
    for training in (False, True):
        result = analyse(trace(loaded, training=training, check=False).graph_module)
        assert result.row_letters == "AF AF | AF AF AF"
        merging = {n: d for n, d in result.depth.items() if "downsample" in n}
        assert set(merging.values()) == {3}
        table = "swin.encoder.layers.1.blocks.2.attention.relative_position_bias.relative_position_bias_table"
        assert result.depth[table] == 5


# Depth by pattern of the parameter's name; the first that matches counts.
DEPTHS = {
    "bert": {r"embeddings": 0, r"layer\.0\.": 1, r"layer\.1\.": 2, r"^cls": 3},
    "albert": {r"embedding": 0, r"layer_groups": 1, r"predictions": 3},
    "llama": {r"embed": 0, r"inv_freq": 1, r"layers\.0\.": 1, r"layers\.1\.": 2, r"model\.norm|lm_head": 3},
    "t5": {
        r"embed_tokens": 0,
        r"encoder\.block\.0": 1,
        r"encoder\.block\.1": 2,
        r"encoder\.final|decoder\.block\.0": 3,
        r"decoder\.block\.1": 4,
        r"decoder\.final|lm_head": 5,
    },
    "clip": {
        r"embed|pre_layrnorm": 0,
        r"vision_model.*layers\.0": 1,
        r"vision_model.*layers\.1": 2,
        r"text_model.*layers\.0": 3,
        r"text_model.*layers\.1": 4,
        r"post_layernorm|final_layer|projection|logit": 5,
    },
    "wav2vec2": {r"feature|pos_conv|encoder\.layer_norm": 0, r"layers\.0": 1, r"layers\.1": 2, r"lm_head": 3},
    "timm:resnet18": {
        r"^conv1|^bn1": 0,
        **{rf"layer{1 + i // 2}\.{i % 2}": i + 1 for i in range(8)},
        r"^fc": 9,
    },
}


@pytest.mark.parametrize("name", DEPTHS)
def test_depth(name: str) -> None:
    for parameter, depth in found(name).depth.items():
        expected = next((d for pattern, d in DEPTHS[name].items() if re.search(pattern, parameter)), None)
        assert depth == expected, parameter


def test_last_weight_and_inner_value() -> None:
    last = {
        "bert": r"attention\.output\.dense|layer\.\d\.output\.dense",
        "mixtral": r"o_proj|experts\.down_proj",
        "qwen2_moe": r"o_proj|experts\.down_proj",
        "t5": r"\.o\.weight|\.wo\.weight",
        "timm:resnet18": r"conv2",
        "convnext": r"pwconv2",
        "gpt_neox": r"attention\.dense|dense_4h_to_h",
    }
    for name, pattern in last.items():
        result = found(name)
        assert all(re.search(pattern, result.parameter(branch.last)) for branch in result.branches), name
    for name in ("llama", "t5", "gpt_neox", "vit", "gemma2"):
        for branch in found(name).branches:
            assert branch.inner is not branch.start  # a norm comes first
    for name in ("bert", "olmo2", "timm:resnet18"):
        assert all(branch.inner is branch.start for branch in found(name).branches)
    llama = found("llama")
    read = {call.node: call.x for call in llama.calls}
    for branch in llama.branches:
        assert read[branch.ops[0]] is branch.inner
    assert all(b.start is b.skip for name in ("bert", "llama", "t5", "swin") for b in found(name).branches)


def run(gm: fx.GraphModule, loaded: LoadedModel) -> Tensor:
    with torch.no_grad():
        output = gm(*loaded.args, **loaded.kwargs)
    return output["logits"] if isinstance(output, dict) else output[0]


@pytest.mark.parametrize("name", ["llama", "bert", "gpt_neox"])
def test_a_block_can_be_left_out_and_repeated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = configured(monkeypatch, name, num_hidden_layers=3)
    result = analyse(trace(loaded, check=False).graph_module)
    (row,) = result.rows
    assert len(row) == 3
    place = next(n for n, m in loaded.module.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
    layers = list(loaded.module.get_submodule(place).children())

    def eager(chosen: list[nn.Module]) -> Tensor:
        module = loaded.module
        parent, _, last = place.rpartition(".")
        holder: Any = module.get_submodule(parent)
        kept = getattr(holder, last)
        holder.config.num_hidden_layers = len(chosen)
        setattr(holder, last, nn.ModuleList(chosen))
        try:
            with torch.no_grad():
                return module(*loaded.args, **loaded.kwargs).logits
        finally:
            setattr(holder, last, kept)

    shortened = copy.deepcopy(result.gm)
    nodes = {node.name: node for node in shortened.graph.nodes}
    nodes[row[1].output.name].replace_all_uses_with(nodes[row[1].input.name])
    shortened.graph.eliminate_dead_code()
    shortened.recompile()
    torch.testing.assert_close(run(shortened, loaded), eager([layers[0], layers[2]]))

    assert row[1].repeatable
    graph = result.gm.graph
    twin: dict[fx.Node, fx.Node] = {row[1].input: row[1].output}
    users = list(row[1].output.users)
    with graph.inserting_before(min(users, key=list(graph.nodes).index)):
        for node in row[1].nodes:
            twin[node] = graph.node_copy(node, lambda n: twin.get(n, n))
    for user in users:
        user.replace_input_with(row[1].output, twin[row[1].output])
    graph.lint()
    result.gm.recompile()
    torch.testing.assert_close(run(result.gm, loaded), eager([layers[0], layers[1], layers[1], layers[2]]))


class Hand(nn.Module):
    """Residual adds as one may write them: in place, with alpha, the skip second, cast, scaled, inner skips."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.maps = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.gamma = nn.Parameter(torch.ones(8))
        self.local = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.a, self.b = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def attend(self, x: Tensor, i: int) -> Tensor:
        # A low-rank update of the values, and positions from a convolution of them: no branches of the stream.
        v = self.maps[i](x) + self.b(self.a(x))
        v = v + self.local(v.transpose(1, 2)).transpose(1, 2)
        return functional.scaled_dot_product_attention(self.maps[i + 1](x), x, v)

    def feed(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x), approximate="tanh"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x, 0).add_(x)
        x = torch.add(x, self.feed(x), alpha=2)
        x = (self.gamma * self.maps[2](self.attend(x, 0)) + x.double()).float()
        return x.mul(0.5) + functional.dropout(self.feed(x), 0.1, self.training)


def test_adds_in_place_scaled_cast_and_turned_round() -> None:
    for training in (False, True):
        result = capture(Hand(), torch.randn(2, 5, 8), training=training)
        assert result.letters == "AFAF"
        assert result.row_letters == "AF AF"


class Group(nn.Module):
    """Blocks with a skip over all of them, as in SwinIR, twice; no block inside repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.maps = nn.ModuleList(nn.Linear(8, 8) for _ in range(10))

    def branch(self, x: Tensor, i: int) -> Tensor:
        return x + self.maps[i + 1](self.maps[i](x).relu())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i in (0, 5):
            x = x + self.maps[i + 4](self.branch(self.branch(x, i), i + 2))
        return x


def test_a_skip_over_branches_is_a_block_around_them() -> None:
    result = capture(Group(), torch.randn(2, 8))
    assert result.letters == "FFOFFO"
    assert result.row_letters == "FFO FFO"
    outer = result.branches[2]
    assert outer.start is outer.skip is result.branches[0].start
    assert [result.parameter(op) for op in outer.ops] == ["maps.4.weight"]


def test_no_residual_adds_no_blocks() -> None:
    result = capture(Net().eval(), torch.randn(2, 1, 8, 8))
    assert (result.branches, result.rows) == ([], [])
    assert set(result.depth.values()) == {0}


def test_adapters_change_nothing(minilm: surgery.Program) -> None:
    names = set(minilm.base.names)
    plain = analyse(minilm.graph_module, names)
    assert plain.row_letters == "AF AF AF AF AF AF"
    adapted = analyse(minilm.apply(surgery.Lora(target="all-linear", rank=2)).graph_module, names)
    assert (adapted.letters, adapted.row_letters) == (plain.letters, plain.row_letters)
    assert plain.depth.items() <= adapted.depth.items()


def test_linear_in_the_number_of_nodes() -> None:
    def work(layers: int) -> int:
        graph, calls = deep(layers)
        flow, roles = trace_origins(graph.nodes, calls), find_roles(graph, calls)

        def find() -> None:
            branches = find_branches(graph, calls, flow, roles)
            rows = find_blocks(graph, calls, flow, branches)
            depth_of(graph, calls, rows)
            assert len(branches) == 2 * layers
            assert [len(row) for row in rows] == [layers]

        return lines_run(find)

    # Eight times the nodes: 8 where the work is linear, 64 where it is quadratic; a tenth for what is done once.
    assert work(160) < 8.8 * work(20)
