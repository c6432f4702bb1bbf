"""Quantized training in little memory: weights recomputed in the backward pass, and the base's memory freed."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import surgery
from surgery.common.errors import JournalError
from surgery.engine import recompute
from surgery.engine.contract.observe import observe
from surgery.passes.quantize import ops
from tests.conftest import minilm_path
from tests.passes.quantize.test_quantize import randomise


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    base = surgery.load(f"hf:{minilm_path()}", model_kwargs={"num_hidden_layers": 1})
    program = base.apply(surgery.Quantize(target="attn.*,mlp.*", format="int4"))
    return randomise(program.apply(surgery.Lora(target="attn.*", rank=2)))


def gradients(module, inputs):
    module.zero_grad()
    module(**inputs)["last_hidden_state"].square().sum().backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def test_made_again_for_the_backward_pass(adapted, monkeypatch):
    """The same gradients bit for bit, with one more decoding of each weight that the gradient passes."""
    module, (_, inputs) = adapted.module(), adapted.example_inputs
    made = []
    decode = ops.decode
    monkeypatch.setattr(ops, "decode", lambda *given: made.append(given[0]) or decode(*given))
    with torch.no_grad():
        module(**inputs)
    assert len(made) == 6
    made.clear()
    again = gradients(module, inputs)
    # Not of q, k and v: nothing that trains lies before them.
    assert len(made) == 6 + 3
    monkeypatch.setattr(recompute, "_watched", lambda: True)
    made.clear()
    kept = gradients(module, inputs)
    assert len(made) == 6
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_weights_given_back(adapted, tmp_path):
    before, (_, inputs) = adapted.run(), adapted.example_inputs
    want = gradients(adapted.module(), inputs)
    adapted.save(tmp_path / "saved")
    names = {r.key.owner for r in adapted.journal.find("quantize")[0].sites}
    assert adapted.release() == sum(adapted.base.tensors[n].numel() * 4 for n in names)
    assert adapted.release() == 0
    assert adapted.base.released == names
    assert all(adapted.base.tensors[n].untyped_storage().nbytes() == 4 for n in names)
    assert names.isdisjoint(dict(adapted.module().named_parameters(remove_duplicate=False)))
    assert observe(before, adapted.run()).equal
    found = gradients(adapted.module().train(), inputs)
    assert found.keys() == want.keys()
    adapted.save(tmp_path / "again")
    assert observe(surgery.load(str(tmp_path / "again")).run(), before).equal
    for act in (lambda: adapted.undo("quantize"), adapted.undo_all):
        with pytest.raises(JournalError, match="was released from memory; load the saved directory again"):
            act()
    with pytest.raises(JournalError, match=r"--standalone: .* was released"):
        adapted.save(tmp_path / "alone", standalone=True)
    with pytest.raises(JournalError, match=r"the program: .* was released from memory"):
        adapted.without("quantize").run()
    loaded = surgery.load(str(tmp_path / "again")).undo("lora").undo("quantize")
    assert all(bool(torch.isfinite(t).all()) for t in loaded.base.tensors.values() if t.is_floating_point())


def test_no_view_of_the_memory_is_left(adapted):
    """No view in an earlier program, in its verification or in a pass report: one alone would keep all of it."""
    earlier = adapted.without("lora")
    earlier.run()
    assert adapted.reports
    names = {r.key.owner for r in adapted.journal.find("quantize")[0].sites}
    memory = {adapted.base.tensors[name].data_ptr() for name in names}
    gc.collect()
    plain = [
        o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.device.type == "cpu"
    ]
    views = [tensor for tensor in plain if tensor.data_ptr() in memory]
    assert len(views) >= 2 * len(names)
    adapted.release()
    assert all(view.untyped_storage().nbytes() == 4 for view in views)


def test_live_layers_make_theirs_again(adapted, monkeypatch):
    live, (_, inputs) = adapted.live(), adapted.example_inputs
    made = []
    decode = ops.decode
    monkeypatch.setattr(ops, "decode", lambda *given: made.append(given[0]) or decode(*given))
    live(**inputs).last_hidden_state.square().sum().backward()
    assert len(made) == 6 + 3
