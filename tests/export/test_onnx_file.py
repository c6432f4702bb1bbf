from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import fx, nn

from surgery.common.errors import ExportError, MissingExtraError
from surgery.export import ExportSource, OnnxModel, export_onnx, journal_of, names_survive, provenance_of
from tests.shared.exported import add_dora, add_lora, capture, merge_lora, text_inputs

Make = Callable[[], ExportSource]


def fresh(vocab: int, seed: int = 3) -> tuple[tuple[()], dict[str, torch.Tensor]]:
    return (), text_inputs(vocab, batch=3, seq=11, seed=seed)


def test_minilm_base_adapted_and_merged(minilm: Make, tmp_path: Path) -> None:
    base, adapted, merged = minilm(), minilm(), minilm()
    provenance = add_lora(adapted)
    merge_lora(adapted, provenance, into=merged.graph_module)
    plain = export_onnx(base, tmp_path / "base.onnx", parity=[fresh(1000)])
    kept = export_onnx(
        adapted,
        tmp_path / "lora.onnx",
        provenance=provenance,
        journal_json=json.dumps([{"pass": "lora", "rank": 3}]),
        parity=[fresh(1000)],
    )
    folded = export_onnx(merged, tmp_path / "merged.onnx", parity=[fresh(1000)])

    assert folded.nodes == plain.nodes < plain.traced_nodes / 2
    assert len(provenance) == 74
    assert {name: kept.stored[name] for name in provenance} == {name: name for name in provenance}
    for report in (plain, kept, folded):
        assert report.parity is not None
        assert report.parity.error < 1e-5
        assert report.parity.optimised_error < 1e-5
        assert report.inputs == {"input_ids": ("batch", "seq"), "attention_mask": ("batch", "seq")}
        assert report.outputs == {
            "last_hidden_state": ("batch", "seq", 384),
            "pooler_output": ("batch", 384),
        }
    # The adapted program and its merge are one function, in two files.
    inputs = text_inputs(1000, batch=4, seq=5, seed=9)
    a, b = (OnnxModel(report.path).run(inputs)["last_hidden_state"] for report in (kept, folded))
    torch.testing.assert_close(a, b, atol=2e-5, rtol=0)

    site = "encoder.layer.3.attention.self.query.weight"
    tensor = provenance_of(kept.path)[f"{site.removesuffix('.weight')}.lora_B"]
    assert (tensor.pass_name, tensor.instance, tensor.site) == ("lora", "default", site)
    ops = {node.name: node.op for node in OnnxModel(kept.path).nodes}
    assert sorted(ops[name] for name in tensor.nodes) == ["Add", "MatMul", "MatMul", "Transpose", "Transpose"]
    assert journal_of(kept.path) == [{"pass": "lora", "rank": 3}]
    assert journal_of(plain.path) is None
    parameters = {name for name, _ in base.graph_module.named_parameters()}
    assert parameters <= names_survive(plain.path).keys()
    assert names_survive(plain.path)[site] == f"{site}.T"


def test_dora_stays_a_formula(small_bert: ExportSource, tmp_path: Path) -> None:
    source = small_bert
    provenance = add_dora(source)
    report = export_onnx(source, tmp_path / "dora.onnx", provenance=provenance, parity=[fresh(1000)])
    stored = provenance_of(report.path)
    assert all(stored[name].pass_name == "dora" for name in provenance)
    base = next(iter(provenance)).rpartition(".")[0] + ".weight"
    assert names_survive(report.path)[base] == base
    # Nodes without a word from the graph itself: found from what they read.
    kinds = {node.name: node.op for node in OnnxModel(report.path).nodes}
    assert {"MatMul", "Add", "Mul", "Div"} <= {kinds[name] for name in stored[next(iter(provenance))].nodes}


def test_nothing_folds_without_provenance_either(small_bert: ExportSource, tmp_path: Path) -> None:
    """Also without provenance nothing is precomputed from a weight: only its transpose is stored."""
    names = add_dora(small_bert)
    report = export_onnx(small_bert, tmp_path / "dora.onnx")
    assert all(report.stored[name] in (name, f"{name}.T") for name in names)


def test_tied_weight_is_stored_once(gpt2: ExportSource, tmp_path: Path) -> None:
    provenance = add_lora(
        gpt2, only=lambda name: name == "lm_head.weight" or name == "transformer.wte.weight"
    )
    report = export_onnx(gpt2, tmp_path / "gpt2.onnx", provenance=provenance, parity=[fresh(96)])
    held = names_survive(report.path)
    assert held["lm_head.weight"] == held["transformer.wte.weight"]
    assert report.stored["lm_head.weight"] == report.stored["transformer.wte.weight"]
    assert len(report.tied) == 1
    assert not any(name.endswith("weight") for name in report.lost)
    vocabulary = [
        t for t in onnx.load(report.path).graph.initializer if tuple(t.dims) in ((100, 32), (32, 100))
    ]
    assert len(vocabulary) == 1
    assert set(provenance) <= held.keys()
    assert report.outputs == {"logits": ("batch", "seq", 100)}
    weights = sum(p.numel() * 4 for p in gpt2.graph_module.parameters())
    assert report.size < weights * 1.1 + 600_000


def test_equal_weights_are_not_one(gpt2: ExportSource, tmp_path: Path) -> None:
    report = export_onnx(gpt2, tmp_path / "gpt2.onnx")
    biases = [name for name in report.stored if name.endswith("ln_1.bias")]
    assert len({report.stored[name] for name in biases}) == len(biases) == 2


def test_conv_net_keeps_batch_norm(convnet: ExportSource, tmp_path: Path) -> None:
    inputs = [((), {"image": torch.randn(5, 3, 8, 8)})]
    provenance = add_lora(convnet)
    report = export_onnx(convnet, tmp_path / "conv.onnx", provenance=provenance, parity=inputs)
    assert set(report.stored) >= {"first.weight", "norm.running_mean", "second.weight", "head.lora_A"}
    assert report.inputs == {"image": ("batch", 3, 8, 8)}


def test_zero_and_one_weights_change_no_node(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))
            self.bias = nn.Parameter(torch.tensor(scale - 1))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": x * self.scale + self.bias}

    counts = []
    for scale in (1.0, 0.5):
        source = capture(Scaled(scale), {"x": torch.randn(2, 3)}, None)
        counts.append(export_onnx(source, tmp_path / f"{scale}.onnx").nodes)
    assert counts == [2, 2]


def test_external_data(gpt2: ExportSource, tmp_path: Path) -> None:
    report = export_onnx(gpt2, tmp_path / "out" / "gpt2.onnx", external_data=True, parity=[fresh(96)])
    assert sorted(file.name for file in report.path.parent.iterdir()) == ["gpt2.onnx", "gpt2.onnx.data"]
    model = OnnxModel(report.path)
    assert model.size == report.size
    inner = model.intermediate([model.nodes[5].outputs[0]], text_inputs(96))
    assert len(inner) == 1
    assert len(list(report.path.parent.iterdir())) == 2
    assert names_survive(report.path)["lm_head.weight"]


def test_shared_outputs_and_inner_names(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, object]:
            relu = torch.relu(x)
            return {"b": relu, "a": relu, "x_again": x, "relu": relu + 1, "many": (x * 2, None)}

    source = capture(Twice(), {"x": torch.randn(2, 3)}, {"x": {0: torch.export.Dim("batch")}})
    report = export_onnx(source, tmp_path / "twice.onnx", parity=[((), {"x": torch.randn(4, 3)})])
    assert list(report.outputs) == ["b", "a", "x_again", "relu", "many.0"]


def test_positional_inputs_and_given_names(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + y, x - y

    args = (torch.randn(2, 3), torch.randn(2, 3))
    batch = torch.export.Dim("batch")
    program = torch.export.export(Pair(), args, dynamic_shapes=({0: batch}, {0: batch}), strict=False)
    source = ExportSource(
        program.module(check_guards=False), args, {}, ({0: batch}, {0: batch}), ["sum", "gap"]
    )
    other = (torch.randn(5, 3), torch.randn(5, 3))
    report = export_onnx(source, tmp_path / "pair.onnx", parity=[(other, {})])
    assert report.inputs == {"x": ("batch", 3), "y": ("batch", 3)}
    assert list(report.outputs) == ["sum", "gap"]
    wrong = ExportSource(source.graph_module, args, {}, source.dynamic_shapes, ["sum"])
    with pytest.raises(ExportError, match="1 output names were given, but the program returns 2"):
        export_onnx(wrong, tmp_path / "wrong.onnx")


@torch.library.custom_op("surgery_export_test::strange", mutates_args=())
def strange(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@strange.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def with_strange_op(source: ExportSource) -> ExportSource:
    graph = source.graph_module.graph
    node = next(each for each in graph.nodes if "relu" in str(each.target))
    with graph.inserting_after(node):
        new = graph.call_function(torch.ops.surgery_export_test.strange.default, (node,), name="odd_one")
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    source.graph_module.recompile()
    return source


def test_unsupported_op_is_named_and_nothing_is_left(convnet: ExportSource, tmp_path: Path) -> None:
    (tmp_path / "conv.onnx").write_bytes(b"the file before")
    with pytest.raises(ExportError) as caught:
        export_onnx(with_strange_op(convnet), tmp_path / "conv.onnx")
    message = str(caught.value)
    assert "'surgery_export_test.strange.default'" in message
    assert "surgery_onnx_lowerings" in message
    assert "\n" not in message
    assert [file.name for file in tmp_path.iterdir()] == ["conv.onnx"]
    assert (tmp_path / "conv.onnx").read_bytes() == b"the file before"


def test_lowering(convnet: ExportSource, tmp_path: Path) -> None:
    import onnxscript

    def lower(x):  # type: ignore[no-untyped-def]
        op = onnxscript.opset18
        return op.Mul(x, op.CastLike(op.Constant(value_float=3.0), x))

    report = export_onnx(
        with_strange_op(convnet),
        tmp_path / "conv.onnx",
        lowerings={torch.ops.surgery_export_test.strange.default: lower},
        parity=[((), {"image": torch.randn(5, 3, 8, 8)})],
    )
    assert report.parity is not None
    assert report.parity.ok


def test_failed_parity_leaves_the_old_file(convnet: ExportSource, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "conv.onnx"
    path.write_bytes(b"the file before")
    run = ExportSource.run
    monkeypatch.setattr(
        ExportSource, "run", lambda self, *given: {k: v * 1.01 for k, v in run(self, *given).items()}
    )
    with pytest.raises(ExportError, match="output 'logits' of the ONNX file differs"):
        export_onnx(convnet, path, parity=[((), {"image": torch.randn(5, 3, 8, 8)})])
    assert path.read_bytes() == b"the file before"
    assert [file.name for file in tmp_path.iterdir()] == ["conv.onnx"]


def test_opset(convnet: ExportSource, tmp_path: Path) -> None:
    report = export_onnx(
        convnet, tmp_path / "conv.onnx", opset=21, parity=[((), {"image": torch.randn(3, 3, 8, 8)})]
    )
    assert report.opset == 21


def test_provenance_of_an_unused_tensor(convnet: ExportSource, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"tensor 'head\.nothing' of pass 'lora' did not reach"):
        export_onnx(convnet, tmp_path / "c.onnx", provenance={"head.nothing": {"pass": "lora"}})
    assert not list(tmp_path.iterdir())


def test_missing_library(convnet: ExportSource, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(
        MissingExtraError, match=r"onnx is not installed; pip install 'torch-surgery\[onnx\]'"
    ):
        export_onnx(convnet, tmp_path / "c.onnx")


def test_source_is_untouched(convnet: ExportSource, tmp_path: Path) -> None:
    before = str(convnet.graph_module.graph)
    meta = [copy.copy(node.meta.get("custom")) for node in convnet.graph_module.graph.nodes]
    export_onnx(convnet, tmp_path / "c.onnx")
    assert str(convnet.graph_module.graph) == before
    assert [node.meta.get("custom") for node in convnet.graph_module.graph.nodes] == meta
    assert isinstance(convnet.graph_module, fx.GraphModule)
