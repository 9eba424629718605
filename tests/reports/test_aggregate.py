"""Aggregated figures: right on runs that can be counted by hand, bounded and readable on any."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtwin.reports.aggregate import document
from kvtwin.reports.aggregate.build import aggregate, run_figures
from kvtwin.reports.aggregate.document import SHARES, CacheHits, Figures, StepFigures
from kvtwin.reports.aggregate.sampling import bins_of, distribution, token_edges
from kvtwin.reports.aggregate.timeline import NUM_INTERVALS, Curve, common_source, envelope, run_curves, timeline
from kvtwin.reports.aggregate.tokens import inter_token_ms
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run
from kvtwin.traces.time import NS_PER_MS
from kvtwin.validate.result import Comparison, TargetReport

from .conftest import with_steps

MakeRun = Callable[..., Run]


def steps_of(comparison: Comparison, max_cells: int = 1500) -> StepFigures:
    found = run_figures(comparison, max_cells).steps
    assert found is not None
    return found


# -- steps ----------------------------------------------------------------------------------------------------


def test_few_steps_stay_themselves(comparison: Comparison) -> None:
    steps = steps_of(comparison)
    decode = next(part for part in steps.parity if part.regime == "decode" and not part.extrapolated)
    assert decode.step[:2] == [1, 4]
    assert decode.measured_ms[:2] == [11.0, 14.0]
    assert decode.predicted_ms[:2] == [12.1, 15.4]
    assert {count for part in steps.parity for count in part.num_steps} == {1}
    assert steps.num_extrapolated == 10
    assert sum(sum(part.num_steps) for part in steps.parity if part.extrapolated) == 10
    assert steps.errors["all"].quantile(0.5) == pytest.approx(0.1, abs=1e-4)
    assert {name: found.n for name, found in steps.errors.items()} == {
        "prefill": 24, "decode": 23, "mixed": 23, "all": 70,
    }  # fmt: skip


def test_many_steps_share_cells_and_none_is_lost(comparison: Comparison, predictions: Callable[..., pa.Table]) -> None:
    many = replace(comparison, predictions=predictions(50_000, ("decode",) * 99 + ("prefill",)))
    steps = steps_of(many, 300)
    assert sum(len(part.step) for part in steps.parity) <= 300
    assert sum(sum(part.num_steps) for part in steps.parity) == 50_000
    assert sum(sum(part.num_steps) for part in steps.parity if part.regime == "prefill") == 500
    total = sum(np.dot(part.num_steps, part.measured_ms) for part in steps.parity)
    assert total == pytest.approx(sum(10 + step for step in range(50_000)), rel=1e-3)
    assert steps == steps_of(many, 300)


def test_the_error_map_counts_each_step_once_in_the_cell_of_its_batch(comparison: Comparison) -> None:
    assert comparison.predictions is not None
    sizes = {"context_tokens": [0, 0, 100, 5000] * 17 + [0, 0], "num_tokens": [512, 1, 1, 64] * 17 + [512, 1]}
    table = comparison.predictions
    for name, values in sizes.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.int64()))
    cells = steps_of(replace(comparison, predictions=table)).error_map
    found = {
        (cells.cache_edges[column], cells.input_edges[row]): count
        for column, row, count in zip(cells.cache_bin, cells.input_bin, cells.num_steps, strict=True)
    }
    assert sum(found.values()) == 70
    assert found[(0, 512)] == found[(0, 1)] == 18
    assert all(low <= tokens for low, tokens in zip(sorted({key[0] for key in found}), (0, 100, 5000), strict=True))
    assert cells.mean_error == cells.mape == [pytest.approx(0.1, abs=1e-3)] * 4


def test_steps_that_took_no_time_are_left_out(comparison: Comparison, predictions: Callable[..., pa.Table]) -> None:
    table = predictions(3)
    index = table.schema.get_field_index("predicted_ns")
    some = table.set_column(index, "predicted_ns", pa.array([0, None, 5], pa.int64()))
    assert steps_of(replace(comparison, predictions=some)).num_left_out == 2
    none = table.set_column(index, "predicted_ns", pa.array([0, None, -5], pa.int64()))
    assert run_figures(replace(comparison, predictions=none)).steps is None


# -- sampling -------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_quantiles_are_values_with_at_least_their_share_at_or_below(values: list[float]) -> None:
    array = np.array(values)
    found = distribution(array)
    assert found is not None
    assert found.n == len(values)
    assert found.values == sorted(found.values)
    for share, value in zip(SHARES, found.values, strict=True):
        near = np.isclose(array, value, rtol=1e-3, atol=1e-12) | (array <= value)
        assert near.mean() >= share - 1e-9


@given(st.integers(0, 10_000_000), st.sampled_from([6, 26, 60]))
def test_token_bins_cover_zero_to_the_largest_without_an_empty_last_one(largest: int, max_bins: int) -> None:
    edges = token_edges(largest, max_bins)
    assert edges[0] == 0
    assert edges[1] == 1
    assert np.all(np.diff(edges) > 0)
    assert edges[-2] <= largest < edges[-1]
    assert bins_of(np.array([0, largest]), edges).tolist() == [0, edges.size - 2]


# -- inter-token latency -----------------------------------------------------------------------------------------


def test_gaps_between_tokens_across_steps_and_chunks(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    # Request 0: prompt 8 in chunks of 5 and 3, then two decodes; request 1 comes in between.
    columns: dict[str, Any] = {
        "step": [0, 1, 2, 3],
        "sched_ns": None,
        "update_ns": None,
        "start_ns": [0, 10, 20, 30],
        "end_ns": [ms * NS_PER_MS for ms in (10, 30, 60, 100)],
        "request": [[0], [1, 0], [0, 1], [0]],
        "cache_len": [[0], [0, 5], [8, 8], [9]],
        "input_len": [[5], [8, 3], [1, 1], [1]],
        "finished": None,
        "num_waiting": None,
        "num_running": None,
        "num_free_blocks": None,
    }
    run = with_steps(make_run(2), **columns)
    assert sorted(inter_token_ms(run).tolist()) == [30.0, 30.0, 40.0]
    monkeypatch.setattr("kvtwin.reports.aggregate.tokens._CHUNK_STEPS", 1)
    assert sorted(inter_token_ms(run).tolist()) == [30.0, 30.0, 40.0]


def test_tokens_computed_again_after_a_preemption_are_no_output(make_run: MakeRun) -> None:
    # Prompt 8: tokens out at steps 0, 1; preempted; prefilled again in chunks of 6 and 4 = prompt + 2 known tokens.
    columns: dict[str, Any] = {
        "step": [0, 1, 2, 3],
        "start_ns": [0, 1, 2, 3],
        "end_ns": [ms * NS_PER_MS for ms in (1, 3, 6, 10)],
        "request": [[0]] * 4,
        "cache_len": [[0], [8], [0], [9]],
        "input_len": [[8], [1], [9], [1]],
        "sched_ns": None, "update_ns": None, "finished": None,
        "num_waiting": None, "num_running": None, "num_free_blocks": None,
    }  # fmt: skip
    assert sorted(inter_token_ms(with_steps(make_run(1), **columns)).tolist()) == [2.0, 7.0]


def test_a_simulated_run_has_every_token_but_the_first(shared: Path) -> None:
    from kvtwin.traces.readers import read_run

    run = read_run(shared / "data" / "vllm_cpu" / "saturated_1")
    tokens = run.requests["output_tokens"].to_numpy()
    assert inter_token_ms(run).size == (tokens - 1).sum()


# -- over time -----------------------------------------------------------------------------------------------------


def as_pairs(curve: Curve) -> list[tuple[int, int]]:
    return list(zip(curve.times_ns.tolist(), curve.values.tolist(), strict=True))


def test_curves_from_requests(make_run: MakeRun) -> None:
    run = make_run(2, arrival_ns=[0, 5], queued_ns=[1, 5], scheduled_ns=[2, 9], first_token_ns=None, finish_ns=[9, 20])
    engine, client = dict(run_curves(run, "queued_ns")), dict(run_curves(run, "arrival_ns"))
    assert as_pairs(engine["waiting"]) == [(1, 1), (2, 0), (5, 1), (9, 0)]
    assert as_pairs(client["waiting"]) == [(0, 1), (2, 0), (5, 1), (9, 0)]
    assert as_pairs(engine["running"]) == [(2, 1), (9, 1), (20, 0)]  # one leaves and one comes at 9


def test_a_request_that_was_never_scheduled_waits_to_the_end(make_run: MakeRun) -> None:
    curves = dict(run_curves(make_run(2, scheduled_ns=[7, None], finish_ns=[9, None]), "queued_ns"))
    assert curves["waiting"].values[-1] == 1
    assert curves["running"].values[-1] == 0


def test_curves_from_steps_fall_when_the_engine_goes_idle(make_run: MakeRun) -> None:
    curves = dict(run_curves(with_steps(make_run(3)), "steps"))
    assert as_pairs(curves["waiting"]) == [(0, 2), (9, 2), (10, 1), (19, 1), (40, 0), (49, 0)]
    assert as_pairs(curves["running"]) == [(0, 1), (9, 1), (10, 2), (19, 0), (40, 1), (49, 0)]
    assert as_pairs(curves["kv_blocks"]) == [(0, 1), (10, 3), (40, 0)]


def test_overlapping_steps_of_an_asynchronous_scheduler_keep_the_later_count(make_run: MakeRun) -> None:
    run = with_steps(make_run(3), sched_ns=[0, 5, 40])  # step 1 is planned while step 0 runs
    assert as_pairs(dict(run_curves(run, "steps"))["running"])[:3] == [(0, 1), (5, 2), (19, 0)]


def test_instances_add_up(make_run: MakeRun) -> None:
    run = with_steps(make_run(3), instance=[0, 1, 0], step=[0, 0, 1])
    # Instance 0 runs request 0 from 0 on (its finish is not in its own steps) and request 2 from 40 to 49.
    assert as_pairs(dict(run_curves(run, "steps"))["running"])[2] == (10, 3)


def test_steps_without_known_times_of_scheduling_use_the_start(make_run: MakeRun) -> None:
    run = with_steps(make_run(3), sched_ns=None, update_ns=None, num_free_blocks=None)
    curves = dict(run_curves(run, "steps"))
    assert curves["running"].times_ns.tolist() == [1, 8, 11, 18, 41, 48]
    assert "kv_blocks" not in curves


def test_both_runs_take_their_curves_from_the_same_place(make_run: MakeRun) -> None:
    plain, stepped = make_run(3), with_steps(make_run(3))
    assert common_source(stepped, stepped) == "steps"
    assert common_source(plain, stepped) == "queued_ns"
    assert common_source(plain, make_run(3, queued_ns=None)) == "arrival_ns"
    assert common_source(plain, make_run(3, scheduled_ns=None)) is None
    assert common_source(stepped, with_steps(make_run(3), num_waiting=None)) == "queued_ns"
    assert timeline(plain, make_run(3, scheduled_ns=None)) is None


def test_the_envelope_by_hand() -> None:
    curve = Curve(np.array([10, 14, 20]), np.array([4, 1, 0]))
    found = envelope(curve, np.array([8.0, 12.0, 16.0, 20.0, 24.0]))
    assert found.mean == [2.0, 2.5, 1.0, 0.0]
    assert found.low == [0, 1, 1, 0]
    assert found.high == [4, 4, 1, 0]
    assert (found.average, found.peak) == (2.2, 4)


@given(st.integers(0, 2**32), st.integers(1, 400), st.integers(1, 50))
def test_the_envelope_keeps_the_area_and_holds_every_value(seed: int, changes: int, intervals: int) -> None:
    rng = np.random.default_rng(seed)
    curve = Curve(np.cumsum(rng.integers(1, 50, changes)), rng.integers(0, 90, changes))
    edges = np.linspace(0, float(curve.times_ns[-1]) + 5, intervals + 1)
    found = envelope(curve, edges)
    area = float(np.sum(np.diff(curve.times_ns) * curve.values[:-1])) + 5 * curve.values[-1]
    assert sum(found.mean) * (edges[1] - edges[0]) == pytest.approx(area, rel=1e-2, abs=1e-6)
    assert max(found.high) == curve.values.max()
    rounding = 1 + 1e-3
    columns = zip(found.low, found.mean, found.high, strict=True)
    assert all(low <= mean * rounding + 1e-9 and mean <= high * rounding + 1e-9 for low, mean, high in columns)


def test_both_sides_share_one_grid_from_their_own_first_arrival(make_run: MakeRun) -> None:
    found = timeline(make_run(4), make_run(4, slow=2.0))
    assert found is not None
    assert found.source == "queued_ns"
    assert found.interval_s == pytest.approx(0.9 / NUM_INTERVALS)  # the slow one ends at 300 + 600 ms
    running = found.counts["running"]
    assert running.measured is not None
    assert running.simulated is not None
    assert (running.measured.peak, running.simulated.peak) == (3, 4)
    assert len(running.measured.mean) == NUM_INTERVALS
    assert running.measured.high[-1] == 0
    assert running.simulated.high[-1] == 1


# -- requests and the whole document --------------------------------------------------------------------------------


def test_latencies_and_cache_hits(make_run: MakeRun) -> None:
    hits = {"cached_tokens": [4, None, 8, 0], "cached_host_tokens": [1, None, 2, 0]}
    run = run_figures(Comparison("x", make_run(num_preemptions=[1, 0, 2, 0], **hits), make_run(slow=1.1), "queued_ns"))
    assert run.num_preemptions == (3, None)
    assert run.cache == (CacheHits(24, 12, 3, None), None)
    ttft = run.latencies["ttft"]
    assert ttft.measured is not None
    assert ttft.simulated is not None
    assert (ttft.measured.n, ttft.measured.mean, ttft.simulated.mean) == (4, 100.0, 110.0)
    assert run.latencies["itl"].measured is None
    assert run.duration_s == pytest.approx(0.6)


def test_an_empty_run_has_empty_figures(make_run: MakeRun) -> None:
    run = run_figures(Comparison("empty", make_run(0), make_run(0), "arrival_ns"))
    assert run.timeline is None
    assert run.duration_s == 0
    assert all(pair.measured is None for pair in run.latencies.values())


def test_what_is_written_is_read_back(report: TargetReport, tmp_path: Path) -> None:
    figures = aggregate(report)
    path = document.write(figures, tmp_path / "figures.json")
    assert document.read(path) == figures
    assert "NaN" not in path.read_text()


def test_no_text_of_a_file_but_the_name_of_the_run(hostile_report: TargetReport, tmp_path: Path) -> None:
    figures = aggregate(hostile_report)
    assert figures.runs[0].steps is not None
    assert set(figures.runs[0].steps.errors) == {"decode", "other", "all"}
    named = Figures([replace(run, name="") for run in figures.runs])
    assert "hacked" not in document.write(named, tmp_path / "figures.json").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version: is 2; this kvtwin reads 1"),
        ({"shares": [0, 1]}, "make it again with kvtwin check"),
        ({"runs": {}}, "runs: {} is not a list"),
        ({"runs": [1]}, "runs[0]: 1 is not a dict"),
        ({"runs": None}, "runs: None is not a list"),
    ],
)
def test_another_document_gets_one_line(
    report: TargetReport, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = document.write(aggregate(report), tmp_path / "figures.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as error:
        document.read(path)
    assert message in str(error.value)


def test_columns_that_do_not_belong_together_are_refused(report: TargetReport, tmp_path: Path) -> None:
    path = document.write(aggregate(report), tmp_path / "figures.json")
    good = path.read_text()
    broken = [json.loads(good) for _ in range(4)]
    runs = [one["runs"][0] for one in broken]
    runs[0]["steps"]["parity"][0]["step"].pop()
    runs[1]["latencies"]["ttft"]["measured"]["values"].pop()
    runs[2]["timeline"]["counts"]["running"]["simulated"]["low"].pop()
    runs[3]["steps"]["error_map"]["cache_bin"][0] = 99
    for one in broken:
        path.write_text(json.dumps(one))
        with pytest.raises(InputError, match=r"figures\.json.*alpha"):
            document.read(path)
