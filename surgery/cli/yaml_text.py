"""YAML for recipes and option values: plain data without aliases, tags, duplicate keys or numbers beyond 64 bits.

An alias repeats what it names, so a kilobyte of nested aliases can stand for gigabytes. A duplicate key hides the value
before it.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

LONGEST = 2**20  # characters of a text
_DEEPEST = 32
_LARGEST = 2**63 - 1
_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")
)


class Refused(ValueError):
    """The text is YAML, and has a construct that surgery does not read."""


class _Loader(yaml.SafeLoader):
    """SafeLoader of plain data."""

    depth = 0
    # Without timestamps and merge keys: both are texts.
    yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc]
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            if event.anchor in self.anchors:
                raise Refused(f"it has an alias, *{event.anchor}{_line(event)}; write the value out")
        self.depth += 1
        if self.depth > _DEEPEST:
            raise Refused(f"it is nested more than {_DEEPEST} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None and node.tag not in _TAGS:
            raise Refused(f"it has the tag {node.tag[:60]!r}{_line(node)}; leave it out")
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            # Numbers are keys of id2label.
            if not isinstance(key, ScalarNode) or not key.tag.endswith((":str", ":int")):
                shown = key.value if isinstance(key, ScalarNode) else "a list or mapping"
                raise Refused(f"it has the key {shown[:60]!r}{_line(key)}; put it in quotes")
            value = self.construct_object(key)
            if value in seen:
                raise Refused(f"it has the key {key.value[:60]!r} twice{_line(key)}; remove one")
            seen.add(value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: ScalarNode) -> int | float:
        read = self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float
        try:
            value: int | float = read(node)
        except (ValueError, OverflowError):
            value = math.inf
        if not math.isfinite(value) or (abs(value) > _LARGEST and isinstance(value, int)):
            raise Refused(f"it has the number {node.value[:40]!r}{_line(node)}; give a finite one below 2^63")
        return value


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def _line(where: Any) -> str:
    mark = where.start_mark
    return f" in line {mark.line + 1}" if mark is not None else ""


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: the text is not valid YAML.
        Refused: the text is longer than 1 MB or nested deeply, or has an alias, a tag, a duplicate key, a key that is
            neither a text nor an integer, or a number that is not finite or exceeds 64 bits.
    """
    if len(text) > LONGEST:
        raise Refused(f"it is longer than {LONGEST} characters")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except RecursionError:
        raise Refused(f"it is nested more than {_DEEPEST} deep") from None
    finally:
        loader.dispose()
