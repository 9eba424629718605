"""A peer's prediction on the real recording gives the errors that its authors published."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from kvtwin.traces import InputError
from kvtwin.traces.readers import read_run
from kvtwin.validate.cli import add_commands
from kvtwin.validate.e2e import compare_e2e
from kvtwin.validate.peers import compare_prediction, match_requests

RUN = "data/runs/llmservingsim/RTXPRO6000__Llama-3.1-8B"
PREDICTED = "PREDICTED_llmservingsim_requests.csv.gz"
PUBLISHED = {  # %, PUBLISHED_llmservingsim_summary.txt beside the recording
    "ttft_mean": -4.0, "ttft_p50": -8.6, "ttft_p90": -4.4, "ttft_p99": -2.0,
    "tpot_mean": -1.0, "tpot_p50": 0.0, "tpot_p90": 0.5, "tpot_p99": 0.6,
    "latency_mean": -1.8, "latency_p50": -1.2, "latency_p90": -1.8, "latency_p99": -1.6,
}  # fmt: skip


def test_published_errors_of_llmservingsim(shared: Path) -> None:
    measured = read_run(shared / RUN)
    predicted = match_requests(measured, read_run(shared / RUN / PREDICTED))
    checks = compare_e2e(measured, predicted, name="run", clock="queued_ns")
    errors = {check.metric: 100 * check.error for check in checks}
    for metric, published in PUBLISHED.items():
        assert errors[metric] == pytest.approx(published, abs=0.0501), metric


def test_side_by_side(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    words = ["validate", "e2e", str(shared / RUN), str(shared / RUN / PREDICTED), str(shared / RUN)]
    args = parser.parse_args(words)
    assert args.run(args) == 0
    assert "(2)" in capsys.readouterr().out
    args = parser.parse_args([*words, "--json"])
    assert args.run(args) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [Path(entry["predicted"]).name for entry in found["predictions"]] == [PREDICTED, Path(RUN).name]
    assert all(check["error"] == 0 for check in found["predictions"][1]["checks"])


def test_other_lengths_are_refused_in_one_line(shared: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.csv"
    header = "instance id,request id,model,input,output,arrival,end_time,latency,queuing_delay,TTFT,TPOT"
    short.write_text(f"{header}\n0,0,llama,10,3,500,2500,2000,0,1000,500\n")
    with pytest.raises(InputError, match="1 requests here, 300 in the measured run"):
        match_requests(read_run(shared / RUN), read_run(short))


def test_a_benchmark_without_names_or_arrivals_is_judged_request_by_request(shared: Path, tmp_path: Path) -> None:
    """The recording itself, written as SGLang's `bench_serving --output-details` would: no error in any metric."""
    measured = read_run(shared / RUN)
    rows = measured.requests.to_pylist()
    details = {
        "backend": "sglang", "completed": len(rows), "mean_ttft_ms": 1.0,
        "input_lens": [row["input_tokens"] for row in rows], "output_lens": [row["output_tokens"] for row in rows],
        "ttfts": [(row["first_token_ns"] - row["arrival_ns"]) / 1e9 for row in rows],
        "itls": [[(row["finish_ns"] - row["first_token_ns"]) / 1e9] for row in rows],
    }  # fmt: skip
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps(details) + "\n")
    checks = compare_prediction(measured, path, name="run", clock="arrival_ns")
    assert {check.metric for check in checks} >= {"ttft_mape", "latency_p99", "throughput"}
    assert all(abs(check.error) < 1e-6 for check in checks)
    with pytest.raises(InputError, match=r"bench\.jsonl, queued_ns: .* compare by the other clock"):
        compare_prediction(measured, path, name="run", clock="queued_ns")
