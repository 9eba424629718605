"""What the commands share: options, gates, and how checks are shown."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtwin.validate.gates import Gates
    from kvtwin.validate.result import Check


def add_judging(parser: argparse.ArgumentParser) -> None:
    """Add `--gates` and `--json`."""
    parser.add_argument(
        "--gates",
        type=Path,
        metavar="FILE",
        help="TOML with a [gates] table, such as a target.toml, or 'default' for kvtwin's own: exit 1 if one fails",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Add `--clock`."""
    parser.add_argument(
        "--clock",
        choices=("queued", "arrival"),
        default="queued",
        help="what TTFT and latency count from: the engine's queue or the client (default: queued)",
    )


def add_repeats(parser: argparse.ArgumentParser) -> None:
    """Add `--repeats`."""
    parser.add_argument(
        "--repeats", type=Path, nargs="+", default=[], metavar="RUN", help="more recordings: noise floor"
    )


def read_gates(args: argparse.Namespace) -> Gates:
    """The gates of `--gates`; none without it.

    Raises:
        InputError: not readable, or no [gates] table.
    """
    from kvtwin.sim.vllm.config import read_settings
    from kvtwin.traces.errors import InputError
    from kvtwin.validate.gates import DEFAULT_GATES, NO_GATES, parse_gates

    if args.gates is None:
        return NO_GATES
    if str(args.gates) == "default" and not args.gates.exists():
        return DEFAULT_GATES
    table = read_settings(args.gates).get("gates")
    if table is None:
        raise InputError("no [gates] table in it", path=args.gates)
    return parse_gates(table, args.gates)


def verdict_code(checks: Sequence[Check]) -> int:
    """Exit code: 1 if a gate failed."""
    return int(any(check.verdict == "fail" for check in checks))


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document; values that do not exist are null."""
    from kvtwin.validate.plain import to_plain

    print(json.dumps(to_plain(document), allow_nan=False))


def print_checks(checks: Sequence[Check]) -> None:
    """A line per check; verdicts where there are gates or floors."""
    print(f"{'metric':20} {'measured':>12} {'predicted':>12} {'error':>9} {'95 % interval':>20} {'noise floor':>12}")
    for check in checks:
        interval = "" if check.interval is None else f"{check.interval[0]:+.2%} .. {check.interval[1]:+.2%}"
        floor = "" if check.noise_floor is None else f"{check.noise_floor:.2%}"
        verdict = "" if check.verdict == "no gate" else f"  {check.verdict}"
        values = f"{number(check.measured)} {number(check.simulated)}"
        print(f"{check.metric:20} {values} {check.error:+9.2%} {interval:>20} {floor:>12}{verdict}")
    for note in notes(checks):
        print(f"note: {note}")
    if all(check.threshold is None for check in checks):
        print("no gate was asked: --gates FILE, or --gates default, judges the errors")


def notes(checks: Sequence[Check]) -> list[str]:
    """What nobody must miss: suspect units, other requests, aggregates in place of requests."""
    from kvtwin.validate.notes import loud_words

    return list(dict.fromkeys(word for check in checks for word in loud_words(check.note)))


def number(value: float) -> str:
    """A column of twelve; blank where there is no value."""
    return f"{'':>12}" if math.isnan(value) else f"{value:12,.3f}"
