"""The `surgery` command line. Every error that a user can fix is one line on stderr and exit code 2.

Commands start quickly: `surgery --help`, `surgery COMMAND --help` and shell completion import neither torch nor a
plugin. Three kinds of module keep it so:

- group, options, pass_groups, plugins, settings, choices, progress: the command group and the options of commands.
- see, change, ship, peft, train, run, infer, author: declarations of commands. A command imports its work when it
  is called.
- All others: the work, which imports torch.
"""

from __future__ import annotations

import os
import sys
import warnings

import click

from surgery.cli.group import LazyGroup
from surgery.cli.progress import terminal_progress
from surgery.common.errors import InterruptedTrainingError, SurgeryError


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="torch-surgery", prog_name="surgery")
@click.option(
    "--plugin",
    metavar="FILE.py",
    multiple=True,
    expose_value=False,
    help="Python file with passes or objectives of your own. It may stand anywhere on the line, and be repeated.",
)
def cli() -> None:
    """Change a PyTorch model and ship it: inspect, plan, apply passes, merge, export, verify, undo.

    MODEL is hf:DIR, hf:ORG/NAME[@REVISION], timm:NAME, diffusers:DIR, py:package.module:callable, FILE.pt2 (with
    --trust), or a directory that surgery saved.
    """


def main(argv: list[str] | None = None) -> None:
    """Run a command line and exit: the entry point of `surgery`. Never returns.

    The exit code is 0 for success, 1 for a difference that `verify` found or an internal error, 2 for an error that
    the user can fix, and 130 for an interrupt.
    """
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with terminal_progress(sys.argv[1:] if argv is None else argv):
            code = cli.main(args=argv, prog_name="surgery", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except InterruptedTrainingError as error:
        _fail(" ".join(str(error).split()), 130)
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
        _fail(f"internal error, {kind}: {first}; set SURGERY_DEBUG=1 for the traceback and report it", 1)


def _fail(message: str, code: int) -> None:
    # A message can repeat a name from a file, which may hold escape sequences of a terminal.
    shown = "".join(character if character.isprintable() else "?" for character in message)
    click.echo(f"error: {shown}", err=True)
    sys.exit(code)
