"""Ctrl-C while parameters are stepped: it takes effect once they have been.

Python raises KeyboardInterrupt between any two of its instructions, so also between the launch of a kernel and the note
that it has been launched. Whether a parameter has been stepped would then be unknown, and so would it be after a second
one while a step that has failed is put right. Therefore SIGINT is held back meanwhile.
"""

from __future__ import annotations

# What stands behind `signal.signal` and `signal.getsignal`, which take ten times as long: they try whether a handler is
# a number. Twice a step, or twice a parameter in backward, that would be seen.
import _signal  # type: ignore[import-not-found]
import threading
import time
from collections.abc import Callable
from signal import SIGINT
from types import FrameType
from typing import Any

PATIENCE = 1.0  # seconds from a held Ctrl-C until another one takes effect at once


class HeldInterrupts:
    """A context in whose body SIGINT has no effect: its handler runs as the body is left, once.

    Another SIGINT, `PATIENCE` after the first, is not held back: a body that takes so long may be compiling.

    Handlers run in the main thread only, so nothing is done in others. Nothing is done either within another such body,
    or where Python has no handler of SIGINT: it is ignored then, or ends the process at once.
    """

    __slots__ = ("_handler", "_since")

    def __init__(self) -> None:
        self._handler: Callable[[int, FrameType | None], Any] | None = None  # whose turn it is once the body is left
        self._since: float | None = None  # when the SIGINT came that is held

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
        if _signal.getsignal(SIGINT) == self._hold:  # the body may have set one of its own
            _signal.signal(SIGINT, handler)
        if self._since is not None:
            handler(SIGINT, None)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._since is None:
            self._since = time.monotonic()
        elif time.monotonic() - self._since >= PATIENCE and self._handler is not None:
            self._since = None
            self._handler(number, frame)
