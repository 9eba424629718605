"""The end-to-end level: times, joins, gaps in either run, floors from repeats."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pytest

from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run, RunInfo
from kvtwin.validate.e2e import compare_e2e, request_metrics, throughput
from kvtwin.validate.gates import METRICS, parse_gates
from kvtwin.validate.result import Check

MakeRun = Callable[..., Run]
TTFT = [10.0, 20.0, 30.0, 40.0]
LATENCY = [110.0, 120.0, 230.0, 240.0]


def compare(measured: Run, simulated: Run, *, repeats: Sequence[Run] = (), gates: object = None) -> dict[str, Check]:
    parsed = parse_gates(gates or {})  # type: ignore[arg-type]
    checks = compare_e2e(measured, simulated, name="run", clock="arrival_ns", repeats=repeats, gates=parsed)
    assert all(check.metric in METRICS for check in checks)
    return {check.metric: check for check in checks}


def shuffled(run: Run, order: Sequence[int]) -> Run:
    """The same requests in another row order."""
    table = run.requests.take(pa.array(order))
    return Run(run.info, {"requests": table})


def test_request_metrics_by_hand(make_run: MakeRun) -> None:
    run = make_run([10.0, None, 30.0], [110.0, None, 30.0], tokens=[11, 11, 1], queue_ms=2.0)
    client, engine = request_metrics(run, "arrival_ns"), request_metrics(run, "queued_ns")
    nan = float("nan")
    assert client["ttft_ms"] == pytest.approx([10, nan, 30], nan_ok=True)
    assert client["tpot_ms"] == pytest.approx([10, nan, nan], nan_ok=True)
    assert client["latency_ms"] == pytest.approx([110, nan, 30], nan_ok=True)
    assert engine["ttft_ms"] == pytest.approx([8, nan, 28], nan_ok=True)
    assert engine["tpot_ms"] == pytest.approx(client["tpot_ms"], nan_ok=True)
    assert engine["latency_ms"] == pytest.approx([108, nan, 28], nan_ok=True)


def test_large_time_stamps_lose_nothing(make_run: MakeRun) -> None:
    table = make_run([1.0], [2.0]).requests
    epoch = 1_777_142_838_338_653_123
    for name in ("arrival_ns", "first_token_ns", "finish_ns"):
        column = pa.array([table.column(name)[0].as_py() + epoch])
        table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
    run = Run(make_run([1.0], [2.0]).info, {"requests": table})
    metrics = request_metrics(run, "arrival_ns")
    assert (metrics["ttft_ms"][0], metrics["latency_ms"][0]) == (1.0, 2.0)
    assert compare(run, run)["throughput"].measured == pytest.approx(11 / 0.002, rel=1e-12)


def test_checks_by_hand(make_run: MakeRun) -> None:
    simulated = make_run([11.0, 18.0, 30.0, 44.0], [111.0, 118.0, 230.0, 244.0])
    checks = compare(make_run(TTFT, LATENCY), simulated)
    assert list(checks)[:5] == ["ttft_mean", "ttft_p50", "ttft_p90", "ttft_p99", "ttft_mape"]
    assert len(checks) == 16
    assert (checks["ttft_mean"].measured, checks["ttft_mean"].simulated) == pytest.approx((25.0, 25.75))
    assert checks["ttft_mean"].error == pytest.approx(0.03)
    assert checks["ttft_p50"].error == pytest.approx(24 / 25 - 1)
    assert checks["ttft_p90"].error == pytest.approx(np.quantile([11, 18, 30, 44], 0.9) / np.quantile(TTFT, 0.9) - 1)
    assert checks["ttft_mape"].error == pytest.approx((0.1 + 0.1 + 0 + 0.1) / 4)
    assert checks["ttft_mape"].note.endswith("paired: each request with itself")
    assert checks["tpot_mean"].error == pytest.approx(0.0)
    # 44 tokens from 0 to 270 ms and to 274 ms.
    assert checks["throughput"].measured == pytest.approx(44 / 0.27)
    assert checks["throughput"].error == pytest.approx(270 / 274 - 1)
    assert {check.n for check in checks.values()} == {4}


def test_a_run_equals_itself(make_run: MakeRun) -> None:
    rng = np.random.default_rng(0)
    ttft = rng.lognormal(3, 1, 200)
    run = make_run(ttft, ttft + rng.lognormal(5, 1, 200))
    for check in compare(run, run, repeats=[run, run], gates={"ttft": 0.01}).values():
        assert check.error == 0
        assert check.interval == pytest.approx((0, 0), abs=1e-12)
        assert check.noise_floor == 0
        assert check.verdict == "not distinguishable"


def test_the_interval_of_independent_requests_is_the_textbook_one(make_run: MakeRun) -> None:
    rng = np.random.default_rng(0)
    ttft = rng.uniform(50, 150, 2000)
    simulated = ttft * rng.uniform(0.9, 1.1, 2000)
    check = compare(make_run(ttft, ttft + 1000), make_run(simulated, simulated + 1000))["ttft_mean"]
    ratio = simulated.mean() / ttft.mean()
    # The delta method; 2.1 for 19 degrees of freedom, whose variance has a standard error of a third.
    half = 2.1 * (simulated - ratio * ttft).std() / np.sqrt(2000) / ttft.mean()
    assert check.interval == pytest.approx((check.error - half, check.error + half), abs=0.4 * half)


def test_row_order_of_the_runs_does_not_matter(make_run: MakeRun) -> None:
    measured, simulated = make_run(TTFT, LATENCY), make_run([11.0, 19.0, 33.0, 39.0], LATENCY)
    plain = compare(_same_arrival(measured), _same_arrival(simulated))
    mixed = compare(_same_arrival(measured), shuffled(_same_arrival(simulated), [2, 0, 3, 1]))
    assert str(plain) == str(mixed)


def _same_arrival(run: Run) -> Run:
    """All requests arrive at once, so that any order of the rows is sorted by arrival."""
    table = run.requests
    columns = [
        pa.chunked_array([[0] * table.num_rows], pa.int64()) if name == "arrival_ns" else table.column(name)
        for name in table.column_names
    ]
    return Run(run.info, {"requests": pa.table(columns, schema=table.schema)})


def test_requests_that_never_finished_in_the_recording_are_left_out(make_run: MakeRun) -> None:
    checks = compare(make_run([*TTFT, 50.0], [*LATENCY, None]), make_run([*TTFT, 50.0], [*LATENCY, 500.0]))
    assert checks["ttft_mean"].n == 5
    assert checks["latency_mean"].n == checks["throughput"].n == 4
    assert checks["latency_mean"].error == 0
    assert "1 requests without a recorded time left out" in checks["latency_mean"].note
    assert "1 requests without a recorded time left out" in checks["tpot_p99"].note


def test_requests_that_never_finish_in_the_simulation_fail_the_gate(make_run: MakeRun) -> None:
    checks = compare(make_run(TTFT, LATENCY), make_run(TTFT, [*LATENCY[:3], None]), gates={"latency": 1, "ttft": 1})
    assert checks["ttft_mean"].verdict == "pass"
    for metric in ("latency_mean", "latency_p99"):
        assert np.isnan(checks[metric].error)
        assert checks[metric].interval is None
        assert checks[metric].verdict == "fail"
        assert checks[metric].note == "error: 1 of 4 recorded times are missing in the simulation"
    assert np.isnan(checks["throughput"].error)


def test_single_tokens_have_no_tpot(make_run: MakeRun) -> None:
    checks = compare(make_run(TTFT, TTFT, tokens=[1] * 4), make_run(TTFT, TTFT, tokens=[1] * 4), gates={"tpot": 0.1})
    assert not [metric for metric in checks if metric.startswith("tpot")]
    mixed = compare(make_run(TTFT, LATENCY, tokens=[1, 2, 3, 4]), make_run(TTFT, LATENCY, tokens=[1, 2, 3, 4]))
    assert mixed["tpot_mean"].n == 3
    assert "left out" not in mixed["tpot_mean"].note


def test_a_recording_without_any_time_cannot_pass(make_run: MakeRun) -> None:
    nothing = make_run([None] * 4, [None] * 4)
    check = compare(nothing, make_run(TTFT, LATENCY), gates={"ttft": 0.5})["ttft_mean"]
    assert (check.n, check.verdict) == (0, "fail")


def test_floors_come_from_the_repeats(make_run: MakeRun) -> None:
    measured = make_run(TTFT, LATENCY)
    slower = make_run([1.1 * t for t in TTFT], [1.1 * t for t in LATENCY])
    checks = compare(measured, slower, repeats=[measured, slower])
    floor = np.sqrt((0.1**2 + (1 / 11) ** 2) / 2)
    for metric in ("ttft_mean", "ttft_p99", "latency_p50"):
        assert checks[metric].noise_floor == pytest.approx(floor)
    assert checks["ttft_mape"].noise_floor == pytest.approx((0.1 + 1 / 11) / 2)
    assert compare(measured, slower, repeats=[measured])["ttft_mean"].noise_floor is None


def test_requests_in_one_run_only(make_run: MakeRun) -> None:
    four, three = make_run(TTFT, LATENCY), make_run(TTFT[:3], LATENCY[:3], ids=["r0", "r1", "x"])
    message = "row 2, request_id: 'r2' is not among the requests of the simulated run (in memory); "
    with pytest.raises(InputError) as error:
        compare(four, three)
    assert str(error.value) == message + "both must hold the same requests"
    with pytest.raises(InputError, match="row 3, request_id: 'r3' of the simulated run is not among those of the meas"):
        compare(make_run(TTFT[:3], LATENCY[:3]), four)
    with pytest.raises(InputError, match="a repeated recording"):
        compare(four, four, repeats=[four, three])


def test_other_prompts_are_not_compared(make_run: MakeRun) -> None:
    run = make_run(TTFT, LATENCY)
    index = run.requests.schema.get_field_index("input_tokens")
    longer = run.requests.set_column(index, "input_tokens", pa.array([100, 100, 101, 100]))
    with pytest.raises(InputError) as error:
        compare(run, Run(run.info, {"requests": longer}))
    place, _, problem = str(error.value).partition(": ")
    assert place == "row 2, input_tokens"
    assert problem == "'r2' has 100 in the measured run and 101 in the simulated run; replay its prompts"


def test_other_output_lengths_fail_and_leave_the_latency_out(make_run: MakeRun) -> None:
    measured, simulated = make_run(TTFT, LATENCY), make_run(TTFT, LATENCY, tokens=[11, 11, 12, 11])
    checks = compare(measured, simulated)
    lengths = checks["output_tokens"]
    assert (lengths.measured, lengths.simulated, lengths.error, lengths.verdict) == (4, 3, -0.25, "fail")
    assert "1 of 4 requests generate other numbers of tokens (44 recorded, 45 simulated)" in lengths.note
    assert checks["ttft_mean"].n == 4
    assert checks["latency_mean"].n == 3
    assert "1 requests of another output length left out" in checks["latency_mean"].note
    assert checks["throughput"].interval is None
    assert compare(measured, simulated, gates={"output_tokens": 0.5})["output_tokens"].verdict == "pass"
    assert "output_tokens" not in compare(measured, measured)


def test_a_clock_that_the_run_does_not_know(make_run: MakeRun) -> None:
    with pytest.raises(InputError, match=r"^queued_ns: is unknown in this run; compare by the other clock"):
        request_metrics(make_run(TTFT, LATENCY), "queued_ns")


def test_time_that_runs_backwards(make_run: MakeRun) -> None:
    with pytest.raises(
        InputError, match=r"row 1, first_token_ns: 20000000 is before queued_ns .24000000., as in 1 of 2"
    ):
        request_metrics(make_run([20.0, 10.0], [30.0, 30.0], queue_ms=14.0), "queued_ns")


def test_runs_without_requests_have_nothing_to_pass(make_run: MakeRun) -> None:
    empty = make_run([], [])
    checks = compare(empty, empty, repeats=[empty, empty], gates={"throughput": 0.1})
    assert {check.n for check in checks.values()} == {0}
    assert checks["throughput"].verdict == "fail"


def test_what_only_the_client_saw_has_a_throughput_and_lengths(make_run: MakeRun) -> None:
    """As `vllm bench` records: the engine's own columns are unknown."""
    run = make_run([10.0, 20.0, 30.0], [110.0, 220.0, 180.0])
    table = run.requests
    for engine, client in (("first_token_ns", "client_first_token_ns"), ("finish_ns", "client_finish_ns")):
        at, nothing = table.schema.get_field_index(engine), pa.nulls(3, pa.int64())
        table = table.set_column(table.schema.get_field_index(client), table.schema.field(client), table.column(engine))
        table = table.set_column(at, table.schema.field(engine), nothing)
    seen = Run(RunInfo("recorded"), {"requests": table})
    assert throughput(seen, "arrival_ns") == throughput(run, "arrival_ns") == pytest.approx(33 / 0.23)
    assert {check.error for check in compare_e2e(seen, run, name="run", clock="arrival_ns")} == {0.0}
    longer = make_run([10.0, 20.0, 30.0], [110.0, 220.0, 180.0], tokens=[11, 12, 11])
    assert compare_e2e(seen, longer, name="run", clock="arrival_ns")[-1].verdict == "fail"  # output_tokens
