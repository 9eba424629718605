"""What a scheduler decides: the plain record between scheduler, latency model and recorder."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtwin.sim.vllm.request import IntArray, Request


@dataclass(slots=True)
class Call:
    """What one schedule() call has decided so far.

    Attributes:
        budget: new tokens that are left.
        long_prefill_threshold: most new tokens of a request; 0 for no such limit.
        tokens: new tokens of the batch, in order.
        preempted: requests that lost their blocks, in order.
        allocated: GPU blocks that members of the batch got, or that whoever was admitted holds; kept where there are
            levels below them.
    """

    budget: int
    long_prefill_threshold: int
    tokens: dict[Request, int] = field(default_factory=dict)
    preempted: list[Request] = field(default_factory=list)
    allocated: dict[Request, IntArray] = field(default_factory=dict)

    def cut(self, num_tokens: int) -> int:
        """Cut a request's new tokens to the long-prefill threshold, where one applies."""
        return min(num_tokens, self.long_prefill_threshold) if self.long_prefill_threshold else num_tokens

    def take(self, request: Request, num_tokens: int) -> None:
        """It is in the batch."""
        self.tokens[request] = num_tokens
        self.budget -= num_tokens

    def take_back(self, request: Request) -> bool:
        """Undo `take` for a preempted request; False if it had not been scheduled in this call."""
        num_tokens = self.tokens.pop(request, 0)
        self.allocated.pop(request, None)
        self.budget += num_tokens
        return num_tokens > 0


@dataclass(slots=True)
class StepPlan:
    """One schedule() call.

    Attributes:
        requests: the batch, in the scheduler's order.
        cache_lens: tokens computed before the step, per member.
        input_lens: new tokens, per member; each at least 1.
        samples: whether the step computes the member's last known token, and so samples the next one.
        preempted: requests preempted while scheduling, in order.
        num_waiting, num_running: queue lengths after the call.
        num_free_blocks: after the call.
        num_evicted_blocks: cached blocks that this call reallocated.
    """

    requests: list[Request]
    cache_lens: list[int]
    input_lens: list[int]
    samples: list[bool]
    preempted: list[Request]
    num_waiting: int
    num_running: int
    num_free_blocks: int
    num_evicted_blocks: int

    @property
    def is_empty(self) -> bool:
        """Nothing to compute: the step takes no time and is not recorded."""
        return not self.requests
