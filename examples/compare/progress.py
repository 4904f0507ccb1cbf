"""The progress of a comparison: a bar if the output is a terminal, otherwise only complete lines."""

from __future__ import annotations

import sys
from types import TracebackType


class Progress:
    """Counts steps. `tqdm` shows them as a bar if it is installed and standard error is a terminal."""

    def __init__(self, total: int) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            self._bar = None
        else:
            # disable=None disables the bar unless the stream is a terminal
            self._bar = tqdm(total=total, unit="step", disable=None, file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, steps: int) -> None:
        if self._bar is not None:
            self._bar.update(steps)

    def write(self, line: str) -> None:
        """Prints a line on standard output, above the bar."""
        if self._bar is None or self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stdout)
