"""Invariants of vLLM with KV levels below its pool and with swapping, over random workloads and engines."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.vllm.block_pool import BlockPool
from kvtwin.sim.vllm.engine import Engine
from kvtwin.sim.vllm.simulate import build_requests, simulate
from kvtwin.traces.errors import KvtwinError
from kvtwin.traces.run import Run

sys.path.insert(0, str(Path(__file__).parent))
from workloads import configs, tiered, workloads  # type: ignore[import-not-found]  # beside this file

LATENCY = LinearLatency(1_000_000, 20_000, 50, 10_000)
MANY = int(os.environ.get("KVTWIN_EXAMPLES", "200"))
QUEUES = ("waiting_ns", "prefetch_ns", "running_ns", "swapped_ns")


def column(run: Run, name: str) -> np.ndarray:
    values: np.ndarray = run.requests.column(name).to_numpy()
    return values


def check_queues(run: Run) -> None:
    """INV-Q the four queues hold a request all the time, and none for less than no time."""
    spent = [column(run, name) for name in QUEUES]
    assert all(np.all(values >= 0) for values in spent)
    assert np.array_equal(np.sum(spent, axis=0), column(run, "finish_ns") - column(run, "queued_ns"))


def check_hits(run: Run, *, num_host_blocks: int, block_size: int) -> None:
    """INV-H a hit never exceeds what was stored: block by block, in the order of the events."""
    below = column(run, "cached_host_tokens") + column(run, "cached_storage_tokens")
    assert np.all(below <= column(run, "cached_tokens"))
    assert num_host_blocks or not below.any()
    held: dict[int, set[int]] = {2: set(), 3: set()}
    names = ("level", "kind", "block_hash", "tokens")
    for level, kind, key, tokens in zip(*(run.cache.column(name).to_pylist() for name in names), strict=True):
        assert tokens > 0
        if key is None:
            continue
        assert tokens == block_size
        if kind == "prefetch_done":
            assert key in held[3]
            held[2].add(key)
        elif kind == "load_back":
            assert key in held[2]
        elif kind == "store" and level in held:
            held[level].add(key)
        elif kind == "evict" and level in held:
            held[level].remove(key)
        assert len(held[2]) <= num_host_blocks
    times = run.cache.column("time_ns").to_pylist()
    assert times == sorted(times)


@settings(max_examples=MANY)
@given(st.data())
def test_tiers_and_swapping_obey_the_invariants_on_every_path(data: st.DataObject) -> None:
    config = data.draw(tiered(data.draw(configs())))
    workload = data.draw(workloads(config.max_model_len))
    try:
        plain = simulate(workload, config, LATENCY, plain=True, record_cache=True)
    except KvtwinError as error:
        assert "never be scheduled" in str(error) or "undo one another" in str(error)
        return
    check_queues(plain)
    check_hits(plain, num_host_blocks=config.num_host_blocks, block_size=config.block_size)
    starts, ends = (plain.steps.column(name).to_numpy() for name in ("start_ns", "end_ns"))
    assert np.all(starts < ends)
    assert np.all(ends[:-1] <= starts[1:])
    for record_steps in (True, False):
        jumped = simulate(workload, config, LATENCY, record_steps=record_steps)
        assert jumped.requests.equals(plain.requests)
        assert not record_steps or jumped.steps.equals(plain.steps)


@settings(max_examples=MANY)
@given(st.data())
def test_blocks_are_conserved_on_every_level(data: st.DataObject) -> None:
    config = data.draw(tiered(data.draw(configs())))
    workload = data.draw(workloads(config.max_model_len))
    engine = Engine(config, LATENCY, plain=True)
    try:
        engine.run(build_requests(workload, config))
    except KvtwinError:
        return
    assert isinstance(engine.pool, BlockPool)
    engine.pool.check_invariants()
    assert engine.pool.num_free == config.num_gpu_blocks - 1
    if engine.offload is not None:
        for level in (engine.offload.host, engine.offload.disk):
            level.check_invariants()


@settings(max_examples=MANY)
@given(st.data())
def test_queues_add_up_without_tiers_on_both_paths(data: st.DataObject) -> None:
    config = data.draw(configs())
    workload = data.draw(workloads(config.max_model_len))
    for plain in (True, False):
        try:
            run = simulate(workload, config, LATENCY, plain=plain)
        except KvtwinError:
            return
        check_queues(run)
        assert not column(run, "prefetch_ns").any()
        assert not column(run, "swapped_ns").any()
