"""Small runs to compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

MS = 1_000_000

MakeRun = Callable[..., Run]


def _make_run(
    ttft_ms: Sequence[float | None],
    latency_ms: Sequence[float | None],
    *,
    tokens: Sequence[int] | None = None,
    ids: Sequence[str] | None = None,
    steps: dict[str, Any] | None = None,
    queue_ms: float | None = None,
) -> Run:
    """A run whose requests arrive 10 ms apart; times count from the arrival."""
    arrival = [10 * MS * i for i in range(len(ttft_ms))]
    requests = {
        "request_id": ids or [f"r{i}" for i in range(len(ttft_ms))],
        "arrival_ns": arrival,
        "input_tokens": [100] * len(arrival),
        "output_tokens": tokens or [11] * len(arrival),
        "queued_ns": [None if queue_ms is None else at + round(queue_ms * MS) for at in arrival],
        "first_token_ns": _after(arrival, ttft_ms),
        "finish_ns": _after(arrival, latency_ms),
    }
    tables = {"requests": from_columns("requests", requests, "run")}
    if steps is not None:
        tables["steps"] = from_columns("steps", steps, "run")
    return Run(RunInfo("recorded"), tables)


def _after(arrival: Sequence[int], ms: Sequence[float | None]) -> list[int | None]:
    return [None if wait is None else at + round(wait * MS) for at, wait in zip(arrival, ms, strict=True)]


@pytest.fixture(scope="session")
def make_run() -> MakeRun:
    """Builds a Run from per-request TTFT and latency in ms (None: never happened)."""
    return _make_run


def _steps(
    batches: Sequence[Sequence[tuple[int, int]]], durations_ns: Sequence[int], gap_ns: int = 1000
) -> dict[str, Any]:
    """Columns of a steps table: (cache_len, input_len) per member, one after the other."""
    columns: dict[str, Any] = {key: [] for key in ("step", "start_ns", "end_ns", "request", "cache_len", "input_len")}
    start = 0
    for step, (batch, duration) in enumerate(zip(batches, durations_ns, strict=True)):
        row = (step, start, start + duration, list(range(len(batch))), [c for c, _ in batch], [i for _, i in batch])
        for values, value in zip(columns.values(), row, strict=True):
            values.append(value)
        start += duration + gap_ns
    return columns


@pytest.fixture(scope="session")
def make_steps() -> Callable[..., dict[str, Any]]:
    """Builds the columns of a steps table from batches and durations."""
    return _steps
