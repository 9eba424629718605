"""`kvtwin simulate`: a workload on an engine, with a profile, to a Run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvtwin.sim import cache_cli
from kvtwin.traces.errors import InputError

if TYPE_CHECKING:
    from kvtwin.traces.run import Run

_CLOCK: Final = "queued_ns"  # what TTFT and latency count from


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `simulate` and `cache`."""
    parser = subparsers.add_parser(
        "simulate",
        help="serve a workload with a simulated engine",
        description="Serve WORKLOAD with a simulated vLLM or SGLang engine; the result is a Run like a recorded one.",
    )
    parser.add_argument("workload", type=Path, help="a run, trace or recording (kvtwin trace info PATH names it)")
    parser.add_argument("--engine", type=Path, required=True, help="engine settings under their upstream names (TOML)")
    parser.add_argument("--profile", type=Path, required=True, help="step latencies (kvtwin calibrate writes them)")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="RUN", help="folder to write; must not exist"
    )
    parser.add_argument(
        "--record",
        default="",
        metavar="TABLES",
        help="optional tables to keep, comma-separated: steps, cache (default: none)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a summary")
    parser.set_defaults(run=_run)
    cache_cli.add_commands(subparsers)


def _run(args: argparse.Namespace) -> int:
    # Imported here: `kvtwin --help` must not wait for numpy and pyarrow.
    from kvtwin.sim.latency.profile import PROFILE_FILE, read_profile
    from kvtwin.sim.progress import progress_bar
    from kvtwin.sim.vllm.config import read_settings
    from kvtwin.sim.vllm.simulate import peak_rss_bytes, with_metrics
    from kvtwin.traces.files import refuse_existing
    from kvtwin.traces.readers import read_run

    refuse_existing(args.output)
    record = _recorded_tables(args.record)
    started = time.perf_counter()
    settings = read_settings(args.engine)
    simulate = _simulator(settings, args.engine)
    profile = read_profile(args.profile)
    latency = profile.latency_model()
    workload = read_run(args.workload)
    loaded = time.perf_counter()
    _say_what_differs(settings, workload, args.engine)
    source = {"workload": args.workload.name, "engine": args.engine.name, "profile": args.profile.name}
    with progress_bar(workload.requests.num_rows, " requests", "simulate") as progress:
        run = simulate(workload, latency, profile.host, **record, source=source, progress=progress)
    metrics: dict[str, Any] = {
        **run.info.metrics,
        **_summary(run),
        **_extrapolated(run, profile),
        "load_s": round(loaded - started, 6),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    simulated = time.perf_counter()
    # With its profile a simulated run says all that it came from (`kvtwin validate attribution`).
    with_metrics(run, **metrics).write(args.output, beside={PROFILE_FILE: args.profile})
    metrics |= {"write_s": round(time.perf_counter() - simulated, 6), "peak_rss_bytes": peak_rss_bytes()}
    _print(args, metrics)
    return 0


def _simulator(settings: dict[str, Any], path: Path) -> Callable[..., Any]:
    """`simulate` of the engine that a file of settings names (vLLM where it names none), with these settings."""
    if settings.get("engine") == "sglang":
        from kvtwin.sim.sglang.config import sglang_config
        from kvtwin.sim.sglang.simulate import simulate_sglang

        sglang = sglang_config(settings, path)
        return lambda workload, *args, **options: simulate_sglang(workload, sglang, *args, **options)
    from kvtwin.sim.vllm.config import vllm_config
    from kvtwin.sim.vllm.simulate import simulate

    vllm = vllm_config(settings, path)
    return lambda workload, *args, **options: simulate(workload, vllm, *args, **options)


def _say_what_differs(settings: dict[str, Any], workload: Run, path: Path) -> None:
    """A recording served by another engine than its own is fine; by one that leaves settings open, most likely a slip."""
    from kvtwin.sim.vllm.config import VllmConfig, recorded_settings

    if settings.get("engine") == "sglang" or not (workload.info.engine or "").startswith("vllm"):
        return
    given = {name.removeprefix("--").replace("-", "_") for name in settings}
    recorded = recorded_settings(dict(workload.info.engine_config))
    open_ones = [
        f"{field.name} = {recorded[field.name]!r} (here {field.default!r})"
        for field in dataclasses.fields(VllmConfig)
        if field.name not in given and recorded.get(field.name) not in (None, field.default)
    ]
    if open_ones:
        print(f"note: {path} leaves open what the recording says: {', '.join(open_ones)}", file=sys.stderr)


def _recorded_tables(text: str) -> dict[str, bool]:
    """`--record` as the simulators' arguments."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in ("steps", "cache")]
    if unknown:
        raise InputError(f"--record {unknown[0]!r}: 'steps' or 'cache' expected")
    return {"record_steps": "steps" in names, **({"record_cache": True} if "cache" in names else {})}


def _summary(run: Any) -> dict[str, float]:
    """A few numbers of the simulated run's served requests: time in ms (from `_CLOCK` on), counts."""
    import numpy as np

    finished = run.requests.column("finish_ns").is_valid()
    table = run.requests.filter(finished)
    columns = (_CLOCK, "first_token_ns", "finish_ns", "output_tokens", "num_preemptions", "cached_tokens")
    queued, first, finish, output, preemptions, cached = (table.column(name).to_numpy() for name in columns)
    if not len(queued):
        return {"num_requests": 0}
    several = output > 1
    tpot_ns = (finish - first)[several] / (output[several] - 1)
    return {
        "num_requests": len(queued),
        "num_output_tokens": int(output.sum()),
        "num_preemptions": int(preemptions.sum()),
        "cached_tokens": int(cached.sum()),
        "ttft_mean_ms": round(float(np.mean(first - queued)) / 1e6, 3),
        "tpot_mean_ms": round(float(np.mean(tpot_ns)) / 1e6, 3) if several.any() else 0.0,
        "latency_mean_ms": round(float(np.mean(finish - queued)) / 1e6, 3),
        **{
            f"{queue}_mean_ms": round(float(np.mean(table.column(f"{queue}_ns").to_numpy())) / 1e6, 3)
            for queue in ("waiting", "prefetch", "running", "swapped")
            if not table.column(f"{queue}_ns").null_count
        },
        "duration_s": round(float(finish.max() - table.column("arrival_ns").to_numpy().min()) / 1e9, 3),
    }


def _extrapolated(run: Any, profile: Any) -> dict[str, int]:
    """How many steps lie outside the domain that the profile was fitted on; known where steps are recorded."""
    from kvtwin.sim.latency.stats import BatchStats

    if not run.has("steps") or not profile.domain:
        return {}
    return {"num_extrapolated_steps": int(profile.extrapolates(BatchStats.of_steps(run.steps)).sum())}


def _print(args: argparse.Namespace, metrics: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps({"run": str(args.output), "clock": _CLOCK, "metrics": metrics}))
        return
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:{width}} {value:>16,}")
    print(f"ttft and latency count from {_CLOCK}, when the engine's loop took the request in")
    print(f"written to {args.output}")
