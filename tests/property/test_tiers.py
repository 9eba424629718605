"""Invariants of vLLM with KV levels below its pool and with swapping, over random workloads and engines."""

from __future__ import annotations

import os
import random
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.vllm.block_pool import BlockPool
from kvtwin.sim.vllm.engine import Engine
from kvtwin.sim.vllm.offload.level import READY, WRITING, Level
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
        engine.offload.host.check_invariants()
        if engine.offload.disk is not None:
            engine.offload.disk.level.check_invariants()


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


class OrderedLevel:
    """The same as `Level`, in the order of use: block -> (is ready, number of readers)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks, self.dropped = num_blocks, list[int]()
        self.held: OrderedDict[int, tuple[bool, int]] = OrderedDict()

    def touch(self, keys: list[int]) -> None:
        for key in reversed(keys):
            if key in self.held:
                self.held.move_to_end(key)

    def prepare_store(self, keys: list[int]) -> list[int] | None:
        wanted = [key for key in keys if key not in self.held]
        short = max(0, len(wanted) - (self.num_blocks - len(self.held)))
        may_go = [key for key, state in self.held.items() if state == (True, 0) and key not in keys]
        if len(may_go) < short:
            return None
        for key in may_go[:short]:
            del self.held[key]
        self.dropped += may_go[:short]
        self.held.update((key, (False, 0)) for key in wanted)
        return wanted

    def some(self, rng: random.Random, *, ready: bool, read: bool) -> list[int]:
        states = self.held.items()
        return [
            key for key, (is_ready, count) in states if is_ready == ready and (count or not read) and rng.random() < 0.5
        ]

    def set(self, keys: list[int], readers: int) -> None:
        for key in keys:
            self.held[key] = (True, self.held[key][1] + readers)


@settings(max_examples=MANY)
@given(st.integers(0, 2**32), st.sampled_from([3, 8, 20]))
def test_a_level_drops_what_was_used_longest_ago(seed: int, num_blocks: int) -> None:
    rng, dropped = random.Random(seed), list[int]()
    level = Level(num_blocks, 30, lambda keys: dropped.extend(keys.tolist()))
    plain = OrderedLevel(num_blocks)
    for _ in range(80):
        keys = rng.sample(range(30), rng.randint(1, 5))
        what = rng.choice(["store", "store", "touch", "complete", "read", "read done"])
        if what == "store":
            stored = level.prepare_store(np.array(keys))
            assert (None if stored is None else stored.tolist()) == plain.prepare_store(keys)
        elif what == "touch":
            level.touch(np.array(keys))
            plain.touch(keys)
        elif what == "complete":
            keys = plain.some(rng, ready=False, read=False)
            level.complete_store(np.array(keys, np.int64))
            plain.set(keys, 0)
        else:
            done = what == "read done"
            keys = plain.some(rng, ready=True, read=done)
            (level.read_done if done else level.read)(np.array(keys, np.int64))
            plain.set(keys, -1 if done else 1)
        level.check_invariants()
        assert dropped == plain.dropped
        assert [READY if plain.held[key][0] else WRITING for key in plain.held] == level.state[[*plain.held]].tolist()
        assert len(level) == len(plain.held)
