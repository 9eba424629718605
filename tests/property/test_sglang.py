"""Invariants of every simulated SGLang run, over random workloads and servers; decode stretches equal single steps."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.regression import RegressionLatency
from kvtwin.sim.sglang.batch import MIXED
from kvtwin.sim.sglang.config import PREFETCH_POLICIES, WRITE_POLICIES, SglangConfig
from kvtwin.sim.sglang.engine import Launched, SglangEngine
from kvtwin.sim.sglang.radix_tree import TreeNode
from kvtwin.sim.sglang.request import SglangRequest
from kvtwin.sim.sglang.simulate import build_engine, build_requests, simulate_sglang
from kvtwin.sim.sglang.stretch import Stretch
from kvtwin.traces.errors import KvtwinError
from kvtwin.traces.run import Run

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "oracle")]
from compare_sglang_sched import OracleLog  # type: ignore[import-not-found]  # every decision
from sglang_cache_log import CacheLog, is_cut_off  # type: ignore[import-not-found]  # beside it
from sglang_invariants import check_tables  # type: ignore[import-not-found]  # beside this file
from sglang_workloads_random import configs, workloads  # type: ignore[import-not-found]  # beside this file

LATENCY = LinearLatency(1_000_000, 20_000, 50, 10_000)
# Each is priced its own way: closed form, one by one in floats (it looks at the longest context), in vectors.
LATENCIES: st.SearchStrategy[LatencyModel] = st.sampled_from(
    [
        LATENCY,
        RegressionLatency({"step": 1e6, "prefill_pairs": 3.0, "decode_context": 60.5, "decode_context_max": 900.0}),
        RegressionLatency({"step": 2e6, "num_tokens": 2.1e4, "decode_context": -40.0}),
    ]
)
# KVTWIN_EXAMPLES=5000 for a longer search.
MANY = int(os.environ.get("KVTWIN_EXAMPLES", "300"))
HOSTS = st.sampled_from([HostTime(), HostTime(200_000, 10_000, 100_000, 5_000, 30_000), HostTime(3_000_000)])


class CutOffs(CacheLog):  # type: ignore[misc]  # Any: found beside the oracle's cases
    """Counts the tokens that were loaded into nodes just dropped: write_back may do so (`HiRadixTree.load_back`)."""

    num_tokens = num_storage_evictions = 0

    def dropped_from_storage(self, time_ns: int, num_tokens: int) -> None:
        """After an eviction from storage."""
        self.num_storage_evictions += 1

    def loaded_back(self, node: TreeNode, num_tokens: int) -> None:
        """After a load back."""
        super().loaded_back(node, num_tokens)
        self.num_tokens += num_tokens if is_cut_off(node) else 0


# What a run may do that another way of taking its steps could get wrong; test_every_path_is_taken counts them.
PATHS = (
    *("chunk", "mixed", "retraction", "preemption", "lost", "host load", "host eviction", "storage eviction"),
    *("prefetch", "prefetch revoked", "prefetch cut short", "stretch", "stretch that cannot evict"),
    *(f"write: {policy}" for policy in WRITE_POLICIES),
    *(f"prefetch: {policy}" for policy in PREFETCH_POLICIES),
)


class Checked(OracleLog):  # type: ignore[misc]  # Any: found beside the oracle's cases
    """Writes everything down, and checks the invariants whenever the scheduler has decided."""

    def __init__(self, config: SglangConfig, requests: Sequence[SglangRequest]) -> None:
        super().__init__(CutOffs(levels=config.enable_hierarchical_cache, now_ns=lambda: self.now_ns))
        self._config, self._requests = config, requests
        self.last_end_ns = 0
        self.paths = Counter[str]()

    def launched(self, step: Launched) -> None:
        """After a step."""
        batch, taken_out = step.batch, set(self.engine.scheduler.requeued)
        self.paths += Counter({
            "chunk": int(batch.chunked is not None), "mixed": int(batch.mode == MIXED),
            "retraction": len(batch.retracted), "preemption": len(taken_out - set(batch.retracted)),
        })  # fmt: skip
        super().launched(step)
        self._check(step.batch.requests, step.start_ns, step.end_ns)

    def stretched(self, stretch: Stretch) -> None:
        """After many."""
        assert len(stretch) >= 1
        assert all(end <= start for end, start in zip(stretch.end_ns, stretch.start_ns[1:], strict=False))
        super().stretched(stretch)
        self.paths["stretch"] += len(stretch) > 1
        asked = len(stretch.requests) * self._config.page_size
        self.paths["stretch that cannot evict"] += len(stretch) > 1 and stretch.available[-2] < asked
        self._check(stretch.requests, stretch.start_ns[0], stretch.end_ns[-1])

    def _check(self, batch: Sequence[SglangRequest], start_ns: int, end_ns: int) -> None:
        """INV-1 every token of the pool is free, cached, locked or private to one request; INV-2 the clock is
        monotone; INV-3 no request is in two places, nor more than max_running_requests in a batch."""
        scheduler = self.engine.scheduler
        pool, cache = scheduler.pool, scheduler.cache
        live = [request for request in self._requests if request.kv_len and not request.finished]
        private = sum(pool.ceil(request.kv_len) - request.cache_protected_len for request in live)
        cached = 0 if cache.disable else cache.evictable_size() + cache.protected_size()
        assert 0 <= pool.available + cached + private - pool.size <= self.cache.num_tokens  # see `CutOffs`
        assert self.last_end_ns <= start_ns < end_ns
        self.last_end_ns = end_ns
        assert len(set(batch)) == len(batch) <= self._config.max_running_requests
        assert not set(batch) & set(scheduler.waiting)


def paths_of(log: Checked, config: SglangConfig, requests: Sequence[SglangRequest]) -> Counter[str]:
    """How often a run has taken each of PATHS."""
    paths = log.paths + Counter({"lost": sum(is_lost(request, config) for request in requests)})
    for step in log.steps:
        for kind, _, *values in step[19]:
            if kind == "w" and values[0]:
                paths[f"write: {config.hicache_write_policy}"] += 1
            elif kind == "l" and values[0]:
                paths["host load"] += 1
            elif kind in ("p", "v", "q", "e"):
                paths["prefetch"] += kind == "p" and values[2]
                paths["prefetch revoked"] += kind == "v"
                paths["prefetch cut short"] += kind == "e" and values[2]
                paths[f"prefetch: {config.hicache_storage_prefetch_policy}"] += kind == "q" and values[1] > 0
        paths["host eviction"] += sum(freed > 0 for *_, freed in step[20])
    paths["storage eviction"] += log.cache.num_storage_evictions
    return paths


def is_lost(request: SglangRequest, config: SglangConfig) -> bool:
    """Whether SGLang has forgotten a request: preempted for one that was then not admitted (`_new_prefill`)."""
    return config.enable_priority_scheduling and request.is_retracted


def run_engine(
    workload: Run, config: SglangConfig, host: HostTime, latency: LatencyModel = LATENCY, *, plain: bool
) -> tuple[Checked, SglangEngine, list[SglangRequest], str]:
    """What was written down, the engine, its requests, and why it stopped ("" at the end of the workload)."""
    requests = build_requests(workload, config)
    log = Checked(config, requests)
    log.engine = engine = build_engine(config, latency, host, observer=log, plain=plain)
    if not config.disable_radix_cache:
        engine.scheduler.cache.observer = log.cache
    try:
        engine.run(requests)
    except KvtwinError as error:
        assert "stops here" in str(error) or "never be scheduled" in str(error) or "dies" in str(error)
        return log, engine, requests, str(error)
    return log, engine, requests, ""


@settings(max_examples=MANY)
@given(st.data())
def test_stretches_equal_the_plain_path_bit_for_bit(data: st.DataObject) -> None:
    config = data.draw(configs())
    workload = data.draw(workloads(config))
    host, latency = data.draw(HOSTS), data.draw(LATENCIES)
    plain, plain_engine, _, end = run_engine(workload, config, host, latency, plain=True)
    jumped, engine, _, other_end = run_engine(workload, config, host, latency, plain=False)
    assert jumped.steps == plain.steps
    assert jumped.times == plain.times
    assert other_end == end
    assert engine.num_steps == plain_engine.num_steps
    # Where it stops is the same, but not how far into that step.
    assert end or engine.scheduler.new_token_ratio == plain_engine.scheduler.new_token_ratio


def test_every_path_is_taken() -> None:
    paths = Counter[str]()

    @settings(max_examples=400, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def count(data: st.DataObject) -> None:
        config = data.draw(configs())
        workload = data.draw(workloads(config))
        log, _, requests, _ = run_engine(workload, config, data.draw(HOSTS), plain=False)
        paths.update(paths_of(log, config, requests))

    count()
    assert [path for path in PATHS if not paths[path]] == []


@settings(max_examples=150)
@given(st.data())
def test_everything_is_served_and_given_back(data: st.DataObject) -> None:
    config = data.draw(configs())
    workload = data.draw(workloads(config))
    log, engine, requests, end = run_engine(workload, config, HostTime(), plain=False)
    if end:
        return
    pool, cache = engine.scheduler.pool, engine.scheduler.cache
    unserved = [request for request in requests if request.num_outputs < request.max_new_tokens]
    assert all(is_lost(request, config) for request in unserved)
    assert all(0 <= request.num_cached_tokens < request.num_prompt_tokens for request in requests)
    counted = pool.available + cache.evictable_size() + cache.protected_size()
    assert 0 <= counted - pool.size <= log.cache.num_tokens
    # A copy's lock is taken off when the next prefill is tried, so the last ones stay.
    assert config.enable_hierarchical_cache or cache.protected_size() == 0


@settings(max_examples=100)
@given(st.data())
def test_a_run_is_whole_and_the_same_twice_and_on_both_paths(data: st.DataObject) -> None:
    config = data.draw(configs())
    workload = data.draw(workloads(config))
    host = data.draw(HOSTS)
    runs: list[Run] = []
    for plain in (False, False, True):
        try:
            runs.append(simulate_sglang(workload, config, LATENCY, host, plain=plain))
        except KvtwinError:
            assert not runs
    for other in runs[1:]:
        assert other.requests.equals(runs[0].requests)
        assert other.steps.equals(runs[0].steps)
    if runs:
        check_tables(runs[0])
