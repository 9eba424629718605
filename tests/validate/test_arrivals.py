"""The way of requests to the engine: clocks that are off for all or for some, and what a queue or a loop does to it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pytest

from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.validate.arrivals import sent_check, two_groups, way_check, way_difference

MS = 1_000_000
Floats = npt.NDArray[np.float64]
NUM_REQUESTS = 200


def make(way_ms: Floats, *, wait_ms: float = 0.0, early_ms: Floats | float = 0.0) -> Run:
    """Requests 100 ms apart that take a way to the queue, wait there, and are served in 40 ms; arrival_ns may lie early."""
    sent_ms = 1000 + 100.0 * np.arange(len(way_ms))
    queued = sent_ms + way_ms
    columns = {
        "request_id": [str(row) for row in range(len(way_ms))],
        "arrival_ns": np.rint((sent_ms - early_ms) * MS).astype(np.int64).tolist(),
        "input_tokens": [10] * len(way_ms),
        "output_tokens": [2] * len(way_ms),
        **{
            name: np.rint((queued + wait) * MS).astype(np.int64).tolist()
            for name, wait in (("queued_ns", 0.0), ("scheduled_ns", wait_ms), ("first_token_ns", wait_ms + 40))
        },
    }
    return Run(RunInfo("recorded"), {"requests": from_columns("requests", columns, "made here")})


def uniform(low: float, high: float, seed: int) -> Floats:
    return np.random.default_rng(seed).uniform(low, high, NUM_REQUESTS)


def test_a_wait_in_the_queue_does_not_hide_a_shift() -> None:
    way = np.full(NUM_REQUESTS, 10.0)
    for wait_ms in (0.0, 60_000.0):
        check = way_check(make(way, wait_ms=wait_ms, early_ms=50.0), make(way, wait_ms=wait_ms), name="x")
        assert check is not None
        assert (check.measured, check.simulated) == pytest.approx((100.0, 50.0))
        assert check.error == pytest.approx(-0.5)


def test_a_way_that_a_clock_makes_negative_has_an_error_too() -> None:
    way = np.full(NUM_REQUESTS, 10.0)
    check = way_check(make(way, early_ms=-50.0), make(way), name="x")
    assert check is not None
    assert check.error == pytest.approx(50 / 80)  # queued 40 ms before it was sent, then 40 ms


def test_a_shift_of_all_of_a_group_and_of_a_stretch_is_told() -> None:
    way, other = uniform(8, 12, 1), uniform(8, 12, 2)
    whole = way_difference(make(way, early_ms=50.0), make(other))
    assert whole is not None and whole.endswith("longer than simulated")
    odd = np.where(np.arange(NUM_REQUESTS) % 3 == 0, 50.0, 0.0)
    some = way_difference(make(way, early_ms=odd), make(other))
    assert some is not None and "takes 67 of 200 requests 49.992 ms longer than the others" in some
    stretch = np.where((np.arange(NUM_REQUESTS) > 60) & (np.arange(NUM_REQUESTS) < 120), -50.0, 0.0)
    some = way_difference(make(uniform(0, 40, 3), early_ms=stretch), make(uniform(0, 40, 4)))
    assert some is not None and "less than the others" in some


def test_ways_that_vary_are_no_shift() -> None:
    for seed in range(20):
        for low, high in ((0, 1), (0, 40), (30, 35)):
            assert way_difference(make(uniform(low, high, seed)), make(uniform(low, high, seed + 100))) is None
    heavy = np.random.default_rng(5).pareto(1.2, NUM_REQUESTS)
    assert way_difference(make(heavy), make(uniform(0, 1, 6))) is None


def test_one_group_is_not_two() -> None:
    rng = np.random.default_rng(7)
    for draw in (rng.normal, rng.exponential, rng.lognormal):
        assert all(two_groups(draw(size=100)) is None for _ in range(100))
    assert two_groups(np.array([0.0] * 95 + [50.0] * 5)) is None  # fewer than ten are strays


def test_other_times_of_sending() -> None:
    way = np.full(NUM_REQUESTS, 10.0)
    run = make(way)
    assert sent_check(run, run, "the plan", name="x") is None
    alike = sent_check(make(way, early_ms=50.0), run, "the plan", name="x")
    assert alike is not None and alike.error == 0
    assert alike.note.startswith("arrival_ns lies 50.000 ms before that of the plan, of all alike")
    some = sent_check(make(way, early_ms=np.where(np.arange(NUM_REQUESTS) < 50, 20.0, 0.0)), run, "the plan", name="x")
    assert some is not None and some.error == -0.25
    assert "50 of 200 requests were sent at other times" in some.note


def test_a_client_that_is_late_by_less_than_half_a_step_sends_as_planned() -> None:
    """So was the client of a real recording: up to 15.6 ms late, where a token takes 34 ms."""
    late = np.where(np.arange(NUM_REQUESTS) % 8 == 0, 14.0, 0.0)
    run = make(np.full(NUM_REQUESTS, 10.0), early_ms=late)
    finish = pc.add(run.requests.column("first_token_ns"), 30 * MS)  # of the second of two tokens
    at = run.requests.schema.get_field_index("finish_ns")
    slow = Run(run.info, {"requests": run.requests.set_column(at, "finish_ns", finish)})
    check = sent_check(slow, make(np.full(NUM_REQUESTS, 20.0)), "the plan", name="x")
    assert check is not None and check.error == 0
    fast = sent_check(run, make(np.full(NUM_REQUESTS, 20.0)), "the plan", name="x")
    assert fast is not None and fast.error == -0.125
