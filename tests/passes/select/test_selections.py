"""Selections by kind and depth of parameters: which ones train, when, how fast, and no others."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import surgery
from surgery.cli import main
from surgery.common.errors import PassError, TargetError
from surgery.testing import CHECKS, check_pass
from tests.shared.models import convnet, forms
from tests.shared.stacks import STACK, Stack, bits, depth_of, fit, moved, program
from tests.techniques.models import program as model

QUICK = [name for name in CHECKS if name not in ("reload", "reexport", "unflatten", "onnx")]


def trains(adapted):
    return {n for n, p in adapted.module().named_parameters() if p.requires_grad}


def depths(adapted):
    return {depth_of(name) for name in trains(adapted)}


# -- by what it is


def test_full_and_freeze():
    base = program()
    names = set(base.parameter_names())
    assert trains(base.apply(surgery.Freeze(), surgery.Full())) == names
    assert trains(base.apply(surgery.Full(), surgery.Freeze(target="head"))) == names - {
        "head.weight",
        "head.bias",
    }
    assert trains(base.apply(surgery.Freeze(), surgery.Full(target="norm"))) == {
        n for n in names if "norm" in n
    }
    beside = base.apply(surgery.Full(), surgery.Lora(target="head", rank=2))
    assert trains(beside) == names | {"head.lora.A", "head.lora.B"}
    with pytest.raises(TargetError, match=r"'attn\.q' matches no parameter"):
        base.apply(surgery.Full(target="attn.q"))


def test_packed_weights_do_not_train():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.randint(-8, 8, (4, 4), dtype=torch.int8), requires_grad=False)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x @ self.codes.to(x.dtype))

    base = surgery.capture(Packed(), torch.randn(3, 4))
    for selection in (surgery.Full(), surgery.GradualUnfreeze(), surgery.Filter(target="all")):
        assert trains(base.apply(selection)) <= {"head.weight", "head.bias"}
    assert trains(base) == {"head.weight", "head.bias"}


def test_classifier():
    base = program()
    assert trains(base.apply(surgery.Classifier())) == {"head.weight", "head.bias"}
    with pytest.raises(
        PassError, match=r"^classifier: the model has no head .*--task text-classification.*--pass head"
    ):
        surgery.capture(Block(), torch.randn(3, 4)).apply(surgery.Classifier())


class Block(nn.Module):
    """A body without a head: its output is a sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.a(x).relu()
        return x + self.b(x).relu()


def test_a_new_head_trains_with_every_selection(minilm):
    """MiniLM's classifier is in no checkpoint: it is random, so it must train with every selection."""
    head = {"classifier.weight", "classifier.bias"}
    assert trains(minilm.apply(surgery.Classifier())) == head
    dense = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert trains(minilm.apply(surgery.Classifier(dense=True))) == head | dense
    for selection in (surgery.Embedding(), surgery.Filter(), surgery.Layerwise(bottom=1), surgery.Bitfit()):
        assert head <= trains(minilm.apply(selection)), selection
    assert not head & trains(minilm.apply(surgery.Layerwise(top=1, freeze_head=True)))
    narrow = minilm.apply(surgery.Layerwise(top=1, target="attn.*"))
    assert head <= trains(narrow)
    assert not dense & trains(narrow)


EMBEDDINGS = {
    "minilm": {
        "token": {"bert.embeddings.word_embeddings.weight"},
        "position": {"bert.embeddings.position_embeddings.weight"},
        "type": {"bert.embeddings.token_type_embeddings.weight"},
    },
    "vit": {
        "token": {"vit.embeddings.cls_token"},
        "position": {"vit.embeddings.position_embeddings"},
        "patch": {f"vit.embeddings.patch_embeddings.projection.{n}" for n in ("weight", "bias")},
    },
    "t5": {"token": {"shared.weight"}},
    "resnet18": {"stem": {"conv1.weight", "bn1.weight", "bn1.bias"}},
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embedding(name):
    base = model(name)
    kinds = EMBEDDINGS[name]
    fresh = set(base.base.fresh)
    for which, expected in kinds.items():
        assert trains(base.apply(surgery.Embedding(which=which))) == expected | fresh
    assert trains(base.apply(surgery.Embedding())) == set().union(*kinds.values()) | fresh
    missing = next(k for k in ("type", "patch") if k not in kinds)
    there = "none; use --which stem" if "stem" in kinds else ", ".join(sorted(kinds))
    with pytest.raises(PassError, match=f"^embedding: the model has no {missing} embeddings.*it has {there}"):
        base.apply(surgery.Embedding(which=missing))


def test_a_tied_head_and_its_embedding_are_one():
    base = surgery.capture(*forms())
    for selection in (surgery.Classifier(), surgery.Embedding()):
        assert trains(base.apply(selection)) == {"embed.weight"}
        assert base.apply(selection).trains("head.weight")


# -- by depth

RANGES = {
    "top": ({"top": 1}, {3, 4}),
    "top and embeddings": ({"top": 2, "embeddings": True}, {0, 2, 3, 4}),
    "bottom": ({"bottom": 1}, {0, 1, 4}),
    "fraction": ({"fraction": 0.3}, {3, 4}),
    "fraction of the bottom": ({"fraction": 0.5, "end": "bottom", "freeze_head": True}, {0, 1, 2}),
    "listed": ({"layers": "1,3"}, {1, 3, 4}),
    "a range": ({"layers": "0-2", "freeze_head": True}, {0, 1, 2}),
    "all": ({}, {0, 1, 2, 3, 4}),
    "no head": ({"freeze_head": True}, {0, 1, 2, 3}),
    "weights of one kind": ({"target": "mlp.up"}, {1, 2, 3}),
}


@pytest.mark.parametrize("name", RANGES)
def test_layerwise_ranges(name):
    options, expected = RANGES[name]
    assert depths(program().apply(surgery.Layerwise(**options))) == expected


def test_layerwise_rates_fall_with_the_distance_from_the_head():
    applied = program().apply(surgery.Layerwise(decay=0.9))
    for name in applied.parameter_names():
        assert applied.schedule.rate((name,)) == pytest.approx(0.9 ** (4 - depth_of(name)))


def test_one_at_a_time_is_one_depth_from_the_top_down():
    applied = program().apply(surgery.Layerwise(top=2, one_at_a_time=True, steps=10, unit="epoch"))
    assert applied.schedule.unit == "epoch"
    assert applied.schedule.changes == (10, 20)
    module = applied.module()
    seen = {step: {depth_of(n) for n in module.advance(step)} for step in (0, 9, 10, 19, 20, 29, 500)}
    assert seen == {0: {4}, 9: {4}, 10: {3}, 19: {3}, 20: {2}, 29: {2}, 500: {2}}


def test_gradual_unfreezing_adds_a_depth_each_time():
    applied = program().apply(surgery.GradualUnfreeze(decay=1 / 2.6, down_to=1))
    assert applied.schedule.unit == "epoch"
    module = applied.module()
    seen = [{depth_of(n) for n in module.advance(epoch)} for epoch in range(5)]
    assert seen == [{4}, {4, 3}, {4, 3, 2}, {4, 3, 2, 1}, {4, 3, 2, 1}]
    assert applied.schedule.rate(("blocks.0.up.weight",)) == pytest.approx(2.6**-3)
    assert not applied.trains("embed.weight")


def test_a_model_that_repeats_no_block_has_a_depth_for_each_weight():
    base = surgery.capture(*convnet())  # conv, norm, conv, linear
    assert trains(base.apply(surgery.Layerwise(top=1))) == {"3.weight", "3.bias", "7.weight", "7.bias"}
    assert trains(base.apply(surgery.Embedding())) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    module = base.apply(surgery.GradualUnfreeze(unit="step")).module()
    assert [len(module.advance(step)) for step in range(4)] == [2, 4, 8, 8]


def test_blocks_are_told_apart_under_passes_that_replace_their_ops():
    lowered = program().apply(surgery.LowRank(target="mlp.*", rank=2))
    applied = lowered.apply(surgery.Layerwise(top=1))
    assert {depth_of(n) for n in trains(applied) if n not in applied.tensors} == {3, 4}
    assert {n for n in applied.tensors if n not in trains(applied)} == set()  # the factors go on training


def test_a_head_that_a_pass_put_in_is_at_the_top():
    renewed = program().apply(surgery.Head(labels=5))
    own = set(renewed.tensors)
    for selection in (surgery.Classifier(), surgery.Layerwise(top=1)):
        applied = renewed.apply(selection)
        assert own <= trains(applied)
        assert {depth_of(n) for n in trains(applied) - own} <= {3, 4}
    module = renewed.apply(surgery.GradualUnfreeze()).module()
    assert own <= set(module.advance(0))


def test_adapters_train_beside_a_selection():
    """The pipeline freezes nothing here: the selection does, and does not affect adapters."""
    lora = surgery.Lora(target="mlp.up", rank=2)
    for order in ((lora, surgery.Layerwise(top=1)), (surgery.Layerwise(top=1), lora)):
        applied = program().apply(*order)
        assert [e.auto for e in applied.journal] == [False, False]
        own = {n for n in applied.parameter_names() if ".lora." in n}
        assert trains(applied) - own == {n for n in trains(applied) if depth_of(n) > 2} - own
        assert own <= trains(applied)
        before = bits(applied)
        fit(applied, 4)
        assert moved(applied, before) == trains(applied)


BAD = {
    "two ranges": ({"top": 1, "layers": "2"}, "--layers and --top each choose depths; give one"),
    "no steps": ({"one_at_a_time": True}, "--one-at-a-time needs --steps"),
    "steps alone": ({"steps": 3}, "--steps is for --one-at-a-time; add that"),
    "decay": ({"decay": 1.5}, "--decay is 1.5: input should be less than or equal to 1"),
    "unknown": ({"botom": 1}, "has no option --botom; did you mean 'bottom'"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_options(name):
    options, says = BAD[name]
    with pytest.raises(PassError, match=f"pass 'layerwise'.*{says}"):
        surgery.Layerwise.parse(options)


FAR = {
    "9": "--layers 9 is not a valid range; the model's blocks are 3: depths 0",
    "3-2": "--layers 3-2 is not a valid range; the model's blocks",
    "1-": "write depths and ranges, such as 2-5,8",
    "first": "write depths and ranges",
}


@pytest.mark.parametrize("layers", FAR)
def test_depths_that_are_not_there(layers):
    with pytest.raises(PassError, match=f"^layerwise: .*{FAR[layers]}"):
        program().apply(surgery.Layerwise(layers=layers))


def test_more_blocks_than_there_are_and_nothing_at_a_depth():
    with pytest.raises(
        PassError, match=r"^layerwise: 7 blocks are asked for; the model has 3: depths 0 \(embeddings\)"
    ):
        program().apply(surgery.Layerwise(top=7))
    with pytest.raises(PassError, match=r"^layerwise: no targeted parameter is at the chosen depths"):
        program().apply(surgery.Layerwise(target="head", freeze_head=True))
    with pytest.raises(
        PassError,
        match=r"^gradual-unfreeze: no targeted parameter is at depth 9 or above; .* head .* is at depth 4",
    ):
        program().apply(surgery.GradualUnfreeze(down_to=9))


# -- it learns

LEARN = {
    "full": (surgery.Full(), {0, 1, 2, 3, 4}),
    "top": (surgery.Layerwise(top=1, decay=0.8), {3, 4}),
    "bottom": (surgery.Layerwise(bottom=1), {0, 1, 4}),
    "classifier": (surgery.Classifier(), {4}),
    "one at a time": (surgery.Layerwise(one_at_a_time=True, steps=8), {0, 1, 2, 3, 4}),
    "gradual": (surgery.GradualUnfreeze(every=8, unit="step"), {0, 1, 2, 3, 4}),
    "embedding": (surgery.Embedding(which="stem"), {0}),
}


@pytest.mark.parametrize("name", LEARN)
def test_the_loss_on_digits_falls_and_nothing_else_moves(name):
    selection, expected = LEARN[name]
    applied = program().apply(selection)
    before = bits(applied)
    losses = fit(applied, 40, lr=2e-2)
    assert losses[-1] < 0.75 * losses[0], losses[::8]
    assert {depth_of(n) for n in moved(applied, before)} == expected
    assert moved(applied, before) == {n for n in applied.parameter_names() if applied.trains(n)}


def test_a_schedule_in_train_mode():
    """The graph of train mode reads the same parameters: windows hold there too; running statistics do move."""
    applied = surgery.load("py:tests.shared.models:convnet").apply(
        surgery.Layerwise(one_at_a_time=True, steps=1)
    )
    module = applied.module().train()
    (x,), _ = applied.example_inputs
    optimiser = torch.optim.AdamW(applied.parameter_groups(1e-2, weight_decay=0.1))
    for expected in ({"7"}, {"3"}, {"0", "1"}):
        module.advance(["7", "3", "0"].index(sorted(expected)[0]))
        before = bits(applied)
        optimiser.zero_grad()
        module(x).square().sum().backward()
        optimiser.step()
        statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
        assert {n.split(".")[0] for n in moved(applied, before) - statistics} == expected


# -- the kit and the command line

KIT = {
    "full": surgery.Full(),
    "embedding": surgery.Embedding(),
    "classifier": surgery.Classifier(),
    "layerwise": surgery.Layerwise(top=1, decay=0.5),
    "one at a time": surgery.Layerwise(one_at_a_time=True, steps=3),
    "gradual": surgery.GradualUnfreeze(every=2, decay=0.385),
}


@pytest.mark.parametrize("name", KIT)
def test_the_kit_on_vit(name):
    report = check_pass(KIT[name], model("vit"), checks=QUICK)
    assert {"numerics", "second", "undo", "gradients", "held", "input"} <= set(report.passed)
    assert set(report.skipped.values()) == {"a selection changes no graph"}


def test_the_whole_kit():
    report = check_pass(surgery.GradualUnfreeze(decay=0.5), surgery.load(STACK))
    assert report.ok
    assert "another process" in report.passed["reload"]
    assert report.passed["held"] == "4 tensors moved at epoch 0; 21 tensors moved at epoch 4"


def test_the_kit_on_a_program_that_has_selections_already():
    base = surgery.capture(Stack(), torch.randn(4, 64)).apply(
        surgery.GradualUnfreeze(unit="step"), surgery.Lora(target="mlp.*", rank=2)
    )
    assert check_pass(surgery.Freeze(target="norm"), base, checks=QUICK).ok
    assert check_pass(surgery.Layerwise(top=1), base, checks=QUICK).ok
    assert check_pass(surgery.Filter(), base, checks=QUICK).ok


@pytest.mark.slow
@pytest.mark.parametrize("which", ["minilm", "smollm2", "t5", "resnet18", "wav2vec2", "mixtral", "mamba"])
@pytest.mark.parametrize("name", KIT)
def test_the_kit_on_other_models(which, name):
    assert check_pass(KIT[name], model(which), checks=[*QUICK, "reload"]).ok


@pytest.fixture
def surgery_(capsys):
    """Run the command in this process; returns its output."""

    def run(*args):
        with pytest.raises(SystemExit) as done:
            main([str(a) for a in args])
        assert not done.value.code
        return capsys.readouterr().out

    return run


SAID = {
    ("layerwise", "--top", "1"): "layerwise: 9 parameters train, 12 do not",
    ("layerwise", "--one-at-a-time", "--steps", "10"): "5 windows over 40 steps, one after another",
    ("layerwise", "--fraction", "0.5", "--decay", "0.5"): "14 parameters train, 7 do not; rates 0.25 to 1",
    ("gradual-unfreeze", "--every", "2", "--unit", "epoch"): "5 windows over 8 epochs, each kept on",
    ("filter", "--fraction", "0.25"): "11 of them in part, 25% to 25% of their values",
    ("classifier",): "classifier: 2 parameters train",
}


@pytest.mark.parametrize("given", SAID, ids=" ".join)
def test_the_command_line_says_it_in_words(given, tmp_path, surgery_):
    said = surgery_("apply", STACK, "--pass", *given, "-o", tmp_path / "out")
    assert SAID[given].split(": ")[-1] in said
    planned = surgery_("plan", STACK, "--pass", *given)
    assert SAID[given].split(": ")[-1] in planned
    count = next(line for line in said.splitlines() if "trainable" in line).split(" trainable")[0].split()[-1]
    assert f"and then {count} train" in planned
    shown = surgery_("inspect", tmp_path / "out", "--base", STACK)
    assert f"applied: {given[0]} " in shown
    assert SAID[given].split(": ")[-1] in shown


def test_the_plan_for_machines(surgery_):
    (planned,) = json.loads(surgery_("plan", STACK, "--pass", "gradual-unfreeze", "--decay", "0.5", "--json"))
    assert planned["windows"]["embed.weight"] == [4, None]
    assert planned["rates"]["embed.weight"] == 0.0625
    assert planned["unit"] == "epoch"


def test_no_note_where_a_selection_settles_what_trains(surgery_):
    lora = ["--pass", "lora", "--target", "mlp.*", "--rank", "2"]
    assert "note:" not in surgery_("plan", STACK, *lora, "--pass", "layerwise", "--top", "1")
    assert "note: --pass freeze" in surgery_("plan", STACK, *lora, "--pass", "freeze", "--target", "norm")


def test_trained_weights_without_an_adapter_become_a_transformers_directory(tmp_path, surgery_):
    base = model("vit")
    trained = base.apply(surgery.Layerwise(top=1))
    module = trained.module()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    trained.save(tmp_path / "trained")
    said = surgery_("merge", tmp_path / "trained", "--format", "hf", "-o", tmp_path / "hf")
    assert "no adapter to fold; the weights of the base are kept as trained" in said
    again = surgery.load(f"hf:{tmp_path / 'hf'}")
    assert torch.equal(
        again.run(*trained.example_inputs[0], **trained.example_inputs[1])["logits"], trained.run()["logits"]
    )
