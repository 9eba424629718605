"""`kvtwin validate step`: step latency, of a recording beside a profile or another run."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtwin.validate.commands import common

if TYPE_CHECKING:
    import pyarrow as pa


def add(levels: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the level."""
    parser = levels.add_parser("step", help="step latency: a recorded run with steps, and a profile or another run")
    parser.add_argument("measured", type=Path, help="recorded run with steps")
    parser.add_argument(
        "predicted", type=Path, help="profile (JSON), or a run with steps: each step beside the alike one of that run"
    )
    common.add_repeats(parser)
    common.add_judging(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from kvtwin.calibrate.noise import step_floor
    from kvtwin.traces.readers import read_run
    from kvtwin.validate.step import compare_steps

    measured = read_run(args.measured)
    predictions, note = _predictions(measured, args.predicted)
    floor = step_floor([measured, *(read_run(path) for path in args.repeats)]) if args.repeats else None
    checks = compare_steps(
        predictions,
        name=args.measured.name,
        floor=floor.metrics if floor else None,
        gates=common.read_gates(args),
    )
    if note:
        checks = [replace(check, note=f"{note}; {check.note}") for check in checks]
    if args.json:
        common.print_json({"checks": checks})
    else:
        common.print_checks(checks)
        print(note, end="\n" if note else "")
    return common.verdict_code(checks)


def _predictions(measured: Any, path: Path) -> tuple[pa.Table, str]:
    """The table of schema PREDICTIONS, and what a reader must know about it."""
    from kvtwin.sim.latency.profile import read_profile
    from kvtwin.sim.latency.stats import BatchStats
    from kvtwin.traces.readers import read_run
    from kvtwin.validate.step import build_predictions, predictions_of_run

    if path.suffix != ".json":
        return predictions_of_run(measured, read_run(path))
    profile = read_profile(path)
    batches = BatchStats.of_steps(measured.steps)
    predicted = profile.latency_model().step_ns(batches, 0)
    return build_predictions(measured.steps, predicted, profile.extrapolates(batches)), ""
