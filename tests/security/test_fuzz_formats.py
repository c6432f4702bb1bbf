"""Mutations of PEFT checkpoints, ONNX files, checkpoints of a training, inputs, and of directories of every pass."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from pathlib import Path

import onnx
import onnx_ir
import peft
import pytest
import torch

import surgery
from surgery.api.programs import find_pass
from surgery.cli.loading import _read_tensors
from surgery.common.errors import SurgeryError
from surgery.export.readback import journal_of, names_survive
from surgery.export.verify import open_side, verify
from surgery.store import saved
from surgery.train.checkpoint import OPTIMIZER, RUN, STATE, WEIGHTS, Checkpoints, State, Weights
from tests.security import crafted, protobuf
from tests.security.mutations import mutate, refused_or
from tests.shared import models, tiny

SEED = 20


def counts(quick: int, many: int):
    return pytest.mark.parametrize("count", [quick, pytest.param(many, marks=pytest.mark.slow)])


def parse(plugins, name, **options):
    return find_pass(plugins, name).cls.parse(options)


def tally(outcomes):
    """Some mutations have to be refused, and some have to be harmless; else the mutations reach too little."""
    refused = sum(isinstance(outcome, SurgeryError) for outcome in outcomes)
    assert 0 < refused < len(outcomes)


def tensors_in(value):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


# -- PEFT


PEFT = {
    "lora": {"target": "attn.*", "rank": 2, "alpha": 4.0},
    "dora": {"target": "attn.*", "rank": 2, "dora": True},
}


# Types that PEFT itself loads and merges: with tables of its own, random projections from a seed, and rotations.
MERGED = {
    "loha": ("LoHaConfig", {"r": 2}),
    "vera": ("VeraConfig", {"r": 2}),
    "oft": ("OFTConfig", {"r": 1, "oft_block_size": 0}),
}


@pytest.mark.parametrize("kind", [*PEFT, *MERGED])
@counts(30, 2000)
def test_peft_checkpoints(kind, count, base, plugins, tmp_path):
    if kind in PEFT:
        adapted = base.apply(parse(plugins, "lora", **PEFT[kind]))
        surgery.export_peft(adapted, tmp_path / "peft")
    else:
        name, options = MERGED[kind]
        paths = [site.path for site in base.sites if site.role.startswith("attn")]
        made = getattr(peft, name)(target_modules=paths, **options)
        theirs = peft.get_peft_model(copy.deepcopy(base.base.loaded.module), made)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        theirs.save_pretrained(tmp_path / "peft")
        assert surgery.import_peft(tmp_path / "peft", base).journal.find("delta")
    config, weights = (
        tmp_path / "peft" / "adapter_config.json",
        tmp_path / "peft" / "adapter_model.safetensors",
    )
    text, raw = config.read_text(), weights.read_bytes()
    header, body = crafted.read_header(weights)
    rng, outcomes = random.Random(SEED), []
    with crafted.memory_below(tmp_path):
        for _ in range(count):
            if rng.random() < 0.6:
                made, said = mutate(json.loads(text), rng)
                config.write_text(json.dumps(made))
            else:
                made, said = mutate(header, rng)
                weights.write_bytes(crafted.with_header(made, body))
            outcomes.append(refused_or(lambda: surgery.import_peft(tmp_path / "peft", base).run(), said))
            config.write_text(text)
            weights.write_bytes(raw)
    tally(outcomes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 10**9}, "r: Input should be less"),
        ({"r": "2"}, "r: Input should be a valid integer"),
        ({"r": 3}, "has rank 3"),
        ({"lora_alpha": float("nan")}, "a number that is not within"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"rank_pattern": {"(a+)+$": 10**9}}, "rank_pattern"),
        ({"rank_pattern": {"(?=a)": 2}}, "only"),
        ({"rank_pattern": {"[": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"a{9999999999}": 2}}, "alpha_pattern"),
        ({"peft_type": "LORA\x1b[31m"}, "peft_type"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"base_model_name_or_path": "a\nb"}, "base_model_name_or_path"),
        ({"x": json.loads("[" * 200 + "]" * 200)}, "nested too deeply"),
    ],
)
def test_the_configuration_of_peft(changes, said, base, tmp_path):
    surgery.export_peft(base.apply(surgery.Lora(target="attn.*", rank=2)), tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(SurgeryError, match=said):
        surgery.import_peft(tmp_path / "peft", base)


def test_a_slow_pattern_is_matched_in_linear_time(base, tmp_path):
    surgery.export_peft(base.apply(surgery.Lora(target="attn.*", rank=2)), tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    slow = {"(.*)*(.*)*(.*)*(.*)*(.*)*!": 2, "(a|a|.)*" * 20 + "!": 2}
    file.write_text(json.dumps({**json.loads(file.read_text()), "rank_pattern": slow, "alpha_pattern": slow}))
    assert surgery.import_peft(tmp_path / "peft", base).journal.entries


def test_a_rank_in_the_shapes_takes_no_memory(base, tmp_path):
    """A of one column and a million rows is two megabytes; LoRA of that rank would be hundreds."""
    from safetensors.torch import save_file

    surgery.export_peft(base.apply(surgery.Lora(target="attn.q", rank=2)), tmp_path / "peft")
    header, _ = crafted.read_header(tmp_path / "peft" / "adapter_model.safetensors")
    names = [name for name in header if "lora_" in name]
    flat = {
        name: torch.zeros((1_000_000, 1) if "lora_A" in name else (1, 1_000_000), dtype=torch.float8_e5m2)
        for name in names
    }
    save_file(flat, tmp_path / "peft" / "adapter_model.safetensors")
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 1_000_000}))
    with crafted.memory_below(tmp_path), pytest.raises(SurgeryError, match="is for another base"):
        surgery.import_peft(tmp_path / "peft", base)


# -- ONNX


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    """The adapted base in one file, and with its weights beside it."""
    folder = tmp_path_factory.mktemp("onnx")
    adapted = base.apply(surgery.Lora(target="attn.*", rank=2))
    adapted.export(folder / "whole.onnx")
    adapted.export(folder / "beside.onnx", external_data=True)
    return folder


@counts(60, 4000)
def test_onnx_files(count, exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "onnx"))
    originals = [onnx.load(folder / f"{name}.onnx", load_external_data=False) for name in ("whole", "beside")]
    other, path = open_side(str(folder / "whole.onnx"), None), folder / "mutated.onnx"
    before = {file.name for file in folder.iterdir()}
    rng, outcomes = random.Random(SEED), []
    with crafted.memory_below(folder):
        for _ in range(count):
            raw, said = protobuf.mutated(rng.choice(originals), rng)
            path.write_bytes(raw)
            outcomes.append(refused_or(lambda: verify(open_side(str(path), None), other), said))
            refused_or(lambda: journal_of(path), said)
            refused_or(lambda: names_survive(path), said)
    tally(outcomes)
    assert {file.name for file in folder.iterdir()} == {*before, "mutated.onnx"}


@pytest.mark.parametrize("text", ["", "{", "3", "[3]", '{"a": 1}', "[" * 5000, "\x00"])
def test_metadata_of_an_onnx_file(text, exported, tmp_path):
    model = onnx_ir.load(exported / "whole.onnx")
    for holder in (model, *model.graph.initializers.values()):
        holder.metadata_props.update({"surgery.journal": text, "surgery.tied": text})
    onnx_ir.save(model, tmp_path / "x.onnx")
    for read in (journal_of, names_survive):
        with pytest.raises(SurgeryError, match="damaged metadata"):
            read(tmp_path / "x.onnx")


# -- a training


@pytest.fixture
def run(base, tmp_path):
    """A checkpoint of a step, with its weights and optimizer."""
    program = base.apply(surgery.Lora(target="attn.*", rank=2))
    weights = Weights(program)
    optimizer = torch.optim.AdamW(program.parameter_groups(1e-3))
    outputs = tensors_in(weights.body.module(*program.example_inputs[0]))
    sum(output.square().sum() for output in outputs).backward()
    optimizer.step()
    folder = tmp_path / "run"
    Checkpoints(folder).begin({"objective": {"name": "x"}, "program": "y"})
    Checkpoints(folder).write(State(step=3, best=3, score=0.5, kept={"kl": 0.1}), weights, optimizer)
    return folder, weights, optimizer


@counts(60, 3000)
def test_checkpoints(count, run):
    folder, weights, optimizer = run
    path = Checkpoints(folder).path(3)
    texts = {
        file: file.read_bytes() for file in (folder / RUN, path / STATE, path / WEIGHTS, path / OPTIMIZER)
    }
    rng, outcomes = random.Random(SEED), []

    def resume():
        checkpoints = Checkpoints(folder)
        checkpoints.check_same({"objective": {"name": "x"}, "program": "y"})
        return checkpoints.read(weights, optimizer)

    assert resume().step == 3
    with crafted.memory_below(folder):
        for _ in range(count):
            file = rng.choice(list(texts))
            if file.suffix == ".json":
                made, said = mutate(json.loads(texts[file]), rng)
                file.write_text(json.dumps(made))
            else:
                header, body = crafted.read_header(file)
                made, said = mutate(header, rng)
                file.write_bytes(crafted.with_header(made, body))
            outcomes.append(refused_or(resume, said))
            file.write_bytes(texts[file])
    tally(outcomes)


def test_what_a_checkpoint_may_not_say(run):
    folder, weights, optimizer = run
    path = Checkpoints(folder).path(3)
    state = json.loads((path / STATE).read_text())
    for changes, said in (
        ({"step": 4}, "another step"), ({"best": 1}, "best checkpoint is gone"), ({"score": math.nan}, "score"),
        ({"kept": {"a": "b"}}, "kept"), ({"more": 1}, "more"), ({"step": "3"}, "step"),
    ):  # fmt: skip
        (path / STATE).write_text(json.dumps({**state, **changes}))
        with pytest.raises(SurgeryError, match=said):
            Checkpoints(folder).read(weights, optimizer)
    (path / STATE).write_text(json.dumps(state))
    header, body = crafted.read_header(path / WEIGHTS)
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"] = [1, *header[name]["shape"]]  # it would be broadcast
    (path / WEIGHTS).write_bytes(crafted.with_header(header, body))
    with pytest.raises(SurgeryError, match=r"holds torch.float32 .* and the program has"):
        Checkpoints(folder).read(weights, optimizer)
    (folder / "step-x").mkdir()
    (folder / "step-9").mkdir()
    assert Checkpoints(folder).steps() == [3]


# -- inputs


@counts(100, 2000)
def test_inputs(count, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "inputs.safetensors"
    save_file({"x": torch.randn(2, 3), "ids": torch.arange(6).view(2, 3)}, file)
    header, body = crafted.read_header(file)
    rng, outcomes = random.Random(SEED), []
    for _ in range(count):
        made, said = mutate(header, rng)
        file.write_bytes(crafted.with_header(made, body))
        outcomes.append(refused_or(lambda: _read_tensors(file), said))
    assert any(isinstance(outcome, SurgeryError) for outcome in outcomes)


# -- directories of every kind of pass

QUERY = "model.layers.0.self_attn.q_proj"
# As import-peft writes it, with a tensor of the checkpoint that no op reads.
SOURCE = json.dumps(
    {
        "config": {"peft_type": "LOHA", "r": 2}, "tensors": {"base_model.model.a": ["float32", [3]]},
        "slots": {QUERY: ["weight"]}, "at": QUERY, "digests": {f"{QUERY}.weight": "0" * 64},
    }
)  # fmt: skip
PIPELINES = {
    "llama": {
        "adapters": [
            ("lora", {"target": "attn.*", "rank": 2}), ("prefix", {"tokens": 2}), ("adapter", {"size": 3}),
            ("lora", {"target": "mlp.*", "rank": 2, "dora": True, "as": "film"}),
        ],
        "tokens": [("prompt", {"tokens": 3}), ("vocab", {"tokens": 3})],
        "gated prefix and a head": [
            ("prefix", {"tokens": 2, "projection": True, "hidden": 4, "gate": True}),
            ("head", {"mode": "add", "labels": 3, "head_name": "x"}),
        ],
        "sparse": [
            ("sparse", {"target": "mlp.*", "pattern": "2:4"}), ("sparse-tune", {"target": "attn.*", "count": 5}),
        ],
        "a schedule": [("sparse", {"target": "mlp.*", "sparsity": 0.5, "schedule": "cubic", "end": 10})],
        "deeper": [("expand", {"deeper": 1})], "wider": [("expand", {"wider": "1.5"})],
        "a side branch": [("expand", {"side": "dense", "size": 4, "target": "mlp.*"})],
        "shared": [("share", {"target": "mlp.*"}), ("ia3", {"target": "attn.k,attn.v"})],
        "low rank": [
            ("low-rank", {"target": "mlp.*", "rank": 4}), ("filter", {"target": "attn.*", "fraction": 0.2}),
            ("layerwise", {"top": 1}),
        ],
        "unfrozen gradually": [("gradual-unfreeze", {})],
        "codes": [("quantize", {"target": "mlp.*", "format": "int4"}), ("lora", {"target": "mlp.*", "rank": 2})],
        "rounded": [
            ("quantize", {"target": "mlp.*", "format": "int8-dynamic"}),
            ("fake-quant", {"target": "attn.*", "format": "int8"}),
        ],
        "fused": [("fuse-qkv", {}), ("lora", {"target": "attn.*", "rank": 2})],
        "whole weights": [
            ("delta", {"target": f"path:{QUERY}", "source": SOURCE}),
            ("lora", {"target": "mlp.*", "rank": 2, "bias": True}),
        ],
    },
    "gpt2": {
        "split": [("split-qkv", {}), ("lora", {"target": "attn.*", "rank": 2})],
        "parts": [
            ("lora", {"target": "attn.*", "rank": 2, "parts": "q,v"}),
            ("lora", {"target": "mlp.*", "rank": 2, "init": "pissa", "as": "p"}),
        ],
        "biases": [("bitfit", {}), ("full", {"target": "mlp.*"})],
    },
    "convnet": {
        "pruned": [("fold-batchnorm", {}), ("prune-filters", {"ratio": 0.5})],
        "adapted": [("lora", {"target": "conv", "rank": 2}), ("fake-quant", {"target": "conv", "format": "int8"})],
        "static": [("int8-static", {"target": "all"})],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def captured(plugins, tmp_path_factory):
    from transformers import GPT2LMHeadModel, LlamaForCausalLM

    known = {}

    def of(name):
        if name not in known:
            torch.manual_seed(0)
            if name == "convnet":
                known[name] = surgery.capture(*models.convnet(), plugins=plugins)
            else:
                cls = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}[name]
                folder = tmp_path_factory.mktemp(name)
                cls(getattr(tiny, name)()).save_pretrained(folder)
                known[name] = surgery.load(f"hf:{folder}", plugins=plugins)
        return known[name]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(("name", "what"), [(n, w) for n, pipelines in PIPELINES.items() for w in pipelines])
def test_directories_of_every_pass(name, what, captured, plugins, tmp_path):
    """Loaded, run, undone, merged, trained, weighted and saved again."""
    root, folder = captured(name), tmp_path / "saved"
    passes = [parse(plugins, each, **options) for each, options in PIPELINES[name][what]]
    root.apply(*passes, verify=False).save(folder)
    document = crafted.manifest_of(folder)

    def load():
        return surgery.load(str(folder), base=root, plugins=plugins)

    shapes = [tuple(leaf.shape) for leaf in tensors_in(load().run())]
    rng, outcomes = random.Random(SEED), []
    with crafted.memory_below(folder):
        for _ in range(120):
            made, said = mutate(document, rng)
            try:
                crafted.seal(folder, made)
            except RecursionError:
                continue
            program = refused_or(load, said)
            outcomes.append(program)
            if isinstance(program, SurgeryError):
                continue
            for act in (
                program.run, lambda p=program: p.undo_all().run(), lambda p=program: p.merge(verify=False).run(),
                lambda p=program: p.parameter_groups(1e-3), lambda p=program: p.module().advance(3),
                lambda p=program: p.weighted({e.id: 1.0 for e in p.journal if e.kind == "rewrite"}).run(),
                lambda p=program: p.save(tmp_path / "again", overwrite=True),
            ):  # fmt: skip
                outcome = refused_or(act, said)
                if act is program.run and not isinstance(outcome, SurgeryError):
                    assert [tuple(leaf.shape) for leaf in tensors_in(outcome)] == shapes or "add" in said
    tally(outcomes)
    assert {path.name for path in tmp_path.iterdir()} <= {"saved", "again"}
    assert saved.is_saved(folder)
