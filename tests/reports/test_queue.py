"""Queue length over time, on runs whose curves can be drawn by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvtwin.reports.queue import Curve, common_source, queue_lengths, sampled
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

MakeRun = Callable[..., Run]


def with_steps(run: Run, **columns: Any) -> Run:
    given = {
        "step": [0, 1, 2],
        "sched_ns": [0, 10, 40],
        "start_ns": [1, 11, 41],
        "end_ns": [8, 18, 48],
        "update_ns": [9, 19, 49],
        "request": [[0], [0, 1], [2]],
        "cache_len": [[0], [8, 0], [0]],
        "input_len": [[8], [1, 8], [8]],
        "finished": [[], [0, 1], [2]],
        "num_waiting": [2, 1, 0],
        "num_running": [1, 2, 1],
    }
    tables = {"requests": run.requests, "steps": from_columns("steps", {**given, **columns}, "hand-made")}
    return Run(RunInfo("recorded"), tables)


def as_pairs(curve: Curve) -> list[tuple[int, int]]:
    return list(zip(curve.times_ns.tolist(), curve.values.tolist(), strict=True))


def test_curves_from_requests(make_run: MakeRun) -> None:
    run = make_run(2, arrival_ns=[0, 5], queued_ns=[1, 5], scheduled_ns=[2, 9], first_token_ns=None, finish_ns=[9, 20])
    engine, client = queue_lengths(run, "queued_ns"), queue_lengths(run, "arrival_ns")
    assert as_pairs(engine.waiting) == [(1, 1), (2, 0), (5, 1), (9, 0)]
    assert as_pairs(client.waiting) == [(0, 1), (2, 0), (5, 1), (9, 0)]
    assert as_pairs(engine.running) == [(2, 1), (9, 1), (20, 0)]  # one leaves and one comes at 9
    assert engine.waiting.mean() == pytest.approx((1 * 1 + 4 * 1) / 8)
    assert engine.running.peak() == 1


def test_a_request_that_was_never_scheduled_waits_to_the_end(make_run: MakeRun) -> None:
    lengths = queue_lengths(make_run(2, scheduled_ns=[7, None], finish_ns=[9, None]), "queued_ns")
    assert lengths.waiting.values[-1] == 1
    assert lengths.running.values[-1] == 0


def test_curves_from_steps_fall_when_the_engine_goes_idle(make_run: MakeRun) -> None:
    lengths = queue_lengths(with_steps(make_run(3)), "steps")
    assert as_pairs(lengths.waiting) == [(0, 2), (9, 2), (10, 1), (19, 1), (40, 0), (49, 0)]
    assert as_pairs(lengths.running) == [(0, 1), (9, 1), (10, 2), (19, 0), (40, 1), (49, 0)]


def test_overlapping_steps_of_an_asynchronous_scheduler_keep_the_later_count(make_run: MakeRun) -> None:
    run = with_steps(make_run(3), sched_ns=[0, 5, 40])  # step 1 is planned while step 0 runs
    assert as_pairs(queue_lengths(run, "steps").running)[:3] == [(0, 1), (5, 2), (19, 0)]


def test_instances_add_up(make_run: MakeRun) -> None:
    run = with_steps(make_run(3), instance=[0, 1, 0], step=[0, 0, 1])
    # Instance 0 runs request 0 from 0 on (its finish is not in its own steps) and request 2 from 40 to 49.
    assert as_pairs(queue_lengths(run, "steps").running)[2] == (10, 3)


def test_steps_without_known_times_of_scheduling_use_the_start(make_run: MakeRun) -> None:
    run = with_steps(make_run(3), sched_ns=None, update_ns=None)
    assert queue_lengths(run, "steps").running.times_ns.tolist() == [1, 8, 11, 18, 41, 48]


def test_both_runs_take_their_curves_from_the_same_place(make_run: MakeRun) -> None:
    plain, stepped = make_run(3), with_steps(make_run(3))
    assert common_source(stepped, stepped) == "steps"
    assert common_source(plain, stepped) == "queued_ns"
    assert common_source(plain, make_run(3, queued_ns=None)) == "arrival_ns"
    assert common_source(plain, make_run(3, scheduled_ns=None)) is None
    assert common_source(stepped, with_steps(make_run(3), num_waiting=None)) == "queued_ns"


def test_a_short_curve_is_drawn_as_it_is() -> None:
    times, values = sampled(Curve(np.array([0, 3]), np.array([2, 0])), 2)
    assert times.tolist() == [0, 3]
    assert values.tolist() == [2, 0]


def test_a_long_curve_becomes_means_with_the_same_area() -> None:
    rng = np.random.default_rng(7)
    curve = Curve(np.cumsum(rng.integers(1, 50, 5000)), rng.integers(0, 90, 5000))
    times, values = sampled(curve, 100)
    extent = curve.times_ns[-1] - curve.times_ns[0]
    assert times.size == values.size == 100
    assert values.mean() == pytest.approx(curve.mean())
    assert values.sum() * extent / 100 == pytest.approx(float(np.sum(np.diff(curve.times_ns) * curve.values[:-1])))


def test_an_empty_run_has_empty_curves(make_run: MakeRun) -> None:
    lengths = queue_lengths(make_run(0), "queued_ns")
    assert lengths.waiting.peak() == 0
    assert np.isnan(lengths.waiting.mean())
    assert sampled(lengths.waiting, 10)[0].size == 0
