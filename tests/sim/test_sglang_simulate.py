"""From a workload to a Run, with one SGLang server in between."""

from __future__ import annotations

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
        own = range(request.output_base, request.output_base + request.max_new_tokens + 1)
        assert taken.isdisjoint(own)
        taken.update(own)
    prompts = {first + place for r in (a, b, c) for first, length in r.prompt_runs for place in range(length)}
    assert taken.isdisjoint(prompts)


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
