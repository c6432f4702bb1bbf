"""LoRA on every form of weight: exact at insertion, merged outputs equal, gradients at the right tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.common.errors import PassError
from tests.shared import models

# Two orders of summation of at most a few dozen fp32 products: a few units in the last place of the largest.
ROUNDING = 2e-6


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = ROUNDING) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(a.abs().max())


FORMS = {
    "forms": (models.forms, "all,!norm"),
    "experts": (models.experts, "all"),
    "attention": (models.attention, "attn.*"),
    "one part": (models.attention, "attn.v"),
    "two parts": (models.attention, "attn.q,attn.v"),
    "interleaved parts": (models.interleaved, "attn.q,attn.v,attn.out"),
    "convnet": (models.convnet, "conv,head"),
}


@pytest.mark.parametrize("form", FORMS)
def test_exact_then_merged(form, randomise):
    factory, target = FORMS[form]
    module, inputs = factory()
    base = surgery.capture(module, inputs)
    program = base.apply(surgery.Lora(target=target, rank=2))
    assert torch.equal(program.run(), base.run())
    assert str(program.journal.entries[-1].numerics["observed"]) == "bit for bit"
    randomise(program, scale=0.3)
    assert not close(program.run(), base.run(), 1e-3)
    merged = program.merge()
    assert close(merged.run(), program.run())
    assert len(merged.graph.nodes) == len(base.graph.nodes)
    assert set(merged.module().state_dict()) == set(module.state_dict())
    assert torch.equal(merged.undo("merge").run(), program.run())
    assert torch.equal(merged.undo_all().run(), base.run())


def test_every_form_is_a_site():
    module, inputs = models.forms()
    program = surgery.capture(module, inputs)
    found = {site.path: (site.kind, site.layout) for site in program.sites}
    assert found["linear"] == ("linear", "oi")
    assert found["addmm_weight"] == ("linear", "io")
    assert found["matmul_weight"] == ("linear", "io")
    assert found["transposed"] == ("linear", "oi")
    assert found["conv1"] == ("conv", "oi")
    assert found["embed"] == ("embedding", "vd")
    assert found["head"] == ("linear", "oi")
    ties = {site.path: site.tied for site in program.sites}
    assert ties["head"] == ("embed.weight",)
    assert ties["embed"] == ("head.weight",)


def test_parts_change_only_their_rows(randomise):
    """A branch on v leaves the q and k rows of the merged fused weight as they were, bit for bit."""
    for factory in (models.attention, models.interleaved):
        module, inputs = factory()
        base = surgery.capture(module, inputs)
        (site,) = [s for s in base.sites if s.role == "attn.qkv"]
        program = randomise(base.apply(surgery.Lora(target="attn.v", rank=2)))
        merged = program.merge().state()["project.weight"]
        changed = (merged != module.project.weight).any(1).nonzero().flatten().tolist()
        assert changed == list(site.parts["v"])
        chosen = base.apply(surgery.Lora(target="attn.qkv", parts="v", rank=2))
        assert list(chosen.tensors) == list(program.tensors)


def test_gradients_are_those_of_eager(randomise):
    """Same loss, same gradients for A and B as autograd gives for y + s·B(Ax) written by hand."""
    module, inputs = models.attention()
    program = randomise(
        surgery.capture(module, inputs).apply(surgery.Lora(target="attn.out", rank=2, alpha=6))
    )
    trained = program.module().train()
    trained(*inputs).square().sum().backward()
    a = program.tensors["out.lora.A"].detach().clone().requires_grad_()
    b = program.tensors["out.lora.B"].detach().clone().requires_grad_()

    class Adapted(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 3.0 * (x @ a.t()) @ b.t()

    module.out = Adapted(module.out)
    module(*inputs).square().sum().backward()
    parameters = dict(trained.named_parameters())
    assert close(parameters["out.lora.A"].grad, a.grad)
    assert close(parameters["out.lora.B"].grad, b.grad)
    assert {n for n, p in parameters.items() if p.grad is not None} == {"out.lora.A", "out.lora.B"}


def test_a_shared_module_gets_one_adapter(randomise):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x).relu())

    program = surgery.capture(Twice(), torch.randn(3, 4))
    adapted = randomise(program.apply(surgery.Lora(target="layer", rank=2)))
    assert sorted(adapted.tensors) == ["layer.lora.A", "layer.lora.B"]
    assert len(adapted.journal.entries[-1].sites) == 1
    assert close(adapted.merge().run(), adapted.run())


def test_several_by_name(randomise):
    module, inputs = models.attention()
    base = surgery.capture(module, inputs)
    first = base.apply(surgery.Lora(target="attn.out", rank=2, label="one"))
    both = randomise(first.apply(surgery.Lora(target="attn.*", rank=3, label="two")), scale=0.3)
    one = both.without("two")
    assert one.tensors["out.lora_one.A"] is both.tensors["out.lora_one.A"]
    assert torch.equal(both.without("one", "two").run(), base.run())
    assert torch.equal(both.only("one").run(), one.run())
    assert torch.equal(both.undo("two").run(), one.run())
    half = both.weighted({"one": 0.5, "two": 0.0})
    whole = both.only("one").merge().state()["out.weight"] - module.out.weight
    halved = half.merge().state()["out.weight"] - module.out.weight
    assert close(whole * 0.5, halved, 1e-5)
    assert close(both.merge().run(), both.run(), 1e-5)
    with pytest.raises(PassError, match=r"applied already.*--as"):
        both.apply(surgery.Lora(target="attn.*", label="one"))


def test_merging_one_of_two_tied_uses_unties(randomise):
    module, inputs = models.forms()
    base = surgery.capture(module, inputs)
    program = randomise(base.apply(surgery.Lora(target="head", rank=2)), 0.3)
    merged = program.merge()
    state = merged.state()
    assert torch.equal(state["embed.weight"], module.embed.weight)
    assert not torch.equal(state["head.weight"], module.embed.weight)
    assert close(merged.run(), program.run())
    with pytest.raises(PassError, match="tied"):
        program.merge(in_place=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype, randomise):
    module, inputs = models.attention()
    base = surgery.capture(module.to(dtype), tuple(x.to(dtype) for x in inputs))
    program = base.apply(surgery.Lora(target="attn.out", rank=2))
    assert torch.equal(program.run(), base.run())
    randomise(program, 0.3)
    a, b = (program.tensors[f"out.lora.{n}"].float() for n in "AB")
    exact = (module.out.weight.float() + 8.0 * b @ a).to(dtype)
    # fp32 sums of two products may fall on either side of a tie between two half-precision neighbours
    off = (program.merge().state()["out.weight"] != exact).float().mean()
    assert off <= 0.02


def test_merge_in_place_needs_no_copy(randomise):
    module, inputs = models.attention()
    base = surgery.capture(module, inputs)
    program = randomise(base.apply(surgery.Lora(target="attn.*", rank=2)))
    before = program.run()
    pointer = base.base.tensors["out.weight"].data_ptr()
    merged = program.merge(in_place=True)
    assert merged.base.tensors["out.weight"].data_ptr() == pointer
    assert close(merged.run(), before)
    with pytest.raises(surgery.SurgeryError, match="merged in place"):
        merged.undo_all()


class Leftover(torch.nn.Module):
    """A layer whose result is not used."""

    def __init__(self):
        super().__init__()
        self.used = torch.nn.Linear(4, 4)
        self.unused = torch.nn.Linear(4, 4)

    def forward(self, x):
        self.unused(x)
        return self.used(x)


def test_a_layer_that_no_output_depends_on_is_refused():
    program = surgery.capture(Leftover(), (torch.randn(2, 4),), dynamic={"x": {0: "batch"}})
    (refused,) = program.plan(surgery.Lora(target="all")).passes[-1].refused
    assert (refused.site.path, refused.refusal) == ("unused", "no output of the model depends on it")
    with pytest.raises(surgery.common.errors.PassError, match="lora at unused: refused, no output"):
        program.apply(surgery.Lora(target="unused"))


def test_starts():
    """A Kaiming-uniform with a = √5 (deviation 1/√(3·in)), or normal with deviation 1/rank; B zero."""
    torch.manual_seed(0)
    base = surgery.capture(torch.nn.Linear(256, 8), torch.randn(2, 256))
    for init, deviation in (("kaiming", (3 * 256) ** -0.5), ("gaussian", 1 / 16)):
        program = base.apply(surgery.Lora(target="all", rank=16, init=init))
        a, b = (program.tensors[f"lora.{name}"].detach() for name in "AB")
        assert abs(float(a.std()) / deviation - 1) < 0.05
        assert not b.any()
