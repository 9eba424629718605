"""Invariants of every simulated SGLang run, over random workloads and servers; decode stretches equal single steps."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.sglang.config import SglangConfig
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
# KVTWIN_EXAMPLES=5000 for a longer search.
MANY = int(os.environ.get("KVTWIN_EXAMPLES", "300"))
HOSTS = st.sampled_from([HostTime(), HostTime(200_000, 10_000, 100_000, 5_000, 30_000), HostTime(3_000_000)])


class CutOffs(CacheLog):  # type: ignore[misc]  # Any: found beside the oracle's cases
    """Counts the tokens that were loaded into nodes just dropped: write_back may do so (`HiRadixTree.load_back`)."""

    num_tokens = 0

    def loaded_back(self, node: TreeNode, num_tokens: int) -> None:
        """After a load back."""
        super().loaded_back(node, num_tokens)
        self.num_tokens += num_tokens if is_cut_off(node) else 0


class Checked(OracleLog):  # type: ignore[misc]  # Any: found beside the oracle's cases
    """Writes everything down, and checks the invariants whenever the scheduler has decided."""

    def __init__(self, config: SglangConfig, requests: Sequence[SglangRequest]) -> None:
        super().__init__(CutOffs(levels=config.enable_hierarchical_cache, now_ns=lambda: self.now_ns))
        self._config, self._requests = config, requests
        self.last_end_ns = 0

    def launched(self, step: Launched) -> None:
        """After a step."""
        super().launched(step)
        self._check(step.batch.requests, step.start_ns, step.end_ns)

    def stretched(self, stretch: Stretch) -> None:
        """After many."""
        assert len(stretch) >= 1
        assert all(end <= start for end, start in zip(stretch.end_ns, stretch.start_ns[1:], strict=False))
        super().stretched(stretch)
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


def is_lost(request: SglangRequest, config: SglangConfig) -> bool:
    """Whether SGLang has forgotten a request: preempted for one that was then not admitted (`_new_prefill`)."""
    return config.enable_priority_scheduling and request.is_retracted


def run_engine(
    workload: Run, config: SglangConfig, host: HostTime, *, plain: bool
) -> tuple[Checked, SglangEngine, list[SglangRequest], str]:
    """What was written down, the engine, its requests, and why it stopped ("" at the end of the workload)."""
    requests = build_requests(workload, config)
    log = Checked(config, requests)
    log.engine = engine = build_engine(config, LATENCY, host, observer=log, plain=plain)
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
    host = data.draw(HOSTS)
    plain, plain_engine, _, end = run_engine(workload, config, host, plain=True)
    jumped, engine, _, other_end = run_engine(workload, config, host, plain=False)
    assert jumped.steps == plain.steps
    assert jumped.times == plain.times
    assert other_end == end
    assert engine.num_steps == plain_engine.num_steps
    # Where it stops is the same, but not how far into that step.
    assert end or engine.scheduler.new_token_ratio == plain_engine.scheduler.new_token_ratio


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
