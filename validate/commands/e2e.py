"""`kvtwin validate e2e`: TTFT, TPOT, latency and throughput of two or more runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtwin.validate.commands import common

if TYPE_CHECKING:
    from kvtwin.validate.result import Check


def add(levels: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the level."""
    parser = levels.add_parser("e2e", help="TTFT, TPOT, latency, throughput: a recorded run and a simulated one")
    parser.add_argument("measured", type=Path, help="recorded run")
    parser.add_argument(
        "predicted",
        type=Path,
        nargs="+",
        help="simulated runs (ours, or another simulator's output), other recordings of the same workload, or a file "
        "of aggregates (vllm bench, SGLang's bench_serving, Dynamo's replay, BLIS)",
    )
    parser.add_argument(
        "--unpaired",
        action="store_true",
        help="the runs served different requests: compare distributions; an error whose interval holds 0 is none",
    )
    common.add_clock(parser)
    common.add_repeats(parser)
    common.add_judging(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from kvtwin.traces.errors import InputError
    from kvtwin.traces.readers import read_run

    if args.unpaired and args.repeats:
        raise InputError("--repeats goes with paired runs: unpaired ones have no noise floor")
    measured = read_run(args.measured)
    found = [(str(path), _compare(args, measured, path)) for path in args.predicted]
    if len(found) > 1:
        _print_side_by_side(found, args)
    elif args.json:
        common.print_json({"clock": _clock(args), "checks": found[0][1]})
    else:
        common.print_checks(found[0][1])
    if not args.json:
        print(f"TTFT and latency count from {_clock(args)}")
    return max(common.verdict_code(checks) for _, checks in found)


def _clock(args: argparse.Namespace) -> str:
    """The column that times count from."""
    return f"{args.clock}_ns"


def _compare(args: argparse.Namespace, measured: Any, path: Path) -> list[Check]:
    from kvtwin.traces.readers import read_run
    from kvtwin.validate.peers import compare_prediction
    from kvtwin.validate.unpaired import compare_unpaired

    options: dict[str, Any] = {
        "name": args.measured.name,
        "clock": _clock(args),
        "gates": common.read_gates(args),
    }
    if args.unpaired:
        return compare_unpaired(measured, read_run(path), **options)
    repeats = [measured, *(read_run(path) for path in args.repeats)] if args.repeats else []
    return compare_prediction(measured, path, repeats=repeats, **options)


def _print_side_by_side(found: list[tuple[str, list[Check]]], args: argparse.Namespace) -> None:
    """Several predictions of one recording: a column for each, its value and its error."""
    if args.json:
        common.print_json(
            {"clock": _clock(args), "predictions": [{"predicted": path, "checks": checks} for path, checks in found]}
        )
        return
    for index, (path, _) in enumerate(found, 1):
        print(f"({index}) {path}")
    print(f"{'metric':20} {'measured':>12}" + "".join(f"{f'({n})':>14} {'error':>9}" for n in range(1, len(found) + 1)))
    by_metric = [{check.metric: check for check in checks} for _, checks in found]
    for metric in dict.fromkeys(metric for checks in by_metric for metric in checks):
        row = [checks.get(metric) for checks in by_metric]
        measured = next(check.measured for check in row if check is not None)
        columns = "".join(
            f"{'':24}" if check is None else f"  {common.number(check.simulated)} {check.error:+9.2%}" for check in row
        )
        print(f"{metric:20} {common.number(measured)}{columns}")
    for index, (_, checks) in enumerate(found, 1):
        for note in common.notes(checks):
            print(f"note: ({index}) {note}")
