"""HiCache (`HiRadixCache`, `HiCacheController`): device, host and storage under one radix tree, as requests see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvtwin.sim.sglang.clock import Clock
from kvtwin.sim.sglang.hi_tree import HiRadixTree
from kvtwin.sim.sglang.pool import KvPool
from kvtwin.sim.sglang.radix_cache import RadixCache
from kvtwin.sim.sglang.radix_tree import TreeNode
from kvtwin.sim.sglang.request import SglangRequest
from kvtwin.sim.sglang.runs import Runs
from kvtwin.sim.sglang.storage import Prefetch, StorageThreads
from kvtwin.traces.errors import InputError

_TOKENS_PER_KI: Final = 1024
_NS_PER_S: Final = 1e9
_NEXT_READING_S: Final = 1e-10
# A server that starts at 0 has read its clock so often before it takes the first request.
_FIRST_READINGS: Final = 5


@dataclass(frozen=True, slots=True)
class PrefetchSettings:
    """When a prefetch from storage begins and ends.

    Attributes:
        policy: when the scheduler goes on without the rest, one of config.PREFETCH_POLICIES.
        threshold: fewest tokens worth asking for.
        timeout_base_s, timeout_per_ki_token_s: the timeout policy's limit, per prefetch and per 1,024 tokens hit.
    """

    policy: str
    threshold: int = 256
    timeout_base_s: float = 1.0
    timeout_per_ki_token_s: float = 0.25

    @classmethod
    def of(cls, policy: str, extra_config: Mapping[str, Any]) -> PrefetchSettings:
        """From `hicache_storage_backend_extra_config`, whose other keys are the backend's own.

        Raises:
            InputError: a value that SGLang refuses.
        """
        threshold = extra_config.get("prefetch_threshold", 256)
        if not isinstance(threshold, int):
            raise InputError(f"prefetch_threshold is {threshold!r}: an integer expected")
        limits = []
        for name, default in (("prefetch_timeout_base", 1), ("prefetch_timeout_per_ki_token", 0.25)):
            value = extra_config.get(name, default)
            if not isinstance(value, int | float):
                raise InputError(f"{name} is {value!r}: seconds expected")
            limits.append(float(value))
        return cls(policy, threshold, *limits)


class HiRadixCache(RadixCache):
    """A prefix cache over device and host, and storage if there is one; see `HostKvCache` for the calls.

    Args:
        tree: the cached prefixes on device and host.
        pool: the device's KV slots.
        clock: virtual time.
        caches_outputs: a finished request leaves its outputs as well (0.5.9).
        storage: the third level's threads; None without one.
        prefetch: when prefetches begin and end.

    Attributes:
        num_prefetches_limited: how often no prefetch was begun because those of other waiting requests held all the
            host memory that prefetches may hold (`HiCacheController.prefetch_rate_limited`). The request computes what
            storage could have given it, and the queue grows.
    """

    def __init__(
        self,
        tree: HiRadixTree,
        pool: KvPool,
        clock: Clock,
        *,
        caches_outputs: bool,
        storage: StorageThreads | None,
        prefetch: PrefetchSettings,
    ) -> None:
        super().__init__(tree, pool, caches_outputs=caches_outputs)
        self._levels, self._clock, self._prefetch = tree, clock, prefetch
        self._storage = tree.storage = storage
        self._prefetches: dict[int, Prefetch] = {}
        self._prefetch_tokens = self.num_prefetches_limited = 0
        self._instant_ns, self._first_reading = 0, -_FIRST_READINGS
        # Prefetches may hold this much of the host memory that the device does not mirror.
        self._max_prefetch_tokens = int(0.8 * (tree.host.size - pool.size))

    def match(self, request: SglangRequest, num_tokens: int) -> None:
        """Look up its first `num_tokens` tokens on both levels."""
        self._note_instant()
        found = self._levels.match_path(self.key(request), num_tokens)
        request.prefix_len, request.last_node, request.host_hit_len, request.last_host_node = found

    def _insert(self, request: SglangRequest, key: Runs, num_tokens: int, *, chunked: bool) -> TreeNode:
        # What storage did before now comes first.
        self.advance(self._clock.now_ns)
        self._note_instant()
        if self._caches_outputs and not chunked:
            self._levels.time += 1  # 0.5.9: `prefill_finished_ts`, or `completion_time`
        return super()._insert(request, key, num_tokens, chunked=chunked)

    def _note_instant(self) -> None:
        if self._clock.now_ns != self._instant_ns:
            self._instant_ns, self._first_reading = self._clock.now_ns, self._levels.time

    def _reading_s(self) -> float:
        """A reading of SGLang's clock as the oracle has it: no two are equal, each is 0.1 ns after the last."""
        reading_s = self._clock.now_ns / _NS_PER_S
        for _ in range(self._levels.time - self._first_reading):
            reading_s += _NEXT_READING_S
        return reading_s

    def evict(self, num_tokens: int) -> None:
        """Free at least `num_tokens` of the device, if that many are evictable."""
        self.advance(self._clock.now_ns)
        self._levels.evict(num_tokens)

    def init_load_back(self, request: SglangRequest) -> None:
        """Bring its host hit back to the device, or not; sets prefix_len and last_node."""
        node = self._levels.load_back(request.last_host_node)
        request.last_node = node
        request.loaded_len = node.end - request.prefix_len
        request.prefix_len = node.end

    def ready_to_load_host_cache(self) -> int | None:
        """Start the loads asked for; returns when they end."""
        return self._levels.start_loading()

    def advance(self, time_ns: int) -> None:
        """Let storage work up to a time."""
        if self._storage is not None:
            self._storage.advance(time_ns)

    def check_hicache_events(self) -> None:
        """Take in finished copies and loads, revoked prefetches, backups, and host slots given back."""
        self.advance(self._clock.now_ns)
        self._levels.check_writes()
        self._levels.check_loads()
        if self._storage is None:
            return
        messages = self._storage.messages
        for row in messages.revoked:
            operation = self._prefetches.pop(row, None)
            if operation is not None:
                self._release(operation)
        for node in messages.backed_up:
            self._levels.release_host(node)
        self._levels.host.free(messages.released_tokens)
        messages.revoked.clear()
        messages.backed_up.clear()
        messages.released_tokens = 0

    def prefetch(self, request: SglangRequest) -> None:
        """A request has come to the queue, and was matched: start to read what storage may hold of it."""
        request.prefetch_ns = request.storage_hit_len = 0
        if self._storage is None or not request.last_node.on_host:
            return
        self.advance(self._clock.now_ns)
        self._levels.time += 1  # `Req.last_tic`
        start = request.prefix_len + request.host_hit_len
        num_tokens = request.fill_len - start
        started = self._start_prefetch(request, start, num_tokens - num_tokens % self._levels.page_size)
        started = started or request.row in self._prefetches
        self.observer.prefetch_asked(request.row, num_tokens, started)
        self._levels.time += 2  # `PrefetchOperation.start_time`, `wait_queue_entry_time`

    def _start_prefetch(self, request: SglangRequest, start: int, num_tokens: int) -> bool:
        assert self._storage is not None
        if num_tokens < self._prefetch.threshold:
            return False
        if self._prefetch_tokens >= self._max_prefetch_tokens:
            self.num_prefetches_limited += 1
            return False
        node = request.last_host_node
        node.host_ref += 1
        host = self._levels.host
        if not host.alloc(num_tokens):
            self._levels.evict_host(num_tokens)
            if not host.alloc(num_tokens):
                self._levels.release_host(node)
                return False
        operation = Prefetch(request, self.key(request), start, num_tokens, node, self._clock.now_ns, self._reading_s())
        self._storage.prefetch(operation)
        self._prefetches[request.row] = operation
        self._prefetch_tokens += num_tokens
        return True

    def _release(self, operation: Prefetch) -> None:
        self._levels.release_host(operation.node)
        self._prefetch_tokens -= operation.num_tokens

    def check_prefetch_progress(self, request: SglangRequest) -> bool:
        """Whether the request may be considered: its prefetch has ended, or is ended now and what it read is kept."""
        operation = self._prefetches.get(request.row)
        if operation is None:
            return True
        self.advance(self._clock.now_ns)
        if not self._may_end(operation):
            return False
        operation.terminated = True
        num_tokens = operation.completed
        known = self._levels.insert_host(operation.node, operation.key, operation.start, operation.start + num_tokens)
        self._levels.host.free(known)
        operation.end(self._clock.now_ns)
        request.storage_hit_len = num_tokens - known
        del self._prefetches[request.row]
        self._release(operation)
        self.observer.prefetch_taken(request.row, num_tokens, operation.hit_tokens)
        return True

    def holds_up(self, request: SglangRequest) -> bool:
        """Whether the scheduler, if it looked now, would let it wait on for its prefetch."""
        operation = self._prefetches.get(request.row)
        if operation is None or self._storage is None:
            return False
        self.advance(self._clock.now_ns)
        return request.row not in self._storage.messages.revoked and not self._may_end(operation)

    def _may_end(self, operation: Prefetch) -> bool:
        if self._prefetch.policy == "best_effort" or operation.failed:
            return True
        complete = operation.hit_tokens > 0 and operation.completed == operation.hit_tokens
        if complete or self._prefetch.policy == "wait_complete":
            return complete
        limit_s = self._prefetch.timeout_base_s + self._pages_timeout_s(operation)
        return self._clock.now_ns / _NS_PER_S - operation.start_s > limit_s

    def _pages_timeout_s(self, operation: Prefetch) -> float:
        page_size = self._levels.page_size
        return operation.hit_tokens // page_size * (page_size / _TOKENS_PER_KI * self._prefetch.timeout_per_ki_token_s)

    def next_event_ns(self) -> int | None:
        """When the next transfer after now ends, or a prefetch times out (a microsecond later, to be past it)."""
        now_ns = self._clock.now_ns
        self.advance(now_ns)
        times_ns = [self._levels.next_ack_ns()]
        if self._storage is not None:
            times_ns.append(self._storage.next_event_ns())
            if self._prefetch.policy == "timeout":
                base_s = self._prefetch.timeout_base_s
                times_ns += [
                    int((operation.start_s + base_s + self._pages_timeout_s(operation)) * _NS_PER_S) + 1000
                    for operation in self._prefetches.values()
                ]
        coming = [time_ns for time_ns in times_ns if time_ns is not None and time_ns > now_ns]
        return min(coming) if coming else None
