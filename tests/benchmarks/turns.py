"""Times a function in turns with a benchmark, so that a change of the machine's speed affects both alike."""

import statistics
import time


class Turns:
    """The `setup` of a benchmark: runs and times a function before each of its rounds.

    Args:
        function: run and timed in turns with the benchmark.
        synchronize: waits until the work of the function is complete."""

    def __init__(self, function, synchronize):
        self._function, self._synchronize = function, synchronize
        self._seconds = []

    def __call__(self):
        started = time.perf_counter()
        self._function()
        self._synchronize()
        self._seconds.append(time.perf_counter() - started)

    def median(self, rounds):
        """The median time of the last rounds, in seconds."""
        return statistics.median(self._seconds[-rounds:])
