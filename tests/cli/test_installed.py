"""`surgery plugins`, lists by family, and the options of one pass behind `--pass NAME --help`."""

from __future__ import annotations

import json

import pytest

from surgery.cli.families import FAMILIES, by_family
from surgery.cli.installed import distributions
from surgery.common.hooks import hookimpl
from surgery.common.plugins import make_plugin_manager
from surgery.engine.registry import passes
from tests.shared.commands import call

FAMILY = {
    "lora": "adds trained tensors",
    "vocab": "adds trained tensors",
    "full": "selects what trains",
    "quantize": "changes the form of weights",
    "prune-filters": "makes the model smaller",
    "fold-batchnorm": "replaces ops",
}


def test_every_pass_has_a_family():
    found = by_family(passes(make_plugin_manager()).values())
    assert list(found) == list(FAMILIES)
    of = {info.name: title for title, infos in found.items() for info in infos}
    assert {name: of[name] for name in FAMILY} == FAMILY
    code, said = call("passes")
    assert code == 0
    assert [line for line in said.splitlines() if line in FAMILIES] == list(FAMILIES)
    assert "from torch-surgery-ia3" in said


def test_the_list_names_every_distribution_and_hook():
    code, said = call("plugins", "--json")
    assert code == 0
    listed = {each["name"]: each["hooks"] for each in json.loads(said)["plugins"]}
    assert "lora" in listed["torch-surgery"]["surgery_passes"]
    assert listed["torch-surgery-ia3"] == {"surgery_passes": ["ia3"]}
    assert (
        "surgery_torchao.quantize_dequantize.default"
        in (listed["torch-surgery-torchao"]["surgery_onnx_lowerings"])
    )
    code, said = call("plugins")
    assert code == 0
    assert "torch-surgery-ia3 0.1.0" in said


class Loud:
    """A plugin whose hooks all do something, one of them too much."""

    @hookimpl
    def surgery_load_schemes(self):
        return ["hf", "loud"]

    @hookimpl
    def surgery_load_model(self, ref):
        return None

    @hookimpl
    def surgery_after_pass(self, result):
        return None


def test_what_is_left_out_is_listed():
    plugins = make_plugin_manager(plugins=(Loud(),))
    own = next(d for d in distributions(plugins) if d.name == "Loud")
    assert own.hooks == {
        "surgery_load_model": [],
        "surgery_load_schemes": ["hf", "loud"],
        "surgery_after_pass": [],
    }
    assert sorted(plugins.schemes) == ["diffusers", "hf", "loud", "py", "timm"]
    assert any("does not load hf" in note for note in plugins.notes)


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (("apply", "--pass", "lora", "--help"), "--svd-iterations"),
        (("plan", "hf:x", "--pass=lora", "--rank", "4", "-h"), "--svd-iterations"),
        (("apply", "x", "--pass", "full", "--pass", "sparse", "--help"), "--sparsity"),
        (("train", "--objective", "sft", "--help"), "--max-length"),
    ],
)
def test_help_after_a_name_shows_its_options(args, shown):
    code, said = call(*args)
    assert code == 0
    assert shown in said
    assert "Usage:" not in said


def test_help_of_a_wrong_name_is_one_line():
    code, said = call("apply", "--pass", "lor", "--help")
    assert code == 2
    assert said == "error: there is no pass 'lor'; did you mean 'lora' or 'low-rank'?\n"
