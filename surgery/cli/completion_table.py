"""Writes completion.json: `python -m surgery.cli.completion_table`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from surgery.cli.completion import TABLE
from surgery.common.options import Configured, written
from surgery.common.plugins import CORE, Info, Plugins, make_plugin_manager
from surgery.engine.registry import passes
from surgery.graph.targets import ROLES
from surgery.train.registry import objectives


def completion_table(plugins: Plugins) -> dict[str, Any]:
    """The names of built-in passes and objectives with their options and values, and the roles."""
    roles = {*ROLES, *(f"{role.partition('.')[0]}.*" for role in ROLES if "." in role), "all", "all-linear"}
    return {
        "--pass": _built_in(passes(plugins)),
        "--objective": _built_in(objectives(plugins)),
        "roles": sorted(roles),
    }


def _built_in(found: Mapping[str, Info[Any]]) -> dict[str, dict[str, list[str]]]:
    return {name: _options(info.cls) for name, info in sorted(found.items()) if info.distribution == CORE}


def _options(cls: type[Configured]) -> dict[str, list[str]]:
    """Option -> its values if they are a fixed list, else none."""
    return {
        "--" + written(name, info).replace("_", "-"): _values(info.annotation)
        for name, info in cls.model_fields.items()
    }


def _values(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [value for part in get_args(annotation) for value in _values(part)]


if __name__ == "__main__":
    TABLE.write_text(json.dumps(completion_table(make_plugin_manager()), indent=0, ensure_ascii=False) + "\n")
