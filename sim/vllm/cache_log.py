"""Write down what a simulated vLLM's KV levels do, as the `cache` table of a Run."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Final

import numpy as np
import pyarrow as pa

from kvtwin.sim.vllm.block_pool import BlockPool
from kvtwin.sim.vllm.recorder import UNKNOWN, RequestTimes
from kvtwin.sim.vllm.request import IntArray
from kvtwin.traces.schema import CACHE

HBM: Final = 1
HOST: Final = 2
STORAGE: Final = 3


class CacheLog:
    """Events as they happen, in compact arrays.

    Args:
        block_size: tokens per block.

    Attributes:
        now_ns: the time of events that come without one: of the schedule() call, the step taken in, or a transfer's end.
    """

    def __init__(self, block_size: int) -> None:
        self.now_ns = 0
        self._block_size = block_size
        self._columns = {name: array("q") for name in ("time_ns", "level", "request", "tokens", "block_hash")}
        self._kinds: list[str] = []

    def blocks(self, level: int, kind: str, keys: Iterable[int], row: int = UNKNOWN) -> None:
        """One event per block, now."""
        for key in keys:
            self._add(level, kind, self._block_size, row, UNKNOWN, key)

    def tokens(self, level: int, kind: str, count: int, row: int, time_ns: int = UNKNOWN) -> None:
        """One event of so many tokens of a request; none where there are none."""
        if count:
            self._add(level, kind, count, row, time_ns, UNKNOWN)

    def _add(self, level: int, kind: str, tokens: int, row: int, time_ns: int, key: int) -> None:
        time_ns = self.now_ns if time_ns == UNKNOWN else time_ns
        for column, value in zip(self._columns.values(), (time_ns, level, row, tokens, key), strict=True):
            column.append(value)
        self._kinds.append(kind)

    def table(self, times: RequestTimes, num_prompt_tokens: list[int], rows: IntArray) -> pa.Table:
        """The `cache` table, by time, with each request's lookup at its first admission and what it found.

        Args:
            times: of the requests.
            num_prompt_tokens: by request.
            rows: where each request stands in the workload's table.
        """
        for row, time_ns in enumerate(times.scheduled):
            if time_ns != UNKNOWN:
                host, storage = times.cached_host[row], times.cached_storage[row]
                self.tokens(HBM, "lookup", num_prompt_tokens[row], row, time_ns)
                self.tokens(HBM, "hit", times.cached[row] - host - storage, row, time_ns)
                self.tokens(HOST, "hit", host, row, time_ns)
                self.tokens(STORAGE, "hit", storage, row, time_ns)
        columns = {name: np.array(values, dtype=np.int64) for name, values in self._columns.items()}
        order = np.argsort(columns["time_ns"], kind="stable")
        known = columns["request"] != UNKNOWN
        columns["request"] = np.where(known, rows[columns["request"]] if len(rows) else columns["request"], UNKNOWN)
        arrays = {}
        for name, values in columns.items():
            mask = (values == UNKNOWN)[order] if name in ("request", "block_hash") else None
            values = np.where(values == UNKNOWN, 0, values) if name == "block_hash" else values
            arrays[name] = pa.array(values[order], CACHE.field(name).type, mask=mask)
        arrays["kind"] = pa.array(self._kinds, pa.string()).take(pa.array(order))
        nothing = {field.name: pa.nulls(len(order), field.type) for field in CACHE if field.name not in arrays}
        return pa.table({name: {**arrays, **nothing}[name] for name in CACHE.names}, schema=CACHE)


class LoggedPool(BlockPool):
    """A block pool that tells which blocks enter and leave its prefix cache.

    Args:
        log: where to.
        num_gpu_blocks, enable_prefix_caching, reuse_uncached_first: see `BlockPool`.
    """

    def __init__(
        self, log: CacheLog, num_gpu_blocks: int, *, enable_prefix_caching: bool, reuse_uncached_first: bool
    ) -> None:
        super().__init__(
            num_gpu_blocks, enable_prefix_caching=enable_prefix_caching, reuse_uncached_first=reuse_uncached_first
        )
        self._log = log

    def cache(self, blocks: IntArray, keys: IntArray) -> None:
        """See `Pool`."""
        super().cache(blocks, keys)
        self._log.blocks(HBM, "store", keys.tolist())

    def _forget(self, block: int) -> None:
        key = self._key[block]
        super()._forget(block)
        if key is not None:
            self._log.blocks(HBM, "evict", (key,))
