"""Who may join a prefill batch, and with how many tokens (`managers/schedule_policy.py`, `PrefillAdder`)."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Final

from kvtwin.sim.sglang.cache import KvCache
from kvtwin.sim.sglang.config import SglangConfig
from kvtwin.sim.sglang.pool import KvPool
from kvtwin.sim.sglang.request import SglangRequest

# Outputs beyond this many tokens are not reserved (CLIP_MAX_NEW_TOKENS).
CLIP_MAX_NEW_TOKENS: Final = 4096
_IGNORE_EOS_RESERVE_TOKENS: Final = 1


class AddReqResult(Enum):
    """What came of trying to add a request."""

    CONTINUE = auto()
    NO_TOKEN = auto()
    OTHER = auto()


class PrefillAdder:
    """Budgets of one try to form a prefill batch.

    Args:
        config: the server's settings.
        cache, pool: the KV cache and its device slots; their sizes are read live.
        running: the running requests.
        new_token_ratio: share of their remaining outputs that is held free for them.
    """

    def __init__(
        self,
        config: SglangConfig,
        cache: Any,
        pool: KvPool,
        running: list[SglangRequest],
        new_token_ratio: float,
    ) -> None:
        self._config, self._pool, self._ratio = config, pool, new_token_ratio
        self._running = running
        self._cache: KvCache = cache
        self._host_cache = cache  # asked for load-backs only where a host hit can occur
        mixed = len(running) if config.mixes_chunks else 0
        self._rem_input = config.max_prefill_tokens - mixed
        self._rem_chunk = None if config.chunk_tokens is None else config.chunk_tokens - mixed
        self._cur_offset = mixed
        # Upstream adds the sum to the int, in this order: the last bit of the float depends on it.
        self._total_offset: float = mixed
        if running:
            ratio, clip = new_token_ratio, CLIP_MAX_NEW_TOKENS
            self._total_offset += sum([
                (left if left < clip else clip) * ratio  # noqa: FURB136 - 1e6 calls less
                for request in running
                for left in (request.max_new_tokens - request.num_outputs,)
            ])  # fmt: skip
        self.can_run: list[SglangRequest] = []
        self.new_chunked: SglangRequest | None = None
        self.preempted: list[SglangRequest] = []
        self._ending: list[tuple[float, int]] | None = None

    def _reserve(self, request: SglangRequest) -> float:
        left = request.max_new_tokens - request.num_outputs
        return (min(CLIP_MAX_NEW_TOKENS, left)) * self._ratio

    def _rem_total(self) -> float:
        return self._pool.available + self._cache.evictable_size() - self._total_offset

    def _cur_rem(self) -> int:
        return self._pool.available + self._cache.evictable_size() - self._cur_offset

    def _spend(self, num_tokens: int, max_new_tokens: int) -> None:
        num_tokens = self._pool.ceil(num_tokens)
        self._total_offset += num_tokens + max_new_tokens
        self._cur_offset += num_tokens
        self._rem_input -= num_tokens
        if self._rem_chunk is not None:
            self._rem_chunk -= num_tokens

    def _budget_state(self) -> AddReqResult:
        if self._rem_total() <= 0 or self._cur_rem() <= 0:
            return AddReqResult.NO_TOKEN
        if self._rem_input <= 0 or (self._rem_chunk is not None and self._rem_chunk <= 0):
            return AddReqResult.OTHER
        return AddReqResult.CONTINUE

    def add_chunked_req(self, request: SglangRequest) -> SglangRequest | None:
        """The next chunk of a request whose prefill has begun; returns it if more chunks remain."""
        assert self._rem_chunk is not None
        rem = min(self._rem_chunk, int(self._rem_total()))
        if rem <= 0 and self._config.rules.starved_chunk_goes_on:
            rem = self._rem_chunk
        truncated = request.extend_input_len > rem
        request.extend_input_len = min(request.extend_input_len, rem)
        request.fill_len = request.prefix_len + request.extend_input_len
        self.can_run.append(request)
        reserve = 0 if truncated else min(request.max_new_tokens, CLIP_MAX_NEW_TOKENS)
        self._spend(request.extend_input_len, reserve)
        return request if truncated else None

    def add_one_req(self, request: SglangRequest) -> AddReqResult:
        """Try to admit a waiting request, which has just been matched."""
        if self._cache.disable:
            return self._add_without_radix_cache(request)
        left = max(request.max_new_tokens - request.num_outputs, 0)
        total = request.extend_input_len + min(left, CLIP_MAX_NEW_TOKENS)
        if total >= self._rem_total():
            return AddReqResult.NO_TOKEN
        real_input = self._pool.ceil(request.extend_input_len - request.host_hit_len)
        if real_input >= self._rem_input and self.can_run:
            return AddReqResult.OTHER
        node = request.last_node
        self._cache.inc_lock_ref(node)
        try:
            if total >= self._rem_total():  # the lock may have made less evictable
                return AddReqResult.NO_TOKEN
            refusal = self._add_locked(request)
        finally:
            # A load-back moves `last_node`; upstream unlocks the node it has locked.
            self._cache.dec_lock_ref(node)
        return refusal or self._budget_state()

    def _add_locked(self, request: SglangRequest) -> AddReqResult | None:
        """Take the request whole, or its first chunk; a reason if neither fits."""
        if request.host_hit_len > 0:
            self._host_cache.init_load_back(request)
            request.extend_input_len = request.fill_len - request.prefix_len
            request.cache_protected_len = request.prefix_len
        num_tokens = self._pool.ceil(request.extend_input_len)
        if num_tokens >= self._rem_input and self.can_run:
            return AddReqResult.OTHER
        if self._rem_chunk is None or num_tokens <= self._rem_chunk:
            self.can_run.append(request)
            self._cache.inc_lock_ref(request.last_node)
            self._spend(num_tokens, min(request.max_new_tokens, CLIP_MAX_NEW_TOKENS))
            return None
        chunk = self._rem_chunk // self._pool.page_size * self._pool.page_size
        if chunk <= 0:
            return AddReqResult.OTHER
        self._take_first_chunk(request, chunk)
        self._cache.inc_lock_ref(request.last_node)
        return None

    def _take_first_chunk(self, request: SglangRequest, num_tokens: int) -> None:
        request.extend_input_len = num_tokens
        request.fill_len = request.prefix_len + num_tokens
        self.can_run.append(request)
        self.new_chunked = request
        self._spend(num_tokens, 0)

    def _add_without_radix_cache(self, request: SglangRequest) -> AddReqResult:
        """Every request runs to its last token (`add_one_req_ignore_eos`): follow memory until each one ends."""
        if self._pool.ceil(request.extend_input_len) > min(self._cur_rem(), self._rem_total()):
            return AddReqResult.NO_TOKEN
        if not self._fits_until_the_end(request):
            return AddReqResult.NO_TOKEN
        if self._rem_chunk is None or request.extend_input_len <= self._rem_chunk:
            self.can_run.append(request)
            self._spend(request.extend_input_len, min(request.max_new_tokens, CLIP_MAX_NEW_TOKENS))
        elif self._rem_chunk <= 0:
            return AddReqResult.OTHER
        else:
            self._take_first_chunk(request, self._rem_chunk)
        return self._budget_state()

    def _fits_until_the_end(self, request: SglangRequest) -> bool:
        self._note_ending(request)
        assert self._ending is not None
        left = self._cur_rem() - self._pool.ceil(request.extend_input_len)
        freed = 0
        for place, (tokens_left, tokens_occupied) in enumerate(self._ending):
            remaining = len(self._ending) - place
            if left + freed - tokens_left * remaining <= _IGNORE_EOS_RESERVE_TOKENS * remaining:
                return False
            freed += tokens_occupied
        return True

    def _note_ending(self, request: SglangRequest) -> None:
        """Add a request to the list of (tokens left, tokens occupied), sorted by tokens left.

        The first time all are listed; a later request goes before the first that has as much left, but before the
        last one if none has (upstream's loop ends there).
        """
        if self._ending is None:
            everyone = [request, *self._running, *self.can_run]
            self._ending = sorted((e for r in everyone if (e := _ending_of(r))[0] > 0), key=lambda entry: entry[0])
            return
        entry = _ending_of(request)
        if entry[0] <= 0:
            return
        place = 0
        for place, (tokens_left, _) in enumerate(self._ending):  # noqa: B007 - the last index is wanted
            if entry[0] <= tokens_left:
                break
        self._ending.insert(place, entry)

    def preempt_to_schedule(
        self, request: SglangRequest, running: list[SglangRequest], release: Callable[[SglangRequest, int], None]
    ) -> list[SglangRequest] | None:
        """Take places from running requests of lower priority.

        Args:
            request: who wants to run.
            running: the running requests.
            release: frees a victim, given how many requests remain.

        Returns:
            The requests that go on running, or None if preemption would not help.
        """
        victims = self._victims(request, running)
        if victims is None:
            return None
        kept: list[SglangRequest] = []
        num_released = 0
        for candidate in running:
            if candidate not in victims:
                kept.append(candidate)
                continue
            self._total_offset -= self._reserve(candidate)
            num_released += 1
            release(candidate, len(running) - num_released)
        self._running = kept
        self.preempted.extend(victims)
        return kept

    def _victims(self, request: SglangRequest, running: list[SglangRequest]) -> dict[SglangRequest, None] | None:
        sign = 1 if self._config.schedule_low_priority_values_first else -1
        candidates = [r for r in running if r not in self.preempted]
        if self._config.rules.preemption_skips_finished:
            candidates = [r for r in candidates if not r.finished]
        candidates.sort(key=lambda r: (-sign * r.priority, -r.queue_entry))
        needed = request.extend_input_len + min(request.max_new_tokens, CLIP_MAX_NEW_TOKENS) - self._rem_total()
        victims: dict[SglangRequest, None] = {}
        for candidate in candidates:
            difference = -sign * (request.priority - candidate.priority)
            if difference <= self._config.priority_scheduling_preemption_threshold:
                break
            victims[candidate] = None
            needed -= self._reserve(candidate)
            if needed <= 0:
                break
        return victims if victims and needed <= 0 else None


def _ending_of(request: SglangRequest) -> tuple[float, int]:
    return request.max_new_tokens - request.num_outputs, request.num_tokens
