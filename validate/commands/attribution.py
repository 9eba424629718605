"""`kvtwin validate attribution`: which simulated layer causes how much of the end-to-end error."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtwin.validate.commands import common

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

    from kvtwin.sim.latency.base import LatencyModel
    from kvtwin.sim.latency.host import HostTime
    from kvtwin.traces.run import Run
    from kvtwin.validate.attribution.hybrids import Twin
    from kvtwin.validate.gates import Gates
    from kvtwin.validate.result import Attribution, Check, Part


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
        help="simulated run; its profile lies in it, or is fitted on its steps (default: simulate one)",
    )
    parser.add_argument(
        "--engine", type=Path, help="engine settings (default: what PREDICTED, or MEASURED, says of it)"
    )
    parser.add_argument("--profile", type=Path, help="profile (JSON; default: the one that lies in PREDICTED)")
    parser.add_argument("--workload", type=Path, help="what was sent, where neither run has block hashes")
    common.add_clock(parser)
    common.add_judging(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    found, checks = _attribute(args)
    if args.json:
        common.print_json({"attributions": found, "checks": checks})
    else:
        _print(found)
    return common.verdict_code(checks)


def _print(found: Sequence[Attribution]) -> None:
    for one in found:
        parts = ", ".join(_bar(part) for part in one.parts)
        print(f"{one.metric:15} {one.simulated / one.measured - 1:+8.2%} = {parts}; blamed: {one.blamed or 'nobody'}")
    for note in dict.fromkeys(one.note for one in found if one.note):
        print(f"note: {note}")


def _bar(part: Part) -> str:
    interval = "" if part.interval is None else f" [{part.interval[0]:+.2%} .. {part.interval[1]:+.2%}]"
    return f"{part.layer} {part.change:+.2%}{interval}"


def _attribute(args: argparse.Namespace) -> tuple[list[Attribution], list[Check]]:
    from kvtwin.traces.readers import read_run
    from kvtwin.validate.attribution.attribute import attribute
    from kvtwin.validate.e2e import compare_e2e, in_order_of
    from kvtwin.validate.step import compare_steps

    measured = read_run(args.measured)
    predicted = read_run(args.predicted) if args.predicted else None
    ordered = in_order_of(measured, predicted) if predicted is not None else None
    latency, host, notes = _prices(args, predicted)
    twin = _twin(args, measured, ordered, latency, host)
    asked: dict[str, Any] = {"name": args.measured.name, "gates": common.read_gates(args)}
    clock: Any = f"{args.clock}_ns"
    checks = compare_e2e(measured, twin.run, clock=clock, **asked)
    table, more = _predictions(measured, predicted, latency)
    checks += [] if table is None else compare_steps(table, **asked)
    notes += more
    found = attribute(measured, twin, name=args.measured.name, clock=clock, checks=checks, notes=notes)
    return found, [*checks, *(_decisions(one, asked["gates"]) for one in found if one.metric == "identical_steps")]


def _decisions(found: Attribution, gates: Gates) -> Check:
    """The check of the scheduler that attribution rests on."""
    from kvtwin.validate.gates import judge
    from kvtwin.validate.result import Check

    error = found.parts[0].change
    number = int(found.measured)
    unjudged = Check(
        found.run, "scheduler", found.metric, found.unit, found.measured, found.simulated, error, None, number
    )
    return judge(unjudged, gates)


def _prices(args: argparse.Namespace, predicted: Run | None) -> tuple[LatencyModel | None, HostTime, list[str]]:
    """What a step costs in the twin, its host, and what a reader must know: of a profile, or as the run's steps tell.

    Raises:
        InputError: neither a profile nor a predicted run; or the profile cannot be used.
    """
    from kvtwin.calibrate.steps.calibrate import calibrate_steps
    from kvtwin.sim.latency.host import HostTime
    from kvtwin.sim.latency.profile import PROFILE_FILE, read_profile
    from kvtwin.traces.errors import InputError

    path = args.profile or (args.predicted / PROFILE_FILE if args.predicted else None)
    if path is not None and (args.profile or path.exists()):
        profile = read_profile(path)
        return profile.latency_model(), profile.host, []
    if predicted is None:
        problem = "no profile: give --profile, or a simulated run"
        raise InputError(problem, path=args.measured)
    if not predicted.has("steps"):
        return None, HostTime(), ["the predicted run has neither profile nor steps: its step times are not judged"]
    try:
        profile = calibrate_steps([predicted])
    except InputError as error:
        return None, HostTime(), [f"no profile, and none can be fitted on the predicted steps: {error.problem}"]
    return profile.latency_model(), profile.host, ["no profile: bars rest on one fitted on the predicted run's steps"]


def _predictions(
    measured: Run, predicted: Run | None, latency: LatencyModel | None
) -> tuple[pa.Table | None, list[str]]:
    """Recorded steps beside what the profile says of them; beside the predicted run's own where that says otherwise."""
    from kvtwin.sim.latency.stats import BatchStats
    from kvtwin.traces.errors import InputError
    from kvtwin.validate.attribution.clocks import steps_and_profile
    from kvtwin.validate.step import build_predictions, predictions_of_run

    if not measured.has("steps"):
        return None, []
    odd = steps_and_profile(predicted, latency) if predicted is not None and latency is not None else None
    if predicted is not None and predicted.has("steps") and (latency is None or odd is not None):
        try:
            return predictions_of_run(measured, predicted)[0], [odd] if odd else []
        except InputError as error:
            return None, [f"step times are not judged: {error.problem}"]
    if latency is None:
        return None, []
    batches = BatchStats.of_steps(measured.steps)
    return build_predictions(measured.steps, latency.step_ns(batches, 0), batches=batches), []


def _twin(
    args: argparse.Namespace, measured: Run, predicted: Run | None, latency: LatencyModel | None, host: HostTime
) -> Twin:
    """What predicts the recording: the simulated run that was given, or one that is made here."""
    from kvtwin.sim.engines import engine_config, simulate_engine
    from kvtwin.sim.vllm.config import read_settings
    from kvtwin.traces.readers import read_run
    from kvtwin.traces.workload import with_prompts
    from kvtwin.validate.attribution.hybrids import Twin
    from kvtwin.validate.scheduler.predicted import replay_settings

    given = read_settings(args.engine) if args.engine else _settings(predicted) if predicted else {}
    config = engine_config(
        replay_settings(measured, given, args.engine), args.engine or args.predicted or args.measured
    )
    knows_prompts = predicted is not None and predicted.info.hash_block_tokens is not None
    prompts = predicted if knows_prompts else None
    workload = with_prompts(measured, read_run(args.workload) if args.workload else prompts)
    if predicted is not None:
        return Twin(workload, config, latency, host, predicted)
    if latency is None:  # `_prices` gives one where nothing was predicted
        raise AssertionError
    return Twin(workload, config, latency, host, simulate_engine(workload, config, latency, host, record_steps=False))


def _settings(predicted: Run) -> dict[str, Any]:
    """The engine that a simulated run was made with."""
    engine = (predicted.info.engine or "").partition(" ")[0]
    return {**predicted.info.engine_config, **({"engine": engine} if engine else {})}
