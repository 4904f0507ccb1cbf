"""Timing beside what is measured: machines whose speed changes within minutes are the same for both."""

import statistics
import time


class Turns:
    """To be the `setup` of a benchmark: runs a function before each of its rounds, and says what that took.

    Args:
        function: what takes turns with what is measured.
        settle: waits until its work is done.
    """

    def __init__(self, function, settle):
        self._function, self._settle = function, settle
        self._seconds = []

    def __call__(self):
        started = time.perf_counter()
        self._function()
        self._settle()
        self._seconds.append(time.perf_counter() - started)

    def median(self, rounds):
        """Of the last rounds, in seconds."""
        return statistics.median(self._seconds[-rounds:])
