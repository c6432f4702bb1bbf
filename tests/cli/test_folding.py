"""inspect, plan and diff in a terminal: folded blocks, --depth, --role, --all, 80 columns, named dimensions."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
import torch
from transformers import LlamaForCausalLM

import surgery
from surgery.cli import main
from surgery.common.folding import Folding, Row
from surgery.engine.replaced import replaced_weights
from tests.conftest import minilm_path
from tests.shared import tiny

CONVNET = "py:tests.shared.models:convnet"


@pytest.fixture
def said(monkeypatch):
    """Runs a command in a terminal of 80 columns; every line of its output must fit."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*args):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
            main([str(arg) for arg in args])
        assert not stopped.value.code
        assert max(map(len, out.getvalue().splitlines())) <= 80
        return out.getvalue()

    return run


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A llama of four blocks, and the same with int4 MLPs and LoRA on q of the blocks 1 and 2."""
    where = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = tiny.llama()
    config.num_hidden_layers = 4
    LlamaForCausalLM(config).save_pretrained(where / "base")
    program = surgery.load(f"hf:{where / 'base'}")
    changed = program.apply(
        surgery.Quantize(target="mlp.*", format="int4", group=16),
        surgery.Lora(target="model.layers.1.self_attn.q_proj,model.layers.2.self_attn.q_proj", rank=2),
    )
    changed.save(where / "changed")
    return where


def rows(*paths):
    return [Row(path, alike, path) for path, alike in paths]


def test_runs_of_equal_blocks_fold_and_others_do_not():
    given = rows(*[(f"m.layers.{i}.{leaf}", leaf + "!" * (i == 2)) for i in range(6) for leaf in ("q", "k")])
    shown = [(path, count) for path, count, _ in Folding().tree(given).lines()]
    assert shown == [
        (f"m.layers.{where}.{leaf}", count)
        for where, count in (("0–1", 2), ("2", 1), ("3–5", 3))
        for leaf in ("q", "k")
    ]
    assert len(list(Folding(all=True).tree(given).lines())) == 12


def test_blocks_fold_in_the_order_of_their_numbers():
    """Passes put their tensors in front, so that a graph lists the last block first."""
    given = rows(*[(f"layers.{i}.q", "") for i in (11, 10, 9, 8)])
    assert [path for path, _, _ in Folding().tree(given).lines()] == ["layers.8–11.q"]


def test_a_gap_in_the_numbers_ends_a_run():
    given = rows(*[(f"layers.{i}", "") for i in (0, 1, 3)])
    assert [(p, n) for p, n, _ in Folding().tree(given).lines()] == [("layers.0–1", 2), ("layers.3", 1)]


def test_depth_counts_a_list_and_its_modules_as_one_level():
    given = rows(*[(f"m.layers.{i}.attn.q", "") for i in range(3)], ("m.norm", ""))
    shown = [(p, n, item.cut, len(item.below)) for p, n, item in Folding(depth=2).tree(given).lines()]
    assert shown == [("m.layers.0–2", 3, True, 3), ("m.norm", 1, False, 1)]


def test_inspect_marks_adapters_at_their_sites(llama, said):
    shown = said("inspect", llama / "changed")
    lines = shown.splitlines()
    blocks = [line.split("layers.")[1].split()[0] for line in lines if "── layers." in line]
    assert blocks == ["0", "1–2", "3"]
    assert sum("q_proj  attn.q" in line for line in lines) == 3
    assert [line for line in lines if "+lora" in line] == [line for line in lines if "q_proj" in line][1:2]
    assert shown.count("+quantize") == 9
    assert "input_ids[batch×seq] int64" in shown
    assert "outputs: logits[batch×seq×101] float32" in shown
    # 12 weights of 64·32 values in f32 become half a byte for each value, and a scale of f32 for each group of 16.
    before, after = 12 * 64 * 32 * 4, 12 * 64 * 32 * (0.5 + 4 / 16)
    assert (
        f"quantize: 12 weights with 24.6k values are codes: {before / 1e3:.3g} kB → {after / 1e3:.3g} kB"
        in shown
    )


def test_a_folded_block_says_which_adapters_it_has(llama, said):
    flat = said("inspect", llama / "changed", "--depth", "2")
    folded = [line for line in flat.splitlines() if "layers.1–2" in line]
    assert len(folded) == 1
    assert folded[0].endswith("sites  frozen  +lora  +quantize")


def test_inspect_takes_depth_role_and_all(llama, said):
    flat = said("inspect", f"hf:{llama / 'base'}", "--depth", "2")
    assert "layers.0–3 ×4  36.9k in 28 sites  trains" in flat
    assert "q_proj" not in flat
    only = said("inspect", f"hf:{llama / 'base'}", "--role", "attn.[qk]")
    assert "q_proj" in only
    assert "v_proj" not in only
    assert "embed_tokens" not in only
    assert said("inspect", f"hf:{llama / 'base'}", "--all").count("q_proj") == 4
    assert "no site has a role like nope; the roles are attn.k, " in said(
        "inspect", f"hf:{llama / 'base'}", "--role", "nope"
    )


def test_plan_folds_and_sums(llama, said):
    lora = ["--pass", "lora", "--target", "attn.*,head", "--rank", "2"]
    shown = said("plan", f"hf:{llama / 'base'}", *lora)
    assert "model.layers.0–3.self_attn.q_proj ×4" in shown
    assert said("plan", f"hf:{llama / 'base'}", "--all", *lora).count("self_attn.q_proj") == 4
    cut = said("plan", f"hf:{llama / 'base'}", "--depth", "2", *lora)
    # Rank 2: q and o add 2·(32+32) values, k and v add 2·(32+16), in each of four blocks.
    line = next(line for line in cut.splitlines() if "model.layers.0–3 ×4" in line)
    assert line.split()[-3:] == ["16", "sites", f"{4 * (2 * 128 + 2 * 96) / 1e3:.3g}k"]


def test_diff_folds_by_module_and_names_the_pass(llama, said):
    shown = said("diff", f"hf:{llama / 'base'}", llama / "changed")
    assert "model.layers.1–2.self_attn.q_proj ×2" in shown
    assert "model.layers.1–2.mlp.up_proj ×2" in shown
    assert "batch×seq×2" in shown
    added = next(line for line in shown.splitlines() if "quantize.codes" in line)
    assert added.split()[0] == "+"
    assert added.split()[-1] == "quantize"
    assert "24.6k of them as codes" in shown
    only = said("diff", f"hf:{llama / 'base'}", llama / "changed", "--role", "attn.q")
    assert "lora.A" in only
    assert "quantize.codes" not in only
    cut = said("diff", f"hf:{llama / 'base'}", llama / "changed", "--depth", "2")
    assert "up_proj" not in cut
    assert "model.layers.1–2 ×2" in cut


def test_what_is_left_after_pruning(tmp_path, said):
    program = surgery.load(CONVNET)
    pruned = program.apply(surgery.PruneFilters(target="all", ratio=0.5))
    (change,) = replaced_weights(pruned)
    assert not change.packed
    left = pruned.count_parameters()[0]
    # The bias of the last layer, of 4 values, is as it was; the running statistics are no parameters.
    assert change.after - 8 + 4 == left
    pruned.save(tmp_path / "pruned")
    assert f"prune-filters: {change.after} of {change.before} left" in said(
        "inspect", tmp_path / "pruned", "--base", CONVNET
    )
    shown = said("diff", CONVNET, tmp_path / "pruned", "--base", CONVNET)
    assert f"parameters: {left} of {program.count_parameters()[0]} left" in shown
    planned = said("plan", CONVNET, "--pass", "prune-filters", "--target", "all", "--ratio", "0.5")
    assert f"{left} of {program.count_parameters()[0]} left" in planned
    # What goes is in short numbers: eight digits of multiply-adds would break the line.
    assert re.search(r"→ \d+; [\d.]+k? parameters, [\d.]+k? MACs fewer *$", planned, re.M)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["minilm", "timm:resnet18"])
def test_real_models_fit_in_80_columns(reference, said):
    reference = f"hf:{minilm_path()}" if reference == "minilm" else reference
    random = ["--random"] if reference.startswith("timm:") else []
    shown = said("inspect", reference, *random)
    assert "layer.0–5 ×6" in shown or "layer1.0–1 ×2" in shown
    said("plan", reference, *random, "--pass", "lora", "--target", "all", "--rank", "2")
