"""Reported errors of merges into codes, against the op itself, run on the data before and after."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.api import PassError, Probe
from surgery.engine.contract.observe import observe
from surgery.engine.registry import find_pass
from surgery.graph.marks import output_with_adapters
from surgery.passes.measure import output_error
from tests.conftest import minilm_path
from tests.passes.quantize.test_quantize import randomise


class Forms(nn.Module):
    """Every kind of weight, each on the inputs directly, so that no input depends on another weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 16)
        self.linear = nn.Linear(6, 10)
        self.left = nn.Parameter(torch.randn(10, 6) / 3)
        self.strided = nn.Conv2d(4, 8, 3, stride=2, padding=(1, 2))
        self.grouped = nn.Conv2d(4, 12, (3, 5), groups=2, padding="same", dilation=(2, 1))
        self.even = nn.Conv1d(8, 8, 4, padding="same", bias=False)
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8, padding=2, dilation=2)
        self.volume = nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), padding="valid")
        self.up = nn.ConvTranspose2d(4, 6, (3, 4), stride=2, padding=1, output_padding=1, dilation=(1, 2))
        self.gathered = nn.Parameter(torch.randn(3, 6, 8) / 3)
        self.stacked = nn.Parameter(torch.randn(3, 8, 6) / 3)

    def forward(self, ids: torch.Tensor, image: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
        signal = image.flatten(2).reshape(-1, 8, image.shape[2] * image.shape[3] // 2)
        return [
            self.table(ids),
            self.linear(rows),
            self.left @ rows.transpose(-2, -1),
            self.strided(image),
            self.grouped(image),
            self.even(signal),
            self.depthwise(signal),
            self.volume(torch.stack([image, image.flip(-1) * 2], 2)),
            self.up(image),
            torch.bmm(rows, self.gathered[ids[:, 0].remainder(3)]),
            torch.bmm(self.stacked, rows[:3].transpose(-2, -1)),
        ]


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens by Zipf's law and features of different scales: a mean over weight values would miss both."""
    generator = torch.Generator().manual_seed(seed)
    often = 1.0 / torch.arange(1, 13)
    ids = torch.multinomial(often, 24, replacement=True, generator=generator).reshape(4, 6)
    ids[0, 0], ids[1, 0], ids[2, 0] = 0, 1, 2
    image = torch.randn(4, 4, 6, 8, generator=generator) * torch.tensor([3.0, 1, 0.3, 0.1])[:, None, None]
    rows = torch.randn(4, 5, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    return ids, image, rows


@pytest.fixture(scope="module")
def forms():
    torch.manual_seed(0)
    return surgery.capture(Forms().eval(), inputs(0))


DATA = [(inputs(seed), {}) for seed in (1, 2)]
PATHS = [
    "table",
    "linear",
    "left",
    "strided",
    "grouped",
    "even",
    "depthwise",
    "volume",
    "up",
    "gathered",
    "stacked",
]


def adapted(base, path, format="int4", size=0.05, **options):
    """One adapter, with codes at all sites."""
    program = base.apply(
        surgery.Quantize(target=f"path:{path}", format=format, group=options.pop("group", 0))
    )
    lora = surgery.Lora(target=f"path:{path}", rank=options.pop("rank", 2), **options)
    own = surgery.SparseTune(target=f"path:{path}", density=0.5) if path == "up" else lora
    program = program.apply(own)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in program.tensors.values():
            if tensor.requires_grad:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * size)
    return program


def site_of(program, path):
    return next(site for site in program.sites if site.path == path)


def outputs(program, path, data=DATA):
    """Outputs of the op with its adapters on the data, without bias."""
    site = site_of(program, path)
    node = output_with_adapters(site.calls[0].node)
    values = Probe(program, data).values([node])[node.name]
    bias = Probe(program).tensor(site.bias) if site.bias else None
    if bias is not None and site.kind == "conv":
        bias = bias.reshape(-1, *(1 for _ in site.shape[2:]))
    return torch.cat([(v if bias is None else v - bias).double().flatten() for v in values])


def choice_adapter(program, path):
    return "sparse-tune" if path == "up" else "lora"


def choice_of(merged):
    (choice,) = merged.journal.entries[-1].options["choices"].values()
    return choice


def check(program, merged, path, data=DATA):
    """Check a choice against running the op. The outputs are sums of some 60 products in fp32."""
    choice = choice_of(merged)
    adapter = program.journal.entries[-1].id
    whole, bare = outputs(program, path, data), outputs(program.without(adapter), path, data)
    moved = (outputs(merged, path, data) - whole).norm()
    assert choice["of"] == "outputs"
    assert choice["errors"][choice["how"]] == pytest.approx(float(moved / whole.norm()), rel=1e-3, abs=1e-6)
    assert choice["lost"] == pytest.approx(float(moved / (whole - bare).norm()), rel=1e-3, abs=1e-5)
    return choice


@pytest.mark.parametrize("how", ["requantize", "residual"])
@pytest.mark.parametrize("path", PATHS)
def test_the_error_is_that_of_the_op_run(path, how, forms):
    program = adapted(forms, path, rank=3)
    if (path, how) == ("up", "residual"):
        with pytest.raises(PassError, match="a transposed convolution has no low-rank branch"):
            program.merge(quantized=how, data=DATA)
        return
    merged = program.merge(quantized=how, data=DATA)
    choice = check(program, merged, path)
    assert choice["how"] == how
    assert choice["lost"] > 0
    if how == "residual":
        assert choice["rank"] >= 1
        # Of all corrections the best: it loses no more than none does.
        assert choice["errors"]["residual"] < choice["errors"]["requantize"]


@pytest.mark.parametrize("budget", [0.03, 0.3, 1.0])
@pytest.mark.parametrize("path", PATHS)
def test_never_worse_than_the_budget(path, budget, forms):
    """Every choice loses at most the budget: measured on the op, or on weight values where there is no data."""
    program = adapted(forms, path, size=0.2, rank=5)
    # A second weight, under an adapter that has learned nothing, so that something always goes into codes.
    other = "linear" if path != "linear" else "left"
    program = program.apply(surgery.Quantize(target=f"path:{other}", format="int8", label="other"))
    program = program.apply(surgery.Lora(target=f"path:{other}", rank=1, label="other"))
    merged = program.merge(quantized="auto", budget=budget, data=DATA)
    choice = merged.journal.entries[-1].options["choices"][path]
    if choice["how"] == "keep":
        assert "% of the adapters' effect" in choice["why"]
        assert torch.equal(outputs(merged, path), outputs(program, path))
        return
    whole, bare = outputs(program, path), outputs(program.without(choice_adapter(program, path)), path)
    lost = float((outputs(merged, path) - whole).norm() / (whole - bare).norm())
    assert choice["lost"] == pytest.approx(lost, rel=1e-3, abs=1e-5)
    assert max(choice["lost"], choice["unseen"]) <= budget * (1 + 1e-6)


@pytest.mark.parametrize("how", ["requantize", "residual"])
def test_what_an_op_reads_is_rounded_too(how, forms):
    """int8-dynamic: the adapter read x before rounding, so its response to the rounding error is lost too."""
    program = adapted(forms, "linear", "int8-dynamic", group=None, size=0.5)
    data = [((ids, image, rows * torch.tensor([1.0, 1, 1, 1, 1, 40])), {}) for (ids, image, rows), _ in DATA]
    merged = program.merge(quantized=how, data=data)
    choice = check(program, merged, "linear", data)
    weight = (
        Probe(merged).stored(site_of(merged, "linear")) - Probe(program).stored(site_of(program, "linear"))
    ).norm()
    assert weight > 0
    assert choice["lost"] > 1e-3


def test_an_adapter_of_what_enters_is_measured_on_what_enters(forms):
    """IA³ before an op: after the merge the codes read x itself, not the scaled x that was there before."""
    ia3 = find_pass(forms.base.plugins, "ia3").cls
    program = forms.apply(surgery.Quantize(target="path:even", format="int4", group=0))
    program = program.apply(ia3(target="path:even", scale="input"))
    vector = next(t for t in program.tensors.values() if t.requires_grad)
    with torch.no_grad():
        vector.copy_(torch.linspace(0.2, 3, vector.numel()))
    check(program, program.merge(quantized="requantize", data=DATA), "even")


def table(updates, tokens):
    """A table with int4 codes and an adapter that adds noise of this size to its rows; the data is these tokens."""
    torch.manual_seed(0)
    base = surgery.capture(
        nn.Sequential(nn.Embedding(len(updates), 32)).eval(), (torch.tensor([[0, 1], [1, 2]]),)
    )
    program = base.apply(surgery.Quantize(target="all", format="int4", group=0))
    program = program.apply(surgery.Lora(target="all", rank=1, alpha=1))
    own = program.tensors
    with torch.no_grad():
        own["0.lora.B"].copy_(torch.randn(32, 1))
        own["0.lora.A"].copy_(torch.as_tensor(updates)[None])
    return program, [((torch.as_tensor([*tokens, *tokens]).reshape(-1, 2),), {})]


def lost_by_weight(program):
    merged = program.merge(quantized="requantize")
    before, after = (Probe(p).stored(site_of(p, "0")) for p in (program.without("lora"), merged))
    update = (program.tensors["0.lora.B"] @ program.tensors["0.lora.A"]).T.detach()
    return float((before + update - after).norm() / update.norm())


def test_outputs_choose_otherwise_than_the_weight():
    """The rounding error of a small update counts as often as its token occurs."""
    # The tokens that have learned much are rare, and the one in nearly all of the data has learned little.
    program, data = table([0.02, 20.0, 20.0, 20.0], [0] * 1_000_000 + [1, 2, 3])
    assert lost_by_weight(program) <= 0.1
    with pytest.raises(PassError, match=r"new codes lose \d+\.\d% of the adapters' effect, and a correction"):
        program.merge(quantized="auto", budget=0.1, data=data)
    # And the reverse: most of the table has learned little, and is hardly read.
    program, data = table([20.0, *[0.3] * 2000], [0] * 100_000 + [*range(1, 2001)])
    assert lost_by_weight(program) > 0.15
    merged = program.merge(quantized="auto", budget=0.15, data=data)
    assert check(program, merged, "0", data)["how"] == "requantize"


def test_what_no_data_uses_is_not_lost_in_silence():
    """Rows that no token uses do not affect outputs; the budget applies to their values."""
    program, data = table([20.0, 20.0, 20.0, 0.02, 0.02], [0, 1, 2])
    with pytest.raises(
        PassError,
        match=r"lose \d+\.\d% of the adapters' effect, and \d+\.\d% of it on inputs that the data never use",
    ):
        program.merge(quantized="auto", budget=0.1, data=data)
    choice = check(program, program.merge(quantized="requantize", data=data), "0", data)
    assert choice["lost"] <= 0.1 < choice["unseen"]


def test_an_expert_and_a_channel_out_of_use(forms):
    ids, image, rows = inputs(3)
    ids[:, 0] = 1
    image[:, 3] = 0
    data = [((ids, image, rows), {})]
    for path, axis, at in (("gathered", 0, [0, 2]), ("strided", 1, [3])):
        program = adapted(forms, path, size=0.5, rank=1)
        with torch.no_grad():
            a = program.tensors[f"{path}{'_' if path == 'gathered' else '.'}lora.A"]
            a.index_fill_(axis, torch.tensor(at), 1e-4)
        merged = program.merge(quantized="requantize", data=data)
        choice = check(program, merged, path, data)
        assert choice["lost"] < 0.5 < choice["unseen"]
        with pytest.raises(PassError, match="of it on inputs that the data never use"):
            program.merge(quantized="auto", budget=0.5, data=data)
        nothing = [((ids, image * 0, rows * 0), {})]
        with pytest.raises(PassError, match="its input is zero on all of the data"):
            program.merge(quantized="requantize", data=nothing)


@pytest.mark.parametrize("format", ["int4", "nf4", "ternary", "binary"])
def test_rows_that_no_adapter_moves_keep_their_codes(format):
    """Rounding decoded values may give other codes: rows that the adapter does not change must keep theirs."""
    program, data = table([1.0, 0.0, 0.0, -1.0, 0.0], [0, 1, 2, 3, 4])
    program = program.undo_all()
    program = program.apply(
        surgery.Quantize(target="all", format=format, group=0), surgery.Lora(target="all", rank=1)
    )
    with torch.no_grad():
        program.tensors["0.lora.B"].fill_(1.0)
        program.tensors["0.lora.A"].copy_(torch.tensor([[1.0, 0, 0, -1, 0]]))
    merged = program.merge(quantized="requantize", data=data)
    before, after = (Probe(p).stored(site_of(p, "0")) for p in (program.without("lora"), merged))
    assert torch.equal(before[[1, 2, 4]], after[[1, 2, 4]])
    assert not torch.equal(before[[0, 3]], after[[0, 3]])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(ids)
        return x, self.head(torch.tanh(x))


def test_a_tied_table_and_its_head_have_codes_of_their_own():
    """Each is measured on its own inputs: tokens for the table, hidden states for the head."""
    torch.manual_seed(0)
    base = surgery.capture(Tied().eval(), (torch.randint(0, 20, (3, 8)),))
    quantized = base.apply(surgery.Quantize(target="all", format="int4", group=0))
    data = [base.example_inputs]
    for path, other in (("embed", "head"), ("head", "embed")):
        program = randomise(quantized.apply(surgery.Lora(target=f"path:{path}", rank=2)))
        merged = program.merge(quantized="requantize", data=data)
        check(program, merged, path, data)
        before, after = (Probe(p).stored(site_of(p, other)) for p in (program, merged))
        assert torch.equal(before, after)


def test_saved_loaded_exported_and_undone(forms, tmp_path):
    """Corrections of every kind of weight at once."""
    paths = [path for path in PATHS if path != "up"]
    target = ",".join(f"path:{path}" for path in paths)
    program = forms.apply(surgery.Quantize(target=target, format="int8"))
    program = randomise(program.apply(surgery.Lora(target=target, rank=3)))
    merged = program.merge(quantized="residual", data=DATA)
    choices = merged.journal.entries[-1].options["choices"]
    assert {choice["how"] for choice in choices.values()} == {"residual"}
    assert set(choices) == set(paths)
    merged.save(tmp_path / "merged")
    assert observe(surgery.load(str(tmp_path / "merged"), base=forms).run(), merged.run()).equal
    assert observe(merged.undo("merge").run(), program.run()).equal
    assert merged.export(tmp_path / "model.onnx").parity.error <= 1e-5


def test_measured_in_parts_where_there_is_little_room(forms, monkeypatch):
    """The products of a large model do not all fit in memory at once."""
    target = ",".join(f"path:{path}" for path in PATHS if path != "up")
    program = forms.apply(surgery.Quantize(target=target, format="int4", group=0))
    program = randomise(program.apply(surgery.Lora(target=target, rank=1)))
    choices = program.merge(quantized="requantize", data=DATA).journal.entries[-1].options["choices"]
    runs = []
    measured = output_error.InputMeasurements._measure
    monkeypatch.setattr(
        output_error.InputMeasurements, "_measure", lambda *given: runs.append(0) or measured(*given)
    )
    monkeypatch.setattr(output_error, "_ROOM", 1)
    assert program.merge(quantized="requantize", data=DATA).journal.entries[-1].options["choices"] == choices
    assert len(runs) == len(choices)


def test_real_tokens():
    """MiniLM's table on sentences: most of its rows are never read."""
    from transformers import AutoTokenizer

    given = {"num_hidden_layers": 1}
    base = surgery.load(f"hf:{minilm_path()}", model_kwargs=given)
    texts = ["The cat sat on the mat, and the dog lay on the rug.", "A merge must not lose what was learned."]
    tokens = AutoTokenizer.from_pretrained(minilm_path())(texts, padding=True, return_tensors="pt")
    names = base.example_inputs[1]
    data = [((), {name: tokens[name] for name in names})]
    program = base.apply(surgery.Quantize(target="embed.token", format="int8"))
    program = randomise(program.apply(surgery.Lora(target="embed.token", rank=4)))
    merged = program.merge(quantized="auto", budget=0.5, data=data)
    (path,) = merged.journal.entries[-1].options["choices"]
    choice = check(program, merged, path, data)
    assert choice["how"] == "requantize"
    assert 0 < choice["unseen"] <= 0.5
