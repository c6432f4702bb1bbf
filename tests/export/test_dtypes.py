"""Files in each dtype: float16 for generation, bfloat16 models converted, and what onnxruntime's CPU cannot run."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import surgery
from surgery.cli import main
from surgery.common.errors import ExportError, LoadError
from surgery.export.generation import check_tokens
from surgery.export.generator import open_generator
from surgery.export.runtime import OnnxModel
from tests.shared import tiny


@pytest.fixture(scope="module")
def bfloat(tmp_path_factory):
    """A directory of a bfloat16 model with a random LoRA and quantized weights."""
    folder = tmp_path_factory.mktemp("bfloat")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.llama()).to(torch.bfloat16).save_pretrained(folder / "base")
    program = surgery.load(f"hf:{folder / 'base'}").apply(surgery.Lora(target="attn.*", rank=2))
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.normal_(std=0.3)
    program.save(folder / "adapted")
    return folder, program


def run(*arguments, code=0, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    said = capsys.readouterr()
    assert ended.value.code == code, said
    return " ".join((said.out + said.err).split())


def test_a_bfloat16_directory_becomes_a_float32_file(bfloat, tmp_path, capsys):
    folder, program = bfloat
    path = tmp_path / "model.onnx"
    said = run("export", folder / "adapted", "-o", path, code=2, capsys=capsys)
    assert "is bfloat16, in which onnxruntime's CPU cannot compute; export with --dtype float32" in said
    assert not path.exists()
    run("export", folder / "adapted", "-o", path, "--dtype", "float32", capsys=capsys)
    wide = surgery.load(str(folder / "adapted"), dtype="float32")
    assert {t.dtype for t in wide.state().values() if t.is_floating_point()} == {torch.float32}
    for name, tensor in program.tensors.items():
        assert torch.equal(wide.tensors[name], tensor.float())
    ids = {"input_ids": torch.randint(3, 90, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    found, wanted = OnnxModel(path).run(ids)["logits"], wide.run(**ids)["logits"]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    # The bfloat16 program rounds after each op: 2 layers, some 20 roundings of 2^-8.
    assert float((program.run(**ids)["logits"].float() - wanted).norm() / wanted.norm()) < 0.1
    assert (
        surgery.load(str(folder / "adapted"), model_kwargs={"dtype": "float32"})
        .run(**ids)["logits"]
        .equal(wanted)
    )
    with pytest.raises(LoadError, match="was saved with the arguments of its model; leave out num_labels"):
        surgery.load(str(folder / "adapted"), model_kwargs={"num_labels": 3})


def test_merged_in_float32(bfloat, tmp_path, capsys):
    folder, _ = bfloat
    run(
        "merge",
        folder / "adapted",
        "-o",
        tmp_path / "hf",
        "--format",
        "hf",
        "--dtype",
        "float32",
        capsys=capsys,
    )
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert merged.dtype == torch.float32
    wide = surgery.load(str(folder / "adapted"), dtype="float32")
    ids = torch.randint(3, 90, (2, 9))
    wanted = wide.run(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    # Products of W + s·BA instead of two products, in float32.
    torch.testing.assert_close(merged(ids).logits, wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))


def test_codes_keep_their_dtype(bfloat, tmp_path):
    folder, _ = bfloat
    program = surgery.load(f"hf:{folder / 'base'}").apply(surgery.Quantize(target="mlp.*"))
    program.save(tmp_path / "saved")
    wide = surgery.load(str(tmp_path / "saved"), dtype="float32")
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in wide.tensors.items()}
    assert kinds == {"codes": torch.int8, "scale": torch.float32}
    assert torch.isfinite(wide.run()["logits"]).all()


def test_what_cannot_be_converted_is_refused(tmp_path):
    program = surgery.capture(nn.Linear(4, 4).bfloat16(), (torch.randn(3, 4).bfloat16(),))
    with pytest.raises(ExportError, match=r"weight is bfloat16, .* or convert the module"):
        program.export(tmp_path / "model.onnx")
    program.save(tmp_path / "saved")
    with pytest.raises(LoadError, match="its base is no hf:, timm: or diffusers: model"):
        surgery.load(str(tmp_path / "saved"), base=program, dtype="float32")


def test_half_precision_for_generation(tmp_path):
    """`generate` returns float32 logits; what counts is that the model computes in float16."""
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.llama()).to(torch.float16).save_pretrained(tmp_path / "base")
    program = surgery.load(f"hf:{tmp_path / 'base'}")
    report = program.export_generation(tmp_path / "onnx")
    # 10 eps of float16: rounded once after each of some 100 ops; see surgery.export.parity.
    assert 1e-6 < report.error < 10 * torch.finfo(torch.float16).eps
    wrong = program.live()
    with torch.no_grad():
        wrong.lm_head.weight.mul_(1.05)
    with pytest.raises(ExportError, match=r"the logits .* differ .*explains at most 1e-02"):
        check_tokens(wrong, tmp_path / "onnx", 0)


@pytest.mark.slow
@pytest.mark.parametrize("per_token", [False, True])
def test_int8_dynamic_for_generation(per_token, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.llama()).save_pretrained(tmp_path / "base")
    program = surgery.load(f"hf:{tmp_path / 'base'}")
    program = program.apply(surgery.Quantize(target="mlp.*", format="int8-dynamic", per_token=per_token))
    report = program.export_generation(tmp_path / "onnx")
    assert report.error < 0.1
    wrong = program.live()
    with torch.no_grad():
        wrong.lm_head.weight.mul_(1.5)
    onnx = open_generator(tmp_path / "onnx")
    from surgery.export.generation import _tokens

    with pytest.raises(
        ExportError, match=r"rounded activations explain at most .*; quantize with --per-token"
    ):
        _tokens(wrong, onnx, 0, 0.1, True)
