"""Compares the benchmarks of a run at its end: in a table, and in the JSON file as `comparison`."""

from collections import defaultdict

from rich.console import Console
from rich.table import Table


def compared(benchmarks):
    """The rows of a comparison, by group and name: the median in seconds, its ratio to that of fused AdamW, the bytes
    to move per second, and their share of the rate of a copy; None if the run has no value to compare with. `fused` of
    a row is the time of fused AdamW measured in turns with it, if it was."""
    groups = defaultdict(dict)
    for group, extra, median in benchmarks:
        groups[group][extra["name"]] = {**extra, "median": median, "bytes_per_second": extra["bytes"] / median}
    for rows in groups.values():
        fused, copy = rows.get("AdamW fused"), rows.get("copy")
        for row in rows.values():
            fused_time = row.get("fused") or (fused["median"] if fused else None)
            row["ratio"] = row["median"] / fused_time if fused_time else None
            row["of_copy"] = row["bytes_per_second"] / copy["bytes_per_second"] if copy else None
    return groups


def pytest_benchmark_update_json(config, benchmarks, output_json):
    done = [(b.group, b.extra_info, b.stats.median) for b in benchmarks if b.extra_info]
    output_json["comparison"] = {group: list(rows.values()) for group, rows in compared(done).items()}


def pytest_terminal_summary(config):
    session = getattr(config, "_benchmarksession", None)
    done = [b for b in session.benchmarks if b.extra_info and not b.has_error] if session else []
    for group, rows in compared((b.group, b.extra_info, b.stats.median) for b in done).items():
        names = ("step", "median ms", "x AdamW fused", "bytes to move", "GB/s", "of copy speed", "peak extra")
        table = Table(*names, title=group)
        for name, row in rows.items():
            table.add_row(
                name,
                f"{1e3 * row['median']:.2f}",
                "" if row["ratio"] is None else f"{row['ratio']:.2f}",
                f"{row['bytes']:,}",
                f"{row['bytes_per_second'] / 1e9:,.1f}",
                "" if row["of_copy"] is None else f"{row['of_copy']:.0%}",
                "" if row["peak"] is None else f"{row['peak']:,}",
            )
        Console(width=120).print(table)
