"""The conformance kit passes correct passes, and each of its checks catches a planted fault."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import surgery
from surgery.api import ADAPTER, LINEAR, RewritePass, ScaleAxis, TensorSpec, hookimpl, rounded, scale_output
from surgery.api.programs import make_plugin_manager
from surgery.engine.contract.base import default_names
from surgery.testing import CHECKS, ConformanceError, check_pass
from tests.conftest import minilm_path
from tests.shared.models import convnet, forms

aten = torch.ops.aten
CHEAP = [name for name in CHECKS if name not in ("reload", "reexport", "unflatten", "onnx")]


def green(pass_, program, skipped=(), **options):
    report = check_pass(pass_, program, **options)
    print(report)
    assert report.ok
    assert set(report.skipped) == set(skipped), report
    return report


# -- what is right


def test_lora_on_minilm():
    """Two layers of it: what more layers add is time."""
    program = surgery.load(f"hf:{minilm_path()}", model_kwargs={"num_hidden_layers": 2})
    report = green(surgery.Lora(target="attn.*,embed.token", rank=4), program, skipped=["tied"])
    assert "another process" in report.passed["reload"]


def test_lora_on_gpt2_with_tied_embeddings(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    program = surgery.load(f"hf:{tmp_path}")
    report = green(surgery.Lora(target="attn.*,mlp.*,embed.token,head", rank=2), program)
    assert "transformer.wte, lm_head" in report.passed["tied"]
    green(surgery.Lora(target="attn.q,attn.v", rank=2, label="parts"), program, checks=CHEAP)


def test_lora_on_a_convolutional_net():
    green(
        surgery.Lora(target="all,!1", rank=2),
        surgery.load("py:tests.shared.models:convnet"),
        skipped=["tied"],
    )


def test_lora_on_every_form_of_weight():
    report = green(surgery.Lora(target="all,!norm", rank=2), surgery.capture(*forms()))
    assert "no reference" in report.passed["reload"]


def test_a_program_that_has_an_adapter_already():
    program = surgery.capture(*convnet()).apply(surgery.Lora(target="0,7", rank=2, label="first"))
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.add_(0.3)
    green(surgery.Lora(target="0,3,7", rank=2), program, checks=CHEAP, skipped=["tied"])


def test_half_precision():
    program = surgery.capture(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).bfloat16(), torch.randn(4, 8).bfloat16()
    )
    report = green(surgery.Lora(target="all", rank=2), program, checks=CHEAP, skipped=["tied"])
    assert "half precision" in report.passed["gradients"]


def test_a_selection():
    report = check_pass(surgery.Freeze(target="0"), surgery.capture(*convnet()), checks=[*CHEAP, "reload"])
    assert {"numerics", "second", "undo", "gradients", "input", "reload"} <= set(report.passed)
    assert report.skipped["merge"] == "a selection changes no graph"


# -- planted faults


class Unmerged(RewritePass):
    """Scales outputs; it is not merged, nor scaled by a weight."""

    name: ClassVar[str] = "scale"
    on: ClassVar[tuple[str, ...]] = (LINEAR,)

    def tensors(self, site):
        return {"s": TensorSpec((site.out_features,), nn.init.ones_)}

    def rewrite(self, site, g):
        return scale_output(site, g, g["s"])


class Scale(Unmerged):
    """Right in everything; the faults below are made from it."""

    effect = replace(ADAPTER, scalable=True)

    def merge(self, site, tensors, weight):
        factor = 1 + weight * (tensors["s"] - 1)
        return {"weight": ScaleAxis(site, factor), "bias": ScaleAxis(site, factor, bias=True)}


class NotExact(Scale):
    """Fault at one site only."""

    def tensors(self, site):
        value = torch.linspace(1, 1.01 if site.path == "2" else 1, site.out_features)
        return {"s": TensorSpec(tuple(value.shape), value=value)}


class OverItsTolerance(NotExact):
    numerics = rounded(1e-5, "it says so")


class FixedBatch(Scale):
    def rewrite(self, site, g):
        return g.call(aten.mul.Tensor, g.output, g.call(aten.expand.default, g["s"], [4, site.out_features]))


class WrongMerge(Scale):
    def merge(self, site, tensors, weight):
        return {
            "weight": ScaleAxis(site, tensors["s"]),
            "bias": ScaleAxis(site, tensors["s"] * 1.05, bias=True),
        }


class MergesNoBias(Scale):
    def merge(self, site, tensors, weight):
        return {"weight": super().merge(site, tensors, weight)["weight"]}


class ForgetsWeight(Scale):
    def rewrite(self, site, g):
        return g.call(aten.mul.Tensor, g.output, g["s"])


class ForgetsWeightInMerge(Scale):
    def merge(self, site, tensors, weight):
        return super().merge(site, tensors, 1.0)


class Detached(Scale):
    effect = ADAPTER

    def rewrite(self, site, g):
        return g.call(aten.mul.Tensor, g.output, g.call(aten.detach.default, g["s"]))


class HalfDetached(Scale):
    """The values are right, the slope is half of what it should be."""

    effect = ADAPTER

    def rewrite(self, site, g):
        half = g.call(aten.mul.Scalar, g["s"], 0.5)
        other = g.call(aten.detach.default, half)
        return g.call(aten.mul.Tensor, g.output, g.call(aten.add.Tensor, half, other))


class CutsTheBase(Scale):
    """The base's output is detached: what stands below it no longer learns."""

    effect = ADAPTER

    def check(self, site):
        return "one is enough" if site.path == "0" else None

    def rewrite(self, site, g):
        return g.call(aten.mul.Tensor, g.call(aten.detach.default, g.output), g["s"])


class ReadsAFrozenCopy(Scale):
    """The op reads a copy that does not train, so the base's weight no longer learns."""

    def tensors(self, site):
        copy = TensorSpec(site.shape, lambda t: t.copy_(site.probe.weight(site)), trainable=False)
        return {**super().tensors(site), "copy": copy}

    def rewrite(self, site, g):
        g.swap_weight(lambda weight: g["copy"])
        return super().rewrite(site, g)


class RefusesASecondForNoReason(Scale):
    """It may refuse one because of the first, if it says so."""

    def check(self, site):
        return "enough is enough" if site.probe.program.journal.by_pass("scale") else None


class LeavesNodes(Scale):
    def rewrite(self, site, g):
        g.call(aten.neg.default, g.output)
        return super().rewrite(site, g)


class PastTheRewriter(Scale):
    def rewrite(self, site, g):
        value = super().rewrite(site, g)
        with g.graph.inserting_before(value):
            doubled = g.graph.call_function(aten.clone.default, (value.args[1],))
        doubled.meta["val"] = value.args[1].meta["val"]
        value.update_arg(1, doubled)
        return value


class NoStack(Scale):
    def rewrite(self, site, g):
        value = super().rewrite(site, g)
        del value.meta["nn_module_stack"]
        return value


class Unused(Scale):
    def tensors(self, site):
        return {**super().tensors(site), "spare": TensorSpec((3,))}


class Dead(Unmerged):
    effect = replace(ADAPTER, scalable=True)

    def rewrite(self, site, g):
        return g.call(aten.add.Tensor, g.output, g.call(aten.mul.Scalar, g["s"], 0.0))


class TouchesItsNeighbour(Scale):
    """Rewires a node of the model by hand, to the same value."""

    def rewrite(self, site, g):
        relu = next((n for n in g.graph.nodes if n.target is aten.relu.default), None)
        if relu is not None:
            relu.target = aten.clamp_min.default
            relu.args = (*relu.args, 0)
        return super().rewrite(site, g)


class ChangesTheBaseGraph(Scale):
    """Merging leaves a node in the captured graph."""

    def merge(self, site, tensors, weight):
        node = site.calls[0].node
        with node.graph.inserting_after(node):
            node.graph.call_function(aten.neg.default, (node,)).meta["val"] = node.meta["val"]
        return super().merge(site, tensors, weight)


class DrawsAtReplay(Unmerged):
    """Every build of the graph is another, once it is trained."""

    def rewrite(self, site, g):
        more = g.call(aten.mul.Scalar, g.call(aten.sub.Scalar, g["s"], 1), 1 + random.random())
        return g.call(aten.mul.Tensor, g.output, g.call(aten.add.Scalar, more, 1))


class WritesIntoTheBase(Scale):
    """Its merge works on the base's own storage."""

    def merge(self, site, tensors, weight):
        call = site.calls[0]
        with torch.no_grad():
            call.node.graph.owning_module.get_parameter(call.weight.target).mul_(1.01)
        return super().merge(site, tensors, weight)


class IgnoresItsLabel(Scale):
    def names(self, site, tensors):
        return default_names(self.model_copy(update={"label": ""}), site, tensors)


class EditsWhilePlanning(Scale):
    def check(self, site):
        node = site.calls[0].node
        with node.graph.inserting_after(node):
            node.graph.call_function(aten.neg.default, (node,)).meta["val"] = node.meta["val"]
        return


@torch.library.custom_op("surgery_tests::scale", mutates_args=())
def scale_op(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return x * s


@scale_op.register_fake
def _(x, s):
    return x * s


scale_op.register_autograd(
    lambda ctx, grad: (grad * ctx.saved_tensors[1], (grad * ctx.saved_tensors[0]).sum(0)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class NoLowering(Scale):
    effect = ADAPTER

    def rewrite(self, site, g):
        return g.call(torch.ops.surgery_tests.scale.default, g.output, g["s"])


FAULTS = {
    NotExact: ("numerics", "declares exact, but inserting it moves"),
    OverItsTolerance: ("numerics", "declares rounded"),
    FixedBatch: ("numerics", ""),
    TouchesItsNeighbour: ("untouched", "relu"),
    LeavesNodes: ("inserted", "left behind"),
    PastTheRewriter: ("inserted", "not inserted through the Rewriter"),
    NoStack: ("inserted", "nn_module_stack"),
    Unused: ("inserted", "'spare' is declared and never used"),
    Dead: ("effect", "do"),
    IgnoresItsLabel: ("second", "is taken"),
    RefusesASecondForNoReason: ("second", "enough is enough"),
    WrongMerge: ("merge", "merging moves the outputs"),
    MergesNoBias: ("merge", "merging moves the outputs"),
    ChangesTheBaseGraph: ("restored", "graph"),
    ForgetsWeight: ("weights", "has to use g.weight"),
    ForgetsWeightInMerge: ("weights", "differ by"),
    DrawsAtReplay: ("second", "does not restore the first"),
    WritesIntoTheBase: ("merge", ""),
    EditsWhilePlanning: ("input", "graph"),
    Detached: ("gradients", "none reaches"),
    HalfDetached: ("gradients", "something is detached"),
    CutsTheBase: ("gradients", "none reaches 0.weight of the base"),
    ReadsAFrozenCopy: ("gradients", "none reaches 0.weight of the base"),
    NoLowering: ("onnx", "scale"),
}


def program_for(*classes):
    class Plugin:
        @hookimpl
        def surgery_passes(self):
            return list(classes)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.LayerNorm(5))
    return surgery.capture(net, torch.randn(4, 6), plugins=make_plugin_manager(plugins=(Plugin(),)))


def test_the_pass_that_the_faults_are_made_from_is_right():
    report = green(Scale(target="0,2"), program_for(Scale), skipped=["tied"])
    assert "1 sites of 3 refused" in report.passed["untouched"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda cls: cls.__name__)
def test_a_fault_is_caught_by_its_check(fault):
    check, says = FAULTS[fault]
    before = [name for name in CHECKS if name in CHEAP]
    checks = before[: before.index(check) + 1] if check in before else [*before, check]
    with pytest.raises(ConformanceError) as caught:
        check_pass(fault(target="0,2"), program_for(fault), checks=checks)
    assert caught.value.check == check
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"scale: {check}")


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (DrawsAtReplay, "reload"),
        (FixedBatch, "reexport"),
        (FixedBatch, "unflatten"),
        (WritesIntoTheBase, "restored"),
        (EditsWhilePlanning, "input"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_check_catches_it_alone(fault, check):
    """An earlier check would find these faults too; here each check must find its fault alone."""
    with pytest.raises(ConformanceError, match=f"scale: {check}"):
        check_pass(fault(target="0,2"), program_for(fault), checks=[check])


def test_a_wrong_merge_of_a_tied_weight_is_caught():
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    plugins = program_for(WrongMerge).base.plugins
    with pytest.raises(ConformanceError, match="scale: tied at 0: merging moves"):
        check_pass(
            WrongMerge(target="0,2"),
            surgery.capture(net, torch.randn(4, 6), plugins=plugins),
            checks=["effect", "tied"],
        )


def test_the_site_at_fault_is_named():
    with pytest.raises(ConformanceError, match="scale: numerics at 2: "):
        check_pass(NotExact(target="0,2"), program_for(NotExact))


def test_failures_can_be_collected():
    report = check_pass(ForgetsWeight(target="0"), program_for(ForgetsWeight), checks=CHEAP, raises=False)
    assert list(report.failed) == ["weights"]
    assert not report.ok
    assert "failed" in str(report)


def test_what_merges_nothing_is_reported():
    class NoMerge(Unmerged):
        effect = replace(ADAPTER, scalable=True)

        def rewrite(self, site, g):
            return scale_output(site, g, g["s"])

    report = check_pass(NoMerge(target="0,2"), program_for(NoMerge), checks=CHEAP)
    assert report.skipped["merge"] == "the pass merges nothing (its class defines no merge)"
    assert "merges nothing" in report.passed["weights"]


def test_an_unknown_check_is_an_error():
    with pytest.raises(ValueError, match="did you mean 'merge'"):
        check_pass(Scale(target="0"), program_for(Scale), checks=["merg"])
