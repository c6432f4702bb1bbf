"""The public face of plugins: few names for the author of a pass, and every name of version 0.1 still there."""

from __future__ import annotations

import importlib
import warnings

import pytest

import surgery.api

MODULES = ("patterns", "structure", "algebra", "quantization", "training", "programs")
# `surgery.api.__all__` of version 0.1.0.
_NAMES = """
CONV EMBEDDING EXACT EXPERTS LEARNED LINEAR NORM AddLowRank Call Candidates CaptureError CodesPass
Combination Entry ExportError Field Found FrozenPart GraphPass Journal JournalError Learned
LoadError LoadOptions LoadedModel Match MergeOp MissingExtraError NearMiss Numerics Objective
OnPolicy OpIndex Pass PassError PassReport Pattern PatternPass Place PluginError Plugins Probe
Program Quantize RewritePass Rewriter ScaleAxis SelectPass Selection Setting Settings Site Source
SurgeryError TargetError TensorSpec TokenObjective TrainingError View WeightOp add_branch add_rows
any_of axis branch capture changes channels chat_template chat_tokens constant dtype_of
factor_shapes find find_tokenizer from_module gather_index hookimpl imported joined load
make_plugin_manager maybe messages_in nearest number ones_elsewhere ops part_index pattern read_rows
reference_of rounded scale_input scale_output shape_of split stored train value
"""
OF_0_1 = sorted(_NAMES.split())


def test_a_pass_author_needs_few_names():
    assert len(surgery.api.__all__) <= 45
    assert all(hasattr(surgery.api, name) for name in surgery.api.__all__)


@pytest.mark.parametrize("module", MODULES)
def test_each_module_has_what_it_lists(module):
    found = importlib.import_module(f"surgery.api.{module}")
    assert found.__all__ == sorted(found.__all__, key=lambda n: (not n.isupper(), n[0].islower(), n))
    for name in found.__all__:
        assert hasattr(found, name)


@pytest.mark.parametrize("name", OF_0_1)
def test_a_name_of_0_1_is_importable(name):
    if name in surgery.api.__all__:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert getattr(surgery.api, name) is not None
        return
    with pytest.warns(DeprecationWarning, match=r"surgery\.api\.\w+") as caught:
        old = getattr(surgery.api, name)
    message = str(caught[0].message)
    if name == "MergeOp":
        assert "surgery.api.Fold" in message
        assert old is surgery.api.Fold
        return
    place = message.rpartition(" ")[2]
    assert place in {f"surgery.api.{module}" for module in MODULES}
    assert getattr(importlib.import_module(place), name) is old


def test_a_name_that_never_was():
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = surgery.api.Nothing


def test_old_names_of_the_rewriter_work_with_a_warning():
    import torch

    import surgery as s

    class Old(surgery.api.RewritePass):
        name = "old"

        def tensors(self, site):
            return {"g": surgery.api.TensorSpec((site.out_features,), torch.nn.init.ones_)}

        def rewrite(self, site, g):
            return g.call(torch.ops.aten.mul.Tensor, g.out, g["g"])

    class Plugin:
        @surgery.api.hookimpl
        def surgery_passes(self):
            return [Old]

    from surgery.api.programs import make_plugin_manager

    plugins = make_plugin_manager(entry_points=False, plugins=(Plugin(),))
    base = s.capture(torch.nn.Linear(4, 3), torch.randn(2, 4), plugins=plugins)
    with pytest.warns(DeprecationWarning, match=r"Rewriter\.out is now Rewriter\.output"):
        program = base.apply(Old(target="all"))
    assert torch.equal(program.run(), base.run())
