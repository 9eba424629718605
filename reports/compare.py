"""`kvtwin compare`: several runs side by side, in the terminal and as a page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtwin.validate.compare import SideBySide
    from kvtwin.validate.e2e import Clock


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `compare`."""
    compare = subparsers.add_parser(
        "compare",
        help="runs side by side: what a setting, a version or a cache level brings",
        description="TTFT, TPOT, latency, throughput, cache hits by level and time in each queue of several runs, with "
        "the change against the first one. Nothing is judged: see validate for that.",
    )
    compare.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders, or any format that kvtwin trace info knows"
    )
    compare.add_argument("--names", metavar="A,B,...", help="what to call the runs (default: their paths' last parts)")
    compare.add_argument(
        "--clock",
        choices=("arrival", "queued"),
        default="arrival",
        help="what TTFT and latency count from: the client or the engine's queue (default: arrival)",
    )
    compare.add_argument("-o", "--output", type=Path, metavar="PAGE", help="HTML page to write; must not exist")
    compare.add_argument("--json", action="store_true", help="print one JSON document")
    compare.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> int:
    from kvtwin.reports.pages.compare import render_comparison
    from kvtwin.traces.files import refuse_existing, write_text
    from kvtwin.traces.readers import read_run
    from kvtwin.validate.compare import compare_runs
    from kvtwin.validate.plain import to_plain

    if args.output is not None:
        refuse_existing(args.output)
    clock: Clock = "arrival_ns" if args.clock == "arrival" else "queued_ns"
    found = compare_runs([read_run(path) for path in args.runs], _names(args), clock)
    if args.output is not None:
        write_text(args.output, render_comparison(found))
    if args.json:
        print(json.dumps(to_plain(found), allow_nan=False))
    else:
        print(_table(found))
    return 0


def _names(args: argparse.Namespace) -> list[str]:
    if args.names is not None:
        return [name.strip() for name in args.names.split(",")]
    last = [path.resolve().name for path in args.runs]
    return last if len(set(last)) == len(last) else [str(path) for path in args.runs]


def _table(found: SideBySide) -> str:
    """A line per metric: the baseline's value, then each run's value and its change."""
    from kvtwin.reports.numbers import percent
    from kvtwin.reports.pages.compare import value_text
    from kvtwin.reports.words import clock_sentence

    lines = [_line("", found.names[0], [(name, "change") for name in found.names[1:]])]
    for metric in found.metrics:
        values = [value_text(metric, index) for index in range(len(found.names))]
        changes = [percent(change) for change in metric.changes]
        lines.append(_line(metric.name, values[0], list(zip(values, changes, strict=True))[1:]))
    return "\n".join([*lines, clock_sentence(found.clock), *(f"note: {note}" for note in found.notes)])


def _line(label: str, first: str, others: list[tuple[str, str]]) -> str:
    return f"{label:21} {first:>17}" + "".join(f" {value:>17} {change:>8}" for value, change in others)
