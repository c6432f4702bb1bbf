"""Any sequence of passes on any small graph keeps a program's guarantees: lint, shapes, names, undo, merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.common.errors import JournalError, PassError, TargetError
from tests.techniques.catalogue import of

WIDTH, LENGTH = 8, 5
# Sums of a few dozen fp32 products in another order, a few layers deep.
MERGED = 1e-4


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12, bias=False), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


LAYERS = {"linear": lambda: nn.Linear(WIDTH, WIDTH), "attend": Attend, "mix": Mix, "mlp": Mlp}


class Net(nn.Module):
    """layers: (kind, True with a residual, True with a norm before the layer)."""

    def __init__(self, layers: list[tuple[str, bool, bool]], tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, WIDTH)
        self.layers = nn.ModuleList(LAYERS[kind]() for kind, _, _ in layers)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) if norm else nn.Identity() for _, _, norm in layers)
        self.residual = [residual for _, residual, _ in layers]
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, 13, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer, norm, residual in zip(self.layers, self.norms, self.residual, strict=True):
            y = self.drop(layer(norm(x)))
            x = x + y if residual else y
        return self.head(x)


LAYER = st.tuples(st.sampled_from(sorted(LAYERS)), st.booleans(), st.booleans())
NETS = st.builds(Net, st.lists(LAYER, min_size=1, max_size=4), st.booleans())
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"target": "all", "rank": 2}),
    ("lora", {"target": "attn.*", "rank": 1, "dora": True}),
    ("lora", {"target": "all-linear", "rank": 2, "rslora": True, "dropout": 0.5}),
    ("lora", {"target": "mlp.*", "rank": 2, "init": "pissa"}),
    ("ia3", {"target": "all-linear"}),
    ("adapter", {"size": 3}),
    ("adapter", {"size": 3, "placement": "parallel"}),
    ("prefix", {"tokens": 2}),
    ("prompt", {"tokens": 2}),
    ("bitfit", {"target": "all-linear", "add_missing": True}),
    ("low-rank", {"target": "all-linear", "rank": 2}),
    ("quantize", {"target": "all-linear"}),
    ("quantize", {"target": "all", "format": "int4", "group": 0}),
    ("quantize", {"target": "all-linear", "format": "int8-dynamic"}),
    ("fake-quant", {"target": "all", "format": "int4", "group": 0}),
    ("int8-static", {"target": "all-linear"}),
    ("sparse", {"target": "all", "sparsity": 0.6}),
    ("sparse", {"target": "all-linear", "pattern": "2:4"}),
    ("sparse", {"target": "all-linear", "criterion": "wanda"}),
    ("split-qkv", {}),
    ("prune-filters", {"ratio": 0.5}),
    ("prune-filters", {"ratio": 0.25, "target": "all"}),
    ("share", {"target": "all-linear"}),
    ("sparse-tune", {"target": "all", "density": 0.2}),
    ("untie", {"target": "head"}),
    ("vocab", {"tokens": 2}),
    ("expand", {"deeper": 1}),
    ("expand", {"wider": "1.5"}),
    ("expand", {"side": "dense", "size": 3, "target": "all-linear"}),
    ("expand", {"side": "conv", "size": 3, "target": "mlp.*"}),
    ("head", {"labels": 4}),
    ("head", {"mode": "add", "labels": 2, "head_name": "other"}),
    ("full", {}),
    ("embedding", {}),
    ("classifier", {}),
    ("gradual-unfreeze", {"every": 2}),
    ("freeze", {"target": "embed.*"}),
    ("filter", {"fraction": 0.5}),
    ("layerwise", {"top": 1}),
]
PASSES = st.lists(st.sampled_from(OPTIONS), min_size=1, max_size=4)


def trained(program: surgery.Program, entry: str, seed: int) -> None:
    """Change the trainable tensors of one entry at random."""
    generator = torch.Generator().manual_seed(seed)
    (found,) = [e for e in program.journal if e.id == entry]
    with torch.no_grad():
        for name in found.tensor_names:
            tensor = program.tensors[name]
            if isinstance(tensor, nn.Parameter):
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


def outputs(program: surgery.Program, *args: Tensor) -> Tensor:
    """Outputs of the net; with an added head, these are one of two outputs."""
    found = program.run(*args)
    return found["output"] if isinstance(found, dict) else found


@settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)  # the same graphs in every run: a failure here is reported by the next person, not once a month
@given(NETS, PASSES, st.integers(0, 5))
def test_any_sequence_of_passes(net, passes, seed):
    keeps_promises(net, passes, seed)


# Of every layer and some twice, so that every pass finds a place; drawn graphs are small, and refuse most.
EVERYTHING = [(kind, True, True) for kind in ("attend", "mlp", "attend", "mlp", "mix")]


@pytest.mark.parametrize("number", range(len(OPTIONS)), ids=lambda n: "-".join(map(str, (n, OPTIONS[n][0]))))
def test_each_pass_with_lora_on_it(number):
    torch.manual_seed(0)
    net = Net(EVERYTHING, tied=True)
    passes = [OPTIONS[number], ("lora", {"target": "head", "rank": 2})]
    assert keeps_promises(net, passes, 1) == passes


def keeps_promises(
    net: nn.Module, passes: list[tuple[str, dict[str, Any]]], seed: int
) -> list[tuple[str, dict[str, Any]]]:
    """Apply, train, merge and undo passes; returns those that were not refused."""
    ids = torch.randint(0, 13, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    program = surgery.capture(net, (ids,), {"ids": {0: "batch", 1: "seq"}})
    base, names = outputs(program), set(program.state())
    history, applied = [], []
    for number, (name, options) in enumerate(passes):
        before, journal = outputs(program), program.journal
        state = {n: (t.detach().clone(), program.trains(n)) for n, t in program.state().items()}
        try:
            following = program.apply(of(name, **options, **{"as": f"n{number}"}))
        except (PassError, TargetError) as error:
            if "declares" in str(error):  # a broken contract is no refusal
                raise
            assert program.journal is journal
            assert torch.equal(outputs(program), before)
            now = program.state()
            assert set(now) == set(state)
            assert all(torch.equal(now[n], t) and program.trains(n) == on for n, (t, on) in state.items())
            continue
        added = [e for e in following.journal if e not in journal.entries and not e.auto]
        following.graph.lint()
        after = outputs(following)
        assert after.shape[:2] == before.shape[:2]
        more = 2 if name == "vocab" else 0
        replaced = name == "head" and options.get("mode") != "add"
        assert after.shape[2] == (options["labels"] if replaced else before.shape[2] + more)
        assert names <= set(following.state())
        assert set(following.tensors) == {n for e in following.journal for n in e.tensor_names}
        trained(following, added[-1].id, seed)
        history.append((added[-1].id, outputs(program)))
        applied.append((name, options))
        program = following
    larger = torch.randint(0, 13, (3, LENGTH + 2), generator=torch.Generator().manual_seed(seed))
    assert outputs(program, larger).shape[:2] == (3, LENGTH + 2)
    _merges(program)
    _undoes(program, history)
    assert torch.equal(outputs(program.undo_all()), base)
    assert set(program.undo_all().state()) == names
    return applied


def _merges(program: surgery.Program) -> None:
    try:
        merged = program.merge(verify=False)
    except PassError:
        return
    a, b = outputs(program), outputs(merged)
    assert float((a - b).abs().max()) <= MERGED * max(1.0, float(a.abs().max()))
    assert torch.equal(outputs(merged.undo(merged.journal.entries[-1].id)), a)


def _undoes(program: surgery.Program, history: list[tuple[str, Tensor]]) -> None:
    """Undo in reverse order; each step restores the bits from before the pass."""
    for entry, before in reversed(history):
        program = program.undo(entry)
        assert torch.equal(outputs(program), before), entry


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(NETS, PASSES, st.randoms(use_true_random=False))
def test_undo_in_any_order(net, passes, random):
    """Undo in any order ends at the base; undoing a pass that others depend on is refused by name."""
    program = surgery.capture(net, (torch.zeros(2, LENGTH, dtype=torch.int64),), {"ids": {0: "batch"}})
    base = outputs(program)
    for number, (name, options) in enumerate(passes):
        try:
            program = program.apply(of(name, **options, **{"as": f"n{number}"}), verify=False)
        except (PassError, TargetError):
            continue
    left = [e.id for e in program.journal if not e.auto]
    random.shuffle(left)
    while left:
        refused = []
        for entry in left:
            try:
                program = program.undo(entry)
            except JournalError as error:
                refused.append((entry, str(error)))
        assert len(refused) < len(left)
        assert all("undo" in why for _, why in refused), refused
        left = [entry for entry, _ in refused]
    assert torch.equal(outputs(program), base)
