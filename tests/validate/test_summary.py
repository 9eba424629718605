"""Aggregates of peers and benchmarks: what each format calls them, and a recording held against them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtwin.reports.cli import main
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.summary import is_summary, read_summary
from kvtwin.traces.run import Run
from kvtwin.validate.e2e import compare_e2e
from kvtwin.validate.summary import NO_PAIRS, compare_summary

MakeRun = Callable[..., Run]

VLLM = {"date": "20260401-101112", "completed": 4, "mean_ttft_ms": 20.0, "median_ttft_ms": 19.0, "p99_e2el_ms": 300.5}
SGLANG = {"backend": "sglang", "completed": 4, "mean_e2e_latency_ms": 200, "std_ttft_ms": 3.0, "output_throughput": 9.5}
DYNAMO = {"completed_requests": 4, "p90_tpot_ms": 12.5, "output_throughput_tok_s": 9.5, "power_w": None}
BLIS = {"completed_requests": 4, "ttft_mean_ms": 20.5, "e2e_p99_ms": 300, "itl_mean_ms": 8.0, "tokens_per_sec": 9.5}


AISIMULATE = {"summary": DYNAMO | {"completed_requests": 4.0}, "details": {}}
AICONFIGURATOR = """model,isl,osl,concurrency,ttft,tpot,request_latency,seq/s,tokens/s,tokens/s/gpu,power_w
llama,1024,256,8,123.5,12.25,3247.25,2.5,640.0,640.0,
"""


def write(folder: Path, *objects: dict[str, Any], indent: int | None = None) -> Path:
    path = folder / "result.json"
    path.write_text("\n".join(json.dumps(values, indent=indent) for values in objects) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("values", "metrics"),
    [
        (VLLM, {"ttft_mean": 20.0, "ttft_p50": 19.0, "latency_p99": 300.5}),
        (SGLANG, {"latency_mean": 200.0, "throughput": 9.5}),
        (DYNAMO, {"tpot_p90": 12.5, "throughput": 9.5}),
        (BLIS, {"ttft_mean": 20.5, "latency_p99": 300.0, "throughput": 9.5}),
        (AISIMULATE, {"tpot_p90": 12.5, "throughput": 9.5}),
    ],
    ids=["vllm", "sglang", "dynamo", "blis", "aisimulate"],
)
def test_each_format_in_our_names(
    values: dict[str, Any], metrics: dict[str, float], indent: int | None, tmp_path: Path
) -> None:
    path = write(tmp_path, values, indent=indent)
    assert is_summary(path)
    found = read_summary(path)
    assert found.metrics == metrics
    assert found.num_requests == 4


def test_a_table_of_aiconfigurator_is_one_deployment(tmp_path: Path) -> None:
    path = tmp_path / "best_config_topn.csv"
    path.write_text(AICONFIGURATOR)
    assert is_summary(path)
    found = read_summary(path)
    assert found.metrics == {"ttft_mean": 123.5, "tpot_mean": 12.25, "latency_mean": 3247.25, "throughput": 640.0}
    assert found.num_requests is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (AICONFIGURATOR + AICONFIGURATOR.splitlines()[1] + "\n", "2 results, one a line"),
        (AICONFIGURATOR.replace("123.5", "x"), "row 2, ttft: 'x' is not a number from 0"),
        (AICONFIGURATOR.replace("123.5", "-1"), "row 2, ttft: '-1' is not"),
        (AICONFIGURATOR.replace("123.5", "1e400"), "row 2, mean_ttft_ms: inf milliseconds is out of range"),
        (AICONFIGURATOR.replace("llama,", ""), "row 2: 10 fields, but the header has 11"),
        (AICONFIGURATOR.splitlines()[0], "holds no rows"),
    ],
)
def test_a_spoilt_table_in_one_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "pareto.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_summary(path)


def test_the_aggregates_of_a_run_have_no_error_against_it(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run([10.0, 20.0, 35.0, 15.0, 22.0, 18.0], [110.0, 190.0, 300.0, 120.0, 230.0, 170.0])
    exact = compare_e2e(run, run, name="run", clock="arrival_ns")
    by_name = {check.metric: check.measured for check in exact if "mape" not in check.metric}
    fields = {"throughput": "output_throughput"}
    for time, word in (("ttft", "ttft"), ("tpot", "tpot"), ("latency", "e2el")):
        fields |= {f"{time}_{key}": f"{key}_{word}_ms" for key in ("mean", "p50", "p90", "p99")}
    path = write(tmp_path, {fields[name]: value for name, value in by_name.items()} | {"completed": 6})
    checks = compare_summary(run, read_summary(path), name="run", clock="arrival_ns")
    assert [check.metric for check in checks] == list(by_name)
    assert all(check.error == pytest.approx(0, abs=1e-12) for check in checks)
    assert all(check.interval[0] <= 0 <= check.interval[1] for check in checks if check.interval is not None)
    assert {check.note for check in checks} == {NO_PAIRS}


def test_an_interval_is_of_the_error_and_other_counts_are_said(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run([10.0, 12.0, 14.0, 16.0, 18.0, 20.0] * 10, [100.0] * 60)
    (check,) = compare_summary(
        run, read_summary(write(tmp_path, VLLM | {"completed": 4})), name="run", clock="arrival_ns"
    )[:1]
    assert (check.metric, check.measured, check.simulated) == ("ttft_mean", 15.0, 20.0)
    assert check.error == pytest.approx(1 / 3)
    assert check.interval is not None and check.interval[0] < check.error < check.interval[1]
    assert "of 4 requests, where the recording has 60" in check.note


def test_side_by_side_leaves_out_what_a_summary_does_not_say(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run([10.0, 20.0, 35.0, 15.0, 22.0], [110.0, 190.0, 300.0, 120.0, 230.0])
    folder = run.write(tmp_path / "run")
    path = write(tmp_path, SGLANG)
    assert main(["validate", "e2e", str(folder), str(folder), str(path), "--clock", "arrival"]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["latency_mean"] == ["190.000", "190.000", "+0.00%", "200.000", "+5.26%"]
    assert len(lines["ttft_mean"]) == 3
    assert lines["note:"] == f"(2) {NO_PAIRS} (of 4 requests, where the recording has 5)".split()
    assert main(["validate", "e2e", str(folder), str(path), "--clock", "arrival"]) == 0
    assert f"note: {NO_PAIRS}" in capsys.readouterr().out
    assert main(["trace", "info", str(path)]) == 0
    assert "aggregates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ([SGLANG, SGLANG], "2 results, one a line"),
        ([VLLM | {"mean_ttft_ms": -1.0}], "column mean_ttft_ms|mean_ttft_ms: -1.0"),
        ([VLLM | {"mean_ttft_ms": "20"}], "mean_ttft_ms: '20' is not a number"),
        ([{"completed": 3}], "no aggregates"),
        ([VLLM | {"completed": 2.5}], "completed: 2.5 is not an integer"),
        ([{"summary": DYNAMO | {"prediction_status": "invalid"}}], "calls this prediction invalid"),
    ],
)
def test_refused_in_one_line(objects: list[dict[str, Any]], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        read_summary(write(tmp_path, *objects))


def test_a_recording_that_knows_nothing_of_it_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run([10.0, None], [None, None])
    with pytest.raises(InputError, match="of which the recording knows nothing"):
        compare_summary(run, read_summary(write(tmp_path, {"mean_tpot_ms": 3.0})), name="run", clock="arrival_ns")


def test_results_with_their_requests_are_runs(tmp_path: Path) -> None:
    assert not is_summary(write(tmp_path, VLLM | {"ttfts": [0.0]}))
    assert not is_summary(write(tmp_path, BLIS | {"requests": []}))
    assert not is_summary(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200)
@given(values=st.dictionaries(st.sampled_from([*VLLM, *SGLANG, *DYNAMO, *BLIS]), JSON, max_size=6))
def test_any_object_is_a_summary_or_one_line(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.getbasetemp(), values)
    try:
        found = read_summary(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(value >= 0 for value in found.metrics.values())
