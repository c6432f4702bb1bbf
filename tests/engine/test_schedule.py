"""Selections are stored and followed: windows, rates and masks, in modules, optimizers, files and undo."""

from __future__ import annotations

import copy
import json
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import surgery
from surgery.api import Selection, SelectPass, hookimpl
from surgery.api.programs import make_plugin_manager
from surgery.common.errors import JournalError, PassError
from surgery.engine.journal import Entry
from surgery.engine.module import ProgramModule
from surgery.engine.schedule import Schedule
from surgery.store import saved
from surgery.testing import ConformanceError, check_pass
from tests.shared.stacks import STACK, Stack, bits, depth_of, digits, fit, moved, program

ONE = {"one_at_a_time": True, "steps": 5}


def depths(names):
    return {depth_of(name) for name in names}


OPTIMISERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {}),
    "nadam": (torch.optim.NAdam, {"decoupled_weight_decay": True}),
    "adamw foreach": (torch.optim.AdamW, {"foreach": True}),
    "adamw fused": (torch.optim.AdamW, {"fused": True}),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("to_none", [True, False])
def test_outside_its_window_a_parameter_stays_bit_for_bit(name, to_none):
    """With momentum from its window, with weight decay, and with gradients that are zeroed instead of None."""
    made, options = OPTIMISERS[name]
    applied = program().apply(surgery.Layerwise(**ONE))
    module, (x, y) = applied.module(), digits(64)
    optimiser = made(applied.parameter_groups(1e-2, weight_decay=0.1), **options)
    for step in range(25):
        training = module.advance(step)
        before = bits(applied)
        F.cross_entropy(module(x), y).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=to_none)
        assert depths(moved(applied, before)) == {max(4 - step // 5, 0)} == depths(training)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_masks_hold(name):
    """Masked values keep their bits in spite of optimizer state; the others move."""
    made, options = OPTIMISERS[name]
    applied = program().apply(surgery.Filter(fraction=0.25))
    before = bits(applied)
    fit(applied, 8, optimiser=made, **options)
    masks = applied.schedule.masks
    assert set(masks) == {
        *(f"blocks.{i}.{n}" for i in range(3) for n in ("up.weight", "up.bias", "down.weight")),
        "embed.weight", "embed.bias",
    }  # fmt: skip
    for parameter, name_of_mask in masks.items():
        mask = applied.tensors[name_of_mask].expand_as(before[parameter])
        now = applied.state()[parameter].detach()
        assert mask.float().mean() == 0.25
        assert torch.equal(now[~mask].view(torch.uint8), before[parameter][~mask].view(torch.uint8))
        assert (now[mask] != before[parameter][mask]).float().mean() > 0.9


def test_decay_spares_what_is_masked_and_what_is_no_matrix():
    applied = program().apply(surgery.Full(), surgery.Filter(target="blocks.0.up"))
    whole = program().apply(surgery.Layerwise(top=1))
    decayed = {n for g in whole.parameter_groups(weight_decay=0.1) if g["weight_decay"] for n in g["names"]}
    assert decayed == {"head.weight", "blocks.2.up.weight", "blocks.2.down.weight"}
    assert all(g["weight_decay"] == 0 for g in applied.parameter_groups(weight_decay=0.1))


def test_masks_survive_the_schedule_and_clipping():
    """Freezing and unfreezing a parameter keeps its hook, and clipping rescales without filling in."""
    applied = program().apply(surgery.Filter())
    module, (x, y) = applied.module(), digits(64)
    parameter = module.get_parameter("embed.weight")
    for on in (False, True):
        parameter.requires_grad_(on)
    F.cross_entropy(module(x), y).backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
    mask = applied.tensors[applied.schedule.masks["embed.weight"]].expand_as(parameter)
    assert parameter.grad[mask].any()
    assert not parameter.grad[~mask].any()
    (direct,) = torch.autograd.grad(F.cross_entropy(module(x), y), [parameter])
    assert not direct[~mask].any()


def test_a_gradient_that_is_not_finite_is_held_too():
    applied = program().apply(surgery.Filter())
    module = applied.module()
    (module(torch.full((2, 64), float("inf"))).sum() * 0).backward()
    mask = applied.tensors[applied.schedule.masks["embed.weight"]].expand(16, 64)
    assert not module.get_parameter("embed.weight").grad[~mask].any()


def test_a_copied_module_keeps_masks_and_windows_and_its_own_place():
    applied = program().apply(surgery.Filter(target="path:embed"), surgery.Full(target="head"))
    first = applied.module()
    second = copy.deepcopy(first)
    x, y = digits(64)
    F.cross_entropy(second(x), y).backward()
    mask = applied.tensors[applied.schedule.masks["embed.weight"]].expand(16, 64)
    gradient = second.get_parameter("embed.weight").grad
    assert gradient[mask].any()
    assert not gradient[~mask].any()
    assert first.get_parameter("embed.weight").grad is None
    scheduled = program().apply(surgery.Layerwise(**ONE)).module()
    other = copy.deepcopy(scheduled)
    assert depths(other.advance(10)) == {2}
    assert depths(n for n, p in scheduled.named_parameters() if p.requires_grad) == {4}
    assert depths(other.advance(5)) == {3}


def test_a_module_in_another_dtype_keeps_its_masks():
    applied = program().apply(surgery.Filter())
    module, (x, y) = applied.module().double(), digits(64)
    F.cross_entropy(module(x.double()), y).backward()
    mask = applied.tensors[applied.schedule.masks["embed.weight"]].expand(16, 64)
    gradient = module.get_parameter("embed.weight").grad
    assert gradient.dtype == torch.float64
    assert gradient[mask].any()
    assert not gradient[~mask].any()


def test_a_compiled_module_is_masked_and_scheduled():
    x, y = digits(64)
    applied = program().apply(surgery.Filter())
    module = applied.module()
    F.cross_entropy(torch.compile(module, backend="aot_eager")(x), y).backward()
    mask = applied.tensors[applied.schedule.masks["embed.weight"]].expand(16, 64)
    gradient = module.get_parameter("embed.weight").grad
    assert gradient[mask].any()
    assert not gradient[~mask].any()
    module = program().apply(surgery.Layerwise(**ONE)).module()
    compiled = torch.compile(module, backend="aot_eager")
    for step in (0, 5, 20):
        module.advance(step)
        F.cross_entropy(compiled(x), y).backward()
        reached = depths(n for n, p in module.named_parameters() if p.grad is not None)
        assert reached == {4 - step // 5}
        module.zero_grad()


def test_views_train_together_at_one_step():
    """`without` shares parameters, and so their trainability: creating or reading a view restarts nothing."""
    applied = program().apply(surgery.Lora(target="mlp.*", rank=2), surgery.Layerwise(**ONE))
    module = applied.module()
    module.advance(10)
    view = applied.without("lora")
    view.run()
    _ = view.state()
    assert depths(n for n, p in module.named_parameters() if p.requires_grad and "lora" not in n) == {2}
    beside = view.module()
    assert depths(n for n, p in beside.named_parameters() if p.requires_grad) == {2}
    assert beside.get_parameter("embed.weight") is module.get_parameter("embed.weight")
    beside.advance(20)
    assert depths(n for n, p in module.named_parameters() if p.requires_grad and "lora" not in n) == {0}
    assert all(p.requires_grad for n, p in module.named_parameters() if "lora" in n)


def test_rates_and_a_scheduler():
    applied = program().apply(surgery.Layerwise(decay=0.5))
    groups = applied.parameter_groups(0.8)
    rate = {depth_of(n): g["lr"] for g in groups for n in g["names"]}
    assert rate == {4: 0.8, 3: 0.4, 2: 0.2, 1: 0.1, 0: 0.05}
    optimiser = torch.optim.SGD(groups)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))
    module, (x, y) = applied.module(), digits(64)
    for _ in range(3):
        F.cross_entropy(module(x), y).backward()
        optimiser.step()
        decay.step()
    assert [g["lr"] for g in optimiser.param_groups] == pytest.approx([g["initial_lr"] / 4 for g in groups])
    assert {g["initial_lr"] for g in optimiser.param_groups} == {0.8, 0.4, 0.2, 0.1, 0.05}


def test_groups_of_one_step():
    applied = program().apply(surgery.GradualUnfreeze(every=3, unit="step"))
    at = {
        step: depths(n for g in applied.parameter_groups(step=step) for n in g["names"])
        for step in (0, 2, 3, 12)
    }
    assert at == {0: {4}, 2: {4}, 3: {4, 3}, 12: {4, 3, 2, 1, 0}}
    assert [g["window"] for g in applied.parameter_groups()] == [
        (12, None),
        (9, None),
        (6, None),
        (3, None),
        (0, None),
    ]
    assert applied.schedule.changes == (3, 6, 9, 12)
    with pytest.raises(PassError, match="nothing trains in this program; select something"):
        program().apply(surgery.Freeze()).parameter_groups()


# -- several selections


def test_a_later_selection_wins():
    """The last selection that names a parameter wins: trainability, window, rate and mask."""
    base = program()
    both = base.apply(surgery.Layerwise(top=1, decay=0.5), surgery.Freeze(target="head"))
    assert depths(n for n, p in both.module().named_parameters() if p.requires_grad) == {3, 4}
    assert not both.trains("head.weight")
    assert both.schedule.rates.keys() == {n for n in base.parameter_names() if depth_of(n) == 3} | {
        "norm.weight", "norm.bias",
    }  # fmt: skip
    back = base.apply(surgery.Freeze(), surgery.Layerwise(bottom=1))
    assert depths(n for n, p in back.module().named_parameters() if p.requires_grad) == {0, 1, 4}
    every = base.apply(surgery.Layerwise(**ONE), surgery.Filter(), surgery.Full())
    assert every.schedule == Schedule()
    assert all(p.requires_grad for p in every.module().parameters())
    masked = base.apply(surgery.Full(), surgery.Filter(), surgery.Full(target="path:embed"))
    assert not {"embed.weight", "embed.bias"} & masked.schedule.masks.keys()
    assert "blocks.0.up.weight" in masked.schedule.masks
    windows = base.apply(surgery.GradualUnfreeze(), surgery.Full(target="blocks.0")).schedule.windows
    assert not any(n.startswith("blocks.0") for n in windows)
    assert windows["blocks.1.up.weight"] == (2, None)


def test_two_units_in_force_are_refused_and_one_set_aside_is_not():
    base = program().apply(surgery.GradualUnfreeze())
    half = surgery.Layerwise(target="blocks.0", freeze_head=True, **ONE)
    assert base.apply(half).schedule.unit == "step"  # it names every parameter, so the epochs are set aside

    class Late(SelectPass):
        name: ClassVar[str] = "late"
        default_target: ClassVar[str | None] = "path:embed"

        def selection(self, candidates):
            names = candidates.targeted
            return Selection(dict.fromkeys(names, True), windows=dict.fromkeys(names, (7, None)))

    base = surgery.load(STACK, plugins=plugins(Late)).apply(surgery.GradualUnfreeze())
    for method in (base.plan, base.apply):
        with pytest.raises(
            PassError, match="'gradual-unfreeze' and 'late' count in epoch and step; use one --unit"
        ):
            method(Late())


def plugins(*classes):
    class Hook:
        @hookimpl
        def surgery_passes(self):
            return list(classes)

    return make_plugin_manager(plugins=(Hook(),))


SAYS = {
    "unknown": (Selection({"nose": True}), "selects 'nose', which is not a parameter"),
    "held": (
        Selection({"embed.weight": False}, rates={"embed.weight": 0.5}),
        "but does not let it train; let it train",
    ),
    "rate": (Selection({"embed.weight": True}, {"embed.weight": 0.0}), "give a positive finite number"),
    "window": (
        Selection({"embed.weight": True}, windows={"embed.weight": (5, 5)}),
        "which contains no step; give a later end",
    ),
    "unit": (
        Selection({"embed.weight": True}, unit="batch"),
        "the unit of the schedule is 'batch'; use 'step' or 'epoch'",
    ),
    "shape": (
        Selection({"embed.weight": True}, masks={"embed.weight": torch.ones(64, 16, dtype=torch.bool)}),
        r"of the shape \(16, 64\) or with size 1",
    ),
    "dtype": (
        Selection({"embed.weight": True}, masks={"embed.weight": torch.ones(16, 64)}),
        "has to be torch.bool",
    ),
    "empty": (
        Selection({"embed.weight": True}, masks={"embed.weight": torch.zeros(16, 1, dtype=torch.bool)}),
        "is False everywhere; freeze the parameter",
    ),
}


@pytest.mark.parametrize("wrong", SAYS)
def test_a_selection_that_makes_no_sense_is_refused(wrong):
    class Odd(SelectPass):
        name: ClassVar[str] = "odd"
        default_target: ClassVar[str | None] = "all"

        def selection(self, candidates):
            return SAYS[wrong][0]

    base = surgery.load(STACK, plugins=plugins(Odd))
    for method in (base.plan, base.apply):
        with pytest.raises(PassError, match=f"^odd.*{SAYS[wrong][1]}"):
            method(Odd())


# -- undo and leaving out


def test_undo_gives_back_what_only_the_selection_trained():
    base = program()
    before = bits(base)
    for selection in (
        surgery.Layerwise(top=2),
        surgery.Filter(),
        surgery.GradualUnfreeze(unit="step"),
        surgery.Full(),
    ):
        trained = base.apply(selection)
        fit(trained, 6)
        assert moved(trained, before)
        assert not moved(trained.undo(selection.name), before)
        assert not moved(trained.undo_all(), before)


def test_undo_keeps_what_was_trained_before_and_beside():
    base = program()
    fit(base, 2)  # nothing was selected: all of it trains
    before = bits(base)
    top = base.apply(surgery.Layerwise(top=1))
    fit(top, 3)
    assert depths(moved(top, before)) == {3, 4}
    assert not moved(top.undo("layerwise"), before)

    head = base.apply(surgery.Classifier())
    fit(head, 2)
    between = bits(head)
    more = head.apply(surgery.Layerwise(top=1))
    fit(more, 2)
    undone = more.undo("layerwise")
    assert depths(moved(undone, between)) == {
        4
    }  # the head trains without it, too, and goes on from where it is
    assert moved(undone, between) == {"head.weight", "head.bias"}
    assert not moved(more.undo("layerwise").undo("classifier"), before)
    # Undone the other way round, what the classifier trained goes with the last that let it train.
    assert not moved(more.undo("classifier").undo("layerwise"), before)


def test_what_was_trained_before_a_selection_is_saved_with_it(tmp_path):
    base = program()
    fit(base, 2)
    before = bits(base)
    top = base.apply(surgery.Layerwise(top=1))
    fit(top, 2)
    top.save(tmp_path / "top")
    again = surgery.load(str(tmp_path / "top"), base=STACK)
    assert not moved(again, bits(top))
    assert not moved(again.undo("layerwise"), before)


def test_bitfit_left_out_and_undone():
    base = program()
    before, expected = bits(base), base.run()
    trained = base.apply(surgery.Bitfit())
    fit(trained, 6, lr=3e-2)
    assert not torch.equal(trained.run(), expected)
    out = trained.without("bitfit")
    assert torch.equal(out.run(), expected)
    assert not moved(out, before)
    assert not any(p.requires_grad for p in out.module().parameters())
    assert torch.equal(out.weighted({"bitfit": 1.0}).run(), trained.run())
    with pytest.raises(PassError, match=r"bitfit cannot be scaled; give it the weight 0 \(off\) or 1 \(on\)"):
        trained.weighted({"bitfit": 0.5})
    assert not moved(trained.undo("bitfit"), before)


# -- kept


def test_a_saved_program_keeps_all_of_it(tmp_path):
    base = program()
    for number, selection in enumerate(
        (
            surgery.Layerwise(decay=0.5, **ONE),
            surgery.GradualUnfreeze(every=2, decay=0.4),
            surgery.Filter(by="weight", count=3),
            surgery.Filter(fraction=0.5),
        )
    ):
        trained = base.apply(selection, surgery.Lora(target="mlp.*", rank=2, label=f"l{number}"))
        fit(trained, 3)
        path = tmp_path / str(number)
        trained.save(path)
        again = surgery.load(str(path), base=STACK)
        assert again.journal.to_json() == trained.journal.to_json()
        assert again.journal.entries[0].windows == trained.journal.entries[0].windows
        assert again.schedule == trained.schedule
        assert not moved(again, bits(trained))
        for name in trained.schedule.masks.values():
            assert again.tensors[name].dtype == torch.bool
            assert torch.equal(again.tensors[name], trained.tensors[name])
        assert again.count_parameters() == trained.count_parameters()
        assert again.module().advance(3) == trained.module().advance(3)
        before = bits(again)
        fit(again, 2)
        assert {n for n in moved(again, before) if ".lora_" not in n} <= {
            n for n in trained.journal.entries[0].trains if trained.trains(n)
        }
        lost = load_file(path / saved.INSERTED)
        if trained.schedule.masks:
            assert set(trained.schedule.masks.values()) <= lost.keys()


def test_a_directory_of_the_first_schema_loads(tmp_path):
    """It stores only trainable parameters; the list of trainable tensors is derived from the passes."""
    trained = program().apply(surgery.Freeze(target="!head"), surgery.Lora(target="mlp.*", rank=2))
    fit(trained, 2)
    trained.save(tmp_path / "old")
    file = tmp_path / "old" / saved.MANIFEST
    manifest = json.loads(file.read_text())
    manifest["schema"] = 1
    del manifest["parameters"]
    for entry in manifest["journal"]:
        for key in ("rates", "windows", "unit", "masks", "limits", "before"):
            entry.pop(key, None)
    manifest["checksum"] = saved._checksum(manifest)
    file.write_text(json.dumps(manifest))
    again = surgery.load(str(tmp_path / "old"), base=STACK)
    assert again.schedule == Schedule()
    assert not moved(again, bits(trained))
    expected = {n for n, p in trained.module().named_parameters() if p.requires_grad}
    assert {n for n, p in again.module().named_parameters() if p.requires_grad} == expected
    assert not moved(again.undo_all(), bits(program()))


def test_a_lost_mask_is_seen(tmp_path):
    trained = program().apply(surgery.Filter())
    trained.save(tmp_path / "masked")
    stored = load_file(tmp_path / "masked" / saved.INSERTED)
    stored.pop(next(iter(stored)))
    save_file(stored, tmp_path / "masked" / saved.INSERTED)
    manifest = json.loads((tmp_path / "masked" / saved.MANIFEST).read_text())
    manifest["files"][saved.INSERTED] = saved.sha256(tmp_path / "masked" / saved.INSERTED)
    manifest["checksum"] = saved._checksum(manifest)
    (tmp_path / "masked" / saved.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(JournalError, match=r"lacks the tensor .*_mask; restore it"):
        surgery.load(str(tmp_path / "masked"), base=STACK)


# -- the check that holds it


def _never_stop(self, step, advance=ProgramModule.advance):
    training = advance(self, step)
    for name, parameter in self.named_parameters():
        parameter.requires_grad_(name in self.__dict__["_trains"])
    return training


def _late(self, names, step):
    first, last = self.window(names)
    return first < step and (last is None or step < last)


FAULTS = {
    "advance does nothing": (ProgramModule, "advance", lambda self, step: [], "should"),
    "nothing stops": (ProgramModule, "advance", _never_stop, "but should not train"),
    "one step late": (Schedule, "trains", _late, "should train"),
    "no mask": (ProgramModule, "_hold", lambda self: None, "where its mask is False"),
    "the journal forgets windows": (Entry, "windows", property(lambda self: {}), "but should not train"),
    "rates are lost": (Schedule, "rate", lambda self, names: 1.0, "but its group has the rate"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_kit_sees_what_is_not_held(fault, monkeypatch):
    owner, name, wrong, says = FAULTS[fault]
    pass_ = surgery.Filter() if "mask" in fault else surgery.Layerwise(decay=0.5, **ONE)
    base = surgery.capture(Stack(), torch.randn(4, 64))
    if owner is not Entry:
        monkeypatch.setattr(owner, name, wrong)
    else:
        original = Entry.__init__

        def without(self, *args, **kwargs):
            original(self, *args, **{**kwargs, name: {}})

        monkeypatch.setattr(Entry, "__init__", without)
    with pytest.raises(ConformanceError, match=f"held.*{says}"):
        check_pass(pass_, base, checks=["held"])


def test_the_kit_sees_decay_under_a_mask(monkeypatch):
    """Weight decay is the only thing that a gradient mask cannot stop."""
    real = surgery.Program.parameter_groups

    def decaying(self, *args, **options):
        groups = real(self, *args, **options)
        for group in groups:
            group["weight_decay"] = 0.1
        return groups

    monkeypatch.setattr(surgery.Program, "parameter_groups", decaying)
    with pytest.raises(ConformanceError, match="where its mask is False"):
        check_pass(surgery.Filter(), surgery.capture(Stack(), torch.randn(4, 64)), checks=["held"])
