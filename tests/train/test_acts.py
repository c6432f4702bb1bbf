"""Changes during training, and their log: learning rates, schedules, ramps, penalties, bf16."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import surgery
from surgery.api.programs import TrainingError, make_plugin_manager
from surgery.train.objectives import CausalLm
from surgery.train.options import Settings
from surgery.train.request import TrainingRequest
from surgery.train.watchers import Watcher, read_log
from tests.train.test_loop import fit


@pytest.fixture(scope="module")
def base(llama_folder):
    return surgery.load(f"hf:{llama_folder}")


def notes(folder):
    rows = [(row["step"], row["note"]) for row in read_log(folder / "log.jsonl") if "note" in row]
    return [(step, note) for step, note in rows if not note.startswith("reads the ")]


def rows_of(folder, key):
    return [row[key] for row in read_log(folder / "log.jsonl") if key in row]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"decay": "linear", "warmup": 0}, [1, 0.75, 0.5, 0.25]),
        ({"decay": "constant", "warmup": 0}, [1, 1, 1, 1]),
        ({"decay": "cosine", "warmup": 0}, [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
        ({"decay": "constant", "warmup": 0.5}, [1 / 3, 2 / 3, 1, 1]),  # half of the steps
        ({"decay": "constant", "warmup": 3}, [1 / 4, 2 / 4, 3 / 4, 1]),  # three of them
        ({"decay": "linear", "warmup": 2}, [1 / 3, 2 / 3, 1, 1 / 2]),
    ],
)
def test_rates_by_hand(options, wanted):
    settings = Settings(**options)
    assert [settings.rate(step, 4) for step in range(4)] == pytest.approx(wanted)


def test_a_recipes_zeros_are_zeros():
    given = {"objective": "causal-lm", "data": "x.txt", "clip": 0, "warmup": 0, "weight_decay": 0.0}
    settings = TrainingRequest.parse(given, make_plugin_manager()).settings
    assert (settings.clip, settings.warmup, settings.weight_decay) == (0, 0, 0)
    assert (
        TrainingRequest.parse(
            {**given, "clip": None, "checkpointing": False}, make_plugin_manager()
        ).settings.clip
        == 1
    )


def test_layers_have_rates_of_their_own_and_join_when_they_should(base, texts, tmp_path):
    """The log has the highest rate, and says the others; what trains from step 2 on is as it was until then."""
    program = base.apply(surgery.Layerwise(decay=0.5))
    fit(program, CausalLm(), texts, tmp_path / "a", steps=2, warmup=0, decay="constant")
    assert rows_of(tmp_path / "a", "lr") == [1e-2, 1e-2]
    said = [note for _, note in notes(tmp_path / "a")]
    assert [note.split()[2] for note in said] == ["0.00125", "0.0025", "0.005", "0.01"]
    assert "lm_head.weight" in said[-1] or "model.norm.weight" in said[-1]

    program = base.apply(surgery.GradualUnfreeze(every=2, unit="step"))
    own = dict(program.module().named_parameters())
    start, moved = {n: p.detach().clone() for n, p in own.items()}, []

    class Looks(Watcher):
        def stepped(self, step, loss, rate, tokens):
            moved.append({n for n, p in own.items() if not torch.equal(p, start[n])})

    fit(program, CausalLm(), texts, tmp_path / "b", steps=6, watchers=[Looks()])
    assert [step for step, _ in notes(tmp_path / "b")][:2] == [3, 5]
    layers = [[any(f"layers.{i}." in name for name in names) for i in (0, 1)] for names in moved]
    assert layers == [[False, False]] * 2 + [[False, True]] * 2 + [[True, True]] * 2


SPARSE = surgery.Sparse(target="mlp.*", schedule="cubic", begin=1, end=5, sparsity=0.5)
ROUNDED = surgery.FakeQuant(
    target="attn.*", format="int4", group=0, schedule="linear", begin=1, end=5, every=2
)


@pytest.mark.parametrize("given", [SPARSE, ROUNDED], ids=["sparsity", "quantization"])
def test_a_ramp_acts_is_in_the_log_and_goes_on_where_it_stopped(given, base, texts, tmp_path):
    program = base.apply(given)
    fit(program, CausalLm(), texts, tmp_path / "whole", steps=8, checkpoint=3)
    said = [note for note in notes(tmp_path / "whole") if note[1].startswith(given.name)]
    if given is SPARSE:  # s(1 − (1 − t/4)³), by hand
        wanted = [(step, f"{0.5 * (1 - (1 - (step - 2) / 4) ** 3):.3g}") for step in (3, 4, 5, 6)]
    else:
        wanted = [(4, "0.5"), (6, "1")]
    assert said == [(step, f"{given.name} changed its tensors to {due}") for step, due in wanted]

    class Breaks(CausalLm):
        def loss(self, module, batch):
            if calls.append(0) or len(calls) == 5:
                raise KeyboardInterrupt
            return super().loss(module, batch)

    calls: list[int] = []
    parts = base.apply(given)
    with pytest.raises(KeyboardInterrupt):
        fit(parts, Breaks(), texts, tmp_path / "parts", steps=8, checkpoint=3)
    again = base.apply(given)
    fit(again, CausalLm(), texts, tmp_path / "parts", steps=8, checkpoint=3, resume=True)
    first, second = program.state(), again.state()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_log(tmp_path / "parts" / "log.jsonl") == read_log(tmp_path / "whole" / "log.jsonl")


def test_penalties_reach_zero_and_feed_what_selects(base, texts, tmp_path):
    """Groups that are zero after training are logged; `sparse` keeps the support, and `filter` trains it."""
    plain = base.apply(surgery.Full())
    fit(plain, CausalLm(), texts, tmp_path / "plain", steps=8)
    program = base.apply(surgery.Full())
    asked = ("group-lasso=1@mlp.up", "l1=0.5@attn.q")
    fit(program, CausalLm(), texts, tmp_path / "run", steps=8, regularize=asked)
    (up, q), (up_plain, q_plain) = ([of(p) for of in (rows_zero, values_zero)] for p in (program, plain))
    assert up_plain == q_plain == 0
    assert 0 < up < 128
    assert 0 < q < 2 * 32 * 32
    assert notes(tmp_path / "run")[-2:] == [
        (8, f"group-lasso=1@mlp.up: {up} of 128 filters are zero"),
        (8, f"l1=0.5@attn.q: {q:,} of 2,048 values are zero"),
    ]
    sizes = [f["penalty"] for f in rows_of(tmp_path / "run", "figures")]
    assert len(sizes) == 8
    assert sizes[-1] < 0.9 * sizes[0]
    sparse = program.apply(surgery.Sparse(target="attn.q", threshold=0))
    assert sum(int((~t).sum()) for n, t in sparse.tensors.items() if n.endswith("mask")) == q
    trains = program.apply(surgery.Filter(target="mlp.up", source="nonzero"))
    assert trains.count_parameters()[1] == (128 - up) * 32


def rows_zero(program):
    return sum(int((t == 0).all(1).sum()) for n, t in program.state().items() if "up_proj" in n)


def values_zero(program):
    return sum(int((t == 0).sum()) for n, t in program.state().items() if "q_proj" in n)


def test_a_penalty_on_what_a_pass_computes_is_a_term_of_the_loss(base, texts, tmp_path):
    """A weight that is rounded is no parameter, and says so; its norm falls all the same."""
    norms = []
    for strength in (1e-9, 1.0):
        program = base.apply(surgery.FakeQuant(target="mlp.up", format="int8"))
        folder = tmp_path / str(strength)
        fit(program, CausalLm(), texts, folder, steps=6, regularize=(f"l1={strength}@mlp.up",))
        assert "the penalty is added to the loss" in notes(folder)[0][1]
        norms.append(sum(float(t.abs().sum()) for n, t in program.state().items() if "up_proj" in n))
    assert norms[1] < 0.8 * norms[0]


def test_gradients_are_clipped(base, texts, tmp_path):
    norms: list[float] = []

    def note(optimizer, *_):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))))

    program = base.apply(surgery.Full())
    hook = register_optimizer_step_pre_hook(note)
    try:
        fit(program, CausalLm(), texts, tmp_path / "a", steps=2, clip=0, lr=1e-9)
        fit(program, CausalLm(), texts, tmp_path / "b", steps=2, clip=0.125, lr=1e-9)
    finally:
        hook.remove()
    assert min(norms[:2]) > 0.125
    assert norms[2:] == pytest.approx(
        [0.125, 0.125], rel=1e-4
    )  # clip_grad_norm_ adds 1e-6 to what it divides by


@pytest.mark.parametrize(("precision", "wanted"), [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_the_forward_pass_has_the_precision_asked_for(precision, wanted, base, texts, tmp_path):
    seen = set()

    class Looks(CausalLm):
        def loss(self, module, batch):
            linear = next(m for m in module.modules() if isinstance(m, nn.Linear))
            hook = linear.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
            value = super().loss(module, batch)
            hook.remove()
            return value

    program = base.apply(surgery.Full())
    fit(program, Looks(), texts, tmp_path / "run", steps=1, precision=precision)
    assert seen == {wanted}
    assert all(p.dtype == torch.float32 for p in program.module().parameters())


def test_a_metric_that_is_no_number_stops_it(base, texts, tmp_path):
    class Breaks(CausalLm):
        def metrics(self, observed):
            calls.append(0)
            return {**super().metrics(observed), **({"loss": math.nan} if len(calls) == 3 else {})}

    calls: list[int] = []
    program = base.apply(surgery.Full())
    with pytest.raises(
        TrainingError, match="loss of the held-out data is NaN after step 4; the checkpoint of step 2"
    ):
        fit(program, Breaks(), texts, tmp_path / "run", steps=6, evaluate=2)
    kept = load_file(tmp_path / "run" / "step-00000002" / "weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_a_run_without_a_checkpoint_starts_again_and_says_so(base, texts, tmp_path):
    class Breaks(CausalLm):
        def loss(self, module, batch):
            raise KeyboardInterrupt

    program = base.apply(surgery.Lora(target="attn.q", rank=2))
    with pytest.raises(KeyboardInterrupt):
        fit(program, Breaks(), texts, tmp_path / "run", steps=2)
    fit(program, CausalLm(), texts, tmp_path / "run", steps=2, resume=True)
    assert (0, "no checkpoint was found; training starts at step 0") in notes(tmp_path / "run")
