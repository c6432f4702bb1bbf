"""quantize: codes and their values, the plan's errors, undo and refusals, adapters on top, standard ONNX."""

from __future__ import annotations

import collections

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import surgery
from surgery.api import PassError, Probe
from surgery.engine.contract.observe import observe
from surgery.engine.registry import find_pass
from surgery.passes.quantize import FORMATS, decode, encode
from surgery.passes.quantize.codes import NF4, pack, unpack
from surgery.passes.quantize.gptq import gptq
from surgery.testing import check_pass
from tests.conftest import minilm_path

# Half a step of the widest block, over the deviation of its normal values, with room for another draw.
WORST = {"int8": 0.012, "int4": 0.12, "nf4": 0.12, "ternary": 0.75, "binary": 0.75}
KIT = (
    "numerics",
    "untouched",
    "inserted",
    "effect",
    "weights",
    "undo",
    "gradients",
    "input",
    "reexport",
    "onnx",
)


def matrix(rows=6, columns=64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("format", list(FORMATS))
def test_codes_there_and_back(format):
    weight = matrix()
    block = 64 if format == "ternary" else 16
    found = encode(weight, format, block)
    given = decode(found.codes, found.scale, found.zero, format, 64)
    assert float((given - weight).norm() / weight.norm()) <= WORST[format]
    again = encode(given, format, block)
    if format != "ternary":  # whose scale is a mean over zeros too
        torch.testing.assert_close(decode(again.codes, again.scale, None, format, 64), given)
    bits = FORMATS[format].bits
    assert found.codes.numel() == 6 * 64 * bits // 8
    assert found.scale.shape == (6, 64 // block)


@pytest.mark.parametrize("columns", [1, 3, 7, 8])
@pytest.mark.parametrize("format", ["int4", "ternary", "binary"])
def test_packing(format, columns):
    bits = FORMATS[format].bits
    values = torch.randint(0, 2**bits, (3, columns), generator=torch.Generator().manual_seed(1))
    assert torch.equal(unpack(pack(values, format), format, columns).long(), values)


def test_values_by_hand():
    row = torch.tensor([[-8.0, 7.0, 3.4, 0.0]])
    assert decode(*_three(encode(row, "int4", 4)), "int4", 4).tolist() == [[-8.0, 7.0, 3.0, 0.0]]
    assert decode(
        *_three(encode(torch.tensor([[0.0, 15.0, 4.6, 1.2]]), "int4", 4, True)), "int4", 4
    ).tolist() == [[0.0, 15.0, 5.0, 1.0]]
    nf4 = torch.tensor([NF4])
    assert torch.equal(decode(*_three(encode(nf4 * 3, "nf4", 16)), "nf4", 16), nf4 * 3)
    ones = decode(*_three(encode(torch.tensor([[1.0, -2.0, 0.1, -0.9]]), "ternary", 4)), "ternary", 4)
    assert ones.tolist() == [[1.0, -1.0, 0.0, -1.0]]
    signs = decode(*_three(encode(torch.tensor([[1.0, -2.0, 0.5, -0.5]]), "binary", 4)), "binary", 4)
    assert signs.tolist() == [[1.0, -1.0, 1.0, -1.0]]
    nothing = encode(torch.zeros(2, 4), "int8", 4)
    assert not decode(*_three(nothing), "int8", 4).any()


def _three(found):
    return found.codes, found.scale, found.zero


@pytest.mark.parametrize(("format", "asymmetric"), [("int8", False), ("int4", False), ("int4", True)])
def test_gptq_keeps_the_products(format, asymmetric):
    """On inputs with a few dominant directions, like those in transformers."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(2000, 64, generator=generator) @ (
        torch.randn(64, 64, generator=generator) * torch.logspace(0, -2, 64)
    )
    weight, products = matrix(), inputs.double().T @ inputs.double()
    block = 16 if format == "int4" else 64

    def error(found):
        moved = weight - decode(*_three(found), format, 64)
        return float((inputs @ moved.T).norm() / (inputs @ weight.T).norm())

    nearest, better = (
        encode(weight, format, block, asymmetric),
        gptq(weight, products, format, block, asymmetric),
    )
    assert error(better) < 0.8 * error(nearest)


class Every(nn.Module):
    """Every form of weight: W x, x W, addmm, convolutions (with groups, transposed), a table, experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.linear = nn.Linear(16, 12)
        self.conv1d = nn.Parameter(torch.randn(12, 16) / 4)
        self.addmm = nn.Parameter(torch.randn(16, 8) / 4)
        self.addmm_bias = nn.Parameter(torch.randn(8))
        self.left = nn.Parameter(torch.randn(6, 8) / 4)
        self.conv = nn.Conv2d(2, 4, 3, groups=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 2, 2)
        self.experts = nn.Parameter(torch.randn(3, 8, 4) / 4)

    def forward(
        self, ids: torch.Tensor, image: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.tanh(self.linear(self.embed(ids))) @ self.conv1d
        x = torch.addmm(self.addmm_bias, x, self.addmm)
        chosen = self.experts[ids.remainder(3)]
        mixed = torch.bmm(x.unsqueeze(1), chosen).squeeze(1)
        return mixed, self.left @ x.t(), self.up(torch.tanh(self.conv(image)))


def every():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    inputs = (torch.randint(0, 20, (5,), generator=generator), torch.randn(2, 2, 6, 6, generator=generator))
    return surgery.capture(Every().eval(), inputs)


@pytest.mark.parametrize("format", list(FORMATS))
def test_every_form_of_weight(format):
    base = every()
    passed = surgery.Quantize(target="all", format=format, group=0)
    program = base.apply(passed)
    assert len(program.reports[-1].plan.accepted) == 8
    expected = Every().eval()
    state = dict(base.base.loaded.module.state_dict())
    probe = Probe(program)
    for site in program.sites:
        if site.key in {r.key for r in program.journal.entries[-1].sites}:
            state[site.weight] = probe.stored(site)
    expected.load_state_dict(state)
    with torch.no_grad():
        wanted = expected(*base.example_inputs[0])
    for a, b in zip(wanted, program.run(), strict=True):
        torch.testing.assert_close(a, b)
    assert not observe(base.run(), program.run()).equal
    report = check_pass(passed, base, checks=KIT)
    assert not report.failed, report


@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize(
    ("format", "asymmetric"), [("int8", False), ("int4", False), ("int4", True), ("nf4", False)]
)
def test_a_table_is_looked_up_in_its_codes(format, asymmetric, group, tmp_path):
    options = {"format": format, "asymmetric": asymmetric, "group": group}
    program = every().apply(surgery.Quantize(target="embed.token", **options))
    # One product for each value: fp32 and onnxruntime round it alike, and the ops behind it are those of the base.
    assert program.export(tmp_path / "model.onnx").parity.error < 1e-6
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not [
        t.name
        for t in graph.initializer
        if list(t.dims) == [20, 16] and t.data_type == onnx.TensorProto.FLOAT
    ]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision(kind):
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)).to(kind).eval()
    base = surgery.capture(module, (torch.randn(2, 64).to(kind),))
    program = base.apply(surgery.Quantize(target="all", format="int4"))
    assert program.run().dtype == kind
    assert program.tensors["0.quantize.scale"].dtype == kind


def test_refused_and_said():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 64), nn.Linear(64, 8))
    with torch.no_grad():
        module[2].weight[0, 0] = float("nan")
    base = surgery.capture(module.eval(), (torch.randn(2, 48),))
    planned = base.plan(surgery.Quantize(target="all", format="int4"))
    refused = {row.site.path: row.refusal for row in planned.passes[-1].refused}
    assert "rows have 48 values, which groups of 32 do not divide; give --group 0" in refused["0"]
    assert "its weight contains inf or NaN; fix the model first" in refused["2"]
    once = base.apply(surgery.Quantize(target="path:1"))
    with pytest.raises(PassError, match=r"'quantize' has quantized it already; undo that first"):
        once.apply(surgery.Quantize(target="path:1", label="again"))
    factored = base.apply(surgery.LowRank(target="path:1", rank=4), verify=False)
    with pytest.raises(PassError, match=r"'low-rank' has put another"):
        factored.apply(surgery.Quantize(target="path:1"))
    for options, message in (
        ({"format": "int8", "asymmetric": True}, "--asymmetric is for int4"),
        ({"format": "ternary", "group": 32}, "ternary has one scale"),
        ({"format": "nf4", "method": "gptq"}, "--method gptq is for int8 and int4"),
    ):
        with pytest.raises(PassError, match=message):
            surgery.Quantize.parse({"target": "all", **options})


def randomise(program):
    """Randomize only trainable tensors: scales of the codes are floats too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in program.tensors.values():
            if tensor.requires_grad:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return program


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    given = {"num_labels": 2, "num_hidden_layers": 2}
    return surgery.load(f"hf:{minilm_path()}", task="text-classification", model_kwargs=given)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "bitfit"])
def test_adapters_stand_on_codes(name, encoder, tmp_path):
    """Only the adapter has gradients, for every adapter; it is saved, loaded and removed bit for bit."""
    quantized = encoder.apply(surgery.Quantize(target="attn.*,mlp.*", format="int4"))
    ia3 = find_pass(encoder.base.plugins, "ia3").cls
    pass_ = {
        "lora": surgery.Lora(target="attn.*", rank=4),
        "dora": surgery.Lora(target="attn.*", rank=4, dora=True),
        "ia3": ia3(),
        "bitfit": surgery.Bitfit(),
    }[name]
    program = quantized.apply(pass_, freeze_base=True)
    assert observe(quantized.run(), program.run()).equal
    module = program.module().train()
    _, inputs = program.example_inputs
    loss = module(**inputs)["logits"].square().sum()
    loss.backward()
    trained = {n for n, p in module.named_parameters() if p.grad is not None}
    assert trained
    assert trained == {n for n, p in module.named_parameters() if p.requires_grad}
    assert not any("quantize" in n for n in trained)
    module.eval()
    program = randomise(program)
    program.save(tmp_path / "saved")
    assert observe(surgery.load(str(tmp_path / "saved")).run(), program.run()).equal
    assert observe(program.undo(name.replace("dora", "lora")).run(), quantized.run()).equal
    if name == "lora":
        with pytest.raises(
            PassError, match=r"lora: quantize has replaced .*, the weight that it would be folded into"
        ):
            program.merge()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"format": "int4"}, {"MatMulNBits": 12}),
        pytest.param({"format": "int8"}, {"MatMulNBits": 12}, marks=pytest.mark.slow),
        pytest.param({"format": "int4", "asymmetric": True}, {"MatMulNBits": 12}, marks=pytest.mark.slow),
        pytest.param({"format": "nf4"}, {"DequantizeLinear": 12}, marks=pytest.mark.slow),
        ({"format": "int8-dynamic"}, {"DynamicQuantizeMatMul": 6, "MatMulIntegerToFloat": 6}),
    ],
)
def test_fused_by_onnxruntime(options, wanted, encoder, tmp_path):
    program = encoder.apply(surgery.Quantize(target="attn.*,mlp.*", **options))
    program = randomise(program.apply(surgery.Lora(target="attn.q", rank=2)))
    report = program.export(tmp_path / "model.onnx")
    # Where activations are rounded too, a value between two levels may go either way.
    assert report.parity.error <= (3e-2 if options["format"] == "int8-dynamic" else 1e-5)
    held = {name for name in program.tensors if ".quantize." in name}
    assert held <= set(report.stored)
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "fast.onnx")
    settings.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), settings, providers=["CPUExecutionProvider"])
    ops = collections.Counter(node.op_type for node in onnx.load(tmp_path / "fast.onnx").graph.node)
    assert {op: ops[op] for op in wanted} == wanted


def test_size_on_disk(encoder, tmp_path):
    """int4 takes at most 0.17 of the bytes of the weights that it covers, int8 at most 0.27; tables too."""
    before = encoder.export(tmp_path / "base.onnx").size
    covered = (
        sum(s.parameters for s in encoder.sites if s.role.startswith(("attn", "mlp", "embed.token"))) * 4
    )
    for format, most in (("int8", 0.27), ("int4", 0.17)):
        target = "attn.*,mlp.*" + (",embed.token" if format == "int8" else "")
        own = (
            covered
            if format == "int8"
            else sum(s.parameters for s in encoder.sites if s.role.startswith(("attn", "mlp"))) * 4
        )
        size = (
            encoder.apply(surgery.Quantize(target=target, format=format))
            .export(tmp_path / f"{format}.onnx")
            .size
        )
        assert size - (before - own) <= most * own + 40_000  # nodes and names


@pytest.mark.parametrize("options", [{"format": "int8"}, {"format": "int4"}])
def test_a_gemm_is_fused_too(options, tmp_path):
    """On two-dimensional inputs linear and addmm become Gemm in ONNX, which onnxruntime would compute in floats."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 96), nn.Linear(32, 64, bias=False)
            self.weight, self.bias = nn.Parameter(torch.randn(96, 32) / 8), nn.Parameter(torch.randn(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.addmm(self.bias, torch.relu(self.up(x)), self.weight))

    base = surgery.capture(Rows().eval(), (torch.randn(3, 64),))
    report = base.apply(surgery.Quantize(target="all", **options)).export(tmp_path / "model.onnx")
    assert list(report.outputs) == list(base.export(tmp_path / "base.onnx").outputs)
    written = [p.key for node in onnx.load(tmp_path / "model.onnx").graph.node for p in node.metadata_props]
    assert "surgery.module" in written
    assert not [key for key in written if not key.startswith(("surgery.", "pkg.onnxscript."))]
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "fast.onnx")
    settings.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), settings, providers=["CPUExecutionProvider"])
    ops = collections.Counter(node.op_type for node in onnx.load(tmp_path / "fast.onnx").graph.node)
    assert ops["MatMulNBits"] == 3
    assert not ops["Gemm"]


def test_data_that_do_not_fit(encoder):
    good = dict(encoder.example_inputs[1])
    wrong = {**good, "input_ids": good["input_ids"][0]}
    passed = surgery.Quantize(target="attn.q", format="int4", method="gptq")
    with pytest.raises(PassError, match=r"data set 2: the input 'input_ids' has shape .* takes \[any, any\]"):
        encoder.apply(passed, data=[((), good), ((), wrong)])
    with pytest.raises(PassError, match="data set 1 has 2 inputs, and the model takes input_ids, "):
        encoder.apply(passed, data=[((), {n: t for n, t in good.items() if n != "attention_mask"})])


def test_data_in_another_order_is_the_same_data(encoder):
    """Keywords match the graph's inputs by name: a tokenizer's order differs from the model's."""
    _, inputs = encoder.example_inputs
    site = next(s for s in encoder.sites if s.role == "attn.out")
    turned = dict(reversed(inputs.items()))
    assert list(turned) != list(inputs)
    found = [Probe(encoder, [((), given)]).products(site) for given in (inputs, turned)]
    assert torch.equal(*found)
    assert found[0].any()


def test_gptq_is_nearer_on_held_out_text(encoder):
    generator = torch.Generator().manual_seed(3)

    def batch(rows):
        ids = torch.randint(1000, 20000, (rows, 24), generator=generator)
        return (), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
        }

    data, (_, held) = [batch(16) for _ in range(4)], batch(16)
    wanted = encoder.run(**held)["logits"]
    errors = []
    for method in ("nearest", "gptq"):
        passed = surgery.Quantize(target="attn.*,mlp.*", format="int4", method=method)
        given = encoder.apply(passed, data=data).run(**held)["logits"]
        errors.append(float((given - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.8 * errors[0]
