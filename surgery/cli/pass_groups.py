"""`--pass NAME --option value --pass NAME …`: options belong to the pass, or the objective, before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_origin

import click
from pydantic.fields import FieldInfo

from surgery.common.errors import PassError
from surgery.common.options import Configured
from surgery.common.plugins import Plugins
from surgery.engine.contract.base import Pass
from surgery.engine.registry import find_pass


class GroupCommand(click.Command):
    """A command that takes groups of options; they arrive in `ctx.meta["groups"]` as (name, options) pairs.

    flag: what begins a group.
    """

    flag = ""

    def find(self, plugins: Plugins, name: str) -> type[Configured]:
        """The class whose options a group has. Raises SurgeryError for an unknown name."""
        raise NotImplementedError

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        plugins: Plugins = ctx.obj
        own = {opt: param for param in self.get_params(ctx) for opt in (*param.opts, *param.secondary_opts)}
        rest, groups = split_groups(args, own, self.flag, lambda name: self.find(plugins, name))
        ctx.meta["groups"] = groups
        return super().parse_args(ctx, rest)


class PassCommand(GroupCommand):
    """A command that takes passes."""

    flag = "--pass"

    def find(self, plugins: Plugins, name: str) -> type[Configured]:
        return find_pass(plugins, name).cls

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "MODEL --pass NAME [PASS OPTIONS] [--pass …] [OPTIONS]")


def split_groups(
    args: list[str], own: dict[str, click.Parameter], begins: str, find: Callable[[str], type[Configured]]
) -> tuple[list[str], list[tuple[str, dict[str, Any]]]]:
    """Separate groups from the command's own arguments. An option that both have is the group's that it stands in."""
    rest: list[str] = []
    groups: list[tuple[str, dict[str, Any]]] = []
    position = 0

    def value_of(flag: str, inline: str | None) -> str:
        nonlocal position
        if inline is not None:
            return inline
        if position >= len(args):
            raise PassError(f"{flag} needs a value")
        position += 1
        return args[position - 1]

    while position < len(args):
        token = args[position]
        position += 1
        flag, equals, inline = token.partition("=")
        text = inline if equals else None
        if flag == begins:
            name = value_of(flag, text)
            find(name)
            groups.append((name, {}))
        elif flag.startswith("--") and groups and (flag not in own or _field(find(groups[-1][0]), flag)):
            name, options = groups[-1]
            key = flag[2:].replace("-", "_")
            field = _field(find(name), flag)
            switch = field is not None and field.annotation is bool
            value: Any = True if switch and text is None else value_of(flag, text)
            several = field is not None and get_origin(field.annotation) is tuple
            options[key] = (*options.get(key, ()), value) if several else value
        else:
            if flag.startswith("--") and flag not in own and flag != "--help" and begins in args[position:]:
                raise PassError(
                    f"{flag} stands before any {begins}; options of a {begins[2:]} come after its {begins} NAME"
                )
            rest.append(token)
            option = own.get(flag)
            takes_value = isinstance(option, click.Option) and not option.is_flag
            if takes_value and not equals and position < len(args):
                rest.append(args[position])
                position += 1
    return rest, groups


def _field(cls: type[Configured], flag: str) -> FieldInfo | None:
    """The field that an option is of."""
    fields, key = cls.model_fields, flag[2:].replace("-", "_")
    return fields.get(key) or next((f for f in fields.values() if f.alias == key), None)


def parse_groups(ctx: click.Context) -> list[Pass]:
    """The pass instances of this command line. Raises PassError for a wrong option."""
    plugins: Plugins = ctx.obj
    return [find_pass(plugins, name).cls.parse(options) for name, options in ctx.meta.get("groups", [])]
