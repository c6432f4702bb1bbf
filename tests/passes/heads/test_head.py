"""Heads: replaced, resized by class, added to the existing ones; the graph's outputs, their names and their masks."""

from __future__ import annotations

from collections import namedtuple

import onnx
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import BertConfig, BertForSequenceClassification

import surgery
from surgery.cli import main
from surgery.common.errors import JournalError, PassError, TargetError
from surgery.engine.diff import diff
from surgery.export import provenance_of
from surgery.export.runtime import OnnxModel
from surgery.export.verify import verify
from surgery.graph.graphs import copy_graph
from surgery.graph.outputs import named_outputs, refuse_output
from surgery.testing import check_pass
from tests.shared import models
from tests.techniques.models import program

CLASSES = 4


@pytest.fixture(scope="module")
def convnet() -> surgery.Program:
    return surgery.capture(*models.convnet())


class Tokens(nn.Module):
    """Scores of all tokens, of the first token, or hidden states alone, in the structure that a test chooses."""

    def __init__(self, returns: str = "dict") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.returns = returns
        self.embed = nn.Embedding(20, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        hidden = self.mix(self.embed(input_ids) * attention_mask[..., None]).tanh()
        if self.returns == "hidden":
            return {"last_hidden_state": hidden}
        scores = self.head(hidden)
        made = {"dict": {"logits": scores}, "tuple": (scores, hidden.mean(1)), "tensor": scores}
        return made[self.returns]


IDS = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))
RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
SEQ = {name: {0: "batch", 1: "seq"} for name in ("input_ids", "attention_mask")}


def tokens(returns: str = "dict") -> surgery.Program:
    given = {"input_ids": IDS, "attention_mask": RIGHT}
    return surgery.capture(Tokens(returns), given, SEQ)


def weights(program: surgery.Program, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    state = program.state()
    return state[f"{prefix}.weight"], state[f"{prefix}.bias"]


# -- replace and resize


def test_a_replaced_head_leaves_the_count_and_the_file(convnet, tmp_path):
    replaced = convnet.apply(surgery.Head(labels=7))
    assert replaced.run().shape == (3, 7)
    assert [s.path for s in replaced.sites if s.role == "head"] == ["7.head"]
    old = sum(convnet.parameter_sizes()[f"7.{n}"] for n in ("weight", "bias"))
    new = 7 * 8 + 7
    assert replaced.count_parameters() == (convnet.count_parameters()[0] - old + new, new)
    replaced.export(tmp_path / "model.onnx")
    names = {value.name for value in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert {"7.head.weight", "7.head.bias"} <= names
    assert not names & {"7.weight", "7.bias"}
    assert provenance_of(tmp_path / "model.onnx")["7.head.weight"].pass_name == "head"
    undone = replaced.undo("head")
    assert torch.equal(undone.run(), convnet.run())
    assert undone.count_parameters() == convnet.count_parameters()


@pytest.mark.parametrize("init", ["normal", "kaiming", "zero"])
def test_what_is_new_starts_as_asked(convnet, init):
    weight, bias = weights(convnet.apply(surgery.Head(labels=400, init=init)), "7.head")
    expected = {"normal": 0.02, "kaiming": (1 / 3 / 8) ** 0.5, "zero": 0.0}[init]  # deviation of U(±1/√8)
    assert float(weight.detach().std()) == pytest.approx(expected, rel=0.1)
    assert not bias.any()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"labels": 9}, [0, 1, 2, 3]),
        ({"labels": 2}, [0, 1]),
        ({"keep": "3,0"}, [3, 0]),
        ({"keep": "2,1", "labels": 5}, [2, 1]),
    ],
)
def test_resizing_keeps_rows_and_their_logits(convnet, options, kept):
    resized = convnet.apply(surgery.Head(mode="resize", **options))
    old, new = weights(convnet, "7"), weights(resized, "7.head")
    count = options.get("labels", len(kept))
    assert new[0].shape == (count, 8)
    for before, after in zip(old, new, strict=True):
        assert torch.equal(before[kept], after[: len(kept)])
    assert resized.journal.entries[-1].sites[0].decided["classes"] == [*kept, *[None] * (count - len(kept))]
    # Same rows, same features; a product of another width may sum its eight terms in another order: 8·eps of the
    # largest, and mostly it is the same bits.
    before, after = convnet.run()[:, kept], resized.run()[:, : len(kept)]
    assert float((before - after).abs().max()) <= 8 * torch.finfo(torch.float32).eps * float(
        before.abs().max()
    )


def test_a_pointwise_convolution_is_a_head_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    base = surgery.capture(net, torch.randn(2, 3, 5, 5))
    for pass_, made in (
        (surgery.Head(labels=7), (2, 7, 5, 5)),
        (surgery.Head(mode="resize", keep="1,0"), (2, 2, 5, 5)),
        (surgery.Head(mode="add", labels=3, head_name="edges"), (2, 3, 5, 5)),
        (surgery.Head(mode="add", labels=3, head_name="image", pool="mean"), (2, 3)),
    ):
        check_pass(pass_, base)
        out = base.apply(pass_).run()
        assert (out if pass_.mode != "add" else out[pass_.output]).shape == made
    with pytest.raises(
        PassError, match="its features are images, and --pool cls is for tokens; use --pool mean"
    ):
        base.apply(surgery.Head(mode="add", labels=3, head_name="x", pool="cls"))


class Counting(nn.Module):
    """Depends on the width of its head, in the way that a test chooses."""

    def __init__(self, way: str, width: int = 2) -> None:
        super().__init__()
        self.way = way
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, width)

    def forward(self, x):
        y = self.head(self.body(x).relu())
        if self.way == "split":
            return y.split(1, dim=-1)
        if self.way == "slice":
            return y[:, :2].softmax(-1)
        if self.way == "view":
            return y.view(-1, 2)
        if self.way == "squeeze":
            return y.squeeze(-1)
        return y.softmax(-1), y.argmax(-1), y.sort(-1).values


@pytest.mark.parametrize(("way", "width"), [("split", 2), ("slice", 3), ("view", 2), ("squeeze", 1)])
def test_what_counts_on_the_old_width_refuses_another(way, width):
    base = surgery.capture(Counting(way, width), torch.randn(3, 4))
    with pytest.raises(
        PassError,
        match=rf"head at head: refused, op {way}.*it has {width} outputs and would get 5.*--mode add",
    ):
        base.apply(surgery.Head(labels=5))
    assert base.apply(surgery.Head(labels=width)).count_parameters()[1] == 5 * width


def test_what_follows_the_width_follows_it():
    base = surgery.capture(Counting("any"), torch.randn(3, 4))
    probabilities, best, ordered = base.apply(surgery.Head(labels=5)).run()
    assert (probabilities.shape, best.shape, ordered.shape) == ((3, 5), (3,), (3, 5))


def test_several_heads_are_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            x = self.body(x).relu()
            return {"a": self.a(x), "b": self.b(x)}

    base = surgery.capture(Two(), torch.randn(3, 4))
    with pytest.raises(PassError, match="has 2 heads; name one with --target: a, b"):
        base.apply(surgery.Head(labels=5))
    out = base.apply(surgery.Head(labels=5, target="b")).run()
    assert torch.equal(out["a"], base.run()["a"])
    assert out["b"].shape == (3, 5)


# -- add


def test_every_structure_of_outputs_takes_one_more():
    added = surgery.Head(mode="add", labels=2, head_name="more")
    for returns, keys in (("dict", ["logits", "logits_more"]), ("tuple", ["0", "1", "2"]), ("tensor", None)):
        base = tokens(returns)
        added = added.model_copy(update={"target": "path:head" if returns == "tuple" else None})
        grown = base.apply(added)
        assert list(named_outputs(grown.graph)) == (keys or ["output", "logits_more"])
        before, after = base.run(), grown.run()
        if returns == "dict":
            assert list(after) == keys
            assert torch.equal(after["logits"], before["logits"])
        elif returns == "tuple":
            assert type(after) is tuple
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False))
        else:
            assert torch.equal(after["output"], before)
        trained = grown.module().train()(IDS, RIGHT)
        assert type(trained) is type(after)
        assert len(trained) == len(after)
        check_pass(added, base)


def test_other_structures_take_none():
    graph = copy_graph(tokens().graph)
    leaves = namedtuple("Scores", "logits")(0)
    info = graph._codegen.pytree_info
    graph._codegen.pytree_info = info._replace(out_spec=pytree.tree_structure(leaves))
    assert "returns a Scores, to which no output can be added; let it return a dict" in refuse_output(
        graph, "a"
    )


@pytest.mark.parametrize("pool", ["cls", "mean", "last", "none"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("returns", ["dict", "hidden"])
def test_pooling_sees_what_the_mask_lets_through(pool, padding, returns):
    module, mask = Tokens(returns), RIGHT if padding == "right" else RIGHT.flip(1)
    pass_ = surgery.Head(mode="add", labels=2, head_name="score", pool=pool)
    grown = tokens(returns).apply(pass_)
    weight, bias = weights(grown, "head_score")
    hidden = module.mix(module.embed(IDS) * mask[..., None]).tanh()
    rows = []
    for states, row in zip(hidden, mask, strict=True):
        seen = states[row.bool()]
        rows.append({"cls": states[0], "mean": seen.mean(0), "last": seen[-1], "none": states}[pool])
    expected = torch.stack(rows) @ weight.t() + bias
    found = grown.run(IDS, mask)["logits_score"]
    assert torch.allclose(found, expected, atol=1e-6)  # eight products, another order
    if (padding, returns, pool) == ("right", "hidden", "last"):
        check_pass(pass_, tokens(returns))


def test_hidden_states_need_a_pool():
    with pytest.raises(PassError, match=r"'last_hidden_state' has 3 axes.*--pool.*--pool none"):
        tokens("hidden").apply(surgery.Head(mode="add", labels=2, head_name="a"))
    with pytest.raises(PassError, match=r"has no head.*use --mode add"):
        tokens("hidden").apply(surgery.Head(labels=2))
    first = tokens("hidden").apply(surgery.Head(mode="add", labels=2, head_name="a", pool="mean"))
    both = first.apply(surgery.Head(mode="add", labels=4, head_name="b", pool="cls"))
    assert both.undo("head:a").run()["logits_b"].shape == (3, 4)  # the second does not stand on the first


def test_heads_are_named_weighted_left_out_and_undone_alone(tmp_path):
    base = tokens()
    a = surgery.Head(mode="add", labels=2, head_name="a")
    both = base.apply(a, surgery.Head(mode="add", labels=4, head_name="b", pool="mean"))
    assert list(both.run()) == ["logits", "logits_a", "logits_b"]
    assert [e.id for e in both.journal] == ["freeze", "head:a", "head:b"]
    assert list(both.without("a").run()) == ["logits", "logits_b"]
    assert torch.equal(both.undo("b").run()["logits_a"], both.run()["logits_a"])
    with pytest.raises(PassError, match="applied already"):
        both.apply(a)
    report = verify(base, both)
    assert report.agree
    assert report.difference == 0
    assert {c.by for c in diff(base, both).nodes if c.change == "+"} == {"head:a", "head:b"}
    both.export(tmp_path / "model.onnx")
    model = OnnxModel(tmp_path / "model.onnx")
    given = {"input_ids": IDS[:, :4], "attention_mask": RIGHT[:, :4]}
    found, expected = model.run(given), both.run(**given)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5)
    again = base.apply(a, a.model_copy(update={"label": "twin"}))
    assert list(again.run()) == ["logits", "logits_a", "logits_a_twin"]


def test_saved_and_loaded(tmp_path):
    base = tokens("tuple")
    both = base.apply(
        surgery.Head(mode="resize", labels=5, target="path:head"),
        surgery.Head(mode="add", labels=2, head_name="a", pool="last", target="path:head.head"),
    )
    both.save(tmp_path / "saved")
    again = surgery.load(str(tmp_path / "saved"), base=base)
    for a, b in zip(both.run(), again.run(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(again.undo_all().run()[0], base.run()[0])


def test_a_new_head_learns_and_nothing_else_moves():
    """A second task on frozen features: the teacher is another head on the same body."""
    base = surgery.capture(*models.convnet())
    grown = base.apply(surgery.Head(mode="add", labels=3, head_name="task"))
    before = {n: t.clone() for n, t in grown.state().items()}
    torch.manual_seed(1)
    images = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        features = models.convnet()[0][:6].eval()(images)
        labels = (features @ torch.randn(8, 3)).argmax(1)
    module = grown.module().eval()
    optimiser = torch.optim.Adam(grown.parameter_groups(0.1))
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(module(images)["logits_task"], labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    moved = {n for n, t in grown.state().items() if not torch.equal(t, before[n])}
    assert moved == {"head_task.weight", "head_task.bias"}
    assert torch.equal(grown.run()["output"], base.run())


@pytest.fixture(scope="module")
def regressor(tmp_path_factory) -> surgery.Program:
    """One score for a text, as transformers trains it on numbers."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, num_labels=1, problem_type="regression",
    )  # fmt: skip
    where = tmp_path_factory.mktemp("regressor")
    BertForSequenceClassification(config).save_pretrained(where)
    return surgery.load(f"hf:{where}", task="text-classification")


def test_a_regressors_head_is_replaced_and_resized(regressor):
    before = regressor.run()["logits"]
    old = weights(regressor, "classifier")
    for labels in (1, 3):
        replaced = regressor.apply(surgery.Head(labels=labels))
        assert replaced.run()["logits"].shape == (len(before), labels)
        assert not torch.equal(weights(replaced, "classifier.head")[0][:1], old[0])
        resized = regressor.apply(surgery.Head(mode="resize", labels=labels))
        for was, now in zip(old, weights(resized, "classifier.head"), strict=True):
            assert torch.equal(was, now[:1])
        # Sixteen terms in another order, as above.
        torch.testing.assert_close(resized.run()["logits"][:, :1], before, rtol=0, atol=1e-6)
    both = regressor.apply(surgery.Head(mode="add", labels=1, head_name="length"))
    assert {name: tuple(value.shape) for name, value in both.run().items()} == {
        "logits": (len(before), 1), "logits_length": (len(before), 1),
    }  # fmt: skip
    assert torch.equal(both.run()["logits"], before)


def test_a_regressors_new_head_learns_numbers(regressor):
    """Another head's numbers on the same body, far from zero; the body stays bit for bit."""
    program = regressor.apply(surgery.Head(labels=1))
    before = {name: tensor.clone() for name, tensor in program.state().items()}
    ids = torch.randint(0, 40, (48, 8), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["token_type_ids"] = torch.zeros_like(ids)
    torch.manual_seed(3)
    with torch.no_grad():
        answers = regressor.apply(surgery.Head(labels=1, init="kaiming")).run(**inputs)["logits"]
        goal = 2 + (answers - answers.mean()) / answers.std()
    module = program.module().eval()
    optimiser = torch.optim.Adam(program.parameter_groups(0.3))
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(module(**inputs)["logits"], goal)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.4  # a constant comes to 1, the variance
    moved = {name for name, tensor in program.state().items() if not torch.equal(tensor, before[name])}
    assert moved == {"classifier.head.weight", "classifier.head.bias"}


# -- with other passes


def test_with_lora_in_both_orders(randomise):
    base = tokens()
    lora, head = surgery.Lora(target="mix", rank=2), surgery.Head(labels=5)
    one, other = base.apply(lora, head), base.apply(head, lora)
    randomise(one, 0.3)
    with torch.no_grad():
        for name, tensor in other.tensors.items():
            tensor.copy_(one.tensors[name])
    assert torch.allclose(one.run()["logits"], other.run()["logits"], atol=1e-6)
    merged = one.merge()
    assert torch.allclose(merged.run()["logits"], one.run()["logits"], atol=1e-5)
    assert merged.journal.entries[-1].options["folded"] == ["lora"]
    assert "a new head has tensors of its own" in merged.journal.entries[-1].options["kept"]["head"]
    on_new = base.apply(head).apply(surgery.Lora(target="re:^head.head$", rank=2))
    assert list(on_new.journal.entries[-1].sites[0].tensors.values()) == [
        "head.head.lora.A",
        "head.head.lora.B",
    ]
    with pytest.raises(JournalError, match=r"'lora' depends on head.head.weight.*undo 'lora' first"):
        on_new.undo("head")
    with pytest.raises(
        PassError, match=r"head at head: refused, 'lora' is attached to it.*apply head before"
    ):
        base.apply(surgery.Lora(target="path:head", rank=2)).apply(head)
    with pytest.raises(TargetError, match="matches no site"):  # the old head is a site no more
        base.apply(head).apply(surgery.Lora(target=r"re:^head\.weight$", rank=2))
    beside = base.apply(
        surgery.Lora(target="head", rank=2), surgery.Head(mode="add", labels=2, head_name="a")
    )
    randomise(beside, 0.3)
    folded = beside.merge()  # the added head stands beside, so what adapts the old one is folded
    assert folded.journal.entries[-1].options["folded"] == ["lora"]
    assert torch.allclose(folded.run()["logits"], beside.run()["logits"], atol=1e-5)
    assert torch.allclose(folded.run()["logits_a"], beside.run()["logits_a"], atol=1e-6)


# -- models, the command line, bad input


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"labels": 5}, {"mode": "add", "labels": 3, "head_name": "score", "pool": "mean"}]
)
def test_conformance_on_vit(options):
    check_pass(surgery.Head(**options), program("vit"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm", "smollm2", "t5", "resnet18"])
@pytest.mark.parametrize(
    "options",
    [
        {"labels": 5},
        {"mode": "resize", "labels": 6},
        {"mode": "resize", "keep": "1,0"},
        {"mode": "add", "labels": 3, "head_name": "score"},
        {"mode": "add", "labels": 1, "head_name": "value", "pool": "last"},
    ],
)
def test_conformance_everywhere(name, options):
    if name == "resnet18" and "pool" in options:
        pytest.skip("an image network has no tokens to pool")
    check_pass(surgery.Head(**options), program(name))


@pytest.mark.slow
def test_a_language_model_gets_a_value_head():
    """RLHF: a scalar for every sequence, and for every token, beside logits that stay as they are."""
    base = program("t5")
    grown = base.apply(
        surgery.Head(mode="add", labels=1, head_name="value", pool="none"),
        surgery.Head(mode="add", labels=1, head_name="score", pool="last"),
    )
    before, after = base.run(), grown.run()
    rows, length = before["logits"].shape[:2]
    assert torch.equal(after["logits"], before["logits"])
    assert after["logits_value"].shape == (rows, length, 1)
    weight, bias = weights(grown, "head_score")
    values = weights(grown, "head_value")
    with torch.no_grad():
        values[0].copy_(weight)
        values[1].copy_(bias)
    after = grown.run()  # of a decoder without a mask the last position counts
    assert torch.allclose(after["logits_score"], after["logits_value"][:, -1], atol=1e-6)
    with pytest.raises(
        PassError, match="the model's features are not computed from tokens; leave out --pool"
    ):
        program("resnet18").apply(surgery.Head(mode="add", labels=1, head_name="a", pool="last"))


BAD = [
    ({}, "give --labels"),
    ({"mode": "add", "labels": 2}, "--mode add needs --head-name"),
    (
        {"labels": 2, "head_name": "a"},
        "--head-name is for --mode add, and this is --mode replace; leave it out",
    ),
    ({"labels": 2, "pool": "mean"}, "--pool is for --mode add"),
    ({"labels": 2, "keep": "1"}, "--keep is for --mode resize"),
    ({"mode": "resize", "keep": "1,1"}, "names a class twice"),
    ({"mode": "resize", "keep": "0,1,2", "labels": 2}, "or more classes than --labels 2"),
    ({"mode": "resize", "keep": "a"}, "is not a list of class numbers; write it as 0,2,5"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options(options, message):
    with pytest.raises(PassError, match=message):
        surgery.Head.parse(options)


def test_bad_requests(convnet):
    with pytest.raises(PassError, match="head at 7: refused, it has no class 9; give classes from 0 to 3"):
        convnet.apply(surgery.Head(mode="resize", keep="9"))
    grown = convnet.apply(surgery.Head(mode="add", labels=2, head_name="a"))
    taken = surgery.Head(mode="add", labels=2, label="a")
    with pytest.raises(PassError, match="applied already"):
        grown.apply(taken)
    with pytest.raises(
        PassError,
        match=r"merge: nothing can be folded.*7: the base has no weight that an added head could be merged into.*ONNX",
    ):
        grown.merge()


def test_from_the_command_line(tmp_path):
    arguments = ["apply", "timm:resnet18", "--random", "--pass", "head", "--mode", "resize", "--keep", "7,3"]
    arguments += ["--pass", "head", "--mode", "add", "--head-name", "other", "--labels", "2"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "-o", str(tmp_path / "out")])
    assert not done.value.code
    loaded = surgery.load(str(tmp_path / "out"))
    assert {name: tuple(value.shape) for name, value in loaded.run().items()} == {
        "output": (2, 2),
        "logits_other": (2, 2),
    }
