"""Prints the comparison once all benchmarks of a run are done."""

from collections import defaultdict

from rich.console import Console
from rich.table import Table


def pytest_terminal_summary(config):
    session = getattr(config, "_benchmarksession", None)
    groups = defaultdict(dict)
    for done in session.benchmarks if session else ():
        if done.extra_info and not done.has_error:
            groups[done.group][done.extra_info["name"]] = (done.stats.median, done.extra_info)
    for group, rows in groups.items():
        table = Table("step", "median ms", "x AdamW fused", "bytes to move", "of copy speed", "peak extra", title=group)
        fused, copy = rows.get("AdamW fused"), rows.get("copy")
        for name, (median, extra) in rows.items():
            speed = extra["bytes"] / median
            table.add_row(
                name,
                f"{1e3 * median:.2f}",
                f"{median / fused[0]:.2f}" if fused else "",
                f"{extra['bytes']:,}",
                f"{speed * copy[0] / copy[1]['bytes']:.0%}" if copy else "",
                "" if extra["peak"] is None else f"{extra['peak']:,}",
            )
        Console(width=120).print(table)
