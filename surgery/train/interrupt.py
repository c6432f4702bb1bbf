"""Ctrl-C during a training: the step that runs is finished, and a checkpoint is written."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupt:
    """Context manager that turns the first Ctrl-C (SIGINT) into a flag. A second one interrupts at once.

    Python handles signals only in the main thread; elsewhere, and where something else handles SIGINT, nothing changes.

    Attributes:
        asked: True after a Ctrl-C.
    """

    def __init__(self) -> None:
        self.asked = False
        self._active = False

    def __enter__(self) -> Interrupt:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._ask)
            self._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._active:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
