"""Patterns: matches, refusals with reasons, one match per place, deterministic results."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from surgery.graph.graphs import copy_graph
from surgery.graph.patterns import (
    OpIndex,
    any_of,
    axis,
    constant,
    dtype_of,
    find,
    maybe,
    number,
    ops,
    pattern,
    shape_of,
    value,
)
from tests.shared.counting import lines_run

aten = torch.ops.aten


def traced(function, *inputs):
    """The ATen graph of a function."""

    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    graph = torch.export.export(Module(), inputs, strict=False).module(check_guards=False).graph
    for node in list(graph.nodes):  # surgery's capture leaves them out too
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    return graph


def found(graph, *patterns):
    return find(OpIndex(graph), *patterns)


X, Y = torch.randn(2, 3), torch.randn(2, 3)


@pattern
def affine():
    x, scale, shift = value("x"), number("scale"), number("shift")
    return ops.add(ops.mul(x, scale), shift)


@pattern
def swish():
    x = value("x")
    return ops.mul(x, ops.sigmoid(x))


def test_captures_and_what_they_stand_for():
    graph = traced(lambda x: (x.sin() * 2.5 + 0.25).cos(), X)
    (match,) = found(graph, affine).matches
    assert [n.target for n in match.nodes] == [aten.mul.Tensor, aten.add.Tensor]
    assert match["x"].target is aten.sin.default
    assert (match["scale"], match["shift"]) == (2.5, 0.25)
    assert match.outputs[0].target is aten.add.Tensor
    assert match.get("absent") is None
    assert "absent" not in match


@pytest.mark.parametrize("order", [lambda a, b: a * b, lambda a, b: b * a])
def test_operands_in_either_order(order):
    (match,) = found(traced(lambda x: order(x, x.sigmoid()), X), swish).matches
    assert match["x"].op == "placeholder"


def test_an_op_that_does_not_commute_keeps_its_order():
    @pattern
    def quotient():
        x = value("x")
        return ops.div(x, ops.exp(x))

    assert found(traced(lambda x: x / x.exp(), X), quotient).matches
    assert not found(traced(lambda x: x.exp() / x, X), quotient).matches


def test_the_same_name_twice_is_the_same_tensor():
    done = found(traced(lambda x, y: y * x.sigmoid(), X, Y), swish)
    assert not done.matches
    (miss,) = done.misses
    assert "'x' is" in miss.reason


def test_the_same_name_twice_is_an_equal_constant():
    @pattern
    def twice():
        n = number("n")
        return ops.mul(ops.mul(value("x"), n), n)

    assert found(traced(lambda x: x * 3 * 3.0, X), twice).matches
    (miss,) = [m for m in found(traced(lambda x: (x * 3 * 4).sin(), X), twice).misses if m.matched == 2]
    assert "'n' is 3 elsewhere, 4 here" in miss.reason


def test_arguments_that_are_not_written_have_their_default():
    @pattern
    def plain():
        return ops.add(value("x"), value("y"))

    @pattern
    def any_alpha():
        return ops.add(value("x"), value("y"), ...)

    @pattern
    def this_alpha():
        return ops.add(value("x"), value("y"), alpha=2)

    graph = traced(lambda x, y: torch.add(x, y, alpha=2), X, Y)
    done = found(graph, plain)
    assert not done.matches
    assert "its alpha is 2" in done.misses[0].reason
    assert found(graph, any_alpha).matches
    assert found(graph, this_alpha).matches


def test_alternatives_are_tried_in_order_and_optional_nodes_are_taken_where_they_fit():
    @pattern
    def squared():
        x = value("x")
        return ops.sin(maybe(ops.to, any_of(ops.pow(x, 2).named("power"), ops.mul(x, x)), ...))

    for function, power in (
        (lambda x: (x * x).sin(), False),
        (lambda x: x.pow(2).sin(), True),
        (lambda x: x.pow(2).to(torch.float64).sin(), True),
    ):
        (match,) = found(traced(function, X), squared).matches
        assert ("power" in match) is power


def test_an_optional_node_that_others_read_stays_outside():
    """Matched greedily first, then without the node: the cast is the captured value if a residual reads it too."""

    @pattern
    def root():
        x = value("x")
        return ops.sin(ops.rsqrt(maybe(ops.to, x, ...)))

    graph = traced(lambda x: (lambda h: h.rsqrt().sin() + h)(x.to(torch.float64)), X)
    (match,) = found(graph, root).matches
    assert match["x"].target is aten.to.dtype
    (match,) = found(traced(lambda x: x.to(torch.float64).rsqrt().sin(), X), root).matches
    assert match["x"].op == "placeholder"


def test_conditions_on_attributes_shapes_and_whole_matches():
    @pattern(condition=lambda m: None if shape_of(m["x"])[-1] == 3 else "three columns are wanted")
    def reduced():
        x = value("x", lambda n: dtype_of(n) is torch.float32, "a value in fp32")
        return ops.mean(x, [axis(-1)], constant("keep", lambda k: k is True, "kept axis"))

    assert found(traced(lambda x: x.mean(-1, keepdim=True), X), reduced).matches
    assert found(traced(lambda x: x.mean(1, keepdim=True), X), reduced).matches, (
        "the last of two, from the front"
    )
    for function, inputs, why in (
        (lambda x: x.mean(0, keepdim=True), X, "axis -1"),
        (lambda x: x.mean(-1), X, "its keepdim is False"),
        (lambda x: x.mean(-1, keepdim=True), X.double(), "value in fp32"),
        (lambda x: x.mean(-1, keepdim=True), torch.randn(2, 4), "three columns"),
    ):
        done = found(traced(function, inputs), reduced)
        assert not done.matches
        assert why in done.misses[0].reason


def test_an_inner_value_that_others_read_prevents_the_match():
    graph = traced(lambda x: (lambda s: x * s + s.sum())(x.sigmoid()), X)
    done = found(graph, swish)
    assert not done.matches
    assert done.misses[0].reason == "its value is also read by sum_1, outside of the pattern"
    assert done.misses[0].node.target is aten.sigmoid.default


def test_a_graph_output_counts_as_a_reader_and_dead_nodes_do_not():
    assert not found(traced(lambda x: (lambda s: (x * s, s))(x.sigmoid()), X), swish).matches
    graph = traced(lambda x: x * x.sigmoid(), X)
    sigmoid = next(n for n in graph.nodes if n.target is aten.sigmoid.default)
    with graph.inserting_after(sigmoid):
        graph.call_function(aten.neg.default, (sigmoid,))
    assert found(graph, swish).matches


def test_several_outputs_reached_through_a_common_input():
    @pattern
    def pair():
        x = value("x")
        return ops.sin(x).named("sin"), ops.exp(ops.cos(x)).named("exp")

    graph = traced(lambda x: (lambda h: h.sin() + h.cos().exp() * h.sin().neg())(x * 2), X)
    done = found(graph, pair)
    (match,) = done.matches
    assert {n.target for n in match.outputs} == {aten.sin.default, aten.exp.default}
    assert match["sin"] is match.outputs[0]
    assert match["x"].target is aten.mul.Tensor
    assert not found(traced(lambda x: x.sin() + (x * 2).cos().exp(), X), pair).matches


def test_a_named_anchor_and_the_rarest_by_default():
    chain = traced(lambda x: (x * 2 + 1).tanh() * 3 + 4, X)

    @pattern
    def by_name():
        return ops.add(ops.mul(value("x"), number("a")).anchor(), number("b"))

    assert [m.anchor.target for m in found(chain, by_name).matches] == [aten.mul.Tensor] * 2

    @pattern
    def by_rarity():
        return ops.add(ops.mul(ops.tanh(value("x")), number("a")), number("b"))

    (match,) = found(chain, by_rarity).matches
    assert match.anchor.target is aten.tanh.default


def test_a_pattern_without_an_op_of_its_own_is_a_mistake():
    with pytest.raises(ValueError, match="every match contains"):
        found(traced(lambda x: x.sin(), X), pattern(lambda: any_of(ops.sin(value("x")), ops.cos(value("x")))))


def test_overlapping_matches_are_resolved_in_graph_order():
    @pattern
    def two():
        return ops.sin(ops.sin(value("x")))

    done = found(traced(lambda x: x.sin().sin().sin().sin().sin(), X), two)
    first, second = done.matches
    order = OpIndex(first.anchor.graph).order
    assert [order[n] for n in first.nodes] == [1, 2]
    assert [order[n] for n in second.nodes] == [3, 4]
    assert len(done.misses) == 1, "the fifth has nothing before it that is free"


def test_of_two_patterns_at_one_place_the_first_counts():
    small = pattern(lambda: ops.cos(value("x")))
    large = pattern(lambda: ops.cos(ops.sin(value("x"))))
    graph = traced(lambda x: x.sin().cos().cos(), X)
    for chosen, sizes in (((large, small), [2, 1]), ((small, large), [1, 1])):
        assert [len(m.nodes) for m in found(graph, *chosen).matches] == sizes


def test_a_value_that_is_changed_in_place_between_the_ops_prevents_the_match():
    def changed(x):
        h = x * 2
        s = h.sigmoid()
        h.add_(1)
        return h * s

    def before(x):
        h = (x * 2).add_(1)
        return h * h.sigmoid()

    graph = traced(changed, X)
    assert any(n.target is aten.add_.Tensor for n in graph.nodes)
    assert not found(graph, swish).matches
    assert found(traced(before, X), swish).matches


def test_the_deepest_failure_is_reported_with_its_node():
    @pattern
    def gate():
        x = value("x")
        return ops.mul(ops.tanh(ops.exp(ops.mul(x, 0.5))), x)

    (miss,) = found(traced(lambda x: (x * 0.25).exp().tanh() * x, X), gate).misses
    assert miss.anchor.target in (aten.tanh.default, aten.exp.default)
    assert "0.25, and the pattern has 0.5" in miss.reason
    assert miss.matched == 3
    assert miss.node.target is aten.mul.Tensor
    (miss,) = found(
        traced(lambda x: (x * 0.5).sin().tanh() * x, X),
        pattern(lambda: ops.tanh(ops.exp(value("x"))).anchor()),
    ).misses
    assert str(miss) == "1 op matches; at sin: it is 'sin', and the pattern has 'exp'"


STEPS = {
    "swish": lambda x: x * x.sigmoid(),
    "turned": lambda x: x.sigmoid() * x,
    "shared": lambda x: (lambda s: x * s + s)(x.sigmoid()),
    "other": lambda x: x.sin() * x.sigmoid(),
    "plain": lambda x: x.tanh() + 1,
}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=12))
def test_in_any_chain_every_place_is_found_once_and_the_same_way_again(steps):
    def chain(x):
        for step in steps:
            x = STEPS[step](x)
        return x

    graph = traced(chain, X)
    done = found(graph, swish)
    assert len(done.matches) == sum(step in ("swish", "turned") for step in steps)
    assert len(done.misses) == sum(step in ("shared", "other") for step in steps)
    nodes = [n for m in done.matches for n in m.nodes]
    assert len(nodes) == len(set(nodes)) == 2 * len(done.matches)
    for again in (graph, copy_graph(graph)):
        other = found(again, swish)
        assert [[n.name for n in m.nodes] for m in other.matches] == [
            [n.name for n in m.nodes] for m in done.matches
        ]
        assert [str(m) for m in other.misses] == [str(m) for m in done.misses]


def long_chain(length):
    graph = fx.Graph()
    x = graph.placeholder("x")
    for _ in range(length):
        x = graph.call_function(aten.mul.Tensor, (x, graph.call_function(aten.sigmoid.default, (x,))))
    graph.output(x)
    return graph


def test_work_grows_with_the_graph_and_not_with_its_square():
    def work(length):
        graph, matches = long_chain(length), []
        lines = lines_run(lambda: matches.extend(found(graph, swish).matches))
        assert len(matches) == length
        return lines

    # Sixteen times the nodes: 16 where the work is linear, 256 where it is quadratic; a tenth for what is done once.
    assert work(1600) < 17.6 * work(100)


def test_a_pattern_that_says_too_little_gives_up_and_says_so():
    x = value("x")
    fan = pattern(lambda: tuple(ops.sin(x) for _ in range(10)))

    def wide(x):
        return sum(x.sin() for _ in range(9))

    done = found(traced(wide, X), fan)
    assert not done.matches
    assert any("make the pattern more specific" in miss.reason for miss in done.misses)
