"""The JSON for Model Explorer: its fields, and a graph without loose ends."""

from __future__ import annotations

import json

import pytest

import surgery
from surgery.cli import main
from surgery.export.show.model import model_data
from surgery.export.show.model_explorer import model_explorer
from tests.shared.stacks import STACK, program

# The fields of GraphNode and IncomingEdge in ai-edge-model-explorer 0.1.34 (model_explorer/graph_builder.py). Its page
# opens an object with `label` and `graphs`; a list of such objects is "Unsupported JSON format".
NODE = {"id", "label", "namespace", "attrs", "incomingEdges", "outputsMetadata"}
EDGE = {"sourceNodeId", "sourceNodeOutputId", "targetNodeInputId"}


def graph_of(program):
    data = model_data(program, "m")
    collection = json.loads(model_explorer(data))
    assert set(collection) == {"label", "graphs"}
    (graph,) = collection["graphs"]
    assert set(graph) == {"id", "nodes"}
    return {node["id"]: node for node in graph["nodes"]}, len(graph["nodes"]), data


def test_every_edge_has_its_ends_and_every_field_is_known():
    nodes, number, data = graph_of(program().apply(surgery.Lora(target="blocks.*", rank=2)))
    assert number == len(nodes) == len(data.ops) + len(data.weights)
    for node in nodes.values():
        assert set(node) == NODE
        for edge in node["incomingEdges"]:
            assert set(edge) == EDGE
            assert edge["sourceNodeId"] in nodes
            assert all(isinstance(value, str) for value in edge.values())
        for item in (*node["attrs"], *(a for o in node["outputsMetadata"] for a in o["attrs"])):
            assert set(item) == {"key", "value"}
            assert isinstance(item["value"], str)


def test_modules_are_namespaces_and_passes_are_named():
    nodes, _, _ = graph_of(program().apply(surgery.Lora(target="blocks.1.up", rank=2)))
    weight = nodes["weight blocks.1.up.weight"]
    assert weight["namespace"] == "blocks/1/up"
    reader = next(
        n for n in nodes.values() if any(e["sourceNodeId"] == weight["id"] for e in n["incomingEdges"])
    )
    assert (reader["label"], reader["namespace"]) == ("linear", "blocks/1/up")
    inserted = [n for n in nodes.values() if {"key": "inserted by", "value": "lora"} in n["attrs"]]
    assert {n["label"] for n in inserted} >= {"A", "B", "linear"}
    assert {n["namespace"].split("/lora")[0] for n in inserted} == {"blocks/1/up"}


def test_the_command_writes_it(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["view", STACK, "--format", "model-explorer", "-o", str(tmp_path / "m.json")])
    assert not stopped.value.code
    assert f"open it with model-explorer {tmp_path / 'm.json'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "m.json").read_text())["label"] == STACK
