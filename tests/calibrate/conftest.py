"""Recordings whose truth is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from kvtwin.sim.latency.regression import RegressionLatency
from kvtwin.sim.latency.stats import BatchStats
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

Batch = Sequence[tuple[int, int, int]]  # (request, cache_len, input_len) per member

# An engine of known prices, in nanoseconds.
TRUTH = {"step": 2_000_000.0, "num_tokens": 60_000.0, "num_reqs": 30_000.0, "decode_context": 200.0}


def random_batches(count: int, seed: int) -> list[Batch]:
    """Batches of 1 to 16 members, of which a few are prefill chunks."""
    rng = np.random.default_rng(seed)
    batches: list[Batch] = []
    for _ in range(count):
        members = rng.choice(64, int(rng.integers(1, 17)), replace=False)
        new = np.where(rng.random(len(members)) < 0.15, rng.integers(2, 200, len(members)), 1)
        batches.append(
            list(zip(members.tolist(), rng.integers(0, 2000, len(members)).tolist(), new.tolist(), strict=True))
        )
    return batches


def true_latency_ns(batches: Sequence[Batch]) -> np.ndarray[Any, Any]:
    """What the engine of TRUTH takes, as integers."""
    stats = [BatchStats.of_batch([c for _, c, _ in batch], [i for _, _, i in batch]).table for batch in batches]
    return RegressionLatency(TRUTH).step_ns(BatchStats(np.concatenate(stats)), 0)


def build_run(
    batches: Sequence[Batch],
    latency_ns: Sequence[int] | np.ndarray[Any, Any],
    *,
    schedule_ns: Sequence[int] | None = None,
    update_ns: Sequence[int] | None = None,
    idle_ns: Sequence[int] | None = None,
    num_requests: int = 64,
    **info: Any,
) -> Run:
    """A synchronous engine's recording: schedule, model, update, and a wait after it, step by step.

    Without `schedule_ns` the recording does not say when schedule() was called.
    """
    nothing = [0] * len(batches)
    names = ("step", "start_ns", "end_ns", "sched_ns", "update_ns", "request", "cache_len", "input_len")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    now = 0
    times = zip(latency_ns, schedule_ns or nothing, update_ns or nothing, idle_ns or nothing, strict=True)
    for step, (batch, (latency, schedule, update, idle)) in enumerate(zip(batches, times, strict=True)):
        start, end = now + schedule, now + schedule + int(latency)
        row = (step, start, end, now, end + update, *([member[i] for member in batch] for i in range(3)))
        for values, value in zip(columns.values(), row, strict=True):
            values.append(value)
        now = end + update + idle
    if schedule_ns is None:
        del columns["sched_ns"], columns["update_ns"]
    requests = {
        "request_id": [f"r{i}" for i in range(num_requests)],
        "arrival_ns": [0] * num_requests,
        "input_tokens": [100] * num_requests,
        "output_tokens": [10] * num_requests,
    }
    tables = {
        "requests": from_columns("requests", requests, "run"),
        "steps": from_columns("steps", columns, "run"),
    }
    return Run(RunInfo("recorded", **info), tables)


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Run]:
    """Builds a recording from batches and latencies; see `build_run`."""
    return build_run


@pytest.fixture(scope="session")
def known_run() -> Callable[..., Run]:
    """A recording of the engine of TRUTH, by number of steps, seed, relative noise and speed."""

    def make(steps: int, seed: int, *, noise: float = 0.0, speed: float = 1.0, **info: Any) -> Run:
        batches = random_batches(steps, seed)
        rng = np.random.default_rng([seed, 1])
        factor = rng.gamma(1 / noise**2, noise**2, steps) if noise else np.ones(steps)
        return build_run(batches, np.rint(true_latency_ns(batches) * factor / speed), **info)

    return make


@pytest.fixture(scope="session")
def truth() -> dict[str, float]:
    """Prices of the engine that `known_run` records."""
    return dict(TRUTH)
