"""Progress of long work. Loops report what they do to a receiver, which the command line sets; without one, to nobody.

for name, weight in track(weights.items(), "merging"):   # countable: a bar
    ...
with stage("capturing BertModel"):                       # not countable
    ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")


class Receiver(Protocol):
    """Receiver of progress."""

    def begin(self, title: str, total: int | None) -> int:
        """Called when work begins. Returns a number that names it.

        Args:
            title: what is done, such as "merging".
            total: number of steps, or None if they are not countable.
        """

    def advance(self, work: int) -> None:
        """Called after a step."""

    def end(self, work: int) -> None:
        """Called when work ends, also after an error."""


_receiver: ContextVar[Receiver | None] = ContextVar("receiver", default=None)
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@contextmanager
def reporting(receiver: Receiver | None) -> Iterator[None]:
    """A context in which work is reported to a receiver, or to nobody."""
    token, loud = _receiver.set(receiver), _quiet.set(False)
    try:
        yield
    finally:
        _receiver.reset(token)
        _quiet.reset(loud)


def be_quiet() -> None:
    """Report to nobody from now on, until the context of `reporting` ends."""
    _receiver.set(None)
    _quiet.set(True)


def is_quiet() -> bool:
    """True if the user asked for no progress."""
    return _quiet.get()


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yield items and report each one.

    Args:
        items: the items.
        title: what is done with them.
        total: number of items; None takes their length, if they have one.
    """
    receiver = _receiver.get()
    if receiver is None:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    work = receiver.begin(title, total)
    try:
        for item in items:
            yield item
            receiver.advance(work)
    finally:
        receiver.end(work)


@contextmanager
def stage(title: str) -> Iterator[None]:
    """A context for work that is not countable."""
    receiver = _receiver.get()
    if receiver is None:
        yield
        return
    work = receiver.begin(title, None)
    try:
        yield
    finally:
        receiver.end(work)
