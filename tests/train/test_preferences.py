"""reward and dpo: examples from pairs, losses against other implementations, and learning."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from surgery.api.programs import Program, TrainingError
from surgery.cli import main
from surgery.train.data import read_rows, split
from surgery.train.loop import train
from surgery.train.objectives import Dpo, Reward
from surgery.train.options import Settings
from surgery.train.tokenizers import find_tokenizer
from surgery.train.tokens import IGNORED
from tests.train.conftest import prepared, write

SCORE = surgery.Head(mode="add", labels=1, head_name="reward", pool="last")
PAIRS = [
    {"prompt": "what is it", "chosen": "a red cat", "rejected": "a green tree and a dog"},
    {"prompt": "is the dog red", "chosen": "yes", "rejected": "no"},
    {"prompt": "what sees the cat", "chosen": "the dog sees the cat and says yes", "rejected": "it is red"},
]


@pytest.fixture(scope="module")
def llama(llama_folder):
    return surgery.load(f"hf:{llama_folder}")


def batch_of(program, objective, path, longest=32, chosen=None):
    found, setting = prepared(program, objective, path, longest)
    examples = found[range(len(found)) if chosen is None else chosen]
    batch = objective.collate(examples, setting, torch.Generator())
    return objective.complete(batch, objective.companions(program)), setting


def moved(program, scale=0.3):
    """Change adapters at random."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in program.tensors.items():
            if name.endswith((".A", ".B")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return program


def adapted(base, *passes):
    return moved(base.apply(surgery.Lora(target="attn.*,mlp.*", rank=4), *passes))


# -- data


def test_texts_messages_and_whole_dialogues_are_the_same_pairs(llama, tmp_path):
    def spoken(row, *keys):
        users = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        return [{"role": users[key], "content": row[key]} for key in keys]

    forms = [
        PAIRS,
        [{key: spoken(row, key) for key in row} for row in PAIRS],
        [{key: spoken(row, key)[0] for key in row} for row in PAIRS],
        [{key: spoken(row, "prompt", key) for key in ("chosen", "rejected")} for row in PAIRS],
    ]
    found = []
    for number, rows in enumerate(forms):
        batch, setting = batch_of(llama.apply(SCORE), Reward(), write(tmp_path / f"{number}.jsonl", rows))
        found.append(batch)
    for batch in found[1:]:
        assert torch.equal(batch["inputs"]["input_ids"], found[0]["inputs"]["input_ids"])
        assert torch.equal(batch["labels"], found[0]["labels"])
    read = setting.tokenizer
    rows = [[t for t in row.tolist() if t != IGNORED] for row in found[0]["labels"]]
    wanted = [[*row[key].split(), "</s>"] for key in ("chosen", "rejected") for row in PAIRS]
    assert [read.convert_ids_to_tokens(row) for row in rows] == wanted
    last = found[0]["last"]
    assert (found[0]["inputs"]["input_ids"][range(6), last] == read.eos_token_id).all()


def test_plain_answers_continue_the_text(llama, tmp_path):
    batch, setting = batch_of(llama.apply(SCORE), Reward(plain=True), write(tmp_path / "p.jsonl", PAIRS))
    first = batch["inputs"]["input_ids"][0, : int(batch["last"][0]) + 1].tolist()
    assert setting.tokenizer.decode(first).split() == ["what", "is", "it", "a", "red", "cat", "</s>"]


def test_what_is_cut_away_is_left_out_and_said(llama, tmp_path):
    """The prompt of 'what is it' has 8 tokens with the template; 'a green tree and a dog' six and an end."""
    rows = [
        *PAIRS[:1],
        {"prompt": "the cat sees the dog and the dog sees a tree", "chosen": "yes", "rejected": "no"},
        {"prompt": "what is it", "chosen": "the cat is red", "rejected": "the cat is green and red"},
    ]
    path = write(tmp_path / "long.jsonl", rows)
    examples, setting = prepared(llama.apply(SCORE), Reward(), path, 12)
    assert setting.counts == {
        "has a rejected answer that exceeds 12 tokens and was cut": 3,
        "has a chosen answer that exceeds 12 tokens and was cut": 2,
        "has no answer within 12 tokens and was skipped": 1,
    }, setting.counts
    whole, _ = prepared(llama.apply(SCORE), Reward(), path, 32)
    assert [e["row"] for e in examples[range(len(examples))]] == [0, 2]
    for cut, long in zip(examples[[0, 1]], whole[[0, 2]], strict=True):
        assert cut["rejected"] == long["rejected"][:12]
    assert len(prepared(llama.apply(SCORE), Reward(), path, 11)[0]) == 1  # the last two differ behind that


def test_of_a_long_prompt_the_end_is_kept(llama, tmp_path):
    """Both answers stay whole, and pairs that would be left out are there."""
    rows = [
        *PAIRS[:1],
        {"prompt": "the cat sees the dog and the dog sees a tree", "chosen": "yes", "rejected": "no"},
    ]
    path = write(tmp_path / "long.jsonl", rows)
    whole, _ = prepared(llama.apply(SCORE), Reward(), path, 32)
    examples, setting = prepared(llama.apply(SCORE), Reward(max_prompt=6), path, 13)
    assert setting.counts == {"has a prompt that was cut to its last 6 tokens": 2}
    assert len(examples) == 2
    for cut, long in zip(examples[[0, 1]], whole[[0, 1]], strict=True):
        for kind in ("chosen", "rejected"):
            answer = [label for label in cut[f"{kind}_labels"] if label != IGNORED]
            assert answer == [label for label in long[f"{kind}_labels"] if label != IGNORED]
            assert cut[kind] == long[kind][-6 - len(answer) :]
    short, _ = prepared(llama.apply(SCORE), Reward(max_prompt=32), path, 32)
    assert short[[0, 1]] == whole[[0, 1]]


# -- losses


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (SCORE, "logits_reward"),
        (surgery.Head(mode="add", labels=1, head_name="reward", pool="none"), "logits_reward"),
        (surgery.Head(labels=1), "logits"),
    ],
)
def test_the_score_is_that_of_the_last_token_however_rows_are_padded(head, name, llama, tmp_path):
    program = adapted(llama, head)
    objective, path, module = Reward(), write(tmp_path / "p.jsonl", PAIRS), program.module()
    batch, _ = batch_of(program, objective, path)
    with torch.no_grad():
        scores = objective.scores(module, batch)
        for row, score in enumerate(scores):
            ids = batch["inputs"]["input_ids"][row : row + 1, : int(batch["last"][row]) + 1]
            alone = module(input_ids=ids, attention_mask=torch.ones_like(ids))[name]
            alone = alone[:, -1] if alone.dim() == 3 else alone
            # fp32, with other lengths of sums
            torch.testing.assert_close(score, alone[0, 0], atol=1e-5, rtol=0)
    margin = scores[:3] - scores[3:]
    assert float(objective.loss(module, batch).detach()) == pytest.approx(
        sum(math.log1p(math.exp(-float(m))) for m in margin) / 3, abs=1e-5
    )
    assert objective.metrics({"margin": torch.tensor([1.0, -1.0, 0.0, 2.0])})["accuracy"] == 0.625


def test_dpo_has_the_loss_and_gradients_of_trl(llama, llama_folder, tmp_path):
    """TRL's trainer on the live model of the same program, with transformers' own model as the reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    program = adapted(llama)
    for number, kind in enumerate(("sigmoid", "ipo")):
        objective = Dpo(beta=0.3, loss=kind)
        batch, _ = batch_of(program, objective, write(tmp_path / "p.jsonl", PAIRS))
        module = program.module()
        module.zero_grad()
        loss = objective.loss(module, batch)
        loss.backward()
        ours = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

        live = program.live()
        arguments = DPOConfig(
            output_dir=str(tmp_path / str(number)), beta=0.3, loss_type=kind, report_to=[], use_cpu=True,
            bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=live, ref_model=AutoModelForCausalLM.from_pretrained(llama_folder), args=arguments,
            train_dataset=Dataset.from_list(PAIRS), processing_class=AutoTokenizer.from_pretrained(llama_folder),
        )  # fmt: skip
        live.eval()
        live.zero_grad()
        answer = torch.zeros_like(batch["labels"])
        answer[:, 1:] = (batch["labels"][:, :-1] != IGNORED).long()
        theirs = trainer._compute_loss(live, {**batch["inputs"], "completion_mask": answer}, False)
        theirs.backward()
        assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
        assert float(loss.detach()) != pytest.approx(math.log(2), abs=1e-3)
        grads = {name: p.grad for name, p in live.named_parameters() if p.grad is not None}
        assert grads.keys() == ours.keys()
        for name, grad in ours.items():
            # fp32 through two orders of attention; the largest gradient gives the scale
            torch.testing.assert_close(
                grad, grads[name], atol=1e-5 * max(1, float(grad.abs().max())), rtol=1e-4
            )


def test_dpo_is_the_formula_and_does_not_see_padding(llama, tmp_path):
    program, smooth = adapted(llama), Dpo(beta=0.2, smoothing=0.1)
    path, module = write(tmp_path / "p.jsonl", PAIRS), program.module()
    batch, _ = batch_of(program, smooth, path)
    margins, singles = [], []
    for number in range(3):
        alone, _ = batch_of(program, smooth, path, chosen=[number])
        singles.append(float(smooth.loss(module, alone).detach()))
        ratios = []
        for row in range(2):
            ids, labels = alone["inputs"]["input_ids"][row], alone["labels"][row]
            total = 0.0
            for place in (labels != IGNORED).nonzero().flatten().tolist():
                inputs = {
                    "input_ids": ids[None, : place + 1],
                    "attention_mask": torch.ones(1, place + 1).long(),
                }
                for sign, which in ((1, module), (-1, llama.graph_module)):
                    logits = which(**inputs)["logits"][0, -1].detach().double()
                    total += sign * float(logits.log_softmax(-1)[labels[place]])
            ratios.append(total)
        margins.append(0.2 * (ratios[0] - ratios[1]))
    wanted = [
        -0.9 * float(F.logsigmoid(torch.tensor(m))) - 0.1 * float(F.logsigmoid(torch.tensor(-m)))
        for m in margins
    ]
    assert singles == pytest.approx(wanted, abs=1e-5)
    assert float(smooth.loss(module, batch).detach()) == pytest.approx(sum(wanted) / 3, abs=1e-5)
    observed = smooth.metrics(smooth.observe(module, batch))
    assert observed["margin"] == pytest.approx(sum(margins) / 3, abs=1e-5)
    assert observed["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 3)


# -- the reference


def storages(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors}


def test_the_reference_is_in_the_programs_storage_and_stays(llama, tmp_path):
    path = write(tmp_path / "p.jsonl", PAIRS)
    own = storages(llama.base.loaded.module.parameters())
    for passes in (
        [surgery.Lora(target="attn.*", rank=4), surgery.Head(mode="add", labels=1, head_name="value", pool="none")],
        [surgery.Full()],
        [surgery.Freeze(target="all"), surgery.Full(target="attn.q")],
        [surgery.Quantize(target="mlp.*"), surgery.Lora(target="attn.*", rank=4)],
    ):  # fmt: skip
        program = llama.apply(*passes)
        module = program.module()
        reference = Dpo().companions(program)["reference"]
        held = storages(reference.parameters())
        assert held <= own | storages(program.tensors.values())
        trained = [p for p in module.parameters() if p.requires_grad]
        assert trained
        assert held.isdisjoint(storages(trained))
        batch, _ = batch_of(program, Dpo(), path)
        before = Dpo().log_probs(reference, batch)
        assert torch.equal(Dpo().log_probs(module, batch).detach(), before)
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        assert torch.equal(Dpo().log_probs(reference, batch), before)
        assert not torch.equal(Dpo().log_probs(module, batch).detach(), before)
        assert all(p.requires_grad for p in trained)


def test_without_a_reference_there_is_a_remedy(llama, tmp_path):
    path = write(tmp_path / "p.jsonl", PAIRS)
    for program in (
        Program(llama.base),
        llama.apply(surgery.Lora(target="attn.q", rank=2), freeze_base=False),
    ):
        program.module()
        with pytest.raises(TrainingError, match="copy the whole program with --reference start"):
            Dpo().companions(program)
        objective = Dpo(reference="start")
        reference = objective.companions(program)["reference"]
        batch, _ = batch_of(program, objective, path)
        before = objective.log_probs(reference, batch)
        with torch.no_grad():
            for parameter in program.module().parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        assert torch.equal(objective.log_probs(reference, batch), before)


# -- learning


def preferences(tmp_path, count=64):
    """Pairs in which red is preferred to green, for any noun and position."""
    words, rows = ("cat", "dog", "tree"), []
    for number in range(count):
        a, b = words[number % 3], words[number // 3 % 3]
        frame = (
            f"a {{}} {a}",
            f"the {a} sees a {{}} {b}",
            f"it is {{}} and says {('yes', 'no')[number % 2]}",
        )
        frame = frame[number // 9 % 3]
        rows.append(
            {
                "prompt": f"what is the {b}",
                "chosen": frame.format("red"),
                "rejected": frame.format("green"),
            }
        )
    return write(tmp_path / "pairs.jsonl", rows)


@pytest.mark.parametrize("objective", [Reward(), Dpo(beta=0.5), Dpo(beta=0.5, loss="ipo")])
def test_what_is_preferred_is_learned(objective, llama, tmp_path):
    torch.manual_seed(0)
    passes = [surgery.Lora(target="attn.*,mlp.*", rank=4)]
    program = llama.apply(*passes, *([SCORE] if objective.name == "reward" else []))
    settings = Settings(batch=8, lr=1e-2, epochs=6, max_length=32)
    rows = split(read_rows([preferences(tmp_path)]), 0.25, 0)
    result = train(
        program, objective, rows, settings, folder=tmp_path / "run", tokenizer=find_tokenizer(program)
    )
    if objective.name == "dpo":
        assert result.before["accuracy"] == 0.5
        assert result.before["margin"] == 0
    assert result.metrics["accuracy"] > 0.9
    assert result.metrics["margin"] > max(0.5, result.before["margin"])
    assert result.metrics["loss"] < 0.6 * result.before["loss"]


def test_the_command_trains_a_reward_model(llama, tmp_path, capsys):
    program = llama.apply(surgery.Lora(target="attn.*,mlp.*", rank=4), SCORE)
    program.save(tmp_path / "adapted")
    out = tmp_path / "judge"
    command = [
        "train",
        str(tmp_path / "adapted"),
        "--objective",
        "reward",
        "--data",
        str(preferences(tmp_path)),
    ]
    command += [
        "-o",
        str(out),
        "--lr",
        "1e-2",
        "--steps",
        "24",
        "--batch",
        "8",
        "--held-out",
        "0.25",
        "--json",
    ]
    with pytest.raises(SystemExit) as caught:
        main(command)
    said = capsys.readouterr()
    assert caught.value.code == 0, said.err
    assert json.loads(said.out)["metrics"]["accuracy"] > 0.9
    judge = surgery.load(str(out))
    batch, _ = batch_of(judge, Reward(), preferences(tmp_path))
    with torch.no_grad():
        found = Reward().scores(judge.module(), batch)
    assert float((found[:64] > found[64:]).double().mean()) > 0.9


BAD = [
    ("reward", [{"question": "a", "chosen": "b"}], [], "no column looks like the rejected answer; the data has"),
    ("reward", [{"prompt": "a", "chosen": "b", "rejected": None}, PAIRS[0]], [], "column 'rejected' contains None"),
    ("reward", [{**PAIRS[0], "rejected": [{"role": "user", "content": "no"}]}], [], "is not the assistant's"),
    ("reward", [{**PAIRS[0], "rejected": PAIRS[0]["chosen"]}], [], "has answers that are equal within 64 tokens"),
    ("reward", PAIRS, ["--score", "logits"], "is not an output with one value, only logits (101), logits_reward"),
    ("dpo", PAIRS, ["--beta", "0"], "--beta is '0'"),
    ("dpo", PAIRS, ["--loss", "hinge"], "--loss is 'hinge'"),
    ("dpo", PAIRS, ["--template", "nowhere.jinja"], "nowhere.jinja cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "rows", "more", "said"), BAD)
def test_bad_input_is_one_line(objective, rows, more, said, llama, tmp_path, capsys, monkeypatch):
    program = llama.apply(surgery.Lora(target="attn.q", rank=2), SCORE)
    refused(program, objective, rows, more, said, tmp_path, capsys, monkeypatch)


def test_a_program_that_gives_no_score_or_no_reference(llama, tmp_path, capsys, monkeypatch):
    for objective, said in (
        ("reward", "the model has no output with one value, only logits (101); add one with --pass head"),
        ("dpo", "add an adapter (--pass lora), select what trains (--pass full)"),
    ):
        refused(Program(llama.base), objective, PAIRS, [], said, tmp_path, capsys, monkeypatch)


def refused(program, objective, rows, more, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("surgery.cli.loading.load", lambda *args, **kwargs: program)
    path = write(tmp_path / "data.jsonl", rows)
    command = ["train", "llama", "--objective", objective, "--data", str(path)]
    with pytest.raises(SystemExit) as caught:
        main([*command, "-o", str(tmp_path / "out"), "--held-out", "0", *more])
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if not line.startswith("note: ")]
    assert caught.value.code == 2, errors
    assert len(errors) == 1, errors
    assert said in errors[0]
    assert not (tmp_path / "out").exists()
