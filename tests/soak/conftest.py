"""Prints the measured growth of all soak tests at the end of the run."""

import sys


def pytest_terminal_summary(terminalreporter, config):
    figures = config.stash.get(sys.modules["test_soak"].FIGURES, {}) if "test_soak" in sys.modules else {}
    for name, (growth, seconds) in figures.items():
        grown = ", ".join(f"{what} {by:+,}" for what, by in growth.items() if by) or "nothing"
        terminalreporter.write_line(f"{name}: {seconds:.0f} s, {grown}")
