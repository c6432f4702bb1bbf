"""JSON Schema of recipes, for editors: made from the option models of passes, objectives and sections."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import BaseModel

from surgery.cli.recipe import Merging, Shipping
from surgery.common.plugins import Plugins
from surgery.engine.registry import passes
from surgery.train.options import Settings
from surgery.train.registry import objectives

_TEXT: dict[str, Any] = {"type": "string"}
_TEXTS: dict[str, Any] = {"type": "array", "items": _TEXT, "minItems": 1}


def recipe_schema(plugins: Plugins) -> dict[str, Any]:
    """The JSON Schema of recipes with the passes and objectives of a plugin manager.

    It describes the form that `surgery apply --save-recipe` writes. `read_recipe` also accepts `-` for `_` in names,
    and refuses options that do not fit together.
    """

    def options(cls: type[BaseModel], **first: Any) -> dict[str, Any]:
        """The options of a class as a mapping. `first` are more keys, which a recipe must have."""
        made = cls.model_json_schema()
        return {
            "type": "object",
            "description": inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " "),
            "properties": {**first, **_options(cls, made["properties"])},
            "required": [*first, *made.get("required", [])],
            "additionalProperties": False,
        }

    every_pass = [options(i.cls, **{"pass": {"const": i.name}}) for i in passes(plugins).values()]
    every_objective = list(objectives(plugins).values())
    names: dict[str, Any] = {"enum": [info.name for info in every_objective]}
    pass_list = {"type": "array", "items": {"anyOf": every_pass}, "minItems": 1}
    train = options(
        Settings,
        objective={
            "anyOf": [names, *(options(i.cls, name={"const": i.name}) for i in every_objective)],
            "description": "a name, or a mapping of 'name' and the options of that objective",
        },
        data={
            "anyOf": [_TEXT, _TEXTS, {"type": "object", "additionalProperties": {"anyOf": [_TEXT, _TEXTS]}}],
            "description": "files of one format, a directory, or files by the name of their data set",
        },
    )
    train["properties"] |= {
        "held_out": {
            "anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}, _TEXT],
            "description": "share of the data to hold out, or a file",
        },
        "tokenizer": {**_TEXT, "description": "directory of a tokenizer that replaces the model's own"},
    }
    flag: dict[str, Any] = {"type": "boolean"}
    found = {
        "model": {**_TEXT, "description": "model reference, such as hf:DIR"},
        "task": {**_TEXT, "description": "task name for transformers, such as text-classification"},
        "model_kwargs": {"type": "object", "description": "arguments of the model's constructor"},
        "input": {"anyOf": [_TEXT, _TEXTS], "description": "example inputs, such as 'x=float32[batch=2,3]'"},
        "random": {**flag, "description": "random weights instead of pretrained ones"},
        "passes": {"$ref": "#/$defs/passes", "description": "passes in order"},
        "freeze_base": {**flag, "description": "freeze the base first; by default if a pass needs it"},
        "train": train,
        "merge": {"anyOf": [flag, options(Merging)], "description": "merge after the training"},
        "finish": {"$ref": "#/$defs/passes", "description": "passes on the trained or merged model"},
        "export": {"anyOf": [flag, _TEXT, options(Shipping)], "description": "ONNX export of the result"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "surgery recipe",
        "type": "object",
        "properties": found,
        "required": ["passes"],
        "additionalProperties": False,
        "$defs": {"passes": pass_list},
    }


def _options(cls: type[BaseModel], made: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The schemas of options, without the titles that pydantic derives from their names.

    An option that a validator of its class reads first also has other forms, such as a text. Only its description
    is kept.
    """
    validators = cls.__pydantic_decorators__.field_validators.values()
    free = {
        name for validator in validators if validator.info.mode == "before" for name in validator.info.fields
    }
    return {
        name: {
            key: value
            for key, value in option.items()
            if key == "description" or (key != "title" and name not in free)
        }
        for name, option in made.items()
    }
