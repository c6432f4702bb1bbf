"""`--pass NAME --option value --pass NAME …`: options belong to the pass before them."""

from __future__ import annotations

from typing import Any

import click

from surgery.errors import PassError
from surgery.pass_base import Pass
from surgery.plugins import Plugins


class PassCommand(click.Command):
    """A command that takes pass groups; they arrive in `ctx.meta["passes"]` as (name, options) pairs."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        plugins: Plugins = ctx.obj
        own = {opt: param for param in self.get_params(ctx) for opt in (*param.opts, *param.secondary_opts)}
        rest, groups = split_groups(args, own, plugins)
        ctx.meta["passes"] = groups
        return super().parse_args(ctx, rest)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "MODEL --pass NAME [PASS OPTIONS] [--pass …] [OPTIONS]")


def split_groups(
    args: list[str], own: dict[str, click.Parameter], plugins: Plugins
) -> tuple[list[str], list[tuple[str, dict[str, Any]]]]:
    """Separate pass groups from the command's own arguments."""
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
        if flag == "--pass":
            name = value_of(flag, text)
            plugins.find_pass(name)
            groups.append((name, {}))
        elif flag.startswith("--") and groups and flag not in own:
            name, options = groups[-1]
            key = flag[2:].replace("-", "_")
            options[key] = True if _is_switch(plugins, name, key) and text is None else value_of(flag, text)
        else:
            if flag.startswith("--") and flag not in own and flag != "--help" and "--pass" in args[position:]:
                raise PassError(
                    f"{flag} stands before any --pass; options of a pass come after its --pass NAME"
                )
            rest.append(token)
            option = own.get(flag)
            takes_value = isinstance(option, click.Option) and not option.is_flag
            if takes_value and not equals and position < len(args):
                rest.append(args[position])
                position += 1
    return rest, groups


def _is_switch(plugins: Plugins, name: str, key: str) -> bool:
    fields = plugins.find_pass(name).cls.model_fields
    field = fields.get(key) or next((f for f in fields.values() if f.alias == key), None)
    return field is not None and field.annotation is bool


def parse_groups(ctx: click.Context) -> list[Pass]:
    """The pass instances of this command line. Raises PassError for a wrong option."""
    plugins: Plugins = ctx.obj
    return [plugins.find_pass(name).cls.parse(options) for name, options in ctx.meta.get("passes", [])]
