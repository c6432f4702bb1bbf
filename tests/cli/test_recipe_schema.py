"""`surgery run --schema`: the JSON Schema of recipes accepts what `read_recipe` accepts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from surgery.api.programs import make_plugin_manager
from surgery.cli import main
from surgery.cli.recipe import Recipe, read_recipe, write_recipe
from surgery.cli.recipe_schema import recipe_schema
from surgery.common.errors import SurgeryError
from surgery.engine.registry import passes

ROOT = Path(__file__).parents[2]
KNOWN = {
    "$schema", "title", "description", "default", "type", "properties", "required", "additionalProperties", "items",
    "minItems", "anyOf", "const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "pattern",
    "maxLength", "minLength", "$ref", "$defs",
}  # fmt: skip
TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
    "null": type(None),
}  # fmt: skip


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return recipe_schema(make_plugin_manager())


def valid(value: Any, schema: dict[str, Any], whole: dict[str, Any]) -> bool:
    """JSON Schema validation, with the keywords that the schema of recipes uses."""
    assert set(schema) <= KNOWN, set(schema) - KNOWN
    if "$ref" in schema:
        return valid(value, whole["$defs"][schema["$ref"].removeprefix("#/$defs/")], whole)
    if "anyOf" in schema and not any(valid(value, each, whole) for each in schema["anyOf"]):
        return False
    if "type" in schema and (
        not isinstance(value, TYPES[schema["type"]])
        or (isinstance(value, bool) and schema["type"] != "boolean")
    ):
        return False
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        return False
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        return (
            set(schema.get("required", ())) <= set(value)
            and all(valid(v, known[k], whole) for k, v in value.items() if k in known)
            and all(
                others if isinstance(others, bool) else valid(v, others, whole)
                for k, v in value.items()
                if k not in known
            )
        )
    if isinstance(value, list):
        return len(value) >= schema.get("minItems", 0) and all(
            valid(each, schema.get("items", {}), whole) for each in value
        )
    if isinstance(value, str):
        return re.search(schema.get("pattern", ""), value) is not None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (
            schema.get("minimum", value) <= value <= schema.get("maximum", value)
            and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
            and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
        )
    return True


def yaml_1_2(text: str) -> Any:
    """YAML as editors read it: 1e-3 is a number."""
    return yaml.safe_load(re.sub(r"\b(\d+)e-(\d+)\b", r"\1.0e-\2", text))


def test_the_file_in_docs_is_up_to_date(capsys):
    """`make docs` writes it."""
    with pytest.raises(SystemExit) as raised:
        main(["run", "--schema"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "recipe.schema.json").read_text()


def recipes() -> list[str]:
    page = (ROOT / "docs" / "howto" / "recipe.md").read_text()
    (shown,) = re.findall(r"^```yaml[^\n]*\n(.*?)^```", page, re.M | re.S)
    return [(ROOT / "examples" / "film.yaml").read_text(), shown]


@pytest.mark.parametrize("text", recipes(), ids=["film.yaml", "how-to"])
def test_recipes_of_the_docs(text, schema, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    read_recipe(tmp_path / "recipe.yaml", make_plugin_manager())
    assert valid(yaml_1_2(text), schema, schema)


def base() -> dict[str, Any]:
    train = {"objective": "classification", "data": "x.csv"}
    return {"passes": [{"pass": "lora", "target": "attn.*"}], "train": train, "export": "x.onnx"}


@pytest.mark.parametrize(
    "changed",
    [
        {"task": "text-classification", "random": True, "input": ["x=float32[batch=2,3]"]},
        {"merge": {"quantized": "auto", "budget": 0.2}, "export": {"file": "m", "generate": True}},
        {
            "train": {
                "objective": {"name": "sft", "packing": True},
                "data": ["a.jsonl", "b.jsonl"],
                "held_out": 0,
            }
        },
        {
            "train": {
                "objective": {
                    "name": "multi-task",
                    "task": {"a": "classification", "b": "regression,label=n"},
                },
                "data": {"a": "a.csv", "b": ["b.csv"]},
            }
        },
        {"train": {"objective": {"name": "distill", "teacher": "hf:t", "hint": "a=b"}, "data": "x.csv"}},
        {"passes": [{"pass": "expand", "target": "mlp.up", "wider": 2}]},
    ],
)
def test_accepted_by_both(changed, schema, tmp_path):
    recipe = {**base(), **changed}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    read_recipe(tmp_path / "recipe.yaml", make_plugin_manager())
    assert valid(recipe, schema, schema)


@pytest.mark.parametrize(
    "changed",
    [
        {"passes": []},
        {"passes": [{"target": "attn.*"}]},
        {"passes": [{"pass": "lora", "rnak": 4}]},
        {"passes": [{"pass": "lora", "rank": 0}]},
        {"trian": {}},
        {"random": "yes"},
        {"train": {"objective": "causal", "data": "x.csv"}},
        {"train": {"objective": "sft"}},
        {"train": {"objective": "sft", "data": "x.csv", "lr": -1}},
        {"merge": {"quantised": "auto"}},
        {"export": 3},
    ],
)
def test_refused_by_both(changed, schema, tmp_path):
    recipe = {**base(), **changed}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(SurgeryError):
        read_recipe(tmp_path / "recipe.yaml", make_plugin_manager())
    assert not valid(recipe, schema, schema)


# Options of the passes that have no default.
GIVEN = {"low-rank": {"rank": 4}, "head": {"labels": 2}, "expand": {"deeper": 1}}


def test_what_save_recipe_writes(schema, tmp_path):
    """Every pass, with all of its options."""
    for info in passes(make_plugin_manager()).values():
        made = info.cls(**GIVEN.get(info.name, {}))
        write_recipe(tmp_path / "recipe.yaml", Recipe((made,), model="hf:x"))
        written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
        assert valid(written, schema, schema), info.name
        assert valid({"passes": [{"pass": info.name, **made.options()}]}, schema, schema), info.name
