"""The step level, on tables small enough to reckon by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvtwin.traces
from kvtwin.sim.latency.stats import BatchStats, durations_ns
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers import read_run
from kvtwin.traces.run import Run
from kvtwin.traces.table import from_columns
from kvtwin.validate.gates import METRICS, parse_gates
from kvtwin.validate.result import PREDICTIONS, Check
from kvtwin.validate.step import build_predictions, compare_steps, predictions_of_run

RUNS = Path(kvtwin.traces.__path__[0]) / "targets" / "vllm-cpu-tiny" / "runs"

members = st.tuples(st.integers(0, 300), st.sampled_from([1, 1, 2, 17]))
batch_lists = st.lists(st.lists(members, min_size=1, max_size=5), min_size=1, max_size=12)


@given(batch_lists)
def test_predictions_equal_the_loop_over_members(batches: list[list[tuple[int, int]]]) -> None:
    rows = build_predictions(*_table(batches)).to_pylist()
    for row, batch in zip(rows, batches, strict=True):
        kinds = {"decode" if new == 1 else "prefill" for _, new in batch}
        assert row["regime"] == (kinds.pop() if len(kinds) == 1 else "mixed")
        assert row["num_reqs"] == len(batch)
        assert row["num_tokens"] == sum(new for _, new in batch)
        assert row["context_tokens"] == sum(cached for cached, _ in batch)
        assert row["measured_ns"] == 100
        assert row["extrapolated"] is None


def _table(batches: list[list[tuple[int, int]]]) -> tuple[pa.Table, np.ndarray]:
    columns = {
        "step": list(range(len(batches))),
        "start_ns": [1000 * i for i in range(len(batches))],
        "end_ns": [1000 * i + 100 for i in range(len(batches))],
        "request": [[0] * len(batch) for batch in batches],
        "cache_len": [[cached for cached, _ in batch] for batch in batches],
        "input_len": [[new for _, new in batch] for batch in batches],
    }
    return from_columns("steps", columns, "steps"), np.full(len(batches), 90)


def predictions(measured: list[int], predicted: list[int], regime: list[str], **columns: Any) -> pa.Table:
    n = len(measured)
    table = {
        "step": range(n), "start_ns": range(n), "measured_ns": measured, "predicted_ns": predicted, "regime": regime,
        "num_reqs": [1] * n, "num_tokens": [1] * n, "context_tokens": [0] * n, "extrapolated": [None] * n,
    }  # fmt: skip
    return pa.table({key: pa.array(values) for key, values in (table | columns).items()}).cast(PREDICTIONS)


def by_metric(checks: list[Check]) -> dict[str, Check]:
    assert all(check.metric in METRICS for check in checks)
    return {check.metric: check for check in checks}


TABLE = predictions([100, 200, 400, 100], [110, 180, 400, 130], ["prefill", "decode", "decode", "mixed"])


def test_step_checks_by_hand() -> None:
    checks = by_metric(compare_steps(TABLE, name="run", floor={"step_mape": 0.05}))
    errors = {name: check.error for name, check in checks.items()}
    assert errors == pytest.approx(
        {
            "step_mape": 0.125,
            "step_mape_prefill": 0.1,
            "step_mape_decode": 0.05,
            "step_mape_mixed": 0.3,
            "step_bias": 820 / 800 - 1,
            "step_mean_error": 0.075,
            "step_p50_ape": 0.1,
            "step_p90_ape": np.quantile([0.1, 0.1, 0.0, 0.3], 0.9),
            "step_p99_ape": np.quantile([0.1, 0.1, 0.0, 0.3], 0.99),
        }
    )
    assert (checks["step_bias"].measured, checks["step_bias"].simulated) == pytest.approx((0.0008, 0.00082))
    mean = checks["step_mean_error"]
    assert (mean.measured, mean.unit) == (1.0, "x measured")
    assert mean.simulated == pytest.approx(1.075)
    assert {name: check.n for name, check in checks.items() if check.n != 4} == {
        "step_mape_prefill": 1,
        "step_mape_decode": 2,
        "step_mape_mixed": 1,
    }
    assert checks["step_mape"].noise_floor == 0.05
    assert checks["step_bias"].noise_floor is None
    assert all(check.interval is None for check in checks.values())  # four steps carry none


def test_intervals_hold_the_error_and_sizes_stay_sizes() -> None:
    rng = np.random.default_rng(0)
    regime = ["decode", "mixed"] * 10 + ["prefill"] * 4
    checks = by_metric(compare_steps(predictions([100] * 24, rng.integers(80, 130, 24).tolist(), regime), name="run"))
    assert checks.pop("step_mape_prefill").interval is None
    for check in checks.values():
        assert check.interval is not None
        assert check.interval[0] <= check.error <= check.interval[1]
        assert check.interval[0] >= 0 or check.metric in ("step_bias", "step_mean_error")


def test_gates_and_floor_are_applied() -> None:
    regime = ["decode"] * 10 + ["mixed"] * 10 + ["prefill"] * 2
    table = predictions([100] * 22, [110] * 10 + [130] * 10 + [300] * 2, regime)
    gates = parse_gates({"step_mape": 0.4, "step_mape_decode": 0.05, "step_bias": 0.01})
    checks = by_metric(compare_steps(table, name="run", floor={"step_mape_mixed": 0.35}, gates=gates))
    expected = {
        "step_mape": "pass",
        "step_mape_decode": "fail",
        "step_mape_mixed": "not distinguishable",
        "step_mape_prefill": "no gate",
        "step_bias": "fail",
        "step_p50_ape": "no gate",
    }
    assert {name: checks[name].verdict for name in expected} == expected
    assert "fewer than 10 steps of this regime: not judged" in checks["step_mape_prefill"].note


def test_the_order_of_rows_is_that_of_time() -> None:
    rng = np.random.default_rng(0)
    measured = rng.integers(50, 150, 300)
    table = predictions(measured.tolist(), rng.integers(50, 150, 300).tolist(), ["decode"] * 300)
    shuffled = table.take(pa.array(rng.permutation(300)))
    first, second = (compare_steps(steps, name="run") for steps in (table, shuffled))
    assert [str(check) for check in first] == [str(check) for check in second]
    # Independent rows, not known to be so: the textbook's interval, but with the quantile of some four degrees of freedom.
    size = np.abs(np.array(table["predicted_ns"]) / np.array(table["measured_ns"]) - 1)
    half = 2.78 * size.std() / np.sqrt(300)
    assert first[0].interval == pytest.approx((size.mean() - half, size.mean() + half), abs=0.4 * half)


def test_notes_say_what_was_left_out_and_what_is_extrapolated() -> None:
    table = predictions(
        [100, 0, 100, 100, 100], [90] * 5, ["decode"] * 5, extrapolated=[True, True, False, False, None]
    )
    note = compare_steps(table, name="run")[0].note
    assert note.startswith("4 steps, as good as 4 independent ones")
    assert note.endswith("; 25.0% of the steps lie outside the profile's domain; 1 steps that took no time left out")
    assert compare_steps(table, name="run")[0].n == 4


def test_nothing_to_compare() -> None:
    assert compare_steps(PREDICTIONS.empty_table(), name="run") == []
    assert compare_steps(predictions([0], [5], ["decode"]), name="run") == []


def test_extrapolated_is_kept(make_steps: Callable[..., dict[str, Any]]) -> None:
    steps = from_columns("steps", make_steps([[(0, 5)], [(5, 1)]], [10, 20]), "steps")
    table = build_predictions(steps, np.array([11, 19]), np.array([False, True]))
    assert table.schema.equals(PREDICTIONS)
    assert table["extrapolated"].to_pylist() == [False, True]


def test_steps_of_another_run_are_matched_by_their_batches() -> None:
    one, two = read_run(RUNS / "poisson_1"), read_run(RUNS / "poisson_2")
    itself, note = predictions_of_run(one, one)
    assert note.startswith("100.0%")
    assert itself.column("measured_ns").equals(itself.column("predicted_ns"))
    other, note = predictions_of_run(one, two)
    assert 0 < other.num_rows < one.steps.num_rows
    assert note.startswith(f"{other.num_rows / one.steps.num_rows:.1%}")
    slower = two.steps.set_column(
        two.steps.schema.get_field_index("end_ns"),
        "end_ns",
        pc.add(two.steps.column("start_ns"), pc.multiply(durations_ns(two.steps), 2)),
    )
    twice, _ = predictions_of_run(one, Run(two.info, {"requests": two.requests, "steps": slower}))
    assert twice.column("predicted_ns").to_pylist() == [2 * x for x in other.column("predicted_ns").to_pylist()]


def test_runs_without_alike_batches_are_refused() -> None:
    run = read_run(RUNS / "poisson_1")
    column = run.steps.column("input_len")
    longer = pa.ListArray.from_arrays(column.combine_chunks().offsets, pc.add(column.combine_chunks().values, 999))
    index = run.steps.schema.get_field_index("input_len")
    other = Run(run.info, {"requests": run.requests, "steps": run.steps.set_column(index, "input_len", longer)})
    with pytest.raises(InputError, match="no step has a batch like"):
        predictions_of_run(run, other)


def test_parts_of_a_long_run_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = read_run(RUNS / "poisson_1").steps
    whole = BatchStats.of_steps(steps)
    monkeypatch.setattr("kvtwin.sim.latency.stats._PART_STEPS", 1000)
    assert np.array_equal(BatchStats.of_steps(steps).table, whole.table)
    assert np.array_equal(BatchStats.of_steps(steps.slice(1234, 50)).table, whole.table[1234:1284])
    assert len(BatchStats.of_steps(steps.slice(0, 0))) == 0
