"""`kvtwin validate attribution`: which simulated layer causes how much of the end-to-end error."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtwin.validate.commands import common

if TYPE_CHECKING:
    from kvtwin.validate.result import Attribution


def add(levels: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the level."""
    parser = levels.add_parser(
        "attribution",
        help="causes of the end-to-end error: a recorded run, an engine and a profile",
        description="Simulates MEASURED's workload, then replaces one simulated layer after another by its recording "
        "(arrival, cache, step times, host, schedule). A layer is blamed only if it differs by itself.",
    )
    parser.add_argument("measured", type=Path, help="recorded run, best with steps")
    parser.add_argument("--engine", type=Path, help="engine settings (default: what the recording says of its engine)")
    parser.add_argument("--profile", type=Path, required=True, help="profile (JSON)")
    parser.add_argument("--workload", type=Path, help="what was sent, where the recording has no block hashes")
    common.add_clock(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap intervals (default: 0)")
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
    from kvtwin.sim.engines import engine_config, simulate_engine
    from kvtwin.sim.latency.profile import read_profile
    from kvtwin.sim.latency.stats import BatchStats
    from kvtwin.sim.vllm.config import read_settings
    from kvtwin.traces.readers import read_run
    from kvtwin.traces.workload import with_prompts
    from kvtwin.validate.attribution.attribute import attribute
    from kvtwin.validate.attribution.hybrids import Twin, replay
    from kvtwin.validate.e2e import compare_e2e
    from kvtwin.validate.scheduler.compare import compare_schedulers
    from kvtwin.validate.scheduler.predicted import replay_settings
    from kvtwin.validate.step import build_predictions, compare_steps

    measured, profile = read_run(args.measured), read_profile(args.profile)
    given = read_settings(args.engine) if args.engine else {}
    config = engine_config(replay_settings(measured, given, args.engine), args.engine or args.measured)
    workload = with_prompts(measured, read_run(args.workload) if args.workload else None)
    latency = profile.latency_model()
    run = simulate_engine(workload, config, latency, profile.host, record_steps=False)
    twin = Twin(workload, config, latency, profile.host, run)
    name, options = args.measured.name, {"seed": args.seed}
    clock: Any = f"{args.clock}_ns"
    checks, schedule = compare_e2e(measured, run, name=name, clock=clock, **options), None
    if measured.has("steps"):
        predicted = latency.step_ns(BatchStats.of_steps(measured.steps), 0)
        checks += compare_steps(build_predictions(measured.steps, predicted), name=name, **options)
        schedule, _ = compare_schedulers(measured, replay(measured, twin), name=name, **options)
    return attribute(measured, twin, name=name, clock=clock, checks=checks, schedule=schedule)
