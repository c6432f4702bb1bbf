"""Plugins on the command line: the plugin manager of a command, and commands that plugins add.

The manager imports every plugin, and with them torch. It is therefore made when a command first needs it, not when the
command line starts; see `plugins_of`.

A plugin adds a command `hello` in one of two ways:

- An entry point of group `surgery.commands`. Its name is the name of the command, and its value a `click.Command`:

      [project.entry-points."surgery.commands"]
      hello = "my_package.commands:hello"

  `surgery --help` and shell completion list it. They read the name from the installed metadata and import nothing.

- The hook `surgery_commands(cli)`. It runs when a command needs the plugins, so its commands work, but `surgery --help`
  does not list them.

Either kind finds the plugin manager in `ctx.obj`. Neither can replace a built-in command.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import click

from surgery.common.errors import PluginError, SurgeryError
from surgery.common.progress import stage

if TYPE_CHECKING:
    from surgery.common.plugins import Plugins

COMMANDS_GROUP = "surgery.commands"
# Key of `ctx.meta`: the files of --plugin.
PLUGIN_FILES = "surgery.plugin_files"


def take_plugin_files(args: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Take `--plugin FILE.py` out of a command line, wherever it stands.

    A file can define a pass that the same line names, so it has to be read before the command's own options.

    Returns:
        The remaining arguments, and the files.

    Raises:
        click.UsageError: The option has no value.
    """
    rest: list[str] = []
    files: list[str] = []
    given = iter(args)
    for text in given:
        flag, equals, value = text.partition("=")
        if text == "--":
            rest += [text, *given]
        elif flag != "--plugin":
            rest.append(text)
        else:
            file = value if equals else next(given, None)
            if not file:
                raise click.UsageError("--plugin needs the path of a Python file")
            files.append(file)
    return rest, tuple(files)


def plugins_of(ctx: click.Context) -> Plugins:
    """The plugin manager of a command line. It is made at the first call and then kept in `ctx.obj`.

    Prints a warning for each plugin that cannot be loaded and for each `surgery_commands` hook that fails.
    """
    root = ctx.find_root()
    if root.obj is None:
        root.obj = _load_plugins(root.command, root.meta.get(PLUGIN_FILES, ()))
    # A context takes over its parent's object when it is created, which may have been before.
    ctx.obj = root.obj
    plugins: Plugins = root.obj
    return plugins


def _load_plugins(cli: click.Command, files: tuple[str, ...]) -> Plugins:
    with stage("loading plugins"):
        from surgery.common.plugins import make_plugin_manager

        plugins = make_plugin_manager(plugins=files)
    for title, reason in plugins.broken.items():
        click.echo(f"warning: plugin {title} cannot be loaded and is ignored: {reason}", err=True)
    # Read now, so that what is left out is said before the command's own output.
    _ = plugins.weight_ops, plugins.writers, plugins.schemes
    for note in plugins.notes:
        click.echo(f"warning: {note}", err=True)
    if isinstance(cli, click.Group):
        _add_commands(cli, plugins)
    return plugins


def _add_commands(cli: click.Group, plugins: Plugins) -> None:
    """Add the commands of `surgery_commands` hooks, without those that have the name of another command."""
    taken = dict.fromkeys(cli.list_commands(click.Context(cli)), "a built-in command")
    for name, points in command_entry_points().items():
        if name in getattr(cli, "BUILT_IN", ()):
            click.echo(
                f"warning: plugin {_owner(points[0])} cannot replace the built-in command {name!r}", err=True
            )
    for impl in plugins.implementations("surgery_commands"):
        owner = plugins.distribution_of(impl)[0]
        # Plugins add to a group of their own first, so that none replaces a command of another.
        own = click.Group(cli.name)
        try:
            plugins.call(impl, cli=own)
        except SurgeryError as error:
            click.echo(f"warning: {error}", err=True)
            continue
        for name, command in own.commands.items():
            if name in taken:
                click.echo(
                    f"warning: plugin {owner!r} cannot replace {taken[name]}: {name!r} is left out", err=True
                )
                continue
            taken[name] = f"a command of {owner!r}"
            cli.add_command(command, name)


def pass_plugins(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a command: passes the plugin manager as the keyword argument `plugins`."""

    @click.pass_context
    @functools.wraps(function)
    def wrapped(ctx: click.Context, /, *args: Any, **kwargs: Any) -> Any:
        return function(*args, plugins=plugins_of(ctx), **kwargs)

    return wrapped


def command_entry_points() -> dict[str, list[metadata.EntryPoint]]:
    """Command name -> its entry points, from the metadata of installed distributions. Imports no plugin."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for point in metadata.entry_points(group=COMMANDS_GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def load_command(name: str) -> click.Command:
    """The command of an entry point.

    Raises:
        PluginError: the entry point cannot be loaded or is not a click command, or two distributions have one name.
    """
    first, *others = command_entry_points()[name]
    if others:
        owners = ", ".join(sorted(_owner(point) for point in (first, *others)))
        raise PluginError(f"several plugins add a command {name!r}: {owners}; uninstall all but one of them")
    try:
        command = first.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PluginError(
            f"the command {name!r} of the plugin {_owner(first)} cannot be loaded: {reason}; "
            f"uninstall the plugin, or report it to its author"
        ) from error
    if not isinstance(command, click.Command):
        raise PluginError(
            f"the plugin {_owner(first)} gives {first.value} for the command {name!r}, which is not a click command; "
            f"report it to its author"
        )
    return command


def _owner(point: metadata.EntryPoint) -> str:
    return repr(point.dist.name if point.dist else point.value)
