"""Activation options of int8-dynamic: scaling factors in the weights (SmoothQuant), and unquantized inputs."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import surgery
from surgery.api import Probe
from surgery.engine.contract.observe import observe
from surgery.graph.marks import input_before_adapters
from surgery.graph.ops import operand
from surgery.passes.quantize.codes import decode, encode
from surgery.passes.quantize.ops import round_activation
from surgery.passes.quantize.smoothing import factors
from tests.shared.tiny import llama

OUTLIER = 5
SMOOTH = {"target": "attn.*,mlp.*", "format": "int8-dynamic", "smooth": 0.5}


def ids(seed, rows=4):
    return torch.randint(3, 101, (rows, 16), generator=torch.Generator().manual_seed(seed))


def inputs(seed, rows=4):
    given = ids(seed, rows)
    return (), {"input_ids": given, "attention_mask": torch.ones_like(given)}


DATA = [inputs(seed) for seed in (1, 2, 3)]


def outlying(folder):
    """A llama with the same outputs, but one feature of every norm's output a hundred times as large."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama()).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            own, mlp = layer.self_attn, layer.mlp
            for norm, maps in (
                (layer.input_layernorm, (own.q_proj, own.k_proj, own.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[OUTLIER] *= 100
                for each in maps:
                    each.weight[:, OUTLIER] /= 100
    model.save_pretrained(folder)
    return surgery.load(f"hf:{folder}")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return outlying(tmp_path_factory.mktemp("planted"))


def sites_of(program, entry="quantize"):
    (found,) = program.journal.find(entry)
    return [(program.sites.by_key[record.key], record) for record in program.journal.standing(found).sites]


def own_tensors(program, record):
    return {name: program.tensors[full] for name, full in record.tensors.items()}


def by_hand(x, smooth):
    """256 levels of the range of x / s, times s, in float arithmetic."""
    wide = x / smooth
    low, high = min(float(wide.min()), 0.0), max(float(wide.max()), 0.0)
    step = torch.tensor(high - low) / 255
    zero = (-low / step).round()
    return (((wide / step).round() + zero).clamp(0, 255) - zero) * step * smooth


def entering(program, site, data):
    node = input_before_adapters(operand(site.calls[0]))
    return Probe(program, data).values([node])[node.name]


# -- the factors and the op


def test_factors_are_the_papers():
    """max|x|^α / max|w|^(1−α) over all data and all weights on the input; equal up to their mean."""
    largest = torch.tensor([4.0, 9.0, 0.0, 1.0])
    weights = [torch.tensor([[1.0, -4.0, 1.0, 0.0]]), torch.tensor([[-9.0, 1.0, 1.0, 0.0]])]
    found = factors(largest, weights, 0.5, torch.float32)
    live = torch.tensor([2 / 3, 3 / 2])
    torch.testing.assert_close(found[:2], live / live.mean())
    assert found[2:].tolist() == [1, 1]  # zero in the data, zero in the weights
    assert factors(torch.zeros(4), weights, 0.5, torch.float32).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_are_positive_and_finite_in_every_dtype(dtype):
    largest = torch.tensor([1e30, 1e-30, 1.0, 0.0])
    found = factors(largest, [torch.tensor([[1e-30, 1e30, 0.0, 1.0]])], 0.9, dtype)
    assert bool((found > 0).all() & found.isfinite().all())
    assert torch.equal(found, found.to(dtype).float())


class Twice(nn.Module):
    """One layer that is called on two inputs, and another on the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.other = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(torch.tanh(self.shared(x)) * 3) + self.other(x)


def test_maxima_are_of_all_data_and_all_calls():
    torch.manual_seed(0)
    base = surgery.capture(Twice().eval(), (torch.randn(4, 16),))
    data = [((torch.randn(3, 16) * size,), {}) for size in (0.1, 2.0, 1.0)]
    by_path = {site.path: site for site in base.sites}
    probe = Probe(base, data)
    x = torch.cat([given for (given,), _ in data])
    assert torch.equal(probe.largest(by_path["other"]), x.abs().amax(0))
    inner = torch.tanh(x @ Probe(base).weight(by_path["shared"]).T + Probe(base).tensor("shared.bias")) * 3
    both = torch.cat([x, inner]).abs().amax(0)
    torch.testing.assert_close(probe.largest(by_path["shared"]), both)
    program = base.apply(surgery.Quantize(target="all", format="int8-dynamic", smooth=0.6), data=data)
    names = {record.path: record.tensors["smooth"] for _, record in sites_of(program)}
    assert names == {"shared": "shared.quantize.smooth", "other": "other.quantize.smooth"}
    wanted = factors(both, [Probe(base).weight(by_path["shared"])], 0.6, torch.float32)
    torch.testing.assert_close(program.tensors["shared.quantize.smooth"], wanted)


@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_the_op_by_its_formula(method, planted):
    """Every layer, from its input: s round(x / s), times codes of W s over s. Sums of at most 64 products."""
    program = planted.apply(surgery.Quantize(**SMOOTH, method=method), data=DATA)
    for site, record in sites_of(program):
        own = own_tensors(program, record)
        base = next(s for s in planted.sites if s.key == site.key)
        weight, columns = Probe(planted).weight(base), site.in_features
        if method == "nearest":
            codes = encode(weight * own["smooth"], "int8", columns, pairs=torch.arange(columns))
            assert torch.equal(codes.codes, own["codes"])
            assert torch.equal(codes.scale, own["scale"])
        given = decode(own["codes"], own["scale"], None, "int8", columns) / own["smooth"]
        assert float((given - weight).norm() / weight.norm()) < 0.05
        (x,) = entering(program, site, DATA[:1])
        node = site.calls[0].node
        (out,) = Probe(program, DATA[:1]).values([node])[node.name]
        torch.testing.assert_close(
            out, by_hand(x, own["smooth"]) @ given.T, rtol=1e-4, atol=1e-4 * float(out.abs().max())
        )


def test_maps_of_one_input_share_the_largest_weights_factors(planted):
    program = planted.apply(surgery.Quantize(**SMOOTH), data=DATA)
    probe, held = Probe(planted, DATA), collections.defaultdict(list)
    for site, record in sites_of(program):
        held[record.tensors["smooth"]].append(next(s for s in planted.sites if s.key == site.key))
    assert sorted(map(len, held.values())) == [1, 1, 1, 1, 2, 2, 3, 3]
    for name, group in held.items():
        largest = torch.cat([v.reshape(-1, v.shape[-1]) for v in probe.inputs(group[0])]).abs().amax(0)
        read = torch.stack([probe.weight(site).abs().amax(0) for site in group]).amax(0)
        wanted = (largest / read).sqrt()
        torch.testing.assert_close(program.tensors[name], wanted / wanted.mean())
        assert not program.tensors[name].requires_grad
    size = sum(t.numel() for n, t in program.tensors.items() if n.endswith(".smooth"))
    assert size == 2 * (32 + 32 + 32 + 64)


def test_smoothing_saves_what_an_outlier_costs(planted):
    held = inputs(9, 8)[1]
    wanted = planted.run(**held)["logits"]

    def error(**options):
        program = planted.apply(surgery.Quantize(**{**SMOOTH, **options}), data=DATA)
        return float((program.run(**held)["logits"] - wanted).norm() / wanted.norm())

    plain, smoothed = error(smooth=0), error()
    assert smoothed < plain / 4
    assert error(method="gptq") < plain / 4


def test_older_calls_of_the_ops_stand():
    """Programs saved by earlier versions have neither argument: the same results bit for bit."""
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_activation(x), round_activation(x, torch.ones(8)))
    x.requires_grad_()
    round_activation(x, torch.linspace(0.1, 5, 8)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision(kind):
    """The stored factors are those used for the codes, and the plan's error of the weight matches the codes."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).to(kind).eval()
    x = (torch.randn(32, 64) * torch.logspace(-2, 1, 64)).to(kind)
    base = surgery.capture(module, (x,))
    program = base.apply(surgery.Quantize(target="all", format="int8-dynamic", smooth=0.65))
    for site, record in sites_of(program):
        own = own_tensors(program, record)
        assert {own["smooth"].dtype, own["scale"].dtype} == {kind}
        weight = Probe(base).weight(next(s for s in base.sites if s.key == site.key))
        codes = encode((weight.float() * own["smooth"].float()).to(kind), "int8", 64, pairs=torch.arange(64))
        assert torch.equal(codes.codes, own["codes"])
        moved = float(
            (weight.double() - Probe(program).stored(site).double()).norm() / weight.double().norm()
        )
        # Half a step of the dtype, once for each value that the codes give.
        assert moved == pytest.approx(
            record.decided["error"], abs=2.0 ** -(9 if kind == torch.bfloat16 else 12)
        )
    moved = observe(base.run(), program.run())
    plain = observe(base.run(), base.apply(surgery.Quantize(target="all", format="int8-dynamic")).run())
    assert moved.difference < plain.difference


# -- inputs that are kept


def errors_by_hand(program, data, smooth=None):
    """Mean over rows of ‖(x̂ − x) Wᵀ‖ / ‖x Wᵀ‖, by path."""
    found = {}
    for site in program.sites:
        if not site.role.startswith(("attn", "mlp")):
            continue
        ratios, weight = [], Probe(program).weight(site)
        for x in entering(program, site, data):
            factor = torch.ones(x.shape[-1]) if smooth is None else smooth[site.path]
            gone, whole = (by_hand(x, factor) - x) @ weight.T, x @ weight.T
            ratios.append((gone.norm(dim=-1) / whole.norm(dim=-1)).flatten())
        found[site.path] = float(torch.cat(ratios).mean())
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_budget_keeps_exactly_what_is_over_it(alpha, planted):
    options = {**SMOOTH, "smooth": alpha}
    whole = planted.apply(surgery.Quantize(**options), data=DATA)
    smooth = {r.path: own_tensors(whole, r)["smooth"] for _, r in sites_of(whole)} if alpha else None
    measured = errors_by_hand(planted, DATA, smooth)
    budget = sorted(measured.values())[8] * 1.001
    passed = surgery.Quantize(**options, activation_budget=budget)
    program = planted.apply(passed, data=DATA)
    assert len(sites_of(program)) == len(measured) == 14
    for site, record in sites_of(program):
        assert record.decided["moved"] == pytest.approx(measured[record.path], rel=1e-2, abs=1e-6)
        kept = measured[record.path] > budget
        assert record.decided["kept"] is kept
        read = operand(site.calls[0])
        assert (read.target is round_activation._opoverload) is not kept
        assert ("smooth" in record.tensors) is (bool(alpha) and not kept)
        if kept:  # as plain int8
            own, weight = own_tensors(program, record), Probe(planted).weight(site)
            assert torch.equal(own["codes"], encode(weight, "int8", site.in_features).codes)
    assert sum(record.decided["kept"] for _, record in sites_of(program)) == 5
    for planned in planted.plan(passed, data=DATA).passes[-1].accepted:
        said, moved = passed.outcome(planned.site).note, measured[planned.site.path]
        assert f"rounding the input changes the outputs by {planned.site.decided['moved']:.1%}" in said
        assert (", over the budget: only the weight is int8" in said) is (moved > budget)
        assert "example inputs" not in said
    assert "calibrated on the model's example inputs (give --data)" in (
        passed.outcome(planted.plan(passed).passes[-1].accepted[0].site).note
    )


def test_a_few_massive_rows_do_not_hide_the_others():
    """In a sum over rows they would: the other rows are rounded to zero, but are negligible in the sum."""
    torch.manual_seed(0)
    base = surgery.capture(nn.Sequential(nn.Linear(16, 16)).eval(), (torch.randn(4, 16),))
    x = torch.randn(64, 16)
    x[0] *= 10_000
    passed = surgery.Quantize(target="all", format="int8-dynamic", activation_budget=0.5)
    program = base.apply(passed, data=[((x,), {})])
    weight = Probe(base).weight(base.sites.sites[0])
    moved = (by_hand(x, torch.ones(16)) - x) @ weight.T
    assert float(moved.norm() / (x @ weight.T).norm()) < 0.02
    assert sites_of(program)[0][1].decided["kept"]
    assert not any(node.target is round_activation._opoverload for node in program.graph.nodes)
    calm = base.apply(passed, data=[((x[1:],), {})])
    assert not sites_of(calm)[0][1].decided["kept"]
