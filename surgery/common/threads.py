"""Lock for tracing. torch.export and fake tensors have global state, so only one thread at a time may use them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_tracing = threading.RLock()


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: of all functions with it, only one runs at a time; they may call each other."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _tracing:
            return function(*args, **kwargs)

    return run
