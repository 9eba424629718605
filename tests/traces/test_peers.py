"""Other simulators' outputs: exact values and units of each sample, and bad fields in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtwin.traces import InputError
from kvtwin.traces.readers import read_run, vllm_bench

Samples = Mapping[str, Callable[[Path], Path]]
LISTS = ("input_lens", "output_lens", "ttfts", "itls")


def _values(samples: Samples, name: str, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_run(samples[name](folder)).requests.to_pydict()
    return found


def test_llmservingsim_is_nanoseconds_in_the_order_of_its_numbers(samples: Samples, tmp_path: Path) -> None:
    found = _values(samples, "llmservingsim_requests", tmp_path)
    assert found["request_id"] == ["0", "1"] and found["input_tokens"] == [10, 20]
    assert found["arrival_ns"] == found["queued_ns"] == [500, 1000]
    assert found["scheduled_ns"] == [500, 1100]
    assert found["first_token_ns"] == [1500, 3000] and found["finish_ns"] == [2500, 4000]


def test_vidur_is_seconds_after_summed_arrivals_and_unfinished_is_null(samples: Samples, tmp_path: Path) -> None:
    found = _values(samples, "vidur_requests", tmp_path)
    assert found["arrival_ns"] == [0, 500_000_000] and found["output_tokens"] == [44, 2]
    assert found["scheduled_ns"] == [125_000_000, None]
    assert found["first_token_ns"] == [250_000_000, None] and found["finish_ns"] == [1_500_000_000, None]


def test_blis_arrives_in_seconds_and_takes_milliseconds(samples: Samples, tmp_path: Path) -> None:
    found = _values(samples, "blis", tmp_path)
    assert found["arrival_ns"] == [250_000_000, 500_000_000] and found["input_tokens"] == [374, 20]
    assert found["first_token_ns"] == [270_500_000, None] and found["finish_ns"] == [618_800_000, None]


def test_vllm_bench_is_what_the_client_saw(samples: Samples, tmp_path: Path) -> None:
    found = _values(samples, "vllm_bench", tmp_path)
    assert found["request_id"] == ["2", "0"] and found["arrival_ns"] == [0, 500_000_000]
    assert found["client_first_token_ns"] == [500_000_000, 750_000_000]
    assert found["client_finish_ns"] == [500_000_000, 1_000_000_000] and found["finish_ns"] == [None, None]
    assert read_run(tmp_path / "bench.json").info.source["failed_requests"] == 1


def test_sglang_simulator_is_seconds_and_what_never_came_is_null(samples: Samples, tmp_path: Path) -> None:
    found = _values(samples, "sglang_simulator", tmp_path)
    assert found["request_id"] == ["0", "1"] and found["input_tokens"] == [10, 20]
    assert found["arrival_ns"] == [0, 250_000_000] and found["queued_ns"] == [0, 375_000_000]
    assert found["scheduled_ns"] == [125_000_000, None]
    assert found["first_token_ns"] == [500_000_000, None] and found["finish_ns"] == [750_000_000, None]


def test_a_benchmark_without_start_times_is_a_run_beside_its_recording(samples: Samples, tmp_path: Path) -> None:
    path = samples["vllm_bench"](tmp_path)
    details = json.loads(path.read_text())
    del details["start_times"]  # SGLang's bench_serving --output-details
    path.write_text(json.dumps(details) + "\n")
    recording = read_run(samples["kvtwin_jsonl"](tmp_path))
    found = vllm_bench.read(path, recording).requests.to_pydict()
    assert found["request_id"] == ["a", "c"] and found["arrival_ns"] == [250_000_000, 500_000_000]  # the second failed
    assert found["client_first_token_ns"] == [500_000_000, 1_000_000_000]
    assert found["client_finish_ns"] == [750_000_000, 1_000_000_000]
    with pytest.raises(InputError, match="start_times: a list"):
        read_run(path)
    path.write_text(json.dumps(details) * 2)
    with pytest.raises(InputError, match="not JSON"):
        vllm_bench.read(path, recording)
    path.write_text((json.dumps(details) + "\n") * 2)
    with pytest.raises(InputError, match="2 results, one a line"):
        vllm_bench.read(path, recording)
    details = {key: value[:2] if isinstance(value, list) else value for key, value in details.items()}
    path.write_text(json.dumps(details))
    with pytest.raises(InputError, match="2 requests here, 3 in the recording"):
        vllm_bench.read(path, recording)


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("llmservingsim_requests", "0,0,llama", "0,1,llama", "request id: 1 is not a number of its own"),
        ("llmservingsim_requests", ",3000,", ",3001,", "row 2, latency: 3001 ns is not end_time - arrival"),
        ("llmservingsim_requests", ",20,2,", ",20,0,", "row 2, output: 0 tokens"),
        ("llmservingsim_requests", "500,2500,2000,0,1000", "500,2500,2000,0,2001", "TTFT: 2001 ns is more than"),
        ("vidur_requests", "1,,,,0.5", "1,,,,", "row 3, request_inter_arrival_delay: is empty"),
        ("vidur_requests", "44.0", "44.5", "request_num_decode_tokens: 44.5 tokens"),
        ("vidur_requests", "1.5,0.25", "nan,0.25", "row 2, request_e2e_time: 'nan' is not a number"),
        ("vidur_requests", "\n1,", "\n2,", "row 3, Request Id: 1 expected"),
        ("blis", "20.5,\n      \"itl", "-1,\n      \"itl", "row 1, ttft_ms: -1 milliseconds is out of range"),
        ("blis", '"requests"', '"request"', "requests: a list of requests expected"),
        ("vllm_bench", '"start_times"', '"starts"', "start_times: a list .* can only be compared: kvtwin validate e2e"),
        ("vllm_bench", '"ttfts"', '"ttft"', "ttfts: a list .* --save-detailed"),
        ("vllm_bench", "[3, 0, 1]", "[3, 0]", "differ in length: 3, 2, 3, 3, 3"),
        ("vllm_bench", "[0.125, 0.125]", "[0.125, null]", "row 1, itls: None is not a number"),
    ],
)  # fmt: skip
def test_bad_field(name: str, old: str, new: str, words: str, samples: Samples, tmp_path: Path) -> None:
    path = samples[name](tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=words) as caught:
        read_run(path, name)
    assert "\n" not in str(caught.value)


def test_blis_on_one_line_is_told_apart_too(samples: Samples, tmp_path: Path) -> None:
    path = samples["blis"](tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert read_run(path).requests.num_rows == 2


CELL = st.none() | st.booleans() | st.floats() | st.integers(-2, 1 << 70) | st.text(max_size=3) | st.lists(st.floats())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lists=st.fixed_dictionaries({name: st.lists(CELL, min_size=3, max_size=3) for name in LISTS}))
def test_any_benchmark_is_a_run_or_one_line(lists: dict[str, Any], samples: Samples, tmp_path: Path) -> None:
    (tmp_path / "recording").mkdir(exist_ok=True)
    recording = read_run(samples["kvtwin_jsonl"](tmp_path / "recording"))
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(lists))
    try:
        vllm_bench.read(path, recording)
    except InputError as error:
        assert "\n" not in str(error)
