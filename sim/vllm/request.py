"""The state of one request while an engine serves it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

NO_BLOCKS: IntArray = np.empty(0, dtype=np.int64)


class Status(Enum):
    """Where a request is. Legal moves: WAITING -> RUNNING -> FINISHED, RUNNING -> WAITING (preempted).

    Under asynchronous scheduling a preempted request may also finish from WAITING: its last token was in
    flight when it lost its blocks. With swap-based preemption the same goes by SWAPPED. With KV tiers a waiting
    request may be FETCHING (`WAITING_FOR_REMOTE_KVS`): it has its GPU blocks, and their content is on its way.
    """

    WAITING = auto()
    FETCHING = auto()
    SWAPPED = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Request:
    """One request; token counts follow the names of `vllm/v1/request.py`.

    Attributes:
        row: its row in the run's requests table; also the last tie-breaker of every order.
        request_id: its name; vLLM's priority queue breaks ties by its string order.
        prefix_keys: names of its full prompt blocks, equal for equal prefixes; empty when nothing is shared.
            These are below every request's `own_key_base`.
        own_key_base: first of a range of keys that no other request has, for blocks that hold output tokens.
        num_output_tokens: output tokens known to the scheduler.
        num_computed_tokens: tokens whose KV is computed or scheduled to be.
        num_output_placeholders: tokens in flight that will become output (asynchronous scheduling).
        num_in_flight_tokens: scheduled tokens whose step has not been processed yet.
        num_stale_output_tokens: those of them scheduled before the latest preemption (0.32).
        blocks: its KV blocks, in order.
        num_cached_blocks: how many of them the prefix cache has been told of.
        last_step: the last step that it was scheduled for, counted from 1 (`freeing.py`).
    """

    row: int
    request_id: str
    arrival_ns: int
    num_prompt_tokens: int
    max_tokens: int
    priority: int = 0
    prefix_keys: IntArray = field(default_factory=lambda: NO_BLOCKS)
    own_key_base: int = 0
    status: Status = Status.WAITING
    num_output_tokens: int = 0
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    num_in_flight_tokens: int = 0
    num_stale_output_tokens: int = 0
    blocks: IntArray = field(default_factory=lambda: NO_BLOCKS)
    num_cached_blocks: int = 0
    last_step: int = 0

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt and the output so far."""
        return self.num_prompt_tokens + self.num_output_tokens

    def put_back(self, num_output_tokens: int) -> None:
        """It has been preempted, with so many output tokens: everything is to be computed again."""
        self.status = Status.WAITING
        self.num_output_tokens = num_output_tokens
        self.num_computed_tokens = self.num_cached_blocks = 0
        self.num_output_placeholders = self.num_in_flight_tokens = self.num_stale_output_tokens = 0
        self.blocks = NO_BLOCKS

    def block_keys(self, first: int, last: int) -> IntArray:
        """Prefix-cache keys of its full blocks `first` .. `last` - 1.

        Blocks of prompt tokens carry shared names; any later block holds output tokens, which no other
        request has, but which it can hit again itself after a preemption.
        """
        shared = self.prefix_keys[first:last]
        num_shared = len(self.prefix_keys)
        if last <= num_shared:
            return shared
        return np.concatenate((shared, self.own_key_base + np.arange(max(first, num_shared), last)))


class RequestBook:
    """The requests of a workload by row, in order of arrival; what one is while it is served is made when asked for.

    An engine that jumps never looks at most requests one by one, so it gets columns.

    Args:
        request_ids: names.
        arrival_ns, num_prompt_tokens, max_tokens, priority: Python integers by row.
        prefix_keys: by row, see `Request`; None where nothing is shared.
        num_shared_keys: every prefix key is below it.
        block_size: tokens per block.

    Attributes:
        started: the requests that have been looked at by themselves and are not finished, by row.
    """

    def __init__(
        self,
        request_ids: list[str],
        arrival_ns: list[int],
        num_prompt_tokens: list[int],
        max_tokens: list[int],
        priority: list[int],
        prefix_keys: list[IntArray] | None,
        num_shared_keys: int,
        block_size: int,
    ) -> None:
        self.request_ids, self.arrival_ns, self.priority = request_ids, arrival_ns, priority
        self.num_prompt_tokens, self.max_tokens = num_prompt_tokens, max_tokens
        self.prefix_keys, self.num_shared_keys = prefix_keys, num_shared_keys
        self._block_size = block_size
        self._own_key_ends: IntArray | None = None
        self.started: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def __getitem__(self, row: int) -> Request:
        request = self.started.get(row)
        if request is None:
            request = self.started[row] = Request(
                row=row,
                request_id=self.request_ids[row],
                arrival_ns=self.arrival_ns[row],
                num_prompt_tokens=self.num_prompt_tokens[row],
                max_tokens=self.max_tokens[row],
                priority=self.priority[row],
                prefix_keys=NO_BLOCKS if self.prefix_keys is None else self.prefix_keys[row],
                own_key_base=self._own_keys(row),
            )
        return request

    def urgency(self, row: int) -> tuple[int, int, str, int]:
        """Smallest first under the priority policy. The row makes the order total: vLLM's ids are unique anyway."""
        return self.priority[row], self.arrival_ns[row], self.request_ids[row], row

    def drop(self, row: int) -> None:
        """A request is finished: forget what it was."""
        self.started.pop(row, None)

    def forget_all(self) -> None:
        """No request has been looked at."""
        self.started.clear()

    @property
    def num_keys(self) -> int:
        """Every key of a block is below it."""
        ends = self._own_ends()
        return int(ends[-1]) if len(ends) else self.num_shared_keys

    def _own_keys(self, row: int) -> int:
        return int(self._own_ends()[row - 1]) if row else self.num_shared_keys

    def _own_ends(self) -> IntArray:
        """Where each request's own keys end: it has as many as it can ever fill blocks."""
        if self._own_key_ends is None:
            tokens = np.array(self.num_prompt_tokens, dtype=np.int64) + np.array(self.max_tokens, dtype=np.int64)
            self._own_key_ends = self.num_shared_keys + np.cumsum(tokens // self._block_size + 1)
        return self._own_key_ends
