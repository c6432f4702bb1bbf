"""The JSON that Model Explorer opens (ai-edge-model-explorer, its GraphCollection)."""

from __future__ import annotations

import json
from typing import Any

from surgery.export.show.model import ModelData, Op, Weight


def model_explorer(data: ModelData) -> str:
    """A program as the JSON of Model Explorer, where modules are namespaces and weights are inputs of their ops."""
    nodes = [*(_weight(weight) for weight in data.weights.values()), *(_op(op, data) for op in data.ops)]
    collection = {"label": data.title, "graphs": [{"id": data.title, "nodes": nodes}]}
    # Its loader takes one collection, or a list of graphs, but no list of collections.
    return json.dumps(collection, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _op(op: Op, data: ModelData) -> dict[str, Any]:
    facts = {
        "op": op.target,
        "module": op.module,
        "class": data.classes.get(op.module, ""),
        "role": op.role,
        "inserted by": op.by,
        "at": op.site,
    }
    sources = [*op.inputs, *(_id(name) for name in op.weights)]
    return {
        "id": op.id,
        "label": op.op,
        "namespace": _namespace(op.module),
        "attrs": _attributes(facts),
        "incomingEdges": [
            {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(place)}
            for place, source in enumerate(sources)
        ],
        "outputsMetadata": _output(op.shape, op.dtype),
    }


def _weight(weight: Weight) -> dict[str, Any]:
    owner, _, name = weight.name.rpartition(".")
    error = "" if weight.error is None else f"{weight.error:.4g}"
    facts = {
        "name": weight.name,
        "kind": weight.kind,
        "values": f"{weight.size:,}",
        "trains": "yes" if weight.trains else "no",
        "tied to": ", ".join(weight.tied),
        "inserted by": weight.by,
        "error": error,
    }
    return {
        "id": _id(weight.name),
        "label": name,
        "namespace": _namespace(owner),
        "attrs": _attributes(facts),
        "incomingEdges": [],
        "outputsMetadata": _output(weight.shape, weight.dtype),
    }


def _id(name: str) -> str:
    """Id of a weight's node, which differs from those of the ops."""
    return f"weight {name}"


def _namespace(path: str) -> str:
    return path.replace("/", "_").replace(".", "/")


def _attributes(facts: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in facts.items() if value]


def _output(shape: str, dtype: str) -> list[dict[str, Any]]:
    return [{"id": "0", "attrs": [{"key": "tensor_shape", "value": f"{dtype}[{shape}]"}]}] if shape else []
