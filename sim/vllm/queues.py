"""vLLM's two waiting queues (`vllm/v1/core/sched/request_queue.py`), holding requests by row."""

from __future__ import annotations

import heapq
from collections import deque
from typing import Literal, Protocol

from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.request import RequestBook


class WaitingQueue(Protocol):
    """Rows of the requests that wait for admission, in the order in which they are tried."""

    def append(self, row: int, /) -> None:
        """A new request arrives."""

    def appendleft(self, row: int, /) -> None:
        """A preempted or passed-over request returns."""

    def __getitem__(self, place: Literal[0], /) -> int:
        """The next one to try; the queue must not be empty."""

    def popleft(self) -> int:
        """Take the next one out; the queue must not be empty."""

    def remove(self, row: int, /) -> None:
        """Take out a request that finished while waiting."""

    def __len__(self) -> int: ...

    def __contains__(self, row: object, /) -> bool: ...


class PriorityQueue:
    """Smallest (priority, arrival time, request id as a string) first; there is no front to return to.

    Its methods are a deque's, which is what serves the fcfs policy.
    """

    def __init__(self, requests: RequestBook) -> None:
        self._requests = requests
        self._heap: list[tuple[int, int, str, int]] = []

    def append(self, row: int) -> None:
        """Insert by priority."""
        heapq.heappush(self._heap, self._requests.urgency(row))

    appendleft = append

    def __getitem__(self, place: Literal[0]) -> int:
        """The row of the most urgent request."""
        return self._heap[place][-1]

    def popleft(self) -> int:
        """Take out the most urgent request."""
        return heapq.heappop(self._heap)[-1]

    def remove(self, row: int) -> None:
        """Take out any request."""
        self._heap = [entry for entry in self._heap if entry[-1] != row]
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def __contains__(self, row: object) -> bool:
        return any(entry[-1] == row for entry in self._heap)


def waiting_queue(config: VllmConfig, requests: RequestBook) -> WaitingQueue:
    """The queue of the configured policy; with fcfs, a preempted request goes to the front."""
    return deque() if config.policy == "fcfs" else PriorityQueue(requests)
