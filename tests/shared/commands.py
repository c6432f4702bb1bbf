"""Runs the command line in this process."""

from __future__ import annotations

import contextlib
import io

import pytest

from surgery.cli import main


def call(*args: object) -> tuple[int, str]:
    """Exit code of a command line, and what it printed on standard output and standard error."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.raises(SystemExit) as done:
        main([str(arg) for arg in args])
    return done.value.code or 0, out.getvalue()
