"""Runs the benchmarks and prints one table; exits with 1 where a goal is missed.

    python -m tests.benchmarks [NAME ...] [--json PATH]

Each row is a ratio of two things measured in one run, turn by turn, so that it means the same on any machine. A
benchmark is a module of this package whose `main()` returns rows (`rows.Row`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.rows import Row

NAMES = (
    "command_line",
    "status",
    "tp_step",
    "mnist_epoch",
    "pipeline_step",
    "bookkeeping",
    "end_step",
    "loss_memory",
    "prefetch",
    "rank_memory",
    "rendezvous",
    "async_save",
    "come_back",
    "kept_time",
)
"""The benchmarks, in the table's order."""
JSON = Path("build/benchmarks.json")
HEAD = ("what", "against", "ratio", "at most", "verdict")


def verdict(row: Row) -> str:
    return "ok" if row["ratio"] <= row["at_most"] else "MISSED"  # NaN misses


def table(rows: Sequence[Row]) -> str:
    """Columns with aligned edges, a line per row."""
    lines = [HEAD]
    lines += [(r["what"], r["against"], f"{r['ratio']:.3f}", f"{r['at_most']:g}", verdict(r)) for r in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def run(name: str) -> list[Row]:
    """A benchmark's rows; one that fails gives a row that misses, so that the others still run."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    try:
        rows: list[Row] = importlib.import_module(f"tests.benchmarks.{name}").main()
    except Exception as error:
        traceback.print_exc()
        nothing = float("nan")
        rows = [Row(what=name, against="", ratio=nothing, at_most=nothing, detail=f"{type(error).__name__}: {error}")]
    for row in rows:
        print(f"  {row['what']}: {row['detail']}", file=sys.stderr)
    print(f"  took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"of {', '.join(NAMES)}; default: all of them")
    parser.add_argument("--json", type=Path, default=JSON, help=f"where the rows go as JSON; default: {JSON}")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in NAMES:
            parser.error(f"{name} is not a benchmark; choose from {', '.join(NAMES)}")
    rows = [row for name in arguments.names or NAMES for row in run(name)]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    written = [
        {**row, **{k: None for k in ("ratio", "at_most") if math.isnan(row[k])}, "verdict": verdict(row)}
        for row in rows
    ]
    arguments.json.write_text(json.dumps(written, indent=2, allow_nan=False) + "\n")
    print(table(rows))
    print(f"as JSON: {arguments.json}", file=sys.stderr)
    return int(any(verdict(row) != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
