"""From a workload to a Run, with one SGLang server in between."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.sglang.config import SglangConfig
from kvtwin.sim.sglang.simulate import build_requests, simulate_sglang
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

CONFIG = SglangConfig(max_total_tokens=4096, page_size=16)
LATENCY = LinearLatency(1_000_000, 20_000, 50, 10_000)


def workload() -> Run:
    """Two prompts that share 64 tokens, and one without hashes."""
    columns = {
        "request_id": ["a", "b", "c"],
        "arrival_ns": [0, 50_000_000, 60_000_000],
        "input_tokens": [100, 90, 30],
        "output_tokens": [4, 4, 4],
        "block_hashes": [[7, 8, 9, 10], [7, 8, 3], None],
    }
    info = RunInfo("workload", hash_block_tokens=32)
    return Run(info, {"requests": from_columns("requests", columns, "three requests")})


def test_equal_prefixes_are_equal_runs_and_outputs_are_nobody_elses() -> None:
    a, b, c = build_requests(workload(), CONFIG)
    assert (a.runs(64), b.runs(64)) == ([(0, 64)], [(0, 64)])
    assert a.runs(65)[-1] != b.runs(65)[-1]
    taken: set[int] = set()
    for request in (a, b, c):
        own = _tokens(request.output_runs)
        assert len(own) == request.max_new_tokens + 1
        assert taken.isdisjoint(own)
        taken.update(own)
    assert taken.isdisjoint(_tokens([run for request in (a, b, c) for run in request.prompt_runs]))


def _tokens(runs: Iterable[tuple[int, int]]) -> set[int]:
    return {first + place for first, length in runs for place in range(length)}


def test_a_prompt_that_quotes_an_answer_has_its_tokens() -> None:
    """40 tokens and their answer of 30 are two blocks of 32 and six tokens; the next prompt goes on from there."""
    columns = {
        "request_id": ["a", "b"],
        "arrival_ns": [0, 10_000_000_000],
        "input_tokens": [40, 90],
        "output_tokens": [30, 4],
        "block_hashes": [[7, 8], [7, 9, 10]],
        "output_block_hashes": [[9], None],
    }
    run = Run(RunInfo("workload", hash_block_tokens=32), {"requests": from_columns("requests", columns, "a turn")})
    first, second = build_requests(run, CONFIG)
    assert first.runs(64) == second.runs(64) == [(0, 64)]
    assert _tokens(first.runs(70)[1:]).isdisjoint(_tokens(second.runs(94)))
    cached = {
        version: simulate_sglang(run, replace(CONFIG, version=version), LATENCY).requests.column("cached_tokens")
        for version in ("0.5.6", "0.5.9")
    }
    assert [column.to_pylist() for column in cached.values()] == [[0, 32], [0, 64]]


def test_the_shared_prefix_is_found_in_whole_pages() -> None:
    run = simulate_sglang(workload(), CONFIG, LATENCY)
    assert run.requests.column("cached_tokens").to_pylist() == [0, 64, 0]


def test_the_way_to_the_queue_and_back_is_the_clients() -> None:
    host = HostTime(frontend_ns=3_000, frontend_per_token_ns=10, output_ns=500)
    near, far = (simulate_sglang(workload(), CONFIG, LATENCY, host=times) for times in (HostTime(), host))
    first, finish = (near.requests.column(name).to_numpy() for name in ("first_token_ns", "finish_ns"))
    assert far.requests.column("first_token_ns").to_numpy()[0] == first[0] + 3_000 + 10 * 100
    assert near.requests.column("client_finish_ns").null_count == 3
    way_back = far.requests.column("client_finish_ns").to_numpy() - far.requests.column("finish_ns").to_numpy()
    assert np.all(way_back == 500)
    assert np.all(finish > first)
