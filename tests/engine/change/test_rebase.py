"""Passes after a merge start from the merged weights: in memory, in a saved directory, from the command line."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import surgery
from surgery.api import PassError
from surgery.api.programs import JournalError
from surgery.testing import check_pass
from tests.shared import tiny
from tests.shared.commands import call

# Products in another order, in fp32 over a few layers.
CLOSE = 1e-5
# int8 codes of a weight are within 1/254 of its largest value.
CODES = 2e-2


def stirred(program: surgery.Program, seed: int = 1) -> surgery.Program:
    """The program with random values in everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in program.tensors.values():
            if isinstance(tensor, nn.Parameter):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return program


def far(a, b) -> float:
    a, b = (next(iter(x.values())) if isinstance(x, dict) else x for x in (a, b))
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module")
def own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    return surgery.capture(net.eval(), (torch.randn(3, 8),))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A tiny llama that ties its head, as a directory."""
    torch.manual_seed(0)
    config = tiny.llama()
    config.tie_word_embeddings = True
    path = tmp_path_factory.mktemp("tied")
    LlamaForCausalLM(config).eval().save_pretrained(path)
    return path


NEXT = {
    "quantize": (surgery.Quantize(target="all", format="int8"), CODES),
    "lora": (surgery.Lora(target="all", rank=2, label="second"), CLOSE),
    "dora": (surgery.Lora(target="all", rank=2, dora=True, label="second"), CLOSE),
    "low-rank": (surgery.LowRank(target="2", rank=7), None),
    "prune-filters": (surgery.PruneFilters(ratio=0.25), None),
    "sparse": (surgery.Sparse(target="all"), None),
    "full": (surgery.Full(), CLOSE),
}


@pytest.mark.parametrize("name", NEXT)
def test_any_pass_follows_a_merge(own, name, tmp_path):
    """A later pass acts on the merged weights. The reloaded directory has the same bits, and earlier programs stay."""
    pass_, tolerance = NEXT[name]
    adapted = stirred(own.apply(surgery.Lora(target="all", rank=2)))
    merged, before = adapted.merge(), own.run()
    done = merged.apply(pass_, freeze_base=False)
    if tolerance is not None:
        assert far(done.run(), adapted.run()) <= tolerance
    assert far(own.run(), adapted.run()) > 0.1
    assert not done.journal.merged
    assert merged.journal.merged
    done.save(tmp_path / "done")
    again = surgery.load(str(tmp_path / "done"), base=own)
    assert torch.equal(again.run(), done.run())
    again.save(tmp_path / "again")
    assert torch.equal(surgery.load(str(tmp_path / "again"), base=own).run(), done.run())
    assert torch.equal(own.run(), before)
    assert torch.equal(merged.undo("merge").undo("lora").run(), before)
    assert torch.equal(done.undo_all().run(), merged.run())


def test_adapter_after_adapter_merges_twice(own, tmp_path):
    """LoRA, merge, LoRA, merge, LoRA, merge: each merge equals the branches that it folds."""
    program = own
    for seed in range(3):
        adapted = stirred(program.apply(surgery.Lora(target="all", rank=2)), seed)
        assert far(program.run(), adapted.run()) > 0.05
        program = adapted.merge()
        assert far(program.run(), adapted.run()) <= CLOSE
    assert program.export(tmp_path / "m.onnx").parity.error <= CLOSE


def test_the_kit_after_a_merge(own):
    merged = stirred(own.apply(surgery.Lora(target="all", rank=2))).merge()
    check_pass(surgery.Lora(target="0,2", rank=2), merged.apply(surgery.Full()))


def test_merged_weights_train(own):
    merged = stirred(own.apply(surgery.Lora(target="all", rank=2))).merge()
    program = merged.apply(surgery.Full())
    module, before = program.module().train(), program.run()
    optimizer = torch.optim.SGD(program.parameter_groups(0.1))
    module(*own.example_inputs[0]).square().sum().backward()
    optimizer.step()
    assert far(program.run(), before) > 1e-3


@pytest.mark.parametrize("target", ["head", "embed.token"])
def test_a_merge_into_a_tied_weight_goes_on(tied, target, tmp_path):
    """The merge unties the weight; so do the directory, its transformers copy, and the file for generation."""
    base = surgery.load(f"hf:{tied}")
    adapted = stirred(base.apply(surgery.Lora(target=target, rank=2)))
    merged = adapted.merge()
    done = merged.apply(surgery.Quantize(target="mlp.*", format="int8"))
    alone = base.apply(surgery.Quantize(target="mlp.*", format="int8"))
    assert far(done.run(), adapted.run()) <= CODES
    assert far(alone.run(), adapted.run()) > 3 * CODES
    done.save(tmp_path / "done")
    assert torch.equal(*(next(iter(p.run().values())) for p in (surgery.load(str(tmp_path / "done")), done)))
    done.save(tmp_path / "alone", standalone=True)
    moved = surgery.load(str(tmp_path / "alone"))
    assert far(moved.run(), done.run()) <= CLOSE
    assert far(moved.undo_all().run(), merged.run()) <= CLOSE
    plain = merged.apply(surgery.Freeze(target="all"))
    plain.write(tmp_path / "hf", "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        assert far(model(**base.example_inputs[1]).logits, plain.run()) <= CLOSE


def test_the_base_of_a_loaded_program_stays_frozen(tied, tmp_path):
    """Merged weights are not a new head: they do not train under the next adapter, in memory or after loading."""
    base = surgery.load(f"hf:{tied}")
    merged = stirred(base.apply(surgery.Lora(target="attn.q", rank=2))).merge()
    merged.apply(surgery.Freeze(target="all")).save(tmp_path / "merged")
    for program in (merged, surgery.load(str(tmp_path / "merged"))):
        adapted = program.apply(surgery.Lora(target="attn.v", rank=2))
        assert {n.rpartition(".")[0] for n, s in adapted.parameter_sizes().items() if adapted.trains(n)} == {
            f"model.layers.{i}.self_attn.v_proj.lora" for i in (0, 1)
        }


def test_a_longer_weight_is_refused_with_a_way(tied, tmp_path):
    base = surgery.load(f"hf:{tied}")
    merged = base.apply(surgery.Vocab(tokens=3)).merge()
    with pytest.raises(PassError, match=r"made .* longer than the model's code expects.*--format hf"):
        merged.apply(surgery.Lora(target="attn.q"))
    merged.write(tmp_path / "longer", "hf")
    assert surgery.load(f"hf:{tmp_path / 'longer'}").apply(surgery.Lora(target="attn.q"))


def test_a_base_merged_in_place_is_refused(own):
    program = surgery.capture(own.base.loaded.module, own.example_inputs[0])
    merged = program.apply(surgery.Lora(target="all", rank=2)).merge(in_place=True)
    with pytest.raises(JournalError, match="merged in place"):
        merged.apply(surgery.Quantize(target="all", format="int8")).save("never")


def run(*args) -> str:
    code, said = call(*args)
    assert not code, said
    return said


def rounded(merged: surgery.Program, quantized) -> torch.Tensor:
    """Outputs of the eager model with merged weights, those of an int8 entry rounded to 127 steps of each row."""
    weights = dict(merged.module().state_dict())
    for site in quantized.sites:
        weight = weights[site.key.owner]
        step = weight.abs().amax(1, keepdim=True) / 127
        weights[site.key.owner] = (weight / step).round() * step
    args, kwargs = merged.example_inputs
    with torch.no_grad():
        return torch.func.functional_call(merged.base.loaded.module, weights, args, kwargs)


@pytest.mark.parametrize(
    "ref", ["py:tests.shared.models:attention", pytest.param("timm:test_vit", marks=pytest.mark.slow)]
)
def test_from_the_command_line(ref, tmp_path):
    """A model without a transformers directory: LoRA, merge, quantize, and the file that onnxruntime runs."""
    named = ("--base", ref) if ref.startswith("py:") else ()
    base = ref if named else None
    run(
        "apply",
        ref,
        *(() if named else ("--random",)),
        "--pass",
        "lora",
        "--target",
        "attn.*",
        "-o",
        tmp_path / "a",
    )
    adapted = stirred(surgery.load(str(tmp_path / "a"), base=base))
    adapted.save(tmp_path / "b")
    run("merge", tmp_path / "b", "-o", tmp_path / "m", *named)
    said = run(
        *("apply", tmp_path / "m", *named, "--pass", "quantize", "--target", "attn.*", "--format", "int8"),
        *("-o", tmp_path / "q"),
    )
    assert "the merged weights are the base now" in " ".join(said.split())
    program = surgery.load(str(tmp_path / "q"), base=base)
    assert far(program.run(), rounded(adapted.merge(), program.journal.entries[-1])) <= CLOSE
    assert far(program.undo_all().run(), adapted.run()) <= CLOSE
    run("export", tmp_path / "q", "-o", tmp_path / "m.onnx", *named)
