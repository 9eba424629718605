"""Write down what a simulated SGLang's cache does, as the `cache` table of a Run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import pyarrow as pa

from kvtwin.sim.sglang.clock import Clock
from kvtwin.sim.sglang.observer import CacheObserver
from kvtwin.sim.sglang.radix_tree import TreeNode
from kvtwin.sim.sglang.request import SglangRequest
from kvtwin.traces.schema import CACHE

_HBM: Final = 1
_HOST: Final = 2
_STORAGE: Final = 3


class CacheRecorder(CacheObserver):
    """Notes evictions, copies, loads, backups and prefetches with their times; lookups are added from the requests.

    What is refused for want of room is not noted. KV that a request leaves on the device is no event.

    Args:
        clock: the server's.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._rows: list[tuple[int, int, str, int | None, int]] = []

    def _note(self, level: int, kind: str, tokens: int, row: int | None = None, time_ns: int | None = None) -> None:
        if tokens > 0:
            self._rows.append((self._clock.now_ns if time_ns is None else time_ns, level, kind, row, tokens))

    def evicted(self, node: TreeNode) -> None:
        """See `CacheObserver`."""
        self._note(_HBM, "evict", node.length)

    def dropped_from_host(self, node: TreeNode) -> None:
        """See `CacheObserver`."""
        self._note(_HOST, "evict", node.length)

    def backed_up(self, node: TreeNode, num_tokens: int) -> None:  # noqa: ARG002 - the observer's contract
        """See `CacheObserver`."""
        self._note(_HOST, "store", num_tokens)

    def loaded_back(self, node: TreeNode, num_tokens: int) -> None:  # noqa: ARG002 - the observer's contract
        """See `CacheObserver`."""
        self._note(_HBM, "load_back", num_tokens)

    def storing(self, node: TreeNode) -> None:
        """See `CacheObserver`."""
        self._note(_STORAGE, "store", node.length)

    def dropped_from_storage(self, time_ns: int, num_tokens: int) -> None:
        """See `CacheObserver`."""
        self._note(_STORAGE, "evict", num_tokens, time_ns=time_ns)

    def prefetch_asked(self, row: int, num_tokens: int, started: bool) -> None:
        """See `CacheObserver`."""
        self._note(_STORAGE, "prefetch_start", num_tokens if started else 0, row)

    def prefetch_revoked(self, row: int, time_ns: int, num_tokens: int) -> None:
        """See `CacheObserver`."""
        self._note(_STORAGE, "prefetch_drop", num_tokens, row, time_ns)

    def prefetch_taken(self, row: int, num_tokens: int, hit_tokens: int) -> None:  # noqa: ARG002 - contract
        """See `CacheObserver`."""
        self._note(_STORAGE, "prefetch_done", num_tokens, row)

    def table(self, requests: Iterable[SglangRequest], scheduled_ns: list[int | None]) -> pa.Table:
        """The `cache` table, by time.

        Args:
            requests: all of the run.
            scheduled_ns: when each was first scheduled, by row: its lookup; what it found then was on the device, or
                was loaded from the host, where its own prefetch from storage may have brought it.
        """
        for request in requests:
            time_ns = scheduled_ns[request.row]
            if time_ns is not None:
                self._note(_HBM, "lookup", request.num_prompt_tokens, request.row, time_ns)
                from_below = request.num_host_tokens + request.num_storage_tokens
                self._note(_HBM, "hit", request.num_cached_tokens - from_below, request.row, time_ns)
                self._note(_HOST, "hit", request.num_host_tokens, request.row, time_ns)
                self._note(_STORAGE, "hit", request.num_storage_tokens, request.row, time_ns)
        rows = sorted(self._rows, key=lambda row: row[0])
        columns: dict[str, list[Any]] = (
            dict(
                zip(("time_ns", "level", "kind", "request", "tokens"), map(list, zip(*rows, strict=True)), strict=True)
            )
            if rows
            else {}
        )
        arrays = [pa.array(columns.get(field.name, [None] * len(rows)), field.type) for field in CACHE]
        return pa.Table.from_arrays(arrays, schema=CACHE)
