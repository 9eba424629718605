"""`kvtwin validate attribution`: which simulated layer causes how much of the end-to-end error."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtwin.validate.commands import common

if TYPE_CHECKING:
    from kvtwin.traces.run import Run
    from kvtwin.validate.attribution.hybrids import Twin
    from kvtwin.validate.result import Attribution


def add(levels: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the level."""
    parser = levels.add_parser(
        "attribution",
        help="causes of the end-to-end error: a recorded run, and a simulated one or an engine and a profile",
        description="Takes PREDICTED, or simulates MEASURED's workload, then replaces one simulated layer after another "
        "by its recording (arrival, cache, step times, host, schedule). A layer is blamed only if it differs by itself.",
    )
    parser.add_argument("measured", type=Path, help="recorded run, best with steps")
    parser.add_argument(
        "predicted",
        type=Path,
        nargs="?",
        help="run of kvtwin simulate, which holds its engine and its profile (default: simulate one)",
    )
    parser.add_argument(
        "--engine", type=Path, help="engine settings (default: what PREDICTED, or MEASURED, says of it)"
    )
    parser.add_argument("--profile", type=Path, help="profile (JSON; default: the one that lies in PREDICTED)")
    parser.add_argument("--workload", type=Path, help="what was sent, where neither run has block hashes")
    common.add_clock(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    found = _attribute(args)
    if args.json:
        common.print_json({"attributions": found})
        return 0
    for one in found:
        parts = ", ".join(f"{part.layer} {part.change:+.2%}" for part in one.parts)
        print(f"{one.metric:14} {one.simulated / one.measured - 1:+8.2%} = {parts}; blamed: {one.blamed or 'nobody'}")
    for note in dict.fromkeys(one.note for one in found if one.note):
        print(f"note: {note}")
    return 0


def _attribute(args: argparse.Namespace) -> list[Attribution]:
    from kvtwin.sim.latency.stats import BatchStats
    from kvtwin.traces.readers import read_run
    from kvtwin.validate.attribution.attribute import attribute
    from kvtwin.validate.attribution.hybrids import replay
    from kvtwin.validate.e2e import compare_e2e
    from kvtwin.validate.scheduler.compare import compare_schedulers
    from kvtwin.validate.step import build_predictions, compare_steps

    measured = read_run(args.measured)
    twin = _twin(args, measured)
    name = args.measured.name
    clock: Any = f"{args.clock}_ns"
    checks, schedule = compare_e2e(measured, twin.run, name=name, clock=clock), None
    if measured.has("steps"):
        predicted = twin.latency.step_ns(BatchStats.of_steps(measured.steps), 0)
        checks += compare_steps(build_predictions(measured.steps, predicted), name=name)
        schedule, _ = compare_schedulers(measured, replay(measured, twin), name=name)
    return attribute(measured, twin, name=name, clock=clock, checks=checks, schedule=schedule)


def _twin(args: argparse.Namespace, measured: Run) -> Twin:
    """What predicts the recording: the simulated run that was given, or one that is made here."""
    from kvtwin.sim.engines import engine_config, simulate_engine
    from kvtwin.sim.latency.profile import PROFILE_FILE, read_profile
    from kvtwin.sim.vllm.config import read_settings
    from kvtwin.traces.errors import InputError
    from kvtwin.traces.readers import read_run
    from kvtwin.traces.workload import with_prompts
    from kvtwin.validate.attribution.hybrids import Twin
    from kvtwin.validate.e2e import in_order_of
    from kvtwin.validate.scheduler.predicted import replay_settings

    predicted = in_order_of(measured, read_run(args.predicted)) if args.predicted else None
    path = args.profile or (args.predicted / PROFILE_FILE if args.predicted else None)
    if path is None or not path.exists():
        problem = "no profile: give --profile, or a run of kvtwin simulate, which holds the one it was made with"
        raise InputError(problem, path=args.predicted or args.measured)
    profile = read_profile(path)
    latency = profile.latency_model()
    given = read_settings(args.engine) if args.engine else _settings(predicted) if predicted else {}
    config = engine_config(
        replay_settings(measured, given, args.engine), args.engine or args.predicted or args.measured
    )
    knows_prompts = predicted is not None and predicted.info.hash_block_tokens is not None
    sent = read_run(args.workload) if args.workload else predicted if knows_prompts else None
    workload = with_prompts(measured, sent)
    run = predicted or simulate_engine(workload, config, latency, profile.host, record_steps=False)
    return Twin(workload, config, latency, profile.host, run)


def _settings(predicted: Run) -> dict[str, Any]:
    """The engine that a simulated run was made with."""
    engine = (predicted.info.engine or "").partition(" ")[0]
    return {**predicted.info.engine_config, **({"engine": engine} if engine else {})}
