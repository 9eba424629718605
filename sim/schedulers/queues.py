"""vLLM's two waiting queues (`vllm/v1/core/sched/request_queue.py`)."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Protocol

from kvtwin.sim.request import Request


class WaitingQueue(Protocol):
    """Requests waiting for admission, in the order in which they are tried."""

    def add(self, request: Request) -> None:
        """A new request arrives."""

    def put_back(self, request: Request) -> None:
        """A preempted or passed-over request returns."""

    def peek(self) -> Request:
        """The next one to try; the queue must not be empty."""

    def pop(self) -> Request:
        """Take the next one out; the queue must not be empty."""

    def remove(self, request: Request) -> None:
        """Take out a request that finished while waiting."""

    def __len__(self) -> int: ...


class FcfsQueue:
    """First come, first served; a preempted request goes to the front."""

    def __init__(self) -> None:
        self._queue: deque[Request] = deque()
        self.add = self._queue.append
        self.put_back = self._queue.appendleft
        self.pop = self._queue.popleft
        self.remove = self._queue.remove

    def peek(self) -> Request:
        """The request at the front."""
        return self._queue[0]

    def __len__(self) -> int:
        return len(self._queue)


class PriorityQueue:
    """Smallest (priority, arrival time, request id as a string) first; there is no front to return to."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, str, int, Request]] = []

    def add(self, request: Request) -> None:
        """Insert by priority. The row makes the order total: vLLM's ids are unique anyway."""
        key = (request.priority, request.arrival_ns, request.request_id, request.row)
        heapq.heappush(self._heap, (*key, request))

    put_back = add

    def peek(self) -> Request:
        """The most urgent request."""
        return self._heap[0][-1]

    def pop(self) -> Request:
        """Take out the most urgent request."""
        return heapq.heappop(self._heap)[-1]

    def remove(self, request: Request) -> None:
        """Take out any request."""
        self._heap = [entry for entry in self._heap if entry[-1] is not request]
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)


WAITING_QUEUES: dict[str, Callable[[], WaitingQueue]] = {"fcfs": FcfsQueue, "priority": PriorityQueue}
