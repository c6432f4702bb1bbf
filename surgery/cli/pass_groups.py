"""Groups of options: in `--pass NAME --option value --pass NAME …`, options belong to the pass before them.

`surgery train` reads `--objective NAME --option value …` in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_origin

import click
from click.shell_completion import CompletionItem

from surgery.cli.completion import in_group, matching, table
from surgery.cli.plugins import plugins_of
from surgery.common.errors import PassError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from surgery.common.options import Configured
    from surgery.common.plugins import Plugins


class GroupCommand(click.Command):
    """A command with groups of options. They arrive in `ctx.meta["groups"]` as (name, options) pairs.

    Attributes:
        flag: option that starts a group, such as `--pass`.
        usage: arguments and options, as the usage line shows them.
    """

    flag = ""
    usage = ""

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, self.usage)

    def find(self, plugins: Plugins, name: str) -> type[Configured]:
        """The class whose fields are the options of a group. Raises SurgeryError for an unknown name."""
        raise NotImplementedError

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:
            # Shell completion: the class of a group is not imported, which takes seconds; see completion.in_group.
            starts = (i for i, text in enumerate(args) if text.partition("=")[0] == self.flag)
            ctx.meta["groups"] = []
            ctx.meta["raw"] = list(args)
            return super().parse_args(ctx, args[: next(starts, len(args))])
        own = {opt: param for param in self.get_params(ctx) for opt in (*param.opts, *param.secondary_opts)}
        asked = self.named_before_help(args)
        if asked:
            self.show(plugins_of(ctx), asked)
            ctx.exit()
        # Plugins are loaded when the first group names a class, so that `COMMAND --help` does without them.
        rest, groups = split_groups(args, own, self.flag, lambda name: self.find(plugins_of(ctx), name))
        ctx.meta["groups"] = groups
        return super().parse_args(ctx, rest)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The parameters; in completion also the option that starts a group, so that its names are offered."""
        params = super().get_params(ctx)
        if ctx.resilient_parsing:
            params.append(
                click.Option([self.flag], hidden=True, expose_value=False, shell_complete=self._names)
            )
        return params

    def _names(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return matching(list(table()[self.flag]), incomplete)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = in_group(self.flag, ctx.meta.get("raw", []), incomplete)
        if found is not None and not incomplete.startswith("-"):
            return found
        return [*(found or []), *super().shell_complete(ctx, incomplete)]

    def named_before_help(self, args: list[str]) -> str | None:
        """Name of the last group before --help, or None: `--pass lora --help` asks for the options of LoRA."""
        ends = [i for i, text in enumerate(args) if text in ("--help", "-h")]
        before = args[: ends[0]] if ends else []
        for i in reversed(range(len(before))):
            flag, equals, name = before[i].partition("=")
            if flag == self.flag and (equals or i + 1 < len(before)):
                return name if equals else before[i + 1]
        return None

    def show(self, plugins: Plugins, name: str) -> None:
        """Print a class with its options. Raises SurgeryError for an unknown name."""
        raise NotImplementedError


class PassCommand(GroupCommand):
    """A command that takes passes."""

    flag = "--pass"
    usage = "MODEL --pass NAME [PASS OPTIONS] [--pass …] [OPTIONS]"

    def find(self, plugins: Plugins, name: str) -> type[Configured]:
        from surgery.engine.registry import find_pass

        return find_pass(plugins, name).cls

    def show(self, plugins: Plugins, name: str) -> None:
        from surgery.cli.views import show_passes

        show_passes(plugins, name, None, as_json=False)


class ObjectiveCommand(GroupCommand):
    """A command that takes an objective."""

    flag = "--objective"
    usage = "MODEL --objective NAME [OBJECTIVE OPTIONS] --data FILE… -o DIR [OPTIONS]"

    def find(self, plugins: Plugins, name: str) -> type[Configured]:
        from surgery.train.registry import find_objective

        return find_objective(plugins, name).cls

    def show(self, plugins: Plugins, name: str) -> None:
        from surgery.cli.views import show_objectives

        show_objectives(plugins, name, None, as_json=False)


def split_groups(
    args: list[str], own: dict[str, click.Parameter], begins: str, find: Callable[[str], type[Configured]]
) -> tuple[list[str], list[tuple[str, dict[str, Any]]]]:
    """Separate the groups from the command's own arguments.

    An option that both the command and the group define belongs to the group that it stands in.

    Args:
        args: arguments of the command.
        own: flag -> parameter of the command.
        begins: option that starts a group.
        find: name of a group -> the class whose fields are its options.

    Returns:
        The command's own arguments, and (name, options) of each group. Values are texts, True for a switch, and a
        tuple for an option that may be repeated.

    Raises:
        PassError: a value is missing, or an unknown option stands before the first group.
    """
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
            find(name)  # an unknown name is reported before its options are read
            groups.append((name, {}))
        elif flag.startswith("--") and groups and (flag not in own or _field(find(groups[-1][0]), flag)):
            name, options = groups[-1]
            key = flag[2:].replace("-", "_")
            field = _field(find(name), flag)
            switch = field is not None and field.annotation is bool
            value: Any = True if switch and text is None else value_of(flag, text)
            several = field is not None and get_origin(field.annotation) is tuple
            if key == "target" and key in options and not several:
                value = f"{options[key]},{value}"  # targets add up, as their comma-separated terms do
            options[key] = (*options.get(key, ()), value) if several else value
        else:
            if flag.startswith("--") and flag not in own and flag != "--help" and begins in args[position:]:
                raise PassError(
                    f"{flag} stands before the first {begins}; put the options of a {begins[2:]} after its "
                    f"{begins} NAME"
                )
            rest.append(token)
            # The value of an own option is taken over unread: it may look like a flag.
            option = own.get(flag)
            takes_value = isinstance(option, click.Option) and not option.is_flag
            if takes_value and not equals and position < len(args):
                rest.append(args[position])
                position += 1
    return rest, groups


def _field(cls: type[Configured], flag: str) -> FieldInfo | None:
    """The field of a class that a flag sets, or None."""
    from surgery.common.options import written

    fields, key = cls.model_fields, flag[2:].replace("-", "_")
    return fields.get(key) or next((f for name, f in fields.items() if written(name, f) == key), None)
