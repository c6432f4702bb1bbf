"""The HTML page of a program or a difference: one file with data, styles and scripts, which needs no network."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from surgery.export.show.model import ModelData
from surgery.export.show.tree import Item, build_tree

# Characters that could end a script element. json.dumps escapes those that are not ASCII, such as U+2028.
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page(data: ModelData) -> str:
    """The page of a program, as HTML."""
    root = build_tree(data)
    content = {
        "kind": data.kind,
        "title": data.title,
        "summary": summary(root, data),
        "facts": data.facts,
        "quantizing": data.quantizing,
        "moved": any(op.moved is not None for op in data.ops),
        "root": _item(root),
        "ops": [_small(dataclasses.asdict(op), ("inputs", "weights", "role", "id", "by")) for op in data.ops],
        "weights": [_small(dataclasses.asdict(weight), ("tied",)) for weight in data.weights.values()],
    }
    return _filled(content)


def summary(root: Item, data: ModelData) -> str:
    """One line about a program: "134,515,008 parameters, 460,800 trainable, 513 MB, 2,210 ops"."""
    return (
        f"{root.parameters:,} parameters, {data.trainable:,} trainable, {root.bytes / 2**20:,.1f} MB in memory, "
        f"{len(data.ops):,} ops"
    )


def _item(item: Item) -> dict[str, Any]:
    return {
        "path": item.path,
        "name": item.name,
        "cls": item.cls,
        "parameters": item.parameters,
        "trainable": item.trainable,
        "bytes": item.bytes,
        **({"marks": item.marks} if item.marks else {}),
        **({"moved": item.moved} if item.moved is not None else {}),
        **({"most": item.most} if item.most is not None else {}),
        **({"changes": item.changes} if item.changes else {}),
        **({"run": True} if item.run else {}),
        "ops": [op.id for op in item.ops],
        "weights": [weight.name for weight in item.weights],
        "children": [_item(child) for child in item.children],
    }


def _small(fields: dict[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """The fields without empty ones, except those that the script reads always."""
    return {k: v for k, v in fields.items() if k in kept or not (v is None or v is False or v in ("", ()))}


def to_json(content: Any) -> str:
    """JSON that can stand inside of a script element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _filled(content: dict[str, Any]) -> str:
    parts = {
        "title": html.escape(content["title"].encode("utf-8", "replace").decode()),
        "style": _asset("page.css"),
        "data": to_json(content),
        # The map of the minified source is not in the page, and a browser would look for it.
        "dagre": _asset("dagre.min.js").partition("//# sourceMappingURL")[0],
        "script": _asset("page.js"),
    }
    # One pass over the template: a value may contain what looks like another place.
    pieces = _asset("page.html").split("{{")
    found = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        found += [parts[name], rest]
    return "".join(found)


def _asset(name: str) -> str:
    return resources.files("surgery.export.show").joinpath("assets", name).read_text("utf-8")
