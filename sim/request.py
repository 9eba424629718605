"""The state of one request while an engine serves it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto


class Status(Enum):
    """Where a request is. Legal moves: WAITING -> RUNNING -> FINISHED, RUNNING -> WAITING (preempted).

    Under asynchronous scheduling a preempted request may also finish from WAITING: its last token was in
    flight when it lost its blocks.
    """

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Request:
    """One request; token counts follow the names of `vllm/v1/request.py`.

    Attributes:
        row: its row in the run's requests table; also the last tie-breaker of every order.
        request_id: its name; vLLM's priority queue breaks ties by its string order.
        prefix_keys: names of its full prompt blocks, equal for equal prefixes; empty when nothing is shared.
        own_key_base: first of a range of keys that no other request has, for blocks that hold output tokens.
        num_output_tokens: output tokens known to the scheduler.
        num_computed_tokens: tokens whose KV is computed or scheduled to be.
        num_output_placeholders: tokens in flight that will become output (asynchronous scheduling).
        num_in_flight_tokens: scheduled tokens whose step has not been processed yet.
        num_stale_output_tokens: those of them scheduled before the latest preemption (0.32).
        blocks: its KV blocks, in order.
        num_cached_blocks: how many of them the prefix cache has been told of.
    """

    row: int
    request_id: str
    arrival_ns: int
    num_prompt_tokens: int
    max_tokens: int
    priority: int = 0
    prefix_keys: list[int] = field(default_factory=list)
    own_key_base: int = 0
    status: Status = Status.WAITING
    num_output_tokens: int = 0
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    num_in_flight_tokens: int = 0
    num_stale_output_tokens: int = 0
    num_preemptions: int = 0
    blocks: list[int] = field(default_factory=list)
    num_cached_blocks: int = 0

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt and the output so far."""
        return self.num_prompt_tokens + self.num_output_tokens

    def block_keys(self, first: int, last: int) -> list[int]:
        """Prefix-cache keys of its full blocks `first` .. `last` - 1.

        Blocks of prompt tokens carry shared names; any later block holds output tokens, which no other
        request has, but which it can hit again itself after a preemption.
        """
        shared = self.prefix_keys[first:last]
        return shared + [self.own_key_base + i for i in range(max(first, len(self.prefix_keys)), last)]
