"""Time that no model runs: the engine's own between steps, and the frontend's before the queue and after a token."""

from __future__ import annotations

from dataclasses import dataclass

from kvtwin.sim.latency.stats import IntArray


@dataclass(frozen=True, slots=True)
class HostTime:
    """Host time of one engine, linear in the number of requests in the step; all zero means a free host.

    Synchronous scheduling pays `schedule` before and `update` after every step. Asynchronous scheduling
    pays them while the previous step runs, so that only `gap` shows, unless the host is the slower of the two.

    Attributes:
        schedule_ns, schedule_per_req_ns: from the start of schedule() to the start of the model.
        update_ns, update_per_req_ns: from the tokens' return to the next schedule().
        gap_ns: least idle time of the device between two steps that are launched back to back.
        frontend_ns, frontend_per_token_ns: from the client's sending to the engine's input queue (HTTP, tokenisation):
            fixed, and per prompt token.
        output_ns: from the engine's having a token to the client's seeing it (detokenisation, streaming).
    """

    schedule_ns: int = 0
    schedule_per_req_ns: int = 0
    update_ns: int = 0
    update_per_req_ns: int = 0
    gap_ns: int = 0
    frontend_ns: int = 0
    frontend_per_token_ns: int = 0
    output_ns: int = 0

    @property
    def takes_time(self) -> bool:
        """Whether the engine's own part is more than the device's gap."""
        return any((self.schedule_ns, self.schedule_per_req_ns, self.update_ns, self.update_per_req_ns))

    def schedule(self, num_reqs: int) -> int:
        """Nanoseconds before a step of `num_reqs` requests."""
        return self.schedule_ns + self.schedule_per_req_ns * num_reqs

    def update(self, num_reqs: int) -> int:
        """Nanoseconds after a step of `num_reqs` requests."""
        return self.update_ns + self.update_per_req_ns * num_reqs

    def frontend(self, num_prompt_tokens: IntArray) -> IntArray:
        """Nanoseconds before the engine's queue, per request."""
        return self.frontend_ns + self.frontend_per_token_ns * num_prompt_tokens
