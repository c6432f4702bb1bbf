"""`program.to(dtype)`: as if the model had been loaded in that dtype, with the journal replayed."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

import surgery
from surgery.common.errors import LoadError, PassError
from surgery.common.plugins import make_plugin_manager
from surgery.engine.registry import find_pass
from tests.shared import tiny
from tests.shared.models import Forms


def of(name, **options):
    return find_pass(make_plugin_manager(), name).cls.parse(options)


@pytest.fixture(scope="module")
def ref(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.llama()).save_pretrained(path)
    return f"hf:{path}"


def test_the_same_as_loading_in_that_dtype(ref):
    there, loaded = surgery.load(ref).to(torch.bfloat16), surgery.load(ref, dtype="bfloat16")
    assert there.base.graph_hash == loaded.base.graph_hash
    for name, tensor in loaded.state().items():
        assert tensor.dtype == there.state()[name].dtype, name
        assert torch.equal(tensor, there.state()[name]), name
    assert torch.equal(there.run()["logits"], loaded.run()["logits"])


def test_adapted_quantized_and_merged(ref):
    codes = of("quantize", target="mlp.*", format="int8", group=0, method="gptq")
    program = surgery.load(ref).apply(codes)
    program = program.apply(surgery.Lora(target="attn.*", rank=2))
    with torch.no_grad():
        for name, tensor in program.tensors.items():
            if "lora" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    there = program.to(torch.bfloat16)
    assert there.journal.to_json() == program.journal.to_json()
    assert there.precision == torch.bfloat16
    for name, tensor in program.tensors.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, there.tensors[name]), name
    # bfloat16 has 8 bits: two layers of rounded sums stay within a few hundredths of the scale.
    before = program.run()["logits"]
    close = {"atol": 0.05 * float(before.abs().max()), "rtol": 0}
    torch.testing.assert_close(there.run()["logits"].float(), before, **close)
    torch.testing.assert_close(there.merge().run()["logits"].float(), before, **close)
    torch.testing.assert_close(program.merge().to(torch.bfloat16).run()["logits"].float(), before, **close)
    assert next(there.module().train().parameters()).dtype == torch.bfloat16


def test_saved_in_that_dtype(ref, tmp_path):
    program = surgery.load(ref).apply(surgery.Lora(target="attn.*", rank=2)).to(torch.bfloat16)
    program.save(tmp_path / "saved")
    again = surgery.load(str(tmp_path / "saved"))
    assert again.precision == torch.bfloat16
    assert torch.equal(again.run()["logits"], program.run()["logits"])


def test_a_module_from_python():
    program = surgery.capture(Forms(), torch.randint(0, 11, (2, 5))).apply(
        surgery.Lora(target="linear", rank=2)
    )
    wide = program.to(torch.float64)
    assert {t.dtype for t in wide.tensors.values()} == {torch.float64}
    torch.testing.assert_close(wide.run().float(), program.run(), atol=1e-4, rtol=1e-4)
    assert wide.to(torch.float64) is wide


def test_what_cannot_be_is_said(ref):
    program = surgery.load(ref)
    with pytest.raises(PassError, match="floating-point"):
        program.to(torch.int8)
    with pytest.raises(PassError, match=r"program\.to\(torch\.float16\)"):
        program.module().half()


def test_a_model_of_a_factory_in_that_dtype(tmp_path):
    source = "py:tests.shared.models:forms"
    program = surgery.load(source, dtype="float64").apply(surgery.Lora(target="linear", rank=2))
    assert program.precision == torch.float64
    program.save(tmp_path / "saved")
    again = surgery.load(str(tmp_path / "saved"), base=source)
    assert again.precision == torch.float64
    assert torch.equal(again.run(), program.run())
    with pytest.raises(LoadError, match="no floating-point dtype"):
        surgery.load(source, dtype="int8")
