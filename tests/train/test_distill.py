"""distill: loss against its formula and transformers' hidden states, and learning."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import BertForSequenceClassification

import surgery
from surgery.api.programs import TrainingError
from surgery.api.training import Setting
from surgery.cli import main
from surgery.train.data import make_examples, read_rows, split
from surgery.train.learned import LEARNED
from surgery.train.loop import train
from surgery.train.objectives import CausalLm, Classification, Distill
from surgery.train.options import Settings
from surgery.train.runner import Body
from surgery.train.tokenizers import find_tokenizer
from surgery.train.tokens import IGNORED
from surgery.train.watchers import read_log
from tests.train.conftest import bert_config, save_tokenizer, write
from tests.train.test_multi_task import KINDS, Stops

HINT = ("bert.encoder.layer.0=bert.encoder.layer.1",)
ATTENTION = ("encoder.layer.0.attention.self=encoder.layer.1.attention.self",)


def classifier(folder, seed, **more):
    torch.manual_seed(seed)
    model = BertForSequenceClassification(bert_config(num_labels=2, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # or every logit were nearly 0
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher saved by surgery."""
    folder = tmp_path_factory.mktemp("teacher")
    surgery.load(classifier(folder / "base", 1), task="text-classification").save(folder / "saved")
    return str(folder / "saved")


@pytest.fixture(scope="module")
def taught(teacher):
    return surgery.load(teacher)


@pytest.fixture(autouse=True)
def known(teacher, taught, monkeypatch):
    """Programs by reference, loaded once; a test may add others."""
    programs, load = {teacher: taught}, surgery.load
    monkeypatch.setattr(
        "surgery.train.objectives.distill.load", lambda ref, **more: programs.get(ref) or load(ref, **more)
    )
    return programs


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """One layer of half the width."""
    more = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    ref = classifier(tmp_path_factory.mktemp("student"), 2, **more)
    return surgery.load(ref, task="text-classification").apply(surgery.Full())


@pytest.fixture
def texts(tmp_path):
    return write(tmp_path / "kinds.jsonl", KINDS)


def batch_of(program, objective, path, count=5):
    rows = read_rows([path]).train
    setting = objective.prepared(rows, Setting.of(program, find_tokenizer(program), 32))
    examples = make_examples(rows, objective, setting)
    batch = objective.collate(examples[range(count)], setting, torch.Generator().manual_seed(0))
    torch.manual_seed(5)  # of the maps
    companions = objective.companions(program)
    return objective.complete(batch, companions), companions


def soft(logits, taught, temperature):
    here, there = logits / temperature, taught / temperature
    distances = (there.softmax(-1) * (there.log_softmax(-1) - here.log_softmax(-1))).sum(-1)
    return distances.mean() * temperature**2


def test_soft_and_hard_targets_are_mixed(student, teacher, taught, texts):
    module = student.module().eval()
    for alpha, temperature in ((0.5, 2.0), (0.3, 1.0), (1.0, 4.0)):
        objective = Distill(teacher=teacher, alpha=alpha, temperature=temperature)
        batch, _ = batch_of(student, objective, texts)
        with torch.no_grad():
            logits = student.run(**batch["inputs"])["logits"]
            said = taught.run(**batch["inputs"])["logits"]
            wanted = (1 - alpha) * F.cross_entropy(logits, batch["labels"])
            wanted += alpha * soft(logits, said, temperature)
            torch.testing.assert_close(objective.loss(module, batch), wanted)
    assert objective.terms(batch) == 5


def test_hints_are_distances_of_what_transformers_gives_inside(student, teacher, taught, texts):
    """The same in the live model, by hooks, and in the graph."""
    with_hints = Distill(teacher=teacher, alpha=1, hint=HINT, hint_weight=0.7)
    batch, companions = batch_of(student, with_hints, texts)
    plain = Distill(teacher=teacher, alpha=1)
    bare, _ = batch_of(student, plain, texts)
    seen = batch["inputs"]["attention_mask"]
    assert not seen.all()
    mapped = companions[LEARNED].linear["0"]
    with torch.no_grad():
        ours = student.live()(**batch["inputs"], output_hidden_states=True).hidden_states[1]
        theirs = taught.live()(**batch["inputs"], output_hidden_states=True).hidden_states[2]
        distance = ((mapped(ours) - theirs).square().mean(-1) * seen).sum() / seen.sum()
        wanted = plain.loss(student.module().eval(), bare) + 0.7 * distance
        for form in ("live", "graph"):
            body = Body(student, form)
            assert body.form == form
            torch.testing.assert_close(with_hints.loss(body.model.eval(), batch), wanted)
    # In train mode, with gradients, and nothing is left on the module.
    module = student.module().train()
    with_hints.loss(module, batch).backward()
    assert mapped.weight.grad is not None
    assert module.get_parameter("bert.encoder.layer.0.output.dense.weight").grad is not None
    assert "_keep" not in module.graph_module().code
    assert not any(p.grad is not None for p in companions["teacher"].parameters())


def test_attention_scores(student, teacher, taught, texts):
    objective = Distill(teacher=teacher, alpha=1, attention=ATTENTION)
    batch, companions = batch_of(student, objective, texts)
    assert LEARNED not in companions
    seen = batch["inputs"]["attention_mask"].bool()

    def scores(program, layer):
        live, width = program.live(), program.base.loaded.module.config.hidden_size // 4
        states = live(**batch["inputs"], output_hidden_states=True).hidden_states[layer]
        own = live.bert.encoder.layer[layer].attention.self
        q, k = (
            made.unflatten(-1, (4, width)).transpose(1, 2) for made in (own.query(states), own.key(states))
        )
        return q @ k.transpose(-1, -2) / width**0.5

    with torch.no_grad():
        pairs = (seen[:, None, :, None] & seen[:, None, None, :]).expand(-1, 4, -1, -1)
        distance = (scores(student, 0) - scores(taught, 1)).square()[pairs].mean()
        outputs = objective._outputs(student.module().eval(), batch)
        torch.testing.assert_close(objective._terms(outputs, batch)["hints"], distance)
        with pytest.raises(TrainingError, match="train with --form graph"):
            objective.loss(Body(student, "live").model, batch)


@pytest.mark.slow
def test_a_language_model_is_taught_where_its_labels_are(llama_folder, tmp_path, known):
    program = surgery.load(f"hf:{llama_folder}")
    moved = program.apply(surgery.Lora(target="attn.*", rank=2))
    for name, tensor in moved.tensors.items():
        tensor.data.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    known["moved"] = moved
    objective = Distill(teacher="moved", of="causal-lm", alpha=0.5)
    batch, _ = batch_of(program, objective, write(tmp_path / "t.jsonl", KINDS))
    at = batch["labels"] != IGNORED
    with torch.no_grad():
        logits, taught = (p.run(**batch["inputs"])["logits"][at] for p in (program, moved))
        wanted = (CausalLm().loss(program.module(), batch) + soft(logits, taught, 2.0)) / 2
        torch.testing.assert_close(objective.loss(program.module(), batch), wanted)
        observed = objective.observe(program.module(), batch)
    figures = objective.metrics(observed)
    assert figures["hard"] == pytest.approx(figures["loss"] * 2 - figures["soft"], rel=1e-5)
    assert figures["score"] == -figures["hard"]
    assert figures["teacher/loss"] != figures["hard"]
    assert figures["agreement"] == pytest.approx(
        float((logits.argmax(-1) == taught.argmax(-1)).double().mean())
    )


def fit(program, objective, path, folder, resume=False, watchers=(), **options):
    settings = Settings.parse({"batch": 4, "lr": 5e-3, "max_length": 32, **options})
    return train(
        program, objective, split(read_rows([path]), 0.25, 0), settings, folder=folder,
        tokenizer=find_tokenizer(program), resume=resume, watchers=watchers,
    )  # fmt: skip


def test_a_smaller_program_learns_and_resumes_bit_for_bit(student, teacher, texts, tmp_path):
    """Soft targets alone, and a hint through a map that is learned."""
    options = {"steps": 24, "checkpoint": 5, "evaluate": 12}
    make = {"teacher": teacher, "alpha": 1, "of": "unlabelled", "hint": HINT}
    whole = student.apply(surgery.Full())
    result = fit(whole, Distill(**make), texts, tmp_path / "whole", **options)
    assert result.metrics["soft"] < result.before["soft"]
    assert result.metrics["hints"] < result.before["hints"]
    assert result.metrics["score"] == result.metrics["agreement"]
    parts = student.apply(surgery.Full())
    with pytest.raises(KeyboardInterrupt):
        fit(parts, Distill(**make), texts, tmp_path / "parts", watchers=[Stops(18)], **options)
    parts = student.apply(surgery.Full())
    fit(parts, Distill(**make), texts, tmp_path / "parts", resume=True, **options)
    one, two = whole.state(), parts.state()
    assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "parts")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("smaller", ["pruned", "fewer layers"])
def test_students_made_of_their_teacher(smaller, texts, tmp_path):
    """The teacher is a model of transformers; the student it with half of its neurons, or without its last layer."""
    teacher = classifier(tmp_path / "base", 1, initializer_range=0.1)
    if smaller == "pruned":
        student = surgery.load(teacher, task="text-classification").apply(
            surgery.PruneFilters(target="mlp.up", ratio=0.5)
        )
    else:
        kwargs = {"num_hidden_layers": 1}
        student = surgery.load(teacher, task="text-classification", model_kwargs=kwargs)
    student = student.apply(surgery.Full())
    own = Distill(teacher=teacher, teacher_task="text-classification", alpha=1, of="unlabelled")
    result = fit(student, own, texts, tmp_path / "run", steps=30, evaluate=10)

    assert result.metrics["soft"] < 0.7 * result.before["soft"]


def test_the_command_saves_the_student_alone(student, teacher, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("surgery.cli.loading.load", lambda *args, **kwargs: student.apply(surgery.Full()))
    line = ["train", "hf:small", "--objective", "distill", "--teacher", teacher, "--of"]
    line += ["classification,text=text", "--hint", HINT[0], "--attention", ATTENTION[0], "--data", str(texts)]
    line += ["--form", "graph", "--steps", "2", "--held-out", "0.25", "--json", "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        main(line)
    said = capsys.readouterr()
    assert caught.value.code == 0, said.err
    figures = json.loads(said.out)["metrics"]
    assert {
        "accuracy",
        "f1",
        "hard",
        "soft",
        "hints",
        "agreement",
        "teacher/accuracy",
        "score",
    } <= figures.keys()
    assert figures["score"] == figures["accuracy"]
    back = surgery.load(str(tmp_path / "out"))
    assert back.state().keys() == student.state().keys()


WRONG = [
    ({}, "give a --teacher: a directory that surgery saved"),
    ({"teacher": "x", "of": "unlabelled"}, "--of unlabelled has no hard labels; set --alpha 1"),
    ({"teacher": "x", "hint": ("layer.0",)}, "--hint is ('layer.0',): write STUDENT=TEACHER"),
    ({"teacher": "x", "of": "a=b"}, "the objective's name is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "said"), WRONG)
def test_wrong_options(options, said):
    with pytest.raises(TrainingError) as caught:
        Distill.parse(options)
    assert said in str(caught.value)


def test_teachers_and_places_that_do_not_suit(student, teacher, taught, known, texts, tmp_path, bert_folder):
    def refused(**options):
        with pytest.raises(TrainingError) as caught:
            batch_of(student, Distill(**{"teacher": teacher, **options}), texts)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"--teacher {tmp_path}: " in refused(teacher=str(tmp_path))
    assert "--of: objective 'classification' has no option --lable; did you" in refused(
        of="classification,lable=x"
    )
    assert "dpo cannot be part of another objective" in refused(of="dpo")
    said = refused(hint=("encoder.layer.1=encoder.layer.1",))
    assert "the program has no module or site 'encoder.layer.1'; did you mean" in said
    assert "the teacher has no module or site 'encoder.layer.7'" in refused(
        hint=("encoder.layer.0=encoder.layer.7",)
    )
    assert "the teacher's 'dense' matches " in refused(hint=("encoder.layer.0=dense",))
    assert "the outputs have 3 and 2 axes" in refused(hint=("bert.encoder.layer.0=bert.pooler",))
    assert "contains 2 scaled_dot_product_attention ops" in refused(attention=("encoder.layer.0=encoder",))
    known["wider"] = taught.apply(surgery.Head(mode="replace", labels=3))
    assert "the teacher's 'logits' has 3 classes, but the program's has 2; give" in refused(teacher="wider")
    encoder = refused(teacher=f"hf:{bert_folder}")
    assert (
        "the teacher has no output 'logits', only last_hidden_state, pooler_output; load it with" in encoder
    )


def test_the_hard_labels_are_checked_as_alone(student, teacher, tmp_path):
    path = write(tmp_path / "bad.jsonl", [{"text": "a", "label": 4}])
    said = []
    for objective in (Classification(), Distill(teacher=teacher)):
        with pytest.raises(TrainingError) as caught:
            objective.prepared(read_rows([path]).train, Setting.of(student, find_tokenizer(student), 32))
        said.append(str(caught.value))
    assert said[0] == said[1]
