"""What SGLang's simulation costs beside its own one-step path, and a cache by itself. `make bench`; extra_info has both."""

from __future__ import annotations

import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from kvtwin.sim.cache_replay import Prompts, prompts_of, replay
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.sglang.config import SglangConfig
from kvtwin.sim.sglang.simulate import simulate_sglang
from kvtwin.traces.readers import read_run
from kvtwin.traces.readers.mooncake import HASH_BLOCK_TOKENS
from kvtwin.traces.run import Run

LATENCY = LinearLatency(8_000_000, 30_000, 15, 12_000)
LEVELS: dict[str, dict[str, Any]] = {
    "device": {},
    "device, host, storage": {"enable_hierarchical_cache": True, "hicache_storage_backend": "file"},
}
CAPACITY_TOKENS = 1 << 22


@pytest.fixture(scope="module")
def conversation(shared: Path) -> Run:
    return read_run(shared / "data" / "traces" / "mooncake" / "conversation_trace.jsonl.gz")


@pytest.mark.benchmark(group="SGLang's core, Mooncake conversation")
@pytest.mark.parametrize("plain", [False, True], ids=["stretches", "plain"])
@pytest.mark.parametrize("levels", LEVELS)
def test_core_on_mooncake(benchmark: BenchmarkFixture, conversation: Run, levels: str, plain: bool) -> None:
    config = SglangConfig(524_288, page_size=64, **LEVELS[levels])
    core_s = []

    def once() -> Run:
        run = simulate_sglang(conversation, config, LATENCY, record_steps=False, plain=plain)
        core_s.append(run.info.metrics["core_s"])
        return run

    run = benchmark.pedantic(once, rounds=1 if plain else 3)
    benchmark.extra_info |= {
        "core_s": min(core_s),
        "num_steps": run.info.metrics["num_steps"],
        "us_per_request": round(1e6 * min(core_s) / run.requests.num_rows),
    }
    assert run.requests.column("finish_ns").null_count == 0


def lru_hits(prompts: Prompts, num_blocks: int) -> int:
    """Tokens that a plain LRU dictionary of blocks finds: about the least that a replay in Python can do."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for chain in prompts.pages:
        for block, pages in chain:
            if block not in held:
                break
            hits += pages * prompts.page_size
        for block, _ in reversed(chain):
            held[block] = None
            held.move_to_end(block)
        while len(held) > num_blocks:
            held.popitem(last=False)
    return hits


@pytest.mark.benchmark(group="a cache by itself, Mooncake conversation")
@pytest.mark.parametrize("policy", ["lru", "slru", "a dictionary"])
def test_cache_replay_of_mooncake(benchmark: BenchmarkFixture, conversation: Run, policy: str) -> None:
    prompts = prompts_of(conversation)
    times_s = []

    def once() -> int:
        started = time.perf_counter()
        hits = find()
        times_s.append(time.perf_counter() - started)
        return hits

    def find() -> int:
        if policy == "a dictionary":
            return lru_hits(prompts, CAPACITY_TOKENS // HASH_BLOCK_TOKENS)
        return replay(prompts.keys, CAPACITY_TOKENS, policy).hit_tokens

    hit_tokens = benchmark.pedantic(once, rounds=3)
    benchmark.extra_info |= {
        "hit_rate": round(hit_tokens / prompts.input_tokens, 4),
        "requests_per_s": round(len(prompts.keys) / min(times_s)),
    }
    assert hit_tokens > 0
