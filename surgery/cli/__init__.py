"""The command line: `surgery COMMAND`. Every error that a user can mend is one line and exit code 2."""

from __future__ import annotations

import os
import sys
import warnings

import click

from surgery.common.errors import SurgeryError


class _Group(click.Group):
    def resolve_command(self, ctx: click.Context, args: list[str]):
        from surgery.common.errors import nearest

        name = args[0] if args else ""
        if name and self.get_command(ctx, name) is None and not name.startswith("-"):
            hint = nearest(name, self.list_commands(ctx))
            raise click.UsageError(f"there is no command {name!r}{hint or '; see surgery --help'}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="torch-surgery", prog_name="surgery")
def cli() -> None:
    """Change a PyTorch model and ship it: see it, plan, apply passes, merge, export, verify, undo.

    MODEL is hf:DIR_OR_ID, timm:NAME, py:package.module:callable, FILE.pt2 (with --trust), or a directory
    that surgery saved.
    """


def _build() -> click.Group:
    from surgery.cli import change, peft, run, see, ship, train
    from surgery.common.plugins import make_plugin_manager

    for module in (see, change, ship, peft, train, run):
        for command in module.COMMANDS:
            cli.add_command(command)
    plugins = make_plugin_manager()
    for title, why in plugins.broken.items():
        click.echo(f"warning: plugin {title} does not load and is left out: {why}", err=True)
    for impl in plugins.implementations("surgery_commands"):
        try:
            plugins.call(impl, cli=cli)
        except SurgeryError as error:
            click.echo(f"warning: {error}", err=True)
    cli.context_settings["obj"] = plugins
    return cli


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `surgery` command."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = _build().main(args=argv, prog_name="surgery", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except SurgeryError as error:
        _fail(" ".join(str(error).split()), 2)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message().splitlines()[0], 2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if os.environ.get("SURGERY_DEBUG"):
            raise
        kind = type(error).__name__
        first = (str(error).splitlines() or [""])[0]
        _fail(f"internal error, {kind}: {first} (set SURGERY_DEBUG=1 for the traceback, and report it)", 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)
