"""Checkpoints of PEFT that no pass of ours computes, and forms of LoRA and IA³ that PEFT stores in its own way.

The base is a small module with every kind of layer that PEFT adapts. PEFT makes an adapter, which is moved to random
values and saved. The imported program must give PEFT's outputs, also merged; written again, PEFT's own class must give
them too. `python -m tests.zoo.peft_table` does the same for all cases of PEFT's own tests.
"""

from __future__ import annotations

import dataclasses
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import surgery
from surgery.common.errors import ExportError, LoadError

# fp32, sums in another order; a merged weight is rounded once more. Over the largest output.
TOLERANCE, MERGED = 1e-5, 1e-4


class Weighted(nn.Module):
    """A product with a parameter that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 10) / 4)

    def forward(self, x):
        return x @ self.weight


class Layers(nn.Module):
    """Every kind of layer that PEFT adapts, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv1d = nn.Conv1d(8, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.conv2d = nn.Conv2d(1, 4, 3, padding=1)
        self.plain = nn.Linear(8, 12)
        self.turned = Conv1D(12, 12)
        self.weighted = Weighted()
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 6)

    def forward(self, ids):
        x = self.emb(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.grouped(self.conv1d(x.transpose(1, 2)).tanh()).transpose(1, 2)
        x = x + self.conv2d(x.unsqueeze(1)).sum(1).tanh()
        x = self.turned(self.plain(x).tanh()).tanh()
        return self.head(self.norm(self.weighted(x)))


def module() -> nn.Module:
    torch.manual_seed(0)
    return Layers().eval()


IDS = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base():
    return surgery.capture(module(), {"ids": IDS})


def checkpoint(config, folder):
    """A checkpoint of PEFT with random values in a folder, and PEFT's outputs."""
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(module(), config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    parameter.add_(torch.randn(parameter.shape) * 0.2)
        model.save_pretrained(folder)
        with torch.no_grad():
            return model(IDS)


def by_peft(folder):
    """Outputs of PEFT's model of a checkpoint, in which no tensor is missing."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(module(), folder).eval()
    assert not [w for w in said if "missing" in str(w.message)]
    with torch.no_grad():
        return model(IDS)


def agree(got, expected, allowed=TOLERANCE):
    assert float((got - expected).abs().max()) <= allowed * float(expected.abs().max())


LORA = {"r": 4, "lora_alpha": 6}
OURS = {
    "dora on convolutions": peft.LoraConfig(**LORA, use_dora=True, target_modules=["conv1d", "conv2d", "plain"]),
    "lora_bias": peft.LoraConfig(**LORA, lora_bias=True, target_modules=["plain", "turned", "conv2d"]),
    "a parameter": peft.LoraConfig(
        **LORA, target_modules=["plain"], target_parameters=["weighted.weight"]
    ),
    "attention": peft.LoraConfig(**LORA, target_modules=["attention"]),
    "rows of an embedding": peft.LoraConfig(
        **LORA, target_modules=["plain"], trainable_token_indices={"emb": [3, 0, 7]}
    ),
    "block-diagonal": peft.LoraConfig(
        **LORA,
        target_modules=["plain", "head"],
        use_bdlora=peft.tuners.lora.config.BdLoraConfig(
            target_modules_bd_a=["plain"], target_modules_bd_b=["head"], nblocks=2
        ),
    ),
    "mica": peft.LoraConfig(**LORA, init_lora_weights="mica", target_modules=["plain"]),
    "bias of adapted layers": peft.LoraConfig(**LORA, bias="lora_only", target_modules=["plain", "turned"]),
    "all biases": peft.LoraConfig(**LORA, bias="all", target_modules=["plain"]),
    "both layouts": peft.LoraConfig(**LORA, target_modules=["plain", "turned"]),
    "ia3 on a convolution's input": peft.IA3Config(
        target_modules=["conv2d", "plain", "turned"], feedforward_modules=["conv2d", "turned"]
    ),
    "ia3 on a convolution's output": peft.IA3Config(
        target_modules=["conv2d", "plain"], feedforward_modules=["plain"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_forms_that_our_passes_have(name, base, tmp_path):
    expected = checkpoint(OURS[name], tmp_path / "theirs")
    program = surgery.import_peft(tmp_path / "theirs", base)
    assert "delta" not in {entry.id for entry in program.journal}
    agree(program.run(ids=IDS), expected)
    agree(program.merge().run(ids=IDS), expected, MERGED)
    surgery.export_peft(program, tmp_path / "ours")
    agree(by_peft(tmp_path / "ours"), expected)


OTHERS = {
    "loha": peft.LoHaConfig(target_modules=["plain", "conv1d", "conv2d"]),
    "oft": peft.OFTConfig(target_modules=["plain", "head"], oft_block_size=0, r=1),
    "vera": peft.VeraConfig(target_modules=["plain"], r=4),  # its projections are made from a seed
    "road": peft.RoadConfig(target_modules=["plain"], group_size=2),  # changes the bias too
    "norms": peft.LNTuningConfig(target_modules=["norm"], modules_to_save=["head"]),
    "tokens": peft.TrainableTokensConfig(target_modules=["emb"], token_indices=[1, 4]),
    "hira": peft.HiraConfig(target_modules=["emb", "plain"]),
    "tied in one bank": peft.VBLoRAConfig(target_modules=["plain"], vector_length=4, num_vectors=5),
    "kasa": peft.LoraConfig(r=4, target_modules=["plain"], kasa_config=peft.KasaConfig()),
    "olora": peft.LoraConfig(r=4, target_modules=["plain"], init_lora_weights="olora"),  # moves the base
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_peft_merges(name, base, tmp_path):
    """The weights are exact, and the checkpoint comes back as it was: the same bits and the same configuration."""
    expected = checkpoint(OTHERS[name], tmp_path / "theirs")
    before = {key: tensor.clone() for key, tensor in base.base.tensors.items()}
    program = surgery.import_peft(tmp_path / "theirs", base, label="film")
    assert program.journal.find("delta:film")
    agree(program.run(ids=IDS), expected)
    assert torch.equal(program.merge().run(ids=IDS), program.run(ids=IDS))
    program.save(tmp_path / "saved")
    again = surgery.load(str(tmp_path / "saved"), base=base)
    assert torch.equal(again.run(ids=IDS), program.run(ids=IDS))
    surgery.export_peft(again, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    configs = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "theirs")]
    assert configs[0] == configs[1]
    assert torch.equal(again.undo_all().run(ids=IDS), base.run(ids=IDS))
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.base.tensors.items())


def test_a_trained_or_scaled_one_is_no_checkpoint_any_more(base, tmp_path):
    checkpoint(OTHERS["loha"], tmp_path / "theirs")
    program = surgery.import_peft(tmp_path / "theirs", base)
    with pytest.raises(
        ExportError, match=r"delta has the weight 0\.5, which a checkpoint of PEFT's LOHA cannot"
    ):
        surgery.export_peft(program.weighted({"delta": 0.5}), tmp_path / "no")
    with torch.no_grad():
        program.tensors["plain.delta.weight"][0, 0] += 1
    with pytest.raises(
        ExportError, match=r"plain\.weight has been trained since delta was imported from a LOHA"
    ):
        surgery.export_peft(program, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    surgery.export_peft(program, tmp_path / "yes", as_lora=64)
    agree(by_peft(tmp_path / "yes"), program.run(ids=IDS), MERGED)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.LilyConfig(target_modules=["plain"], r=2, stride_A=1, num_B=2), "PEFT cannot merge this LILY"),
        (
            peft.LoraConfig(r=4, use_dora=True, target_modules=["grouped"]),
            r"its DoRA mixes the 2 groups of a convolution\. PEFT cannot merge",
        ),
    ],
)
def test_what_peft_cannot_merge_is_refused_with_its_reason(config, said, base, tmp_path):
    checkpoint(config, tmp_path / "theirs")
    with pytest.raises(LoadError, match=said):
        surgery.import_peft(tmp_path / "theirs", base)


def test_without_peft_the_reason_names_it(base, tmp_path, monkeypatch):
    import sys

    checkpoint(OTHERS["loha"], tmp_path / "theirs")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        LoadError, match=r"no pass for PEFT's LOHA .* but peft is not installed; pip install peft"
    ):
        surgery.import_peft(tmp_path / "theirs", base)


def test_a_grouped_convolution_of_peft_stays_a_branch(base, tmp_path):
    config = peft.LoraConfig(**LORA, use_rslora=True, target_modules=["grouped", "conv1d"])
    expected = checkpoint(config, tmp_path / "theirs")
    program = surgery.import_peft(tmp_path / "theirs", base)
    agree(program.run(ids=IDS), expected)
    surgery.export_peft(program, tmp_path / "ours")
    agree(by_peft(tmp_path / "ours"), expected)
    merged = program.merge()
    agree(merged.run(ids=IDS), expected, MERGED)
    (left,) = merged.journal.entries[-1].options["kept"].values()
    assert "reads the channels of all groups, which a grouped weight cannot hold" in left


def test_our_grouped_lora_in_peft(base, tmp_path, randomise):
    """PEFT's A reads the channels of every group: ours are zero there, and come back as they were."""
    program = randomise(base.apply(surgery.Lora(target="path:grouped", rank=2, alpha=3)), scale=0.4)
    surgery.export_peft(program, tmp_path / "ours")
    agree(by_peft(tmp_path / "ours"), program.run(ids=IDS))
    again = surgery.import_peft(tmp_path / "ours", base)
    agree(again.run(ids=IDS), program.run(ids=IDS))
    assert again.tensors["grouped.lora.A"].shape == program.tensors["grouped.lora.A"].shape


@pytest.mark.parametrize("target", ["plain", "conv2d", "path:grouped", "emb", "turned"])
def test_pissa_becomes_a_plain_lora_on_the_original_base(target, base, tmp_path):
    program = base.apply(surgery.Lora(target=target, rank=1, init="pissa"))
    with torch.no_grad():
        for tensor in program.tensors.values():
            if isinstance(tensor, nn.Parameter):
                tensor.add_(torch.randn_like(tensor) * 0.2)
    surgery.export_peft(program, tmp_path / "ours")
    agree(
        by_peft(tmp_path / "ours"), program.run(ids=IDS), MERGED
    )  # a singular value decomposition in between


def test_one_projection_of_an_attention_in_peft(base, tmp_path, randomise):
    """PEFT adapts an attention as a whole, with one rank: what is missing is zero."""
    passes = [
        surgery.Lora(target="path:attention.in_proj_weight", rank=2, alpha=3, label="in"),
        surgery.Lora(target="path:attention.out_proj", rank=3, alpha=8, label="out"),
    ]
    program = randomise(base.apply(*passes), scale=0.4)
    for chosen in (program, program.only("in"), program.only("out")):
        surgery.export_peft(chosen, tmp_path / "ours", overwrite=True)
        agree(by_peft(tmp_path / "ours"), chosen.run(ids=IDS))


def test_trained_weights_under_and_beside_an_adapted_layer(base, tmp_path, randomise):
    program = base.apply(surgery.Lora(target="path:plain", rank=2), surgery.Full(target="plain,norm"))
    program = randomise(program)
    program.own()
    with torch.no_grad():
        for name in ("plain.weight", "plain.bias", "norm.weight", "norm.bias"):
            program.changed[name].add_(torch.randn_like(program.changed[name]) * 0.3)
    config = surgery.export_peft(program, tmp_path / "ours")
    assert (config["bias"], config["modules_to_save"]) == ("lora_only", ["norm"])
    agree(by_peft(tmp_path / "ours"), program.run(ids=IDS))
    again = surgery.import_peft(tmp_path / "ours", base)
    agree(again.run(ids=IDS), program.run(ids=IDS))


def test_several_ranks_and_places_at_once(base, tmp_path):
    """Patterns of ranks and alphas name modules and parameters; trained weights lie under an attention, too."""
    passes = [
        surgery.Lora(target="path:weighted", rank=2, alpha=1.0, label="a"),
        surgery.Lora(target="path:attention.in_proj_weight", rank=4, alpha=8.0, label="b"),
        surgery.Lora(target="path:plain,path:emb", rank=1, alpha=3.0, label="c"),
        surgery.Full(
            target="path:attention.in_proj_weight,path:attention.out_proj.bias,path:weighted.weight"
        ),
    ]
    program = base.apply(*passes)
    program.own()
    with torch.no_grad():
        for name, tensor in [*program.tensors.items(), *program.changed.items()]:
            if "lora" in name or name.startswith(("attention", "weighted")):
                tensor.add_(torch.randn_like(tensor) * 0.2)
    surgery.export_peft(program, tmp_path / "ours")
    agree(by_peft(tmp_path / "ours"), program.run(ids=IDS))
    agree(surgery.import_peft(tmp_path / "ours", base).run(ids=IDS), program.run(ids=IDS))


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        (
            [surgery.Lora(target="path:attention.out_proj", dora=True)],
            "attention: PEFT has no DoRA for nn.Multi",
        ),
        (
            [surgery.Lora(target="path:attention.out_proj", bias=True)],
            "attention: PEFT leaves the bias of an update",
        ),
        ([surgery.Lora(target="path:weighted,path:turned")], "no parameter after a Conv1D such as turned"),
        (
            [surgery.Lora(target="path:weighted", dropout=0.1)],
            "as a parameter, for which it has no --dropout",
        ),
        (
            [surgery.Lora(target="path:grouped", dora=True)],
            "PEFT's DoRA of a grouped convolution mixes its groups",
        ),
    ],
)
def test_what_peft_cannot_hold(passes, said, base, tmp_path):
    with pytest.raises(ExportError, match=said):
        surgery.export_peft(base.apply(*passes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_path_that_ends_another_one(tmp_path, randomise):
    """PEFT matches ends of paths: `lin` must not adapt `inner.lin` as well."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.inner = nn.ModuleDict({"lin": nn.Linear(4, 4)})

        def forward(self, x):
            return self.inner["lin"](self.lin(x).tanh())

    torch.manual_seed(0)
    made = Nested()
    x = torch.randn(3, 4)
    program = randomise(
        surgery.capture(made, {"x": x}).apply(surgery.Lora(target="path:lin", rank=2)), scale=0.5
    )
    surgery.export_peft(program, tmp_path / "ours")
    with torch.no_grad():
        agree(peft.PeftModel.from_pretrained(made, tmp_path / "ours").eval()(x), program.run(x=x))


def test_what_peft_does_not_load_is_not_left_behind(base, tmp_path, randomise, monkeypatch):
    program = randomise(base.apply(surgery.Lora(target="path:plain", rank=2)), scale=0.4)
    from surgery.store.peft import writing

    written = writing.write_lora

    def wrong(*given):
        config, tensors, adapted = written(*given)
        return {**config, "lora_alpha": 5 * config["lora_alpha"]}, tensors, adapted

    monkeypatch.setattr(writing, "write_lora", wrong)
    with pytest.raises(ExportError, match="gives other outputs than the program"):
        surgery.export_peft(program, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- files from elsewhere


def edited(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
            "lets PEFT import modules",
        ),
        ({"peft_type": "XLORA", "adapters": {"a": "some/where"}}, "loads other models"),
        ({"peft_type": "CARTRIDGE"}, "changes no weights"),
        ({"peft_type": "NEVER"}, "the installed peft has no type NEVER"),
        ({"r": 10**9}, "its option r is 1000000000, larger than any tensor"),
        ({"r": 60_000}, "asks PEFT for a tensor of|asks for a model of over|PEFT cannot load it"),
        ({"rank_pattern": {"(a+)+$": 3}}, "has the pattern .*, which is not read"),
        ({"target_modules": "(?=plain)plain"}, "is no pattern that surgery reads"),
        ({"target_modules": ["nowhere"]}, "PEFT cannot load it on this base"),
        ({"surprise": 3}, "the installed peft has no option surprise"),
    ],
)
def test_configurations_that_are_not_to_be_trusted(changes, said, base, tmp_path):
    import sys

    checkpoint(peft.LoHaConfig(target_modules=["plain"], r=4), tmp_path / "theirs")
    edited(tmp_path / "theirs", **changes)
    with pytest.raises(LoadError, match=said):
        surgery.import_peft(tmp_path / "theirs", base)
    assert "antigravity" not in sys.modules


def test_tensors_that_peft_does_not_need_or_lacks(base, tmp_path):
    checkpoint(peft.LoHaConfig(target_modules=["plain"], r=4), tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    save_file({name: t for name, t in tensors.items() if name != first}, file)
    with pytest.raises(LoadError, match=r"lacks the tensor .*hada_"):
        surgery.import_peft(tmp_path / "theirs", base)
    save_file({**tensors, "base_model.model.other.hada_w1_a": torch.zeros(2)}, file)
    with pytest.raises(LoadError, match=r"PEFT does not read, the tensor .*other"):
        surgery.import_peft(tmp_path / "theirs", base)


# -- as the nearest LoRA


def test_the_nearest_lora(base, tmp_path):
    """At full rank it computes the same; at a low rank the journal states the error. PEFT loads both."""
    config = peft.LoHaConfig(target_modules=["plain", "conv1d", "conv2d", "emb"][:3], r=4)
    expected = checkpoint(config, tmp_path / "theirs")
    whole = surgery.import_peft(tmp_path / "theirs", base, as_lora=64)
    assert {entry.pass_name for entry in whole.journal} == {"freeze", "lora"}
    agree(whole.run(ids=IDS), expected, MERGED)
    surgery.export_peft(whole, tmp_path / "ours")
    agree(by_peft(tmp_path / "ours"), whole.run(ids=IDS))
    low = surgery.import_peft(tmp_path / "theirs", base, as_lora=2)
    (said,) = [e.numerics["observed"] for e in low.journal if e.pass_name == "lora"]
    delta = surgery.import_peft(tmp_path / "theirs", base)
    change = delta.tensors["plain.delta.weight"] - base.base.tensors["plain.weight"]
    values = torch.linalg.svdvals(change.detach().double())
    error = float(values[2:].norm() / values.norm())
    assert said.startswith("the nearest LoRA of rank 2: its updates differ by up to ")
    assert (
        error <= float(said.split("up to ")[1].split("%")[0]) / 100 + 5e-4
    )  # it is printed to a tenth of a percent
    update = low.tensors["plain.lora_delta.B"] @ low.tensors["plain.lora_delta.A"]
    assert abs(float((update - change).norm() / change.norm()) - error) < 1e-5


def test_the_commands_name_what_peft_merged(tmp_path, capsys):
    from transformers import LlamaForCausalLM

    from surgery.cli import main
    from tests.shared import tiny

    def run(*args):
        with pytest.raises(SystemExit) as done:
            main([str(a) for a in args])
        said = capsys.readouterr()
        return done.value.code or 0, said.out + said.err

    torch.manual_seed(0)
    LlamaForCausalLM(tiny.llama()).save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            LlamaForCausalLM.from_pretrained(tmp_path / "base"),
            peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
        )
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        theirs.save_pretrained(tmp_path / "theirs")
    given = ("import-peft", tmp_path / "theirs", "--base", f"hf:{tmp_path / 'base'}", "-o", tmp_path / "in")
    code, said = run(*given)
    assert code == 0
    assert "the weights that PEFT merged from LN_TUNING; export-peft gives the checkpoint back" in said
    code, said = run("export-peft", tmp_path / "in", "-o", tmp_path / "out")
    assert code == 0
    assert "PEFT loads it with the program's outputs" in said
    ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("out", "theirs"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_saved_directory_names_no_code_to_peft_either(base, tmp_path):
    """The source of a delta comes with a directory from elsewhere. It is checked again before PEFT sees it."""
    import sys

    checkpoint(OTHERS["loha"], tmp_path / "theirs")
    program = surgery.import_peft(tmp_path / "theirs", base)
    (entry,) = program.journal.find("delta")
    source = json.loads(entry.options["source"])
    source["config"] |= {"megatron_config": {"a": 1}, "megatron_core": "antigravity"}
    crafted = dataclasses.replace(entry, options={**entry.options, "source": json.dumps(source)})
    journal = surgery.Journal(tuple(crafted if e is entry else e for e in program.journal))
    with pytest.raises(ExportError, match="lets PEFT import modules"):
        surgery.export_peft(program.derive(journal), tmp_path / "out")
    assert "antigravity" not in sys.modules
    assert not (tmp_path / "out").exists()
