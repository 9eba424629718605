"""What a scheduler decides: the plain record between scheduler, latency model and recorder."""

from __future__ import annotations

from dataclasses import dataclass

from kvtwin.sim.vllm.request import Request


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
