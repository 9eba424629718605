"""Which queue a request's time goes to, and which level its hit came from, on workloads small enough to reckon."""

from __future__ import annotations

from typing import Any

from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.sglang.config import SglangConfig
from kvtwin.sim.sglang.simulate import simulate_sglang
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

MS = 1_000_000
LATENCY = LinearLatency(10 * MS, 0, 0, 0)
# Free transfers, but for those that a test makes slow.
FREE = {
    f"{link}_{price}": 0
    for link, unit in (("d2h", "token"), ("h2d", "token"), ("query", "page"), ("read", "page"), ("write", "page"))
    for price in ("base", f"per_{unit}")
}


def served(
    arrivals_ms: list[int], blocks: list[list[int]], outputs: list[int], **settings: Any
) -> dict[str, list[Any]]:
    """The requests table, by column; a block is 32 tokens."""
    columns = {
        "request_id": [f"r{row}" for row in range(len(blocks))],
        "arrival_ns": [time * MS for time in arrivals_ms],
        "input_tokens": [32 * len(chain) for chain in blocks],
        "output_tokens": outputs,
        "block_hashes": blocks,
    }
    workload = Run(
        RunInfo("workload", hash_block_tokens=32), {"requests": from_columns("requests", columns, "a workload")}
    )
    config = SglangConfig(page_size=16, disable_overlap_schedule=True, **settings)
    result: dict[str, list[Any]] = simulate_sglang(workload, config, LATENCY).requests.to_pydict()
    return result


def test_who_finds_no_place_waits() -> None:
    requests = served([0, 5], [[1], [2]], [3, 2], max_total_tokens=1024, max_running_requests=1)
    assert requests["waiting_ns"] == [0, 20 * MS]
    assert requests["running_ns"] == [30 * MS, 20 * MS]
    assert requests["prefetch_ns"] == requests["swapped_ns"] == [0, 0]


def test_who_is_retracted_waits_again() -> None:
    requests = served([0, 0], [[1] * 4, [2] * 4], [60, 60], max_total_tokens=352, schedule_conservativeness=0.01)
    assert requests["num_preemptions"] == [0, 1]
    assert requests["waiting_ns"][0] == 0 < requests["waiting_ns"][1]
    # A token for each step; the first also sits through the prefill of what the second had lost.
    assert requests["running_ns"] == [61 * 10 * MS, 60 * 10 * MS]


def levels(**settings: Any) -> dict[str, list[Any]]:
    """The first prompt comes once more after a second one has taken its place on the device."""
    return served(
        [0, 1_000, 2_000],
        [[1] * 6, [2] * 6, [1] * 6 + [3]],
        [1, 1, 1],
        max_total_tokens=320,
        enable_hierarchical_cache=True,
        **settings,
    )


def test_a_load_from_the_host_that_outlasts_the_model_is_prefetch() -> None:
    requests = levels(hicache_links=FREE | {"h2d_per_token": MS})
    assert requests["cached_tokens"] == [0, 0, 192]
    assert requests["cached_host_tokens"] == [0, 0, 192]
    assert requests["cached_storage_tokens"] == [0, 0, 0]
    assert requests["prefetch_ns"] == [0, 0, (192 - 10) * MS]
    assert requests["running_ns"] == [10 * MS] * 3
    assert requests["waiting_ns"] == [0, 0, 0]


def test_a_load_that_the_model_hides_is_none() -> None:
    requests = levels(hicache_links=FREE | {"h2d_per_token": MS // 100})
    assert (requests["cached_host_tokens"][2], requests["prefetch_ns"][2]) == (192, 0)


def test_waiting_for_storage_is_prefetch() -> None:
    requests = served(
        [0, 1_000, 2_000, 3_000, 4_000],
        [[1] * 6, [2] * 6, [3] * 6, [4] * 6, [1] * 6 + [5]],
        [1] * 5,
        max_total_tokens=320,
        enable_hierarchical_cache=True,
        hicache_storage_backend="file",
        hicache_storage_prefetch_policy="wait_complete",
        hicache_storage_backend_extra_config={"prefetch_threshold": 16},
        hicache_links=FREE | {"query_base": 7 * MS, "read_per_page": 5 * MS},
    )
    assert requests["cached_tokens"] == requests["cached_storage_tokens"] == [0, 0, 0, 0, 192]
    assert requests["cached_host_tokens"] == [0] * 5
    # Asking takes 7 ms, whatever is there; 12 pages of the last prompt are.
    assert requests["prefetch_ns"] == [7 * MS] * 4 + [(7 + 12 * 5) * MS]
    assert requests["waiting_ns"] == [0] * 5
    assert requests["running_ns"] == [10 * MS] * 5
