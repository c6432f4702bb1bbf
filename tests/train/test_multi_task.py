"""multi-task: batches of one task by share, losses and metrics of each, learned weights, exact resume."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

import surgery
from surgery.api.programs import TrainingError
from surgery.api.training import Setting
from surgery.cli import main
from surgery.train.data import Rows, make_examples, read_rows, split, together
from surgery.train.learned import LEARNED, train_learned
from surgery.train.loop import train
from surgery.train.objectives import Classification, MultiTask, Regression
from surgery.train.options import Settings
from surgery.train.tables import joined
from surgery.train.tokenizers import find_tokenizer
from surgery.train.watchers import Watcher, read_log
from tests.train.conftest import write

ANIMALS, COLOURS = ("cat", "dog"), ("red", "green")
KINDS = [
    {
        "text": f"the {ANIMALS[i % 2]} sees a {COLOURS[i // 2 % 2]} tree" + " and says yes" * (i % 3),
        "label": i % 2,
    }
    for i in range(24)
]
RATED = [
    {"review": f"is it {COLOURS[i % 2]}" + " yes" * (i % 4), "stars": 1.0 - 2 * (i % 2), "note": "x"}
    for i in range(12)
]
TASKS = ("kind=classification", "rating=regression,label=stars")


@pytest.fixture(scope="module")
def heads(bert_folder):
    torch.manual_seed(0)
    kind = surgery.Head(mode="add", labels=2, head_name="kind", pool="mean")
    rating = surgery.Head(mode="add", labels=1, head_name="rating", pool="mean")
    return surgery.load(f"hf:{bert_folder}").apply(kind).apply(rating).apply(surgery.Full())


@pytest.fixture
def rows(tmp_path):
    parts = {"kind": KINDS, "rating": RATED}
    return {name: read_rows([write(tmp_path / f"{name}.jsonl", own)]) for name, own in parts.items()}


def prepared(program, objective, rows):
    setting = Setting.of(program, find_tokenizer(program), 32)
    return objective.prepared(together(rows), setting)


def batch_of(data, objective, setting, numbers):
    return objective.collate(data[numbers], setting, torch.Generator())


def test_each_batch_is_one_task_and_has_its_loss(heads, rows):
    objective = MultiTask(task=TASKS)
    both = joined(rows)
    setting = prepared(heads, objective, both)
    data = make_examples(both.train, objective, setting)
    assert len(data) == 36
    module = heads.module().eval()
    for name, own in (
        ("kind", Classification(output="logits_kind")),
        ("rating", Regression(label="stars", output="logits_rating")),
    ):
        numbers = [i for i, task in enumerate(data.examples["task"]) if task == name][:5]
        batch = batch_of(data, objective, setting, numbers)
        alone = own.prepared(rows[name].train, Setting.of(heads, find_tokenizer(heads), 32))
        wanted = own.collate(make_examples(rows[name].train, own, alone)[range(5)], alone, torch.Generator())
        assert torch.equal(batch["inputs"]["input_ids"], wanted["inputs"]["input_ids"])
        module.zero_grad()
        loss = objective.loss(module, batch)
        assert torch.equal(loss, own.loss(module, wanted))
        assert objective.terms(batch) == own.terms(wanted)
        loss.backward()
        moved = {n for n, p in module.named_parameters() if p.grad is not None and n.startswith("head_")}
        assert moved == {f"head_{name}.weight", f"head_{name}.bias"}
    with pytest.raises(TrainingError, match="the batch mixes tasks kind, rating"):
        batch_of(data, objective, setting, [0, 30])


def test_shares_of_tasks(heads, rows):
    both = joined(rows)
    sizes = {"small": 100, "large": 10_000}
    found = {
        temperature: MultiTask(task=TASKS, temperature=temperature).shares(sizes, 10)
        for temperature in (1.0, 2.0, 1e6)
    }
    assert found[1.0] == {"small": 10, "large": 1000}
    # 10 : 100 of 1010 batches, and half of them each.
    assert found[2.0] == {"small": round(1010 / 11), "large": round(10100 / 11)}
    assert found[1e6] == {"small": 505, "large": 505}
    assert MultiTask(task=TASKS, limit=100).shares(sizes, 10) == {"small": 505, "large": 505}

    for temperature, alike in ((1.0, False), (1e6, True)):
        objective = MultiTask(task=TASKS, temperature=temperature)
        data = make_examples(both.train, objective, prepared(heads, objective, both))
        tasks = data.examples["task"]
        epoch = objective.epoch(data, 4, torch.Generator().manual_seed(0))
        assert all(len({tasks[i] for i in batch}) == 1 for batch in epoch)
        read = sorted(i for batch in epoch for i in batch)
        if alike:
            counts = [sum(tasks[batch[0]] == name for batch in epoch) for name in rows]
            assert counts[0] in (4, 5)
            assert sum(counts) == 9 or counts[0] == counts[1]
        else:
            assert read == list(range(36))
        held = objective.epoch(data, 4, None)
        assert sorted(i for batch in held for i in batch) == list(range(36))
        assert all(len({tasks[i] for i in batch}) == 1 for batch in held)


def test_uncertainty_weighs_as_kendall_has_it(heads, rows):
    objective = MultiTask(task=TASKS, uncertainty=True)
    plain = MultiTask(task=TASKS)
    both = joined(rows)
    setting = prepared(heads, objective, both)
    data = make_examples(both.train, objective, setting)
    companions = objective.companions(heads)
    noise = companions[LEARNED]
    with torch.no_grad():
        noise.log_variance["kind"].fill_(0.7)
        noise.log_variance["rating"].fill_(-0.4)
    module = heads.module().eval()
    for number, s, half in ((0, 0.7, 1.0), (30, -0.4, 0.5)):
        batch = objective.complete(batch_of(data, objective, setting, [number]), companions)
        bare = float(plain.loss(module, batch).detach())
        loss = objective.loss(module, batch)
        assert float(loss.detach()) == pytest.approx(half * math.exp(-s) * bare + s / 2, rel=1e-6)
        loss.backward()
        grad = float(noise.log_variance[batch["task"]].grad)
        assert grad == pytest.approx(0.5 - half * math.exp(-s) * bare, rel=1e-5, abs=1e-6)
    with torch.no_grad():
        seen = objective.observe(module, batch)
    assert float(seen["rating/"]) == pytest.approx(math.exp(0.4))


class Stops(Watcher):
    """Simulates a kill at a step."""

    def __init__(self, at):
        self.at = at

    def stepped(self, step, loss, rate, tokens):
        if step == self.at:
            raise KeyboardInterrupt


def fit(program, objective, rows, folder, resume=False, watchers=(), **options):
    settings = Settings.parse({"batch": 4, "lr": 3e-3, "max_length": 32, **options})
    parts = {name: split(own, 0.25, 0) for name, own in rows.items()}
    return train(
        program, objective, joined(parts), settings, folder=folder, tokenizer=find_tokenizer(program), resume=resume,
        watchers=watchers,
    )  # fmt: skip


def test_it_learns_and_resumes_bit_for_bit_with_its_weights(heads, rows, tmp_path):
    objective = MultiTask(task=TASKS, uncertainty=True, temperature=2.0)
    options = {"steps": 30, "checkpoint": 4, "evaluate": 15}
    whole = heads.apply(surgery.Full())
    result = fit(whole, objective, rows, tmp_path / "whole", **options)
    parts = heads.apply(surgery.Full())
    with pytest.raises(KeyboardInterrupt):
        fit(parts, objective, rows, tmp_path / "parts", watchers=[Stops(14)], **options)
    parts = heads.apply(surgery.Full())
    fit(parts, objective, rows, tmp_path / "parts", resume=True, **options)
    one, two = whole.state(), parts.state()
    assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    held = [row["held_out"] for row in logs[0] if "held_out" in row]
    assert held[0]["kind/weight"] != held[1]["kind/weight"] != 1.0
    assert result.metrics["kind/loss"] < result.before["kind/loss"]
    assert result.metrics["rating/loss"] < 0.8 * result.before["rating/loss"]
    assert result.metrics["score"] == pytest.approx(
        (result.metrics["kind/accuracy"] - result.metrics["rating/loss"]) / 2
    )
    saved = tmp_path / "saved"
    whole.save(saved)
    assert not any(LEARNED in name for name in surgery.load(str(saved)).state())


def test_what_is_learned_beside_the_program_is_one_process_s(heads):
    objective = MultiTask(task=TASKS, uncertainty=True)
    with pytest.raises(TrainingError, match="several processes do not share; train in one process"):
        train_learned(objective.companions(heads), SimpleNamespace(num_processes=2), None, 1e-3)


def test_tasks_as_text_and_as_in_a_recipe():
    given = MultiTask.parse({"task": TASKS})
    recipe = MultiTask.parse(
        {"task": {"kind": "classification", "rating": {"objective": "regression", "label": "stars"}}}
    )
    assert given == recipe
    assert MultiTask.parse(given.options()) == given
    assert hash(given) == hash(recipe)
    assert given.tasks["rating"] == Regression(label="stars", output="logits_rating")
    assert MultiTask.parse({"task": "a=classification,output=logits"}).tasks["a"].output == "logits"


WRONG = [
    ([], "give a --task NAME=OBJECTIVE for each task"),
    (["kind"], "--task is 'kind': write NAME=OBJECTIVE,OPTION=VALUE"),
    (["kind=classification,labels"], "'labels' is not an option; write OBJECTIVE,OPTION=VALUE"),
    (["kind=classification", "kind=regression"], "two tasks have the name 'kind'"),
]  # fmt: skip
BAD = [
    (["kind=clasification"], "there is no objective 'clasification'; did you mean 'classification'"),
    (["kind=classification,lable=x"], "task 'kind': objective 'classification' has no option --lable; did you mean"),
    (["kind=sft,packing=true"], "task 'kind': sft cannot pack as part of another objective; leave out packing"),
    (["kind=dpo"], "task 'kind': dpo cannot be part of another objective; train with it alone"),
    (["kind=classification"], "the data 'rating' has no task of that name; there are kind"),
    ([*TASKS, "third=classification"], "task 'third' has no data, only kind, rating; give --data third=FILE"),
    (["kind=classification", "rating=regression"], "task 'rating': objective 'regression': no column looks like the l"),
    (["kind=classification", "rating=classification,label=stars"], "task 'rating': row 0: stars is 1, but the model"),
    (["kind=classification,output=logits_x", TASKS[1]], "task 'kind': the model has no output 'logits_x', only l"),
]  # fmt: skip


@pytest.mark.parametrize(("tasks", "said"), WRONG)
def test_wrong_options(tasks, said):
    with pytest.raises(TrainingError) as caught:
        MultiTask.parse({"task": tuple(tasks)})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("tasks", "said"), BAD)
def test_bad_input_is_one_line(tasks, said, heads, rows):
    with pytest.raises(TrainingError) as caught:
        prepared(heads, MultiTask.parse({"task": tuple(tasks)}), joined(rows))
    assert said in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_that_are_wrong_say_whose(heads, rows, tmp_path):
    bad = {**rows, "kind": read_rows([write(tmp_path / "bad.jsonl", [{"text": "the cat", "label": 2}])])}
    with pytest.raises(
        TrainingError, match="task 'kind': row 0: label is 2, but the model's 'logits_kind' has the"
    ):
        prepared(heads, MultiTask(task=TASKS), joined(bad))
    bad["kind"] = read_rows([write(tmp_path / "worse.jsonl", [{"text": 3, "label": 1}])])
    both, objective = joined(bad), MultiTask(task=TASKS)
    with pytest.raises(
        TrainingError, match="row 0: task 'kind': column 'text' contains 3, which is not a text"
    ):
        make_examples(both.train, objective, prepared(heads, objective, both))
    with pytest.raises(TrainingError, match="'rating' has no held-out rows, but 'kind' has"):
        joined({"rating": rows["rating"], "kind": Rows(rows["kind"].train, rows["kind"].train)})
    with pytest.raises(
        TrainingError, match="needs data for each task; give --data NAME=FILE for kind, rating"
    ):
        prepared(heads, objective, rows["kind"])


def test_the_command(heads, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("surgery.cli.loading.load", lambda *args, **kwargs: heads)
    files = {"kind": write(tmp_path / "a.jsonl", KINDS), "rating": write(tmp_path / "b.jsonl", RATED)}
    line = [
        "train",
        "hf:small",
        "--objective",
        "multi-task",
        "--task",
        TASKS[0],
        "--task",
        TASKS[1],
        "--steps",
        "2",
    ]
    line += ["--held-out", "0.25", "--json", "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        main([*line, *(part for name, path in files.items() for part in ("--data", f"{name}={path}"))])
    said = capsys.readouterr()
    assert caught.value.code == 0, said.err
    figures = json.loads(said.out)["metrics"]
    assert {"score", "loss", "kind/accuracy", "kind/f1", "rating/pearson", "rating/loss"} <= figures.keys()
    for more, wanted in (
        (["--data", str(files["kind"])], "objective 'multi-task' reads several data sets; write NAME="),
        (
            ["--data", f"kind={files['kind']}", "--held-out", str(files["kind"])],
            "with several data sets give a share",
        ),
    ):
        with pytest.raises(SystemExit):
            main([*line, "--overwrite", *more])
        assert wanted in capsys.readouterr().err
