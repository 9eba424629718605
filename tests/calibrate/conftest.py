"""Recordings and tables of operator times whose truth is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvtwin.sim.latency.regression import RegressionLatency
from kvtwin.sim.latency.stats import BatchStats
from kvtwin.traces.readers.optable import OpSamples, OpTable
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


# ---- tables of operator times: functions as fixtures, since test files cannot import one another -------------------

ROWS = [1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024]


def _samples_of(
    work: str, load: dict[str, npt.NDArray[Any]], time_us: npt.NDArray[np.float64], **fields: Any
) -> OpSamples:
    n = len(time_us)
    defaults: dict[str, Any] = {
        "op": work, "key": {"version": "1.0"}, "shape": {}, "rows": np.arange(n), "spread": np.full(n, np.nan),
        "suspect": np.zeros(n, np.bool_),
    }  # fmt: skip
    return OpSamples(work=work, load=load, time_us=time_us, **(defaults | fields))


def _table_of(*samples: OpSamples, **facts: str) -> OpTable:
    return OpTable(Path("table.csv"), "planted", samples, {"reader": "planted"}, facts)


def _product(**axes: Sequence[float]) -> dict[str, npt.NDArray[Any]]:
    grids = np.meshgrid(*axes.values(), indexing="ij")
    return {name: grid.ravel() for name, grid in zip(axes, grids, strict=True)}


def _gemm(scale: float = 1.0, sizes: Sequence[int] = (1024, 4096)) -> OpSamples:
    """A kernel of 64 x 128 tiles on 100 slots: 3 us, and 0.01 us per wave and element of depth."""
    columns = _product(m=ROWS, n=sizes, k=sizes)
    blocks = np.ceil(columns["m"] / 64) * np.ceil(columns["n"] / 128)
    time_us = scale * (3.0 + 0.01 * np.ceil(blocks / 100) * columns["k"])
    return _samples_of("gemm", {"m": columns["m"]}, time_us, shape={"n": columns["n"], "k": columns["k"]})


def _decode(noise: float = 0.0, seed: int = 0) -> OpSamples:
    load = _product(num_decode=[1, 2, 4, 8, 16, 32, 64], context=[128, 256, 512, 1024, 2048, 4096, 8192])
    time_us = 6.0 + 2e-3 * load["num_decode"] * load["context"]
    time_us = time_us * (1 + noise * np.random.default_rng(seed).standard_normal(len(time_us)))
    return _samples_of("decode_attention", load, time_us)


@pytest.fixture(scope="session")
def samples_of() -> Callable[..., OpSamples]:
    return _samples_of


@pytest.fixture(scope="session")
def table_of() -> Callable[..., OpTable]:
    return _table_of


@pytest.fixture(scope="session")
def product() -> Callable[..., dict[str, npt.NDArray[Any]]]:
    return _product


@pytest.fixture(scope="session")
def gemm() -> Callable[..., OpSamples]:
    return _gemm


@pytest.fixture(scope="session")
def decode() -> Callable[..., OpSamples]:
    return _decode
