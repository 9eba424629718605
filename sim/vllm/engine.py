"""One vLLM engine on a virtual clock: from event to event where it can, step by step where it must."""

from __future__ import annotations

from functools import partial

import pyarrow as pa

from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.pricing import VectorPricer, pricer_for
from kvtwin.sim.links import Link
from kvtwin.sim.progress import Progress
from kvtwin.sim.vllm import handover
from kvtwin.sim.vllm.array_pool import ArrayPool
from kvtwin.sim.vllm.block_pool import BlockPool, Pool
from kvtwin.sim.vllm.block_tables import CountedBlocks, PooledBlocks
from kvtwin.sim.vllm.cache_log import CacheLog, LoggedPool
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.counted_pool import CountedPool
from kvtwin.sim.vllm.jump import JumpLoop
from kvtwin.sim.vllm.offload.by_job import JobConnector
from kvtwin.sim.vllm.offload.by_request import RequestConnector
from kvtwin.sim.vllm.offload.connector import Connector
from kvtwin.sim.vllm.plain import PlainLoop
from kvtwin.sim.vllm.recorder import UNKNOWN, RequestTimes, StepLog
from kvtwin.sim.vllm.request import IntArray, RequestBook
from kvtwin.sim.vllm.scheduler import VllmScheduler
from kvtwin.sim.vllm.swap import SwapSpace

_LEAST_PLAIN_TURNS = 4  # a handover costs about as much


class Engine:
    """Serves requests with one vLLM engine.

    Args:
        config: the engine's settings.
        latency: how long the model runs for a batch.
        host: time between steps.
        record_steps: keep a row per step.
        record_cache: keep a row per event of the KV levels; every step is taken by itself then.
        plain: take every step by itself, with the pool that says what it does: the specification; the result is the
            same, bit for bit. With KV tiers every step is taken by itself in any case: nearly every one sends blocks
            to the host.
    """

    def __init__(
        self,
        config: VllmConfig,
        latency: LatencyModel,
        host: HostTime | None = None,
        *,
        record_steps: bool = True,
        record_cache: bool = False,
        plain: bool = False,
    ) -> None:
        self._config, self._host = config, host or HostTime()
        self._is_plain = plain or record_cache
        self._pricer = VectorPricer(latency) if plain else pricer_for(latency)
        self._cache_log = CacheLog(config.block_size) if record_cache else None
        self._record_steps = record_steps
        self._log = StepLog()
        self._progress: Progress | None = None
        self.num_steps = 0
        self.pool: Pool = CountedPool(config.num_gpu_blocks)
        self.offload: Connector | None = None

    def run(self, requests: RequestBook, progress: Progress | None = None) -> RequestTimes:
        """Serve `requests` to the last token.

        Args:
            requests: the workload.
            progress: told how many requests have finished, whenever some have.

        Raises:
            KvtwinError: a waiting request can never be scheduled, or preemptions undo one another for ever.
        """
        self._progress = progress
        if self._is_plain:
            return self._run_stepping(requests, self._plain_pool())
        if self._config.kv_offloading_size:
            return self._run_stepping(requests, self._array_pool(requests))
        # Nobody shares a block: only a request that comes back after a preemption can hit one, its own.
        nothing_shared = not self._config.enable_prefix_caching or (
            requests.num_shared_keys == 0 and not self._record_steps
        )
        if nothing_shared:
            times = self._run_counted(requests)
            if times is not None:
                return times
            requests.forget_all()  # and from the beginning
        return self._run_pooled(requests)

    def steps(self, rows: IntArray) -> pa.Table:
        """The `steps` table of what was run. Only with `record_steps`.

        Args:
            rows: where each request stands in the workload's table.
        """
        assert self._record_steps, "steps were not recorded"
        return self._log.table(rows)

    def cache(self, times: RequestTimes, requests: RequestBook, rows: IntArray) -> pa.Table:
        """The `cache` table of what was run. Only with `record_cache`.

        Args:
            times, requests: of the run.
            rows: where each request stands in the workload's table.
        """
        assert self._cache_log is not None, "cache events were not recorded"
        return self._cache_log.table(times, requests.num_prompt_tokens, rows)

    def _plain_pool(self) -> Pool:
        config = self._config
        make_pool = BlockPool if self._cache_log is None else partial(LoggedPool, self._cache_log)
        return make_pool(
            config.num_gpu_blocks,
            enable_prefix_caching=config.enable_prefix_caching,
            reuse_uncached_first=config.rules.reuse_uncached_first,
        )

    def _array_pool(self, requests: RequestBook) -> ArrayPool:
        config = self._config
        return ArrayPool(
            config.num_gpu_blocks,
            num_shared_keys=requests.num_shared_keys,
            enable_prefix_caching=config.enable_prefix_caching,
            reuse_uncached_first=config.rules.reuse_uncached_first,
            counts_evicted=self._record_steps,
        )

    def _run_stepping(self, requests: RequestBook, pool: Pool) -> RequestTimes:
        self.pool = pool
        times = RequestTimes(len(requests))
        plain = self._plain_loop(requests, pool, times)
        while plain.turn():
            pass
        self.num_steps = plain.clock.num_steps
        return times

    def _run_counted(self, requests: RequestBook) -> RequestTimes | None:
        """None if somebody is preempted who could hit blocks of its own: the pool must be looked at then."""
        self.pool = pool = CountedPool(self._config.num_gpu_blocks)
        blocks = CountedBlocks(self._config, requests, pool)
        return self._run_jumping(requests, pool, blocks, may_preempt=not self._config.enable_prefix_caching)

    def _run_pooled(self, requests: RequestBook) -> RequestTimes:
        self.pool = pool = self._array_pool(requests)
        times = self._run_jumping(requests, pool, PooledBlocks(self._config, requests, pool), may_preempt=True)
        assert times is not None
        return times

    def _run_jumping(
        self, requests: RequestBook, pool: Pool, blocks: CountedBlocks | PooledBlocks, *, may_preempt: bool
    ) -> RequestTimes | None:
        times = RequestTimes(len(requests))
        plain = self._plain_loop(requests, pool, times)
        log = self._log if self._record_steps else None
        waiting = plain.scheduler.waiting
        jump = JumpLoop(
            self._config,
            requests,
            waiting,
            blocks,
            pool,
            self._pricer,
            self._host,
            times,
            log,
            may_preempt=may_preempt and not self._config.swaps,
            progress=self._progress,
        )
        cuts_prompts = self._config.long_prefill_token_threshold > 0
        while True:
            done = jump.run()
            self.num_steps = jump.num_steps
            if done:
                return times
            if not may_preempt:
                if self._progress is not None:  # all that was done is done again
                    self._progress(-sum(time_ns != UNKNOWN for time_ns in times.finish))
                return None
            handover.to_plain(jump, plain, requests, blocks)
            turns = 0
            while turns < _LEAST_PLAIN_TURNS or not handover.is_calm(plain, requests, cuts_prompts=cuts_prompts):
                turns += 1
                if not plain.turn():
                    self.num_steps = plain.clock.num_steps
                    return times
            handover.to_jump(plain, jump, blocks)

    def _plain_loop(self, requests: RequestBook, pool: Pool, times: RequestTimes) -> PlainLoop:
        config, cache_log = self._config, self._cache_log
        log = self._log if self._record_steps else None
        links = config.links()
        d2h, h2d = Link(links.d2h_base, links.d2h_per_token), Link(links.h2d_base, links.h2d_per_token)
        if config.kv_offloading_size:
            make = JobConnector if config.rules.offloads_by_job else RequestConnector
            self.offload = make(config, requests.num_keys, links, d2h, h2d, pool, times, cache_log)
        swap = SwapSpace(config.num_swap_blocks, config.block_size, d2h, h2d, cache_log) if config.swaps else None
        scheduler = VllmScheduler(config, requests, pool, self.offload, swap)
        return PlainLoop(
            config,
            requests,
            scheduler,
            self._pricer,
            self._host,
            times,
            log,
            self._progress,
            self.offload,
            cache_log,
        )
