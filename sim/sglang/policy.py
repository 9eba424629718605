"""The order of the waiting queue (`managers/schedule_policy.py`, `SchedulePolicy`).

Every sort is stable over the queue's current order. Matching for `lpm` and `dfs-weight` goes through the cache itself:
it refreshes access times and may split nodes, so it is part of the cache's state.
"""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any, Final

from kvtwin.sim.sglang.cache import KvCache
from kvtwin.sim.sglang.config import SglangConfig
from kvtwin.sim.sglang.request import SglangRequest

# IN_BATCH_PREFIX_CACHING_CHECK_THRESHOLD and ..._DEPRIORITIZE_THRESHOLD of upstream, in tokens.
_CHECK_TOKENS: Final = 32
_SHARED_TOKENS: Final = 32
# Longer queues are neither matched nor sorted by lpm.
_MAX_LPM_QUEUE: Final = 128


class SchedulePolicy:
    """Sorts the waiting queue before each try to form a prefill batch.

    Args:
        config: the server's settings.
        cache: where prefixes are matched.
    """

    def __init__(self, config: SglangConfig, cache: KvCache) -> None:
        aware = config.schedule_policy in ("lpm", "dfs-weight")
        self._policy = "fcfs" if aware and cache.disable else config.schedule_policy
        self._cache = cache
        self._by_priority = config.enable_priority_scheduling
        self._sign = 1 if config.schedule_low_priority_values_first else -1
        self._random = random.Random(config.random_seed)

    def sort(self, waiting: list[SglangRequest]) -> None:
        """Put the queue in order, in place (`calc_priority`)."""
        if self._policy == "fcfs":
            if self._by_priority:
                waiting.sort(key=lambda request: (self._sign * request.priority, request.queue_entry))
        elif self._policy == "lpm":
            if len(waiting) <= _MAX_LPM_QUEUE:
                later = self._match_all(waiting)
                waiting.sort(key=lambda request: float("inf") if request in later else -request.prefix_len)
        elif self._policy == "dfs-weight":
            self._match_all(waiting)
            waiting[:] = _depth_first(waiting, self._cache)
        elif self._policy == "lof":
            if self._by_priority:
                waiting.sort(key=lambda request: (self._sign * request.priority, -request.max_new_tokens))
            else:
                waiting.sort(key=lambda request: -request.max_new_tokens)
        else:
            self._random.shuffle(waiting)

    def _match_all(self, waiting: list[SglangRequest]) -> set[SglangRequest]:
        """Match every waiting request; returns those to come later (`_compute_prefix_matches`).

        A request that finds little in the cache, but begins like an earlier one in the queue, waits for it, so that
        it will find more. Upstream looks this up in a radix tree of its own; as whole requests are inserted and both
        thresholds are the same, a set of beginnings answers alike.
        """
        beginnings: set[tuple[tuple[int, int], ...]] = set()
        later = set()
        for request in waiting:
            self._cache.match(request, request.num_tokens)
            if request.prefix_len > _CHECK_TOKENS or request.num_tokens < _SHARED_TOKENS:
                continue
            beginning = tuple(request.runs(_SHARED_TOKENS))
            if beginning in beginnings:
                later.add(request)
            else:
                beginnings.add(beginning)
        return later


def _depth_first(waiting: list[SglangRequest], cache: Any) -> list[SglangRequest]:
    """Requests of heavy subtrees first, a node's own after its children's (`_sort_by_dfs_weight`)."""
    ending: defaultdict[Any, list[SglangRequest]] = defaultdict(list)
    for request in waiting:
        ending[request.last_node].append(request)
    weight: defaultdict[Any, int] = defaultdict(int)
    for node, requests in ending.items():
        while node is not None:
            weight[node] += len(requests)
            node = node.parent
    order: list[SglangRequest] = []
    stack = [(cache.root_node, False)]
    while stack:
        node, children_done = stack.pop()
        if children_done:
            order.extend(ending.get(node, ()))
            continue
        stack.append((node, True))
        # Subtrees without a waiting request add nothing to the order.
        heavy = sorted((child for child in node.children.values() if child in weight), key=lambda child: -weight[child])
        stack.extend((child, False) for child in reversed(heavy))
    return order
