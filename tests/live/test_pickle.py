"""A live model is pickled and copied as a whole: its passes come with it, and stay removable."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import surgery
from surgery.common.errors import PassError
from tests.live.conftest import fill, small
from tests.techniques.catalogue import of

PASSES = {
    "dora, embedding": [
        surgery.Lora(target="attn.q", rank=2, dora=True, dropout=0.5),
        surgery.Lora(target="embed.token", rank=2, label="e"),
    ],
    "int4 and lora": [
        surgery.Quantize(target="attn.*", format="int4"),
        surgery.Lora(target="attn.*", rank=2),
    ],
    "sparse": [of("sparse-tune", target="mlp.*", density=0.05)],
}


@pytest.fixture(scope="module")
def adapted_models():
    models = {}
    for name, passes in PASSES.items():
        models[name] = small()
        surgery.apply_(models[name], *passes)
        fill(models[name])
    return models


def test_opened_in_another_process(adapted_models, ids, tmp_path):
    torch.save((adapted_models, ids), tmp_path / "models.pt")
    line = [sys.executable, "-m", "tests.live.reopened", tmp_path / "models.pt", tmp_path / "outputs.pt"]
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "outputs.pt")
    with torch.no_grad():
        base = small()(ids).logits
        for name, model in adapted_models.items():
            expected = model(ids).logits
            assert not torch.equal(expected, base)
            model.train()
            torch.manual_seed(5)
            trained = model(ids).logits
            model.eval()
            for there, here in zip(found[name], (expected, trained, expected, base), strict=True):
                assert torch.equal(there, here), name


def test_pickled_with_its_optimiser_it_trains_on(adapted, ids):
    optimiser = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    other, again = pickle.loads(pickle.dumps((adapted, optimiser)))

    def step(model, by):
        model(ids, labels=ids).loss.backward()
        by.step()
        return model(ids).logits.detach()

    before = adapted(ids).logits.detach()
    trained = step(other, again)
    assert not torch.equal(trained, before)
    assert torch.equal(adapted(ids).logits, before)
    assert torch.equal(step(adapted, optimiser), trained)
    surgery.merge_(other)
    merged = pickle.loads(pickle.dumps(other))
    assert torch.equal(merged(ids).logits, other(ids).logits)
    surgery.remove_(merged, "merge")
    assert torch.equal(merged(ids).logits, trained)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_what_is_held_fixed_stays_fixed_in_a_copy(llama, ids, copied):
    surgery.apply_(llama, of("filter", fraction=0.25, target="mlp.up"))
    other = copied(llama).train()
    other(ids, labels=ids).loss.backward()
    rows = other.model.layers[0].mlp.up_proj.weight.grad.abs().sum(1) > 0
    assert int(rows.sum()) == 16  # of 64 filters


def test_a_merge_that_unties_is_undone_in_a_copy(ids):
    from tests.live.test_tied import llama, stir

    torch.manual_seed(0)
    model = llama().eval()
    before = model(ids).logits
    stir(surgery.apply_(model, surgery.Lora(target="head", rank=2)))
    surgery.merge_(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, model(ids).logits)
        surgery.remove_(other)
        assert other.config.tie_word_embeddings
        assert torch.equal(other(ids).logits, before)


def test_a_program_is_copied_and_pickled():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
    program = surgery.capture(model, torch.randn(5, 4)).apply(surgery.Lora(target="all", rank=2))
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.normal_()
    before = program.run()
    for other in (copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
        assert torch.equal(other.run(), before)
        with torch.no_grad():
            for tensor in other.tensors.values():
                tensor.zero_()
        assert not torch.equal(other.run(), before)
    assert torch.equal(program.run(), before)


class Filled(torch.nn.Linear):
    """Creates a tensor of a dtype that does not follow from its weights."""

    def forward(self, input):
        return super().forward(input) + torch.full((self.out_features,), 0.5)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_program_that_names_its_dtype_cannot_be_converted(cast):
    x = torch.randn(2, 3)
    module = surgery.capture(Filled(3, 3), x).module()
    with pytest.raises(PassError, match=r"its graph names float32 \(aten\.full.*use program\.to\(torch"):
        getattr(module, cast)()
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert module.float().to("cpu") is module
    plain = surgery.capture(torch.nn.Linear(3, 3), x).module()
    expected = plain(x)
    torch.testing.assert_close(plain.double()(x.double()).float(), expected)
