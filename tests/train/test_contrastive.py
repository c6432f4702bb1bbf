"""contrastive: losses against their formulas, refusals, and learning."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch.nn import functional as F

import surgery
from surgery.api.programs import TrainingError
from surgery.cli import main
from surgery.train.embeddings import retrieval
from surgery.train.objectives import Contrastive
from surgery.train.tokenizers import find_tokenizer
from tests.train.conftest import prepared, write
from tests.train.test_loop import fit

PAIRS = [
    {"text1": "the cat sees a tree", "text2": "a tree", "negative": "the dog"},
    {"text1": "is it red", "text2": "yes it is", "negative": "no"},
    {"text1": "what is it", "text2": "a dog and a cat", "negative": "green"},
]


@pytest.fixture(scope="module")
def bert(bert_folder):
    return surgery.load(f"hf:{bert_folder}")


def batch_of(program, objective, path):
    examples, setting = prepared(program, objective, path)
    return objective.collate(examples[range(len(examples))], setting, torch.Generator().manual_seed(0))


def vectors(program, texts):
    """Means over the tokens of each text alone, without padding."""
    read, found = find_tokenizer(program), []
    for text in texts:
        ids = torch.tensor([read(text)["input_ids"]] * 2)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
        }
        found.append(program.run(**inputs)["last_hidden_state"][0].mean(0))
    return torch.stack(found)


def test_infonce_is_the_cross_entropy_of_in_batch_candidates(bert, tmp_path):
    path = write(tmp_path / "p.jsonl", PAIRS)
    found = {}
    for kind in ("cos", "dot"):
        objective = Contrastive(temperature=0.1, similarity=kind)
        batch = batch_of(bert, objective, path)
        with torch.no_grad():
            found[kind] = float(objective.loss(bert.module(), batch))
        assert objective.terms(batch) == 3
    a, p, n = (vectors(bert, [row[k] for row in PAIRS]) for k in ("text1", "text2", "negative"))
    for kind, scale in (("cos", lambda x: F.normalize(x, dim=-1)), ("dot", lambda x: x)):
        scores = scale(a) @ scale(torch.cat([p, n])).T / 0.1
        wanted = F.cross_entropy(scores, torch.arange(3))
        # fp32: padded rows sum in another order, and the temperature makes tenfold of it.
        assert found[kind] == pytest.approx(float(wanted), rel=1e-4), kind


def test_both_directions_and_a_projection_that_passes_grafted(bert, tmp_path):
    head = surgery.Head(mode="add", labels=16, head_name="proj", pool="mean")
    bend = surgery.Expand(side="dense", target="path:head_proj", size=16, activation="gelu")
    program = bert.apply(head).apply(bend)
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2)) * 0.3)
    path = write(tmp_path / "p.jsonl", [{k: row[k] for k in ("text1", "text2")} for row in PAIRS])
    one = Contrastive(vector="logits_proj", temperature=0.5)
    both = Contrastive(vector="logits_proj", temperature=0.5, symmetric=True)
    batch = batch_of(program, one, path)
    with torch.no_grad():
        a, p = (F.normalize(v, dim=-1) for v in program.run(**batch["inputs"])["logits_proj"].chunk(2))
        forward, back = (F.cross_entropy(scores / 0.5, torch.arange(3)) for scores in (a @ p.T, p @ a.T))
        torch.testing.assert_close(one.loss(program.module(), batch), forward)
        torch.testing.assert_close(both.loss(program.module(), batch), (forward + back) / 2)
    one.loss(program.module().train(), batch).backward()
    moved = [name for name, p in program.module().named_parameters() if p.grad is not None]
    assert set(moved) == set(program.tensors)


def test_the_same_text_is_no_negative(bert, tmp_path):
    rows = [*PAIRS[:2], {**PAIRS[2], "text2": PAIRS[0]["text2"]}, {**PAIRS[1], "text2": "a red tree"}]
    rows[0] = {**rows[0], "negative": "yes it is"}  # the positive of row 1
    batch = batch_of(bert, Contrastive(), write(tmp_path / "p.jsonl", rows))
    false = torch.nonzero(batch["false"]).tolist()
    assert false == [[0, 2], [1, 3], [1, 4], [2, 0], [3, 1]]
    a, p, n = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    scores = (a @ torch.cat([p, n]).T) / 0.05
    for i, j in false:
        scores[i, j] = -math.inf
    found = Contrastive(similarity="dot")._infonce(a, p, n, batch["false"])
    torch.testing.assert_close(found, F.cross_entropy(scores, torch.arange(4)))


def test_triplets_given_and_mined():
    draw = torch.Generator().manual_seed(1)
    a, p, n = (F.normalize(torch.randn(5, 6, generator=draw), dim=-1) for _ in range(3))
    objective, none = Contrastive(loss="triplet", margin=0.3), torch.zeros(5, 5, dtype=torch.bool)
    near, far = (a - p).square().sum(1), (a - n).square().sum(1)
    torch.testing.assert_close(objective._triplet(a, p, n, none), (near - far + 0.3).clamp_min(0).mean())
    terms = []
    for i in range(5):
        others = [float((a[i] - p[j]).square().sum()) for j in range(5) if j != i]
        beyond = [d for d in others if d > near[i]]
        terms.append(max(0.0, float(near[i]) - (min(beyond) if beyond else max(others)) + 0.3))
    assert float(objective._triplet(a, p, None, none)) == pytest.approx(sum(terms) / 5, rel=1e-5)
    single = objective._triplet(a[:1].requires_grad_(), p[:1], None, none[:1, :1])
    single.backward()
    assert float(single.detach()) == 0.0


def test_retrieval_counts_ties_as_chance():
    same = torch.ones(4, 3)
    assert retrieval(same, same, "cos") == {"accuracy": 0.25, "mrr": pytest.approx(1 / 2.5)}
    eye = torch.eye(3)
    assert retrieval(eye, eye, "cos")["accuracy"] == 1.0
    assert retrieval(eye, eye[[1, 2, 0]], "cos")["accuracy"] == 0.0


def test_simcse_has_two_views_of_dropout(bert, tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": row["text1"]} for row in PAIRS])
    objective = Contrastive(loss="simcse")
    batch = batch_of(bert, objective, path)
    module = bert.apply(surgery.Full()).module().train()
    torch.manual_seed(0)
    first, second = objective._views(module, batch)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    wanted = F.cross_entropy(
        F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T / 0.05, torch.arange(3)
    )
    torch.manual_seed(0)
    torch.testing.assert_close(objective.loss(module, batch), wanted)
    seen = [objective.observe(module.eval(), batch) for _ in range(2)]
    assert torch.equal(seen[0]["losses"], seen[1]["losses"])  # the same views at every evaluation
    assert not torch.equal(seen[0]["anchors"], seen[0]["positives"])

    class Dry(torch.nn.Module):
        def forward(self, input_ids, **rest):
            return {"last_hidden_state": F.one_hot(input_ids, 101).float()}

    with pytest.raises(TrainingError, match="the model has no active dropout"):
        objective.loss(Dry().train(), batch)


@pytest.mark.parametrize("loss", ["infonce", "simcse", pytest.param("triplet", marks=pytest.mark.slow)])
def test_it_learns_which_texts_belong_together(bert, loss, tmp_path):
    """Each of three words has a translation, and no two of the 27 pairs are the same; for simcse the loss alone."""
    words = [("user", "assistant", ":"), ("the", "cat", "dog"), ("sees", "a", "red")]
    others = [("green", "tree", "and"), ("says", "yes", "no"), ("what", "is", "it")]
    rows = [
        {side: " ".join(w[i] for w, i in zip(of, chosen, strict=True)) for side, of in sides.items()}
        for chosen in itertools.product(range(3), repeat=3)
        for sides in [{"anchor": words, "positive": others}]
    ]
    data = write(tmp_path / "p.jsonl", rows)
    result = fit(bert.apply(surgery.Full()), Contrastive(loss=loss), data, tmp_path / "run", steps=60, batch=10,
                 lr=3e-3)  # fmt: skip
    assert result.metrics["loss"] < result.before["loss"]
    if loss != "simcse":
        # 7 held-out pairs: chance is (1 + 1/2 + … + 1/7) / 7 = 0.37.
        assert result.metrics["mrr"] > 0.6


BAD = [
    ([{"words": "a", "positive": "b"}], [], "no column looks like the anchor; the data has words, positive"),
    ([{"text": "a"}], [], "no column looks like the positive; the data has text; name one with --positive, or use"),
    ([{"text1": "a", "text2": 3}] * 4, [], "row 0: column 'text2' contains 3, which is not a text"),
    (PAIRS, ["--vector", "logits"], "has no output 'logits', only last_hidden_state, pooler_output"),
    (PAIRS, ["--batch", "1"], "takes its negatives from the batch; give a --batch of 2 or more"),
    (PAIRS, ["--loss", "triplet", "--symmetric"], "--symmetric needs --loss infonce, not triplet"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "more", "said"), BAD)
def test_bad_input_is_one_line(rows, more, said, bert, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("surgery.cli.loading.load", lambda *args, **kwargs: bert.apply(surgery.Full()))
    path = write(tmp_path / "data.jsonl", rows)
    command = ["train", "hf:small", "--objective", "contrastive", "--data", str(path), "--held-out", "0"]
    with pytest.raises(SystemExit) as caught:
        main([*command, "-o", str(tmp_path / "out"), *more])
    errors = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2, errors
    assert len(errors) == 1
    assert said in errors[0]


def test_the_command(bert, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("surgery.cli.loading.load", lambda *args, **kwargs: bert.apply(surgery.Full()))
    path = write(tmp_path / "data.jsonl", PAIRS * 4)
    with pytest.raises(SystemExit) as caught:
        main(["train", "hf:small", "--objective", "contrastive", "--loss", "triplet", "--data", str(path), "--steps",
              "2", "-o", str(tmp_path / "out"), "--json"])  # fmt: skip
    said = capsys.readouterr()
    assert caught.value.code == 0, said.err
    assert {"loss", "accuracy", "mrr"} == json.loads(said.out)["metrics"].keys()
