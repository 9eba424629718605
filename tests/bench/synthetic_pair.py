"""A measured and a simulated run of any size, made at once: every step decodes a window of requests that moves on."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.traces.time import NS_PER_MS
from kvtwin.validate.result import PREDICTIONS, Check, Comparison, TargetReport

_BATCH = 20


def synthetic_report(num_requests: int, num_steps: int) -> TargetReport:
    """Two runs of `num_requests` requests and `num_steps` steps, the simulated one with other step times."""
    measured, simulated = (_run(num_requests, num_steps, seed) for seed in (0, 1))
    durations = [run.steps["end_ns"].to_numpy() - run.steps["start_ns"].to_numpy() for run in (measured, simulated)]
    steps = measured.steps
    predictions = pa.table(
        {
            "step": steps["step"],
            "start_ns": steps["start_ns"],
            "measured_ns": durations[0],
            "predicted_ns": durations[1],
            "regime": np.where(np.arange(num_steps) % 10 == 0, "mixed", "decode"),
            "num_reqs": np.full(num_steps, _BATCH),
            "num_tokens": np.where(np.arange(num_steps) % 10 == 0, _BATCH + 511, _BATCH),
            "context_tokens": np.random.default_rng(2).integers(0, 100_000, num_steps),
            "extrapolated": np.arange(num_steps) % 1000 == 0,
        },
        schema=PREDICTIONS,
    )
    comparison = Comparison("synthetic", measured, simulated, "queued_ns", predictions)
    check = Check(
        "synthetic", "e2e", "ttft_mean", "ms", 10.0, 10.5, 0.05, (0.01, 0.09), num_requests, 0.02, 0.1, "pass"
    )
    return TargetReport({"name": "synthetic"}, (check,), (comparison,))


def _run(num_requests: int, num_steps: int, seed: int) -> Run:
    rng = np.random.default_rng(seed)
    durations = (rng.lognormal(2.3, 0.3, num_steps) * NS_PER_MS).astype(np.int64)
    end = np.cumsum(durations + 200_000)
    start = end - durations
    per_request = num_steps * _BATCH // num_requests  # steps that each request is in
    first = np.arange(num_requests) * per_request // _BATCH
    last = np.minimum(first + per_request, num_steps) - 1
    arrival = np.maximum(start[first] - rng.integers(0, 50 * NS_PER_MS, num_requests), 0)
    arrival.sort()
    requests = {
        "request_id": [f"request-{row}" for row in range(num_requests)],
        "arrival_ns": arrival,
        "input_tokens": np.full(num_requests, 512),
        "output_tokens": np.full(num_requests, per_request),
        "queued_ns": arrival,
        "scheduled_ns": np.maximum(start[first], arrival),
        "first_token_ns": np.maximum(end[first], arrival),
        "finish_ns": end[last],
        "cached_tokens": rng.integers(0, 512, num_requests),
    }
    step = np.repeat(np.arange(num_steps), _BATCH)
    newest = np.minimum(step * num_requests // num_steps, num_requests - 1)
    member = np.maximum(newest - np.tile(np.arange(_BATCH), num_steps), 0).astype(np.int32)
    age = step - first[member]
    offsets = pa.array(np.arange(num_steps + 1, dtype=np.int32) * _BATCH)

    def lists(values: np.typing.NDArray[np.int32]) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    steps = {
        "step": np.arange(num_steps),
        "sched_ns": start - 100_000,
        "start_ns": start,
        "end_ns": end,
        "request": lists(member),
        "cache_len": lists(np.where(age > 0, 511 + age, 0).astype(np.int32)),
        "input_len": lists(np.where(age > 0, 1, 512).astype(np.int32)),
        "num_waiting": rng.integers(0, 50, num_steps),
        "num_running": np.full(num_steps, _BATCH),
        "num_free_blocks": rng.integers(0, 4000, num_steps),
    }
    tables = {
        "requests": from_columns("requests", requests, "synthetic"),
        "steps": from_columns("steps", steps, "synthetic"),
    }
    return Run(RunInfo("recorded"), tables)
