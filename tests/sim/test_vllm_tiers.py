"""vLLM with KV levels below its pool: times that can be worked out by hand, swapping, and the cache record."""

from __future__ import annotations

from typing import Any

import pytest

from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.vllm.config import VllmConfig, vllm_config
from kvtwin.sim.vllm.simulate import simulate
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.validate.cache import cache_figures

LATENCY = LinearLatency(1_000_000, 0, 0, 0)
BLOCK_GIB = 4 / 2**30  # blocks of 4 tokens of a byte
ENGINE: dict[str, Any] = {
    "num_gpu_blocks": 5, "block_size": 4, "max_model_len": 16, "async_scheduling": False, "kv_bytes_per_token": 1,
    "kv_links": {"h2d_base": 0, "h2d_per_token": 10_000, "read_base": 0, "read_per_page": 2_000_000},
}  # fmt: skip


def workload(**columns: list[Any]) -> Run:
    count = len(columns["arrival_ns"])
    table = from_columns("requests", {"request_id": [str(row) for row in range(count)], **columns}, "test")
    return Run(RunInfo("workload", hash_block_tokens=4), {"requests": table})


def again() -> Run:
    """A prompt of 8 tokens, one of 15 that takes the whole pool, and the first again."""
    return workload(
        arrival_ns=[0, 10_000_000, 20_000_000],
        input_tokens=[8, 15, 8],
        output_tokens=[1, 1, 1],
        block_hashes=[[1, 2], [11, 12, 13, 14], [1, 2]],
    )


def last(run: Run, *names: str) -> list[int]:
    return [run.requests.column(name)[-1].as_py() for name in names]


@pytest.mark.parametrize(
    ("tiers", "cached", "waiting_ns", "prefetch_ns"),
    [
        ({}, [0, 0, 0], 0, 0),
        ({"kv_offloading_size": 8 * BLOCK_GIB}, [7, 7, 0], 0, 8 * 10_000),
        # The host has dropped the second block.
        ({"kv_offloading_size": 4 * BLOCK_GIB}, [4, 4, 0], 0, 4 * 10_000),
        # The disk is asked for it, and has it; on the host it pushes out the first one, for which the same begins.
        (
            {"kv_offloading_size": 4 * BLOCK_GIB, "kv_offloading_disk_size": 99 * BLOCK_GIB},
            [7, 0, 7],
            2 * 201_000,
            2 * 2_000_000 + 8 * 10_000,
        ),
    ],
)
def test_a_prompt_seen_before_comes_from_below(
    tiers: dict[str, Any], cached: list[int], waiting_ns: int, prefetch_ns: int
) -> None:
    run = simulate(again(), VllmConfig(**ENGINE, **tiers), LATENCY, record_cache=True)
    assert last(run, "cached_tokens", "cached_host_tokens", "cached_storage_tokens") == cached
    assert last(run, "waiting_ns", "prefetch_ns", "running_ns", "swapped_ns") == [waiting_ns, prefetch_ns, 1_000_000, 0]
    assert last(run, "finish_ns") == [20_000_000 + waiting_ns + prefetch_ns + 1_000_000]
    figures = cache_figures(run.cache)
    hits = [figures.get(f"hit_tokens_l{level}", (0, 0))[0] for level in (1, 2, 3)]
    assert hits == [cached[0] - cached[1] - cached[2], *cached[1:]]


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "jumps"])
def test_a_swapped_request_goes_on_where_it_was(plain: bool) -> None:
    two = workload(arrival_ns=[0, 0], input_tokens=[4, 4], output_tokens=[12, 12], block_hashes=[[1], [2]])
    swapping = VllmConfig(**ENGINE, preemption_mode="swap")
    run = simulate(two, swapping, LATENCY, plain=plain)
    assert last(run, "num_preemptions") == [1]
    inputs = [tokens for lengths in run.steps.column("input_len").to_pylist() for tokens in lengths]
    assert sorted(inputs)[-3:] == [1, 4, 4]  # nothing but the two prompts is computed again
    assert last(run, "swapped_ns")[0] > 0
    assert last(run, "waiting_ns") == [0]
    none = VllmConfig(**{**ENGINE, "swap_space": 0.0}, preemption_mode="swap")
    recomputed = simulate(two, none, LATENCY, plain=plain)
    assert recomputed.requests.equals(simulate(two, VllmConfig(**ENGINE), LATENCY).requests)
    assert last(recomputed, "swapped_ns") == [0]
    assert last(recomputed, "waiting_ns")[0] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_offloading_size": -1}, "kv_offloading_size is -1.0: GiB >= 0 expected"),
        ({"kv_offloading_size": 1e-9}, "holds no KV block"),
        ({"kv_offloading_size": 1, "enable_prefix_caching": False}, "needs prefix caching"),
        ({"kv_offloading_size": 1, "kv_offloading_backend": "lmcache"}, "kv_offloading_backend is 'lmcache': 'native'"),
        ({"kv_offloading_disk_size": 1}, "kv_offloading_disk_size is 1.0: needs kv_offloading_size"),
        ({"preemption_mode": "abort"}, '"recompute" or "swap" expected'),
        ({"kv_bytes_per_token": 0}, "kv_bytes_per_token is 0: at least 1 expected"),
        ({"kv_links": 5}, "kv_links is 5"),
        ({"kv_links": {"h2d": 5}}, "unknown link time 'h2d'"),
        ({"kv_links": {"h2d_base": -5}}, "nanoseconds >= 0 expected"),
    ],
)
def test_bad_tiers_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        vllm_config({"num_gpu_blocks": 1000, **settings}, "engine.toml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
