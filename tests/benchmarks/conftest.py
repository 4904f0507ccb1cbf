"""Compares the benchmarks of a run once all are done: in a table, and in the JSON file as `comparison`."""

from collections import defaultdict

from rich.console import Console
from rich.table import Table


def compared(benchmarks):
    """By group and name: the median in seconds, its ratio to fused AdamW's, bytes that must move per second, and these
    as a share of a copy's; None where the run has nothing to compare with. `fused` is what steps of fused AdamW took
    that were taken in turns with it, if there were any.
    """
    groups = defaultdict(dict)
    for group, extra, median in benchmarks:
        groups[group][extra["name"]] = {**extra, "median": median, "bytes_per_second": extra["bytes"] / median}
    for rows in groups.values():
        fused, copy = rows.get("AdamW fused"), rows.get("copy")
        for row in rows.values():
            beside = row.get("fused") or (fused["median"] if fused else None)
            row["ratio"] = row["median"] / beside if beside else None
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
