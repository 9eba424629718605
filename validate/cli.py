"""`kvtwin validate LEVEL`: two runs compared, or a run and a profile or engine. (`kvtwin check` is in reports/.)"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtwin.validate.result import Check


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `validate`."""
    parser = subparsers.add_parser("validate", help="compare a recording with a prediction")
    levels = parser.add_subparsers(metavar="LEVEL", dest="level", required=True)
    e2e = levels.add_parser("e2e", help="TTFT, TPOT, latency, throughput: a recorded run and a simulated one")
    e2e.add_argument("measured", type=Path, help="recorded run")
    e2e.add_argument(
        "predicted",
        type=Path,
        nargs="+",
        help="simulated runs (ours, or another simulator's output), or other recordings of the same workload",
    )
    e2e.add_argument(
        "--clock",
        choices=("queued", "arrival"),
        default="queued",
        help="what TTFT and latency count from: the engine's queue or the client (default: queued)",
    )
    e2e.add_argument("--repeats", type=Path, nargs="+", default=[], metavar="RUN", help="more recordings: noise floor")
    e2e.set_defaults(run=_e2e)
    step = levels.add_parser("step", help="step latency: a recorded run with steps, and a profile")
    step.add_argument("measured", type=Path, help="recorded run with steps")
    step.add_argument("predicted", type=Path, help="profile (JSON)")
    step.add_argument("--repeats", type=Path, nargs="+", default=[], metavar="RUN", help="more recordings: noise floor")
    step.set_defaults(run=_step)
    cache = levels.add_parser("cache", help="hits, moves and evictions per cache level: two cache event traces")
    cache.add_argument("measured", type=Path, help="run with cache events, Tair log, vLLM KV events, HiCache log")
    cache.add_argument("predicted", type=Path, nargs="?", help="another such trace (or --capacity)")
    cache.add_argument("--capacity", type=int, metavar="BLOCKS", help="replay MEASURED through a cache of this size")
    cache.add_argument("--policy", default="lru", help="eviction policy of the replay (default: lru)")
    cache.set_defaults(run=_cache)
    cache.add_argument("--json", action="store_true", help="print one JSON document")
    scheduler = levels.add_parser("scheduler", help="decisions, step by step: a recorded run with steps, and an engine")
    scheduler.add_argument("measured", type=Path, help="recorded run with steps, of vLLM or SGLang")
    scheduler.add_argument(
        "predicted",
        type=Path,
        nargs="?",
        help="engine settings (.toml, .json) to replay the recording on, at its own step times; or another run with "
        "steps (default: the engine that the recording names)",
    )
    scheduler.set_defaults(run=_scheduler)
    for level in (e2e, step, scheduler):
        level.add_argument("--seed", type=int, default=0, help="of the bootstrap intervals (default: 0)")
        level.add_argument("--json", action="store_true", help="print one JSON document")


def _e2e(args: argparse.Namespace) -> int:
    from kvtwin.traces.readers import read_run
    from kvtwin.validate.e2e import compare_e2e
    from kvtwin.validate.peers import match_requests

    measured = read_run(args.measured)
    repeats = [measured, *(read_run(path) for path in args.repeats)] if args.repeats else []
    clock: Any = f"{args.clock}_ns"
    found = []
    for path in args.predicted:
        predicted = match_requests(measured, read_run(path))
        name = args.measured.name
        checks = compare_e2e(measured, predicted, name=name, clock=clock, repeats=repeats, seed=args.seed)
        found.append((str(path), checks))
    if len(found) == 1:
        _print(found[0][1], args)
    else:
        _print_side_by_side(found, args)
    return 0


def _print_side_by_side(found: list[tuple[str, list[Check]]], args: argparse.Namespace) -> None:
    """Several predictions of one recording: a column for each, its value and its error."""
    if args.json:
        plain = [{"predicted": path, "checks": [_row(check) for check in checks]} for path, checks in found]
        print(json.dumps({"predictions": plain}, allow_nan=False))
        return
    for number, (path, _) in enumerate(found, 1):
        print(f"({number}) {path}")
    print(f"{'metric':20} {'measured':>12}" + "".join(f"{f'({n})':>14} {'error':>9}" for n in range(1, len(found) + 1)))
    for row in zip(*(checks for _, checks in found), strict=True):
        columns = "".join(f"  {_number(check.simulated)} {check.error:+9.2%}" for check in row)
        print(f"{row[0].metric:20} {_number(row[0].measured)}{columns}")


def _step(args: argparse.Namespace) -> int:
    from kvtwin.calibrate.noise import step_floor
    from kvtwin.sim.latency.profile import read_profile
    from kvtwin.sim.latency.stats import BatchStats
    from kvtwin.traces.readers import read_run
    from kvtwin.validate.step import build_predictions, compare_steps

    measured, profile = read_run(args.measured), read_profile(args.predicted)
    batches = BatchStats.of_steps(measured.steps)
    predicted = profile.latency_model().step_ns(batches, 0)
    predictions = build_predictions(measured.steps, predicted, profile.extrapolates(batches))
    floor = step_floor([measured, *(read_run(path) for path in args.repeats)]) if args.repeats else None
    metrics = floor.metrics if floor else None
    _print(compare_steps(predictions, name=args.measured.name, floor=metrics, seed=args.seed), args)
    return 0


def _cache(args: argparse.Namespace) -> int:
    from kvtwin.traces.errors import InputError
    from kvtwin.traces.readers.cache_events import read_cache_events
    from kvtwin.validate.cache import compare_cache, replay_events

    if (args.predicted is None) == (args.capacity is None):
        raise InputError("either PREDICTED or --capacity expected")
    measured = read_cache_events(args.measured)
    if args.predicted is not None:
        predicted = read_cache_events(args.predicted)
    else:
        predicted = replay_events(measured, args.capacity, args.policy)
    _print(compare_cache(measured, predicted, name=args.measured.name), args)
    return 0


def _scheduler(args: argparse.Namespace) -> int:
    from kvtwin.traces.readers import read_run
    from kvtwin.validate.plain import to_plain
    from kvtwin.validate.scheduler.compare import compare_schedulers
    from kvtwin.validate.scheduler.predicted import predicted_run
    from kvtwin.validate.scheduler.text import describe

    measured = read_run(args.measured)
    predicted = predicted_run(measured, args.predicted)
    finding, checks = compare_schedulers(measured, predicted, name=args.measured.name, seed=args.seed)
    if args.json:
        print(json.dumps(to_plain({"checks": checks, "schedule": finding}), allow_nan=False))
        return 0
    for line in describe(finding):
        print(line)
    _print(checks, args)
    return 0


def _print(checks: list[Check], args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps({"checks": [_row(check) for check in checks]}, allow_nan=False))
        return
    print(f"{'metric':20} {'measured':>12} {'predicted':>12} {'error':>9} {'95 % interval':>20} {'noise floor':>12}")
    for check in checks:
        interval = "" if check.interval is None else f"{check.interval[0]:+.2%} .. {check.interval[1]:+.2%}"
        floor = "" if check.noise_floor is None else f"{check.noise_floor:.2%}"
        values = f"{_number(check.measured)} {_number(check.simulated)}"
        print(f"{check.metric:20} {values} {check.error:+9.2%} {interval:>20} {floor:>12}")


def _row(check: Check) -> dict[str, Any]:
    return {name: _plain(getattr(check, name)) for name in check.__slots__}


def _number(value: float) -> str:
    return f"{'':>12}" if math.isnan(value) else f"{value:12,.3f}"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
