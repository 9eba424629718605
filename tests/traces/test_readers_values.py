"""Exact values read from the hand-written samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvtwin.traces import Run
from kvtwin.traces.readers import read_run

Samples = Mapping[str, Callable[[Path], Path]]


def _column(run: Run, name: str, table: str = "requests") -> list[Any]:
    values: list[Any] = getattr(run, table).column(name).to_pylist()
    return values


@pytest.fixture
def read(samples: Samples, tmp_path: Path) -> Callable[[str], Run]:
    return lambda name: read_run(samples[name](tmp_path))


def test_recording(read: Callable[[str], Run]) -> None:
    run = read("vllm_recording")
    assert {name: _column(run, name) for name in run.requests.column_names if name not in _UNKNOWN} == {
        "request_id": ["a", "b", "c"],
        "arrival_ns": [250_000_000, 250_000_000, 500_000_000],
        "input_tokens": [5, 3, 8],
        "output_tokens": [2, 1, 1],
        "queued_ns": [250_000_300, 250_000_200, 500_000_001],
        "scheduled_ns": [250_001_000, 250_001_000, 500_001_000],
        "first_token_ns": [260_000_500, 260_000_500, 600_000_500],
        "finish_ns": [280_000_500, 260_000_500, 600_000_500],
        "client_first_token_ns": [260_000_000, 260_000_000, 600_000_000],
        "client_finish_ns": [280_000_000, 260_000_000, 600_000_000],
        "cached_tokens": [0, 0, 4],
        "num_preemptions": [0, 0, 1],
        "priority": [None, -1, None],
        "block_hashes": [[7, 8], [9], [7, 8]],
    }
    assert _column(run, "request", "steps") == [[1, 0], [0], [2], [2]]
    assert _column(run, "cache_len", "steps") == [[0, 0], [5], [4], [0]]
    assert _column(run, "input_len", "steps") == [[3, 5], [1], [2], [8]]
    assert _column(run, "preempted", "steps") == [[], [], [2], []]
    assert _column(run, "finished", "steps") == [[1], [0], [], [2]]
    assert _column(run, "update_ns", "steps")[0] == 260_000_500
    assert _column(run, "num_free_blocks", "steps") == [9, 9, 9, 9]
    assert _column(run, "num_evicted_blocks", "steps") == [None] * 4
    assert (run.info.engine, run.info.hash_block_tokens, run.info.metrics) == ("vllm 0.32.0", 4, {"threads": 1})
    assert run.info.engine_config == {"block_size": 2, "hash_id_tokens": 4, "max_num_seqs": 2}


_QUEUES = {"waiting_ns", "prefetch_ns", "running_ns", "swapped_ns"}
_LEVELS = {"cached_host_tokens", "cached_storage_tokens"}
_UNKNOWN = {"instance", "session_id", "parent_id", "slo_class", "output_block_hashes"} | _QUEUES | _LEVELS


def test_llmservingsim_run_aligns_its_two_clocks_to_the_nanosecond(read: Callable[[str], Run]) -> None:
    run = read("llmservingsim_run")
    assert _column(run, "arrival_ns") == [0, 1_000_000_000]
    assert _column(run, "queued_ns") == [0, 1_000_000_007]
    assert _column(run, "scheduled_ns") == [100_000_000, 1_100_000_000]
    assert _column(run, "first_token_ns") == [200_000_000, 1_200_000_000]
    assert _column(run, "finish_ns") == [300_000_000, 1_300_000_000]
    assert (run.info.engine, run.info.model, run.info.engine_config) == ("vllm 0.19.0", "llama", {"max_num_seqs": 128})
    assert "monotonic" in run.info.source["clocks"]


def test_llmservingsim_run_has_the_waits_that_were_found_by_hand(shared: Path) -> None:
    """data/README.md, trap 2: a median wait of 16 ms and a maximum of 108 ms before the engine reads a request."""
    run = read_run(shared / "data/runs/llmservingsim/RTXPRO6000__Llama-3.1-8B")
    waits = sorted(q - a for q, a in zip(_column(run, "queued_ns"), _column(run, "arrival_ns"), strict=True))
    assert waits[0] == 0
    assert round(waits[150] / 1e6) == 16
    assert round(waits[-1] / 1e6) == 108


def test_workload_interns_token_blocks(read: Callable[[str], Run]) -> None:
    run = read("llmservingsim_workload")
    assert _column(run, "request_id") == ["bench-0", "bench-1"]
    assert _column(run, "arrival_ns") == [5, 5]
    assert _column(run, "block_hashes") == [[0, 1], [0, 2]]
    assert run.info.hash_block_tokens == 16


def test_mooncake(read: Callable[[str], Run]) -> None:
    run = read("mooncake")
    assert _column(run, "request_id") == ["r0", "r1"]
    assert _column(run, "arrival_ns") == [0, 3_001_000_000]
    assert _column(run, "block_hashes") == [[3, 4], [3]]
    assert run.info.hash_block_tokens == 512


def test_a_tair_lookup_is_a_request_and_the_write_that_goes_on_from_it_its_output(read: Callable[[str], Run]) -> None:
    run = read("tair")
    assert _column(run, "arrival_ns") == [0, 1000]
    assert _column(run, "block_hashes") == [[1, 2**64 - 2, 3], [1, 2**64 - 2, 4]]
    assert (_column(run, "input_tokens"), _column(run, "output_tokens")) == ([3, 3], [1, 2])
    assert _column(run, "cached_tokens") == [1, None]
    assert (run.info.hash_block_tokens, run.cache.num_rows) == (1, 10)


def test_azure_keeps_all_seven_decimals(read: Callable[[str], Run]) -> None:
    run = read("azure2023")
    assert _column(run, "arrival_ns") == [0, 200]
    assert (_column(run, "input_tokens"), _column(run, "output_tokens")) == ([374, 396], [44, 109])
    assert _column(run, "block_hashes") == [None, None]


def test_kvtwin_jsonl(read: Callable[[str], Run]) -> None:
    run = read("kvtwin_jsonl")
    assert _column(run, "arrival_ns") == [250_000_000, 250_000_000, 500_000_000]
    assert _column(run, "priority") == [None, -1, None]
    assert _column(run, "queued_ns") == [None] * 3


def test_kvtwin_jsonl_takes_nanoseconds_and_token_ids(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"request_id": "x", "arrival_s": 9, "arrival_ns": 3, "input_length": 17, "output_length": 1, '
        f'"prompt_token_ids": {[*range(16), 5]}}}\n\n'
        '{"request_id": "y", "arrival_ns": 4, "input_length": 17, "output_length": 1}\n'
    )
    run = read_run(path)
    assert _column(run, "arrival_ns") == [3, 4]
    assert _column(run, "block_hashes") == [[0], None]
    assert run.info.hash_block_tokens == 16


def test_sglang_log(read: Callable[[str], Run]) -> None:
    run = read("sglang_log")
    assert run.info.engine == "sglang 0.5.9"
    assert run.info.engine_config["max_total_tokens"] == 1000 and run.info.engine_config["disable_overlap_schedule"]
    assert _column(run, "scheduled_ns") == [90, 90]
    assert _column(run, "finish_ns") == [400, 500]
    assert run.info.hash_block_tokens == 4
    # One common block of 4 tokens, then their own.
    assert _column(run, "block_hashes") == [[0, 51200000], [0, 51200512, 51200516]]
    steps = run.steps.to_pylist()
    assert [step["sched_ns"] for step in steps] == [90, 300, 400]
    assert [step["request"] for step in steps] == [[0, 1]] * 3
    assert [step["cache_len"] for step in steps] == [[0, 4], [7, 10], [8, 11]]
    assert [step["input_len"] for step in steps] == [[7, 6], [1, 1], [1, 1]]
    assert [step["preempted"] for step in steps] == [[], [1], []]
    # Logged a step late.
    assert [step["finished"] for step in steps] == [[], [0], [1]]
    assert [step["num_free_blocks"] for step in steps] == [985, 983, 981]


def test_sglang_log_of_a_trace_that_is_not_there_has_no_prompts(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORACLE_TRACES", raising=False)
    path = samples["sglang_log"](tmp_path)
    lines = path.read_text().splitlines()
    meta = json.loads(lines[0])
    meta["case"]["workload"] = {"kind": "mooncake", "trace": "conversation", "start": 0, "count": 2}
    path.write_text("\n".join([json.dumps(meta), *lines[1:]]))
    run = read_run(path)
    assert _column(run, "block_hashes") == [None, None] and run.info.hash_block_tokens is None
