from __future__ import annotations

import copy
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper

from surgery.common.errors import ExportError
from surgery.export import ExportSource, OnnxModel, check_parity, export_onnx, first_divergence
from surgery.export.parity import difference, scale_of, tolerance_of
from tests.shared.exported import add_lora, text_inputs

INPUTS = ((), text_inputs(96, batch=3, seq=11, seed=3))


def plant(path: Path, tensor: str) -> None:
    """Change one weight of the file."""
    proto = onnx.load(path)
    held = next(each for each in proto.graph.initializer if each.name == tensor)
    held.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held) * 1.05 + 0.01, tensor))
    # Metadata is not part of the copy, and the comparison must not lean on it.
    onnx.save(proto, path)


def test_planted_weight_is_found_and_the_file_goes(gpt2: ExportSource, tmp_path: Path) -> None:
    provenance = add_lora(gpt2)
    report = export_onnx(gpt2, tmp_path / "gpt2.onnx", provenance=provenance, parity=[INPUTS])
    assert first_divergence(gpt2.graph_module, OnnxModel(report.path), INPUTS) is None
    plant(report.path, report.stored["transformer.h.1.mlp.c_fc.weight"])
    for optimised in (True, False):
        model = OnnxModel(report.path, optimised=optimised)
        found = first_divergence(gpt2.graph_module, model, INPUTS)
        assert found is not None
        assert found.module_path == "transformer.h.1.mlp.c_fc"
        assert found.op == "aten.addmm.default"
        back = first_divergence(model, gpt2.graph_module, INPUTS)
        assert back is not None
        assert back.other == found.node
    with pytest.raises(
        ExportError, match=r"output 'logits' of the ONNX file differs .* by 0\.\d+ of its scale"
    ):
        check_parity(report.path, gpt2, [INPUTS])
    assert not list(tmp_path.iterdir())


def test_planted_adapter_weight(small_bert: ExportSource, tmp_path: Path) -> None:
    source = small_bert
    provenance = add_lora(source)
    report = export_onnx(source, tmp_path / "lora.onnx", provenance=provenance)
    planted = "encoder.layer.1.output.dense"
    plant(report.path, f"{planted}.lora_A")
    found = first_divergence(source.graph_module, OnnxModel(report.path), ((), text_inputs(1000, 3, 9)))
    assert found is not None
    assert found.module_path == planted
    graph = source.graph_module.graph
    node = next(each for each in graph.nodes if each.name == found.node)
    assert node.args[1].target == f"{planted}.lora_A"


def test_two_graphs(small_bert: ExportSource) -> None:
    first, second = small_bert, copy.deepcopy(small_bert)
    inputs = ((), text_inputs(1000, 3, 9))
    assert first_divergence(first.graph_module, second.graph_module, inputs, tol=0) is None
    # The edited graph has more nodes, and the ones it shares still pair up.
    with torch.no_grad():
        add_lora(second, only=lambda name: "layer.1.intermediate" in name)
    found = first_divergence(first.graph_module, second.graph_module, inputs)
    assert found is not None
    assert found.module_path == "encoder.layer.1.intermediate.intermediate_act_fn"


def test_two_files(convnet: ExportSource, tmp_path: Path) -> None:
    a = export_onnx(convnet, tmp_path / "a.onnx")
    b = export_onnx(convnet, tmp_path / "b.onnx")
    inputs = ((), {"image": torch.randn(3, 3, 8, 8)})
    assert first_divergence(OnnxModel(a.path), OnnxModel(b.path), inputs) is None
    plant(b.path, "second.weight")
    found = first_divergence(OnnxModel(a.path), OnnxModel(b.path), inputs)
    assert found is not None
    assert (found.op, found.module_path) == ("Conv", "second")


def test_fresh_inputs_and_sizes(gpt2: ExportSource, tmp_path: Path) -> None:
    report = export_onnx(gpt2, tmp_path / "gpt2.onnx")
    asked = []

    def make(source: ExportSource, sizes: dict[str, int], seed: int):  # type: ignore[no-untyped-def]
        asked.append((dict(sizes), seed))
        return (), text_inputs(96, sizes["batch"], sizes["seq"], seed)

    found = check_parity(
        report.path,
        gpt2,
        fresh_inputs=make,
        sizes=[{"batch": 1, "seq": 4}, {"batch": 5, "seq": 13}],
        seeds=(1, 2),
    )
    assert len(asked) == 4
    assert {output.shape for output in found.outputs} == {(1, 4, 100), (5, 13, 100)}
    assert found.ok
    assert found.error < 1e-5
    with pytest.raises(ValueError, match="needs inputs"):
        check_parity(report.path, gpt2)
    assert report.path.exists()


def test_another_programs_file(gpt2: ExportSource, convnet: ExportSource, tmp_path: Path) -> None:
    report = export_onnx(gpt2, tmp_path / "gpt2.onnx")
    with pytest.raises(ExportError, match=r"needs the input 'input_ids'"):
        check_parity(report.path, convnet, [((), {"image": torch.randn(3, 3, 8, 8)})])
    with pytest.raises(ExportError, match="there is no ONNX file"):
        OnnxModel(tmp_path / "none.onnx")


def test_the_tolerance_is_not_blind(gpt2: ExportSource, tmp_path: Path) -> None:
    """A LoRA that is 1% too strong must not pass as rounding."""
    provenance = add_lora(gpt2)
    report = export_onnx(gpt2, tmp_path / "gpt2.onnx", provenance=provenance)
    changed = copy.deepcopy(gpt2.graph_module)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if name.endswith("lora_B"):
                parameter.mul_(1.01)
    with pytest.raises(ExportError, match="differs"):
        check_parity(report.path, ExportSource(changed, (), gpt2.kwargs), [INPUTS])


def test_difference_and_scale() -> None:
    lowest = torch.finfo(torch.float32).min
    masked = torch.tensor([1.0, -2.0, lowest, float("-inf"), float("nan")])
    assert scale_of(masked) == 2.0
    assert difference(masked, masked.clone()) == 0.0
    assert difference(masked, masked.nan_to_num(nan=0.0)) == float("inf")
    assert difference(masked, masked.abs()) == float("inf")
    assert difference(torch.zeros(2), torch.zeros(3)) == float("inf")
    assert scale_of(torch.zeros(3)) == scale_of(torch.zeros(0)) == 1.0
    assert tolerance_of(torch.int64) == 0.0
    assert tolerance_of(torch.float32) < tolerance_of(torch.float16) < tolerance_of(torch.bfloat16) < 0.1


def test_runtime(convnet: ExportSource, tmp_path: Path) -> None:
    report = export_onnx(convnet, tmp_path / "conv.onnx")
    model = OnnxModel(report.path, threads=1)
    inputs = {"image": torch.randn(3, 3, 8, 8)}
    assert (model.inputs, model.outputs) == (("image",), ("logits",))
    assert model.size == report.path.stat().st_size == report.size
    assert 0 < model.latency(inputs, repeats=3, warmup=1) < 1
    convolution = next(node for node in model.nodes if node.op == "Conv")
    value = model.intermediate(convolution.outputs, inputs)[convolution.outputs[0]]
    with torch.no_grad():
        expected = convnet.graph_module.get_submodule("first")
        want = torch.nn.functional.conv2d(inputs["image"], expected.weight, expected.bias, padding=1)
    torch.testing.assert_close(value, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ExportError, match="has no value 'nothing'"):
        model.intermediate(["nothing"], inputs)
