"""New tokens: exact for old ones, in embedding and output layer; trained, exported, folded and undone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.capture.hf import from_model
from surgery.common.errors import JournalError, PassError
from surgery.export.runtime import OnnxModel
from surgery.store.hf import write_hf
from surgery.testing import check_pass
from tests.shared import models
from tests.techniques.models import program

OLD = 11  # tokens of models.forms


class Untied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, ids):
        return self.head(self.embed(ids).cumsum(1)) * 0.5


@pytest.fixture(scope="module")
def forms() -> surgery.Program:
    return surgery.capture(*models.forms())


def larger(rows: torch.Tensor) -> nn.Module:
    """The same module with nn's own layers of the larger size."""
    module, _ = models.forms()
    table = nn.Parameter(torch.cat([module.embed.weight, rows]).detach())
    module.embed, module.head = nn.Embedding(*table.shape), nn.Linear(8, len(table), bias=False)
    module.embed.weight = module.head.weight = table
    return module.eval()


def new_ids(rows: int) -> torch.Tensor:
    """Every new token and some old ones, in the shape that models.forms takes."""
    return (torch.arange(15) * 2 % (rows + 3) + OLD - 3).view(3, 5)


def test_old_tokens_are_exact_and_new_ones_are_there(forms):
    grown = forms.apply(surgery.Vocab(tokens=3))
    before, after = forms.run(), grown.run()
    assert torch.equal(after[..., :OLD], before)
    assert after.shape == (*before.shape[:-1], OLD + 3)
    assert list(grown.tensors) == ["embed.vocab.rows"]  # one tensor for both uses
    assert grown.count_parameters() == (forms.count_parameters()[0] + 24, 24)
    plan = forms.plan(surgery.Vocab(tokens=3)).passes[-1]
    assert plan.parameters == 24
    rows = grown.tensors["embed.vocab.rows"]
    assert torch.allclose(rows.detach(), forms.state()["embed.weight"].mean(0).expand(3, -1))
    with torch.no_grad():
        rows.normal_()
    ids = new_ids(3)
    expected = larger(rows)(ids)
    # Two products of 8 terms instead of one, under a layer norm: a few ulp.
    assert torch.allclose(grown.run(ids), expected, rtol=0, atol=4e-6 * float(expected.abs().max()))
    for beyond in (OLD + 3, -1):
        with pytest.raises((IndexError, RuntimeError)):
            grown.run(torch.full((3, 5), beyond))


def test_new_ids_in_onnx(forms, tmp_path):
    grown = forms.apply(surgery.Vocab(tokens=3, init="normal"))
    report = grown.export(tmp_path / "model.onnx")
    assert len(report.parity.outputs) == 3  # fresh, another shape, and with new tokens
    for program_ in (grown, grown.merge()):
        program_.export(tmp_path / "model.onnx")
        ids = new_ids(3)
        model = OnnxModel(tmp_path / "model.onnx")
        (name,) = model.signature
        (found,) = model.run({name: ids}).values()
        assert torch.allclose(found, grown.run(ids), atol=1e-5)


@pytest.mark.parametrize(("options", "rows"), [({"tokens": 3, "multiple_of": 8}, 5), ({"multiple_of": 4}, 1)])
def test_rounded_up(forms, options, rows):
    grown = forms.apply(surgery.Vocab(**options))
    assert grown.run().shape[-1] == OLD + rows
    assert (OLD + rows) % options["multiple_of"] == 0


def test_starts(forms):
    weight = forms.state()["embed.weight"].detach()
    mean = weight.mean(0)

    def rows(init: str, count: int = 4000, **options) -> torch.Tensor:
        torch.manual_seed(0)
        return (
            forms.apply(surgery.Vocab(tokens=count, init=init, **options))
            .tensors["embed.vocab.rows"]
            .detach()
        )

    assert not rows("zero").any()
    assert float(rows("normal").std()) == pytest.approx(0.02, rel=0.02)
    drawn = rows("mean-noise", noise=0.5)
    covariance = (weight - mean).t() @ (weight - mean) / len(weight)
    # Of 4000 draws the error of a covariance is about √(2/4000) = 2% of its largest entry; four of these.
    assert torch.allclose(
        torch.cov(drawn.t()), 0.25 * covariance, atol=0.09 * 0.25 * float(covariance.abs().max())
    )
    assert torch.allclose(drawn.mean(0), mean, atol=0.1)


def test_conformance_and_growing_twice(forms):
    check_pass(surgery.Vocab(tokens=3), forms)
    twice = forms.apply(surgery.Vocab(tokens=2, init="normal")).apply(
        surgery.Vocab(tokens=3, label="more", init="normal")
    )
    rows = torch.cat([twice.tensors[f"embed.vocab{label}.rows"] for label in ("", "_more")]).detach()
    expected = larger(rows)(new_ids(5))
    assert torch.allclose(twice.run(new_ids(5)), expected, atol=4e-6 * float(expected.abs().max()))
    assert twice.undo("vocab:more").run().shape[-1] == OLD + 2


# -- with other passes


def test_with_lora_in_both_orders(forms, randomise):
    """LoRA of either layer adapts the old rows: before or after, and merged, the function is the same."""
    lora, vocab = surgery.Lora(target="embed,path:head", rank=2), surgery.Vocab(tokens=3, init="normal")
    one, other = forms.apply(lora, vocab), forms.apply(vocab, lora)
    randomise(one, 0.3)
    with torch.no_grad():
        for name, tensor in other.tensors.items():
            tensor.copy_(one.tensors[name])
    ids = new_ids(3)
    assert torch.equal(one.run(ids), other.run(ids))
    alone = forms.apply(lora)
    with torch.no_grad():
        for name, tensor in alone.tensors.items():
            tensor.copy_(one.tensors[name])
    for program_ in (one, other):
        assert torch.equal(program_.run()[..., :OLD], alone.run())
        assert torch.equal(program_.undo("vocab").run(), alone.run())
        assert torch.equal(program_.without("vocab").run(), alone.run())
        undone = program_.undo("lora")
        assert torch.equal(undone.run()[..., :OLD], forms.run())
        merged = program_.merge()
        assert set(merged.journal.entries[-1].options["folded"]) == {"lora", "vocab"}
        assert torch.allclose(merged.run(ids), program_.run(ids), atol=1e-5)
        assert len(merged.graph.nodes) == len(forms.graph.nodes)
        assert merged.count_parameters()[0] == forms.count_parameters()[0] + 3 * 8


def test_what_cannot_be_folded_keeps_it(forms):
    left = forms.apply(surgery.Vocab(tokens=3, output_layer="off"))
    assert left.run().shape[-1] == OLD
    with pytest.raises(
        PassError, match="embed: another op reads its weight and expects the old number of rows"
    ):
        left.merge()
    with pytest.raises(PassError, match="head reads the same weight, and was not made longer"):
        forms.apply(surgery.Vocab(tokens=3, target="embed")).merge()
    with pytest.raises(PassError, match="tied"):
        forms.apply(surgery.Vocab(tokens=3)).merge(in_place=True)
    untied = surgery.capture(Untied(), torch.randint(0, 9, (3, 5)))
    with pytest.raises(
        JournalError, match=r"makes embed.weight longer than its storage; merge without in_place"
    ):
        untied.apply(surgery.Vocab(tokens=3)).merge(in_place=True)
    assert untied.run().shape[-1] == 9


@pytest.mark.slow
def test_conformance_with_lora(forms):
    lora, vocab = surgery.Lora(target="embed,path:head", rank=2), surgery.Vocab(tokens=3, init="normal")
    check_pass(lora, forms.apply(vocab))
    check_pass(vocab, forms.apply(lora))


# -- models


@pytest.mark.slow
def test_a_folded_vocabulary_is_a_transformers_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name in ("t5", "mamba"):
        base = program(name)
        grown = base.apply(surgery.Vocab(tokens=5, init="normal"))
        merged = grown.merge()
        write_hf(merged, tmp_path / name)
        again = type(base.base.loaded.module).from_pretrained(tmp_path / name).eval()
        assert again.config.vocab_size == 104
        assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
        kwargs = {k: v.clone() for k, v in grown.example_inputs[1].items()}
        kwargs["input_ids"][:, 1:3] = torch.tensor([99, 103])
        if "decoder_input_ids" in kwargs:
            kwargs["decoder_input_ids"][:, 2] = 101
        with torch.no_grad():
            expected = again(**kwargs, use_cache=False).logits
        assert torch.allclose(grown.run(**kwargs)["logits"], expected, atol=1e-5)
    assert transformers is not None


def test_biases_of_output_layers():
    """A bias of the layer (BERT) grows; one that is added behind it (BART's final_logits_bias) stays as it is."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **small)).eval()
    nn.init.normal_(bert.cls.predictions.bias)
    sides = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=50, d_model=16, max_position_embeddings=32, **sides, **heads)
    ).eval()
    nn.init.normal_(bart.final_logits_bias)
    for model, biased in ((bert, True), (bart, False)):
        base = captured(model)
        grown = base.apply(surgery.Vocab(tokens=4))
        before, after = base.run()["logits"], grown.run()["logits"]
        assert torch.equal(after[..., :50], before)
        assert after.shape[-1] == 54
        assert any(name.endswith(".bias") for name in grown.tensors) == biased
        replaced = base.apply(surgery.Head(mode="resize", keep="4,2,9")).run()["logits"]
        assert torch.allclose(replaced, before[..., [4, 2, 9]], atol=1e-5)
        if biased:
            assert torch.allclose(grown.merge().run()["logits"], after, atol=1e-5)
        else:
            with pytest.raises(
                PassError, match="adds a separate bias tensor to its logits, which cannot grow"
            ):
                grown.merge()


def captured(model: nn.Module) -> surgery.Program:
    from surgery.capture import trace
    from surgery.common.plugins import make_plugin_manager
    from surgery.engine.base import Base

    loaded = from_model(model)
    return surgery.Program(Base(loaded, trace(loaded), make_plugin_manager()))


def test_an_untied_output_layer_gets_rows_of_its_own():
    torch.manual_seed(0)
    base = surgery.capture(Untied(), torch.randint(0, 9, (3, 5)))
    grown = base.apply(surgery.Vocab(tokens=2))
    assert sorted(grown.tensors) == ["embed.vocab.rows", "head.vocab.bias", "head.vocab.rows"]
    assert torch.equal(grown.run()[..., :9], base.run())
    assert torch.equal(
        grown.run()[..., 9:], base.run().mean(-1, keepdim=True).expand(-1, -1, 2)
    ) or torch.allclose(
        grown.run()[..., 9:], base.run().mean(-1, keepdim=True), atol=1e-6
    )  # a mean row scores the mean
    check_pass(surgery.Vocab(tokens=2), base)
    off = base.apply(surgery.Vocab(tokens=2, output_layer="off"))
    assert off.run().shape[-1] == 9
    assert list(off.tensors) == ["embed.vocab.rows"]


def test_new_tokens_learn_and_the_old_stay(forms):
    """A new token has to be told from the old ones, as input and as output; the old table does not move."""
    grown = forms.apply(surgery.Vocab(tokens=2))
    before = {name: tensor.clone() for name, tensor in grown.state().items()}
    torch.manual_seed(0)
    ids = torch.randint(0, OLD + 2, (32, 5))
    module = grown.module().eval()
    optimiser = torch.optim.Adam(grown.parameter_groups(0.1))
    here = ids >= OLD
    losses = []
    for _ in range(40):
        logits = module(ids)
        loss = nn.functional.cross_entropy(logits[here], ids[here])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    moved = {name for name, tensor in grown.state().items() if not torch.equal(tensor, before[name])}
    assert moved == {"embed.vocab.rows"}
    assert torch.equal(grown.run()[..., :OLD], forms.run())


@pytest.mark.slow
def test_conformance_on_a_tiny_t5():
    check_pass(surgery.Vocab(tokens=3), program("t5"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm", "smollm2", "mixtral", "mamba"])
def test_conformance_everywhere(name):
    check_pass(surgery.Vocab(tokens=3, multiple_of=8), program(name))


# -- refused


class Counts(nn.Module):
    def __init__(self, way: str):
        super().__init__()
        self.way, self.embed, self.head = way, nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, ids):
        scores = self.head(self.embed(ids))
        return {
            "view": lambda: scores.view(-1, 9),
            "slice": lambda: scores[..., :8],
            "log_softmax": lambda: scores.log_softmax(-1),
        }[self.way]()


COUNTS = [
    (
        "view",
        r"op view.*depends on the old size.*; the vocabulary has 9 rows; "
        r"extend the embedding alone with --output-layer off",
    ),
    ("slice", r"op slice.*cuts the values to the old size"),
    ("log_softmax", r"normalizes its logits \(op log_softmax\)"),
]


@pytest.mark.parametrize(("way", "message"), COUNTS)
def test_what_counts_on_the_vocabulary_refuses_it(way, message):
    counts = surgery.capture(Counts(way), torch.randint(0, 9, (3, 5)))
    with pytest.raises(PassError, match=rf"vocab' at head: refused, .*{message}"):
        counts.apply(surgery.Vocab(tokens=2))
    grown = counts.apply(surgery.Vocab(tokens=2, output_layer="off"))
    assert torch.equal(grown.run(), counts.run())


def test_refused(forms):
    with pytest.raises(PassError, match=r"has no token embedding.*no vocabulary to extend"):
        program("vit").apply(surgery.Vocab(tokens=2))
    with pytest.raises(PassError, match="it has 11 rows, and none would be added; give --tokens"):
        forms.apply(surgery.Vocab())
    ids = torch.randint(0, 9, (3, 5))

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Embedding(20, 4), nn.Embedding(30, 4)

        def forward(self, x, y):
            return (self.a(x).cumsum(1) * self.b(y).cumsum(1)).sum(-1)

    two = surgery.capture(Two(), (ids, ids.flip(0)))
    with pytest.raises(PassError, match=r"has 2 token embeddings.*name one with --target"):
        two.apply(surgery.Vocab(tokens=2))
    assert list(two.apply(surgery.Vocab(tokens=2, target="a")).tensors) == ["a.vocab.rows"]
    with pytest.raises(PassError, match="no output layer has 20 rows, as a has; leave out --output-layer on"):
        two.apply(surgery.Vocab(tokens=2, target="a", output_layer="on"))
    with pytest.raises(PassError, match=r"head at head: refused, 'vocab' is attached to it"):
        forms.apply(surgery.Vocab(tokens=2), surgery.Head(labels=3))
