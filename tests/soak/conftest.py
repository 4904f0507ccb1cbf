"""Prints what the soak found, once all of it is done."""

import sys


def pytest_terminal_summary(terminalreporter, config):
    found = config.stash.get(sys.modules["test_soak"].FIGURES, {}) if "test_soak" in sys.modules else {}
    for name, (growth, seconds) in found.items():
        grown = ", ".join(f"{what} {by:+,}" for what, by in growth.items() if by) or "nothing"
        terminalreporter.write_line(f"{name}: {seconds:.0f} s, {grown}")
