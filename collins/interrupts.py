"""Defers Ctrl-C until the parameters of a step have been stepped.

Python can raise KeyboardInterrupt between any two instructions, for example between the launch of a kernel and the
record that it was launched. Then it would be unknown whether a parameter has been stepped. The same holds for a second
interrupt while a failed step is being completed. Therefore SIGINT is deferred during a step.
"""

from __future__ import annotations

# The C functions behind `signal.signal` and `signal.getsignal`. The Python functions take ten times as long, because
# they convert handlers to enums; they would be called twice per step, or twice per parameter in backward.
import _signal  # type: ignore[import-not-found]
import threading
import time
from collections.abc import Callable
from signal import SIGINT
from types import FrameType
from typing import Any

PATIENCE = 1.0  # seconds after a deferred Ctrl-C from which on another one takes effect at once


class HeldInterrupts:
    """A context manager that defers SIGINT: its handler runs once, when the body has ended.

    A SIGINT that arrives at least `PATIENCE` after the first one is not deferred, since such a long body may be
    compiling.

    Signal handlers run in the main thread only, so in other threads the context has no effect. It has no effect either
    within another such context, or if Python has no handler of SIGINT, which is then ignored or ends the process.
    """

    __slots__ = ("_handler", "_since")

    def __init__(self) -> None:
        self._handler: Callable[[int, FrameType | None], Any] | None = None  # the original handler
        self._since: float | None = None  # the time of the deferred SIGINT

    def __enter__(self) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            return
        handler = _signal.getsignal(SIGINT)
        if callable(handler) and getattr(handler, "__func__", None) is not HeldInterrupts._hold:
            self._handler = handler
            _signal.signal(SIGINT, self._hold)

    def __exit__(self, *_: object) -> None:
        handler = self._handler
        if handler is None:
            return
        if _signal.getsignal(SIGINT) == self._hold:  # the body may have set another handler
            _signal.signal(SIGINT, handler)
        if self._since is not None:
            handler(SIGINT, None)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._since is None:
            self._since = time.monotonic()
        elif time.monotonic() - self._since >= PATIENCE and self._handler is not None:
            self._since = None
            self._handler(number, frame)
