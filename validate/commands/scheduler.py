"""`kvtwin validate scheduler`: decisions, step by step."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvtwin.validate.commands import common


def add(levels: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the level."""
    parser = levels.add_parser("scheduler", help="decisions, step by step: a recorded run with steps, and an engine")
    parser.add_argument("measured", type=Path, help="recorded run with steps, of vLLM or SGLang")
    parser.add_argument(
        "predicted",
        type=Path,
        nargs="?",
        help="engine settings (.toml, .json) to replay the recording on, at its own step times; or another run with "
        "steps (default: the engine that the recording names)",
    )
    common.add_judging(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from kvtwin.traces.readers import read_run
    from kvtwin.validate.scheduler.compare import compare_schedulers
    from kvtwin.validate.scheduler.predicted import predicted_run
    from kvtwin.validate.scheduler.text import describe

    measured = read_run(args.measured)
    predicted = predicted_run(measured, args.predicted)
    gates = common.read_gates(args)
    finding, checks = compare_schedulers(measured, predicted, name=args.measured.name, gates=gates)
    if args.json:
        common.print_json({"checks": checks, "schedule": finding})
    else:
        for line in describe(finding):
            print(line)
        common.print_checks(checks)
    return common.verdict_code(checks)
