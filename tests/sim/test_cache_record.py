"""What a simulated server's cache did, recorded: every token accounted for, the same on every path."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.sglang.config import SglangConfig
from kvtwin.sim.sglang.simulate import simulate_sglang
from kvtwin.traces.readers import read_run
from kvtwin.traces.readers.cache_events import read_cache_events
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.validate.cache import cache_figures, compare_cache

LATENCY = LinearLatency(5_000_000, 2_000, 20, 50_000)
LEVELS = {
    "enable_hierarchical_cache": True, "hicache_write_policy": "write_through", "hicache_storage_backend": "file",
    "hicache_storage_prefetch_policy": "wait_complete", "hicache_ratio": 1.5,
}  # fmt: skip


def conversations() -> Run:
    """40 conversations of 4 turns, interleaved; every turn repeats the turns before it."""
    rows = [(turn * 40 + one, one, turn) for turn in range(4) for one in range(40)]
    columns = {
        "request_id": [f"r{place}" for place, _, _ in rows],
        "arrival_ns": [place * 400_000_000 for place, _, _ in rows],
        "input_tokens": [512 * (turn + 1) for _, _, turn in rows],
        "output_tokens": [5] * len(rows),
        "block_hashes": [[one * 10 + part for part in range(turn + 1)] for _, one, turn in rows],
    }
    info = RunInfo("workload", hash_block_tokens=512)
    return Run(info, {"requests": from_columns("requests", columns, "test")}, name="conversations")


@pytest.mark.parametrize("policy", ["write_through", "write_through_selective", "write_back"])
def test_levels_bring_back_what_the_device_dropped(policy: str, tmp_path: Path) -> None:
    workload = conversations()
    # 0.5.9 stops under write_back: it drops a host node before its child.
    version = "0.5.6" if policy == "write_back" else "0.5.9"
    device = SglangConfig(16_384, version, page_size=16)
    levels = SglangConfig(16_384, version, page_size=16, **{**LEVELS, "hicache_write_policy": policy})  # type: ignore[arg-type]
    runs = [simulate_sglang(workload, config, LATENCY, record_cache=True) for config in (device, levels)]
    plain = simulate_sglang(workload, levels, LATENCY, record_cache=True, plain=True)
    assert plain.cache.equals(runs[1].cache)
    alone, tiered = (cache_figures(run.cache) for run in runs)
    assert tiered["hit_rate"] > alone["hit_rate"]
    assert tiered["load_back_tokens_l1"][0] > 0
    for run, figures in zip(runs, (alone, tiered), strict=True):
        hits = {level: figures.get(f"hit_tokens_l{level}", (0, 0))[0] for level in (1, 2, 3)}
        cached, host, storage = (
            sum(run.requests.column(name).to_pylist())
            for name in ("cached_tokens", "cached_host_tokens", "cached_storage_tokens")
        )
        assert hits == {1: cached - host - storage, 2: host, 3: storage}
        times = run.cache.column("time_ns").to_pylist()
        assert times == sorted(times)
    written = read_cache_events(runs[1].write(tmp_path / "run"))
    assert all(check.error == 0 for check in compare_cache(written, runs[1].cache, name="run"))


def test_a_storage_with_a_limit_drops_its_oldest_pages_and_brings_back_less() -> None:
    def figures(max_tokens: int | None) -> dict[str, tuple[float, int]]:
        limit = {"hicache_storage_backend_extra_config": {"max_tokens": max_tokens}}
        config = SglangConfig(4_096, page_size=16, **LEVELS | limit)  # type: ignore[arg-type]
        return cache_figures(simulate_sglang(conversations(), config, LATENCY, record_cache=True).cache)

    without, wide, narrow = (figures(max_tokens) for max_tokens in (None, 1 << 20, 16_384))
    assert without == wide
    assert "evict_tokens_l3" not in without
    assert narrow["evict_tokens_l3"][0] > 0
    assert narrow.get("hit_tokens_l3", (0, 0))[0] < without["hit_tokens_l3"][0]


def test_recording_changes_nothing(shared: Path) -> None:
    trace = read_run(shared / "data" / "traces" / "mooncake" / "synthetic_trace.jsonl.gz")
    short = Run(trace.info, {"requests": trace.requests.slice(0, 300)}, name="short")
    config = SglangConfig(400_000, page_size=64, **LEVELS)  # type: ignore[arg-type]
    with_events, without = (
        simulate_sglang(short, config, LATENCY, record_cache=record_cache) for record_cache in (True, False)
    )
    assert with_events.requests.equals(without.requests)
    assert with_events.steps.equals(without.steps)
    assert not without.has("cache")
