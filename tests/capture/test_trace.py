"""Properties that a capture preserves: names, objects, regions, modes, shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.export import Dim

from surgery.capture import dynamic_axes, fresh_inputs, from_module, named_sizes, trace
from surgery.common.errors import CaptureError
from tests.shared import modules


def _ops(captured):
    return [str(node.target) for node in captured.graph.nodes if node.op == "call_function"]


def test_names_and_objects_are_the_modules_own():
    loaded = from_module(modules.Mlp(), torch.randn(3, 4))
    captured = trace(loaded)
    own = dict(loaded.module.named_parameters())
    assert {n.target for n in captured.graph.nodes if n.op == "get_attr"} == set(own)
    assert all(captured.graph_module.get_parameter(name) is own[name] for name in own)


def test_from_module_copies_and_leaves_the_callers_module_alone():
    module = modules.Mlp().train()
    module.up.weight.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    loaded = from_module(module, torch.randn(3, 4))
    trace(loaded)
    trace(loaded, training=True)
    assert loaded.module is not module
    assert module.training
    assert module.drop.training
    assert not module.up.weight.requires_grad
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
def test_flags_of_every_submodule_are_left_as_found(training):
    loaded = from_module(modules.Mlp(), torch.randn(3, 4))
    loaded.module.drop.train()
    loaded.module.down.bias.requires_grad_(False)
    trace(loaded, training=training)
    assert [m.training for m in loaded.module.modules()] == [False, False, True, False]
    assert not loaded.module.down.bias.requires_grad
    assert "forward" not in vars(loaded.module)


def test_no_grad_region_is_flat_and_does_not_train():
    loaded = from_module(modules.Frozen(), torch.randn(3, 4))
    captured = trace(loaded)
    assert not any("wrap_with" in op for op in _ops(captured))
    assert _ops(captured).count("aten.detach.default") == 1
    captured.graph_module(torch.randn(5, 4))["out"].sum().backward()
    assert loaded.module.first.weight.grad is None
    assert loaded.module.second.weight.grad is not None
    # Autocast around the graph would reach what eager kept out of it: the node says so.
    assert [n.meta.get("autocast") for n in captured.graph.nodes if "relu" in n.name] == [False]


def test_no_grad_region_gives_the_gradients_of_eager():
    loaded = from_module(modules.Frozen(), torch.randn(3, 4))
    captured = trace(loaded)
    x = torch.randn(5, 4, requires_grad=True)
    (eager,) = torch.autograd.grad(loaded.module(x)["out"].sum(), x, allow_unused=True)
    (graph,) = torch.autograd.grad(captured.graph_module(x)["out"].sum(), x, allow_unused=True)
    assert eager is None
    assert graph is None


def test_tied_weight_is_one_object_under_the_name_of_each_use():
    loaded = from_module(modules.Tied(), torch.randint(0, 11, (3, 5)), {"ids": {0: "batch", 1: "seq"}})
    captured = trace(loaded)
    gm = captured.graph_module
    assert gm.get_parameter("embed.weight") is gm.get_parameter("head.weight") is loaded.module.embed.weight
    uses = {n.name: [a.target for a in n.all_input_nodes if a.op == "get_attr"] for n in captured.graph.nodes}
    assert uses["embedding"] == ["embed.weight"]
    assert uses["linear"] == ["head.weight"]


def test_train_capture_drops_and_eval_capture_does_not():
    loaded = from_module(modules.Mlp(), torch.randn(3, 4))
    train, plain = trace(loaded, training=True), trace(loaded)
    x = torch.ones(64, 4)
    assert train.training
    assert not plain.training
    assert not torch.equal(train.graph_module(x), train.graph_module(x))
    assert torch.equal(plain.graph_module(x), plain.graph_module(x))
    assert torch.equal(plain.graph_module(x), loaded.module(x))


def test_train_ready_is_called_for_the_train_capture_only():
    from dataclasses import replace

    seen = []
    loaded = replace(
        from_module(modules.Mlp(), torch.randn(3, 4)), train_ready=lambda m: seen.append(m.training)
    )
    trace(loaded)
    assert seen == []
    trace(loaded, training=True)
    assert seen == [True]


def test_a_size_baked_in_is_an_error_that_names_the_dimension():
    with pytest.raises(CaptureError, match=r"'batch'.*leave it out"):
        trace(from_module(modules.Baked(), torch.randn(4, 4)))
    trace(from_module(modules.Baked(), torch.randn(4, 4), {}))


def test_a_capture_that_differs_at_another_size_is_an_error():
    with pytest.raises(CaptureError, match="disagrees with eager at batch=6"):
        trace(from_module(modules.Hinted(), torch.randn(3, 4)))


def test_control_flow_on_values_names_the_line(capfd):
    with pytest.raises(CaptureError, match=r"modules\.py:\d+ in forward: `if x\.sum\(\) > 0") as caught:
        trace(from_module(modules.Branching(), torch.randn(3, 4)))
    assert "\n" not in str(caught.value)
    assert "torch.where" in str(caught.value)
    assert capfd.readouterr().err == ""


def test_enabled_autocast_is_refused():
    with pytest.raises(CaptureError, match="autocast"):
        trace(from_module(modules.AutocastOn(), torch.randn(3, 4)))


def test_inputs_taken_by_double_star_keep_their_names():
    loaded = from_module(modules.Keywords(), {"x": torch.randn(3, 4), "bias": torch.randn(3, 4)})
    captured = trace(loaded)
    assert [n.target for n in captured.graph.nodes if n.op == "placeholder"] == ["x", "bias"]
    x, bias = torch.randn(5, 4), torch.randn(5, 4)
    assert torch.equal(captured.graph_module(bias=bias, x=x), x + bias)


def test_mapping_outputs_become_dicts_and_are_named():
    class Output(dict):
        pass

    class Model(modules.Mlp):
        def forward(self, x):
            return Output(y=super().forward(x), nested=Output(z=x))

    out = trace(from_module(Model(), torch.randn(3, 4))).graph_module(torch.randn(2, 4))
    assert type(out) is dict
    assert type(out["nested"]) is dict


def test_dynamic_by_names_and_by_dims():
    by_name = from_module(modules.Mlp(), torch.randn(3, 5, 4), {"x": {0: "batch", 1: "seq"}})
    assert dynamic_axes(by_name) == {"x": {0: "batch", 1: "seq"}}
    assert named_sizes(by_name) == {"batch": 3, "seq": 5}
    by_dim = from_module(modules.Mlp(), torch.randn(3, 5, 4), ({1: Dim("seq", max=6)},))
    captured = trace(by_dim)
    args, _ = fresh_inputs(captured, {"seq": 6})
    assert args[0].shape == (3, 6, 4)
    with pytest.raises(CaptureError, match="takes at most 6"):
        fresh_inputs(captured, {"seq": 7})
    with pytest.raises(CaptureError, match="did you mean 'seq'"):
        fresh_inputs(captured, {"sek": 5})


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"y": {0: "batch"}}, "'y', which is not given"),
        ({"x": {5: "batch"}}, "no dynamic axis 5"),
        ({"x": {0: Dim.AUTO}}, "name it"),
        ({"x": {0: "a b"}}, "not a valid dimension name"),
    ],
)
def test_wrong_dynamic_is_refused_before_tracing(dynamic, message):
    with pytest.raises(CaptureError, match=message):
        from_module(modules.Mlp(), {"x": torch.randn(3, 4)}, dynamic)


def test_fresh_inputs_keep_kind_range_and_edges():
    ids = torch.tensor([[1, 5, 6, 9, 2], [1, 7, 8, 4, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"ids": ids, "mask": mask, "scale": torch.ones(2), "x": torch.randn(2, 5) + 10}
    dynamic = {name: {0: "batch", 1: "seq"} for name in ("ids", "mask", "x")} | {"scale": {0: "batch"}}

    class Model(nn.Module):
        def forward(self, ids, mask, scale, x):
            return ids * mask + x * scale[:, None]

    loaded = from_module(Model(), inputs, dynamic)
    _, fresh = fresh_inputs(loaded, {"batch": 3, "seq": 50}, seed=3)
    assert fresh["ids"].shape == fresh["mask"].shape == fresh["x"].shape == (3, 50)
    assert set(fresh["ids"][:, 0].tolist()) == {1}
    assert set(fresh["ids"][:, -1].tolist()) == {2}
    assert fresh["ids"][:, 1:-1].min() >= 4
    assert fresh["ids"].max() <= 9
    assert set(fresh["mask"].unique().tolist()) <= {0, 1}
    assert (fresh["mask"].sum(1) > 0).all()
    assert torch.equal(fresh["scale"], torch.ones(3))
    assert abs(float(fresh["x"].mean()) - 10) < 1
    _, again = fresh_inputs(loaded, {"batch": 3, "seq": 50}, seed=3)
    assert torch.equal(fresh["ids"], again["ids"])
    trace(loaded)
