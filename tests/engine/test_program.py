"""Programs: immutability, modes, selections, undo, ownership of storage."""

from __future__ import annotations

import copy

import pytest
import torch

import surgery
from surgery.common.errors import CaptureError, JournalError, PassError, TargetError
from tests.shared import models


def test_the_callers_model_is_untouched():
    module, inputs = models.convnet()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    program = surgery.capture(module, inputs).apply(surgery.Lora(target="conv", rank=2), freeze_base=False)
    trained = program.module().train()
    optimiser = torch.optim.SGD(trained.parameters(), lr=0.1)
    trained(*inputs).sum().backward()
    optimiser.step()
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in module.parameters())
    assert not torch.equal(trained.state_dict()["1.running_mean"], before["1.running_mean"])


def test_train_mode_drops_and_eval_mode_does_not():
    module, inputs = models.forms()
    program = surgery.capture(module, inputs).apply(surgery.Lora(target="linear", rank=2))
    running = program.module()
    assert not running.training
    assert torch.equal(running(*inputs), running(*inputs))
    running.train()
    assert running.training
    assert not torch.equal(running(*inputs), running(*inputs))
    running.eval()
    assert torch.equal(running(*inputs), module.eval()(*inputs))


def test_dropout_mask_and_gradients_are_eagers():
    """With one seed, the train graph and eager draw one mask and give one gradient, bit for bit."""
    module, inputs = models.convnet()
    program = surgery.capture(module, inputs)
    ours, theirs = program.module().train(), module.train()
    torch.manual_seed(5)
    ours(*inputs).square().sum().backward()
    torch.manual_seed(5)
    theirs(*inputs).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, expected[name].grad), name


def test_training_one_program_leaves_its_relatives_alone():
    module, inputs = models.attention()
    base = surgery.capture(module, inputs)
    adapted = base.apply(surgery.Lora(target="attn.*", rank=2))
    expected = adapted.run()
    full = base.module().train()
    full(*inputs).sum().backward()
    torch.optim.SGD(full.parameters(), lr=1.0).step()
    assert torch.equal(adapted.run(), expected)
    frozen = [n for n, p in adapted.module().named_parameters() if not p.requires_grad]
    assert "out.weight" in frozen
    assert full.get_parameter("out.weight").requires_grad


def test_freeze_by_role_path_and_exclusion():
    module, inputs = models.attention()
    base = surgery.capture(module, inputs)

    def trains(program):
        return {name for name, p in program.module().named_parameters() if p.requires_grad}

    everything = {"project.weight", "project.bias", "out.weight", "out.bias"}
    assert trains(base) == everything
    assert trains(base.apply(surgery.Freeze())) == set()
    assert trains(base.apply(surgery.Freeze(target="attn.qkv"))) == {"out.weight", "out.bias"}
    assert trains(base.apply(surgery.Freeze(target="!out.bias"))) == {"out.bias"}
    lora = surgery.Lora(target="attn.out", rank=2)
    assert trains(base.apply(lora)) == {"out.lora.A", "out.lora.B"}
    assert trains(base.apply(lora, freeze_base=False)) == everything | {"out.lora.A", "out.lora.B"}
    assert trains(base.apply(lora, surgery.Freeze(target="project"))) == {
        "out.weight", "out.bias", "out.lora.A", "out.lora.B",
    }  # fmt: skip


def test_a_new_head_keeps_training(minilm):
    program = minilm.apply(surgery.Lora(target="attn.*"))
    trains = {n for n, p in program.module().named_parameters() if p.requires_grad and ".lora." not in n}
    assert trains == {"classifier.weight", "classifier.bias"}
    assert program.journal.entries[0].auto
    assert program.journal.entries[0].pass_name == "freeze"


def test_undo_keeps_what_else_was_trained(randomise):
    module, inputs = models.attention()
    base = surgery.capture(module, inputs)
    program = base.apply(surgery.Lora(target="attn.*", rank=2), surgery.Freeze(target="!out.bias"))
    program = program.apply(surgery.Freeze(target="project"))
    running = program.module()
    with torch.no_grad():
        running.get_parameter("out.bias").add_(1.0)
    left = program.undo("lora")
    assert not left.tensors
    assert torch.allclose(left.run(), base.run() + 1.0, atol=1e-6)
    assert torch.equal(program.undo_all().run(), base.run())
    with pytest.raises(JournalError, match=r"no pass 'lroa'.*'lora'"):
        program.undo("lroa")


def test_merge_must_be_undone_before_what_it_folded(randomise):
    module, inputs = models.attention()
    program = randomise(surgery.capture(module, inputs).apply(surgery.Lora(target="attn.*", rank=2)))
    merged = program.merge()
    with pytest.raises(JournalError, match="folded by 'merge'; undo 'merge' first"):
        merged.undo("lora")
    assert torch.equal(merged.undo("merge").run(), program.run())
    with pytest.raises(PassError, match="nothing can be folded"):
        merged.merge()
    # A pass that follows makes the merged weights its base.
    later = merged.apply(surgery.Lora(target="attn.*", label="later"))
    assert torch.equal(later.run(), merged.run())


def test_deepcopy_of_a_module_is_independent():
    module, inputs = models.attention()
    program = surgery.capture(module, inputs).apply(surgery.Lora(target="attn.*", rank=2))
    first = program.module()
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.get_parameter("out.bias").add_(1.0)
    assert torch.equal(first(*inputs), module(*inputs))
    assert not torch.equal(second(*inputs), first(*inputs))


def test_a_pass_that_breaks_its_promise_is_refused():
    class Wrong(surgery.Lora):
        name = "wrong"

        def tensors(self, site):
            specs = super().tensors(site)
            return {"A": specs["A"], "B": type(specs["B"])(specs["B"].shape, torch.nn.init.ones_)}

    from surgery.common.hooks import hookimpl
    from surgery.common.plugins import make_plugin_manager

    class Hook:
        @hookimpl
        def surgery_passes(self):
            return [Wrong]

    module, inputs = models.attention()
    base = surgery.capture(module, inputs, plugins=make_plugin_manager(entry_points=False, plugins=(Hook(),)))
    with pytest.raises(PassError, match="declares exact, but the outputs moved by"):
        base.apply(Wrong(target="attn.out", rank=2))
    assert len(base.journal) == 0


def test_misses_and_refusals_say_what_to_do():
    module, inputs = models.convnet()
    base = surgery.capture(module, inputs)
    with pytest.raises(TargetError, match=r"'attn.*' is a role and matches no site; the model has the roles"):
        base.apply(surgery.Lora(target="attn.*"))
    with pytest.raises(PassError, match="lora at 1: refused, lora works on linear, conv"):
        base.apply(surgery.Lora(target="norm"))
    with pytest.raises(PassError, match="needs a target"):
        base.apply(surgery.Lora())
    with pytest.raises(CaptureError):
        surgery.capture(*models.breaks_on_data())


def test_plan_changes_nothing_and_says_everything():
    module, inputs = models.forms()
    base = surgery.capture(module, inputs)
    plan = base.plan(surgery.Lora(target="all", rank=2))
    auto, lora = plan.passes
    assert auto.auto
    assert [s.site.path for s in lora.refused] == ["norm"]
    assert len(lora.accepted) == 9
    program = base.apply(surgery.Lora(target="all", rank=2))
    assert lora.parameters == sum(t.numel() for t in program.tensors.values())
    assert len(base.journal) == 0


def test_programs_train_apart_after_apply_and_undo(randomise):
    module, inputs = models.attention()
    first = randomise(surgery.capture(module, inputs).apply(surgery.Lora(target="attn.*"), freeze_base=False))
    first.module()  # from here on the program has its own copy of what trains
    before = first.run()
    for derived in (
        first.apply(surgery.Lora(target="attn.*", label="two")),
        first.apply(surgery.Lora(target="attn.*", label="two")).undo("two"),
    ):
        trained = derived.module()
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(1.0)
        assert torch.equal(first.run(), before)
        assert not torch.equal(derived.run(), before)


def test_plan_refuses_what_apply_does():
    module, inputs = models.attention()
    program = surgery.capture(module, inputs)
    twice = (surgery.Lora(target="attn.*"), surgery.Lora(target="attn.out"))
    for method in (program.plan, program.apply):
        with pytest.raises(PassError, match="'lora' is applied already; give this one a name"):
            method(*twice)
        with pytest.raises(PassError, match="the class Lora is not a pass"):
            method(surgery.Lora)
