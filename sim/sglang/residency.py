"""Which queue each request is in, and for how long: Waiting, Prefetch and Running add up to finish - queued."""

from __future__ import annotations

from array import array

from kvtwin.sim.sglang.request import SglangRequest

_WAITING, _PREFETCH, _RUNNING = range(3)


class Residency:
    """Time of every request in each queue. SGLang swaps nobody out: who is retracted waits again.

    Running begins with the step that admits a request and ends when it finishes, or with the step in which it is
    retracted or preempted. Before that it waits; Prefetch is the part of it in which storage works for the request, and
    what its admitting step then spends on loads from the host after the model is done.

    Args:
        num_requests: rows of the workload.
    """

    COLUMNS = ("waiting_ns", "prefetch_ns", "running_ns")

    def __init__(self, num_requests: int) -> None:
        self._spent_ns = [array("q", bytes(8 * num_requests)) for _ in self.COLUMNS]
        self._since_ns = array("q", bytes(8 * num_requests))
        # By row of those that run.
        self._load_wait_ns: dict[int, int] = {}

    def queued(self, request: SglangRequest, now_ns: int) -> None:
        """It has arrived."""
        self._since_ns[request.row] = now_ns

    def admitted(self, request: SglangRequest, now_ns: int, load_wait_ns: int) -> None:
        """A step takes it from the queue, or goes on with its prompt, and waits so long for loads from the host."""
        if request.row not in self._load_wait_ns:
            self._leave(request, _WAITING, request.prefetch_ns, now_ns)
            self._load_wait_ns[request.row] = load_wait_ns if request.loaded_len else 0

    def left(self, request: SglangRequest, now_ns: int) -> None:
        """It has finished, or lost its KV and waits again."""
        self._leave(request, _RUNNING, self._load_wait_ns.pop(request.row), now_ns)

    def _leave(self, request: SglangRequest, queue: int, prefetch_ns: int, now_ns: int) -> None:
        stay_ns = now_ns - self._since_ns[request.row]
        prefetch_ns = min(prefetch_ns, stay_ns)
        self._spent_ns[queue][request.row] += stay_ns - prefetch_ns
        self._spent_ns[_PREFETCH][request.row] += prefetch_ns
        self._since_ns[request.row] = now_ns

    def columns(self) -> dict[str, array[int]]:
        """Nanoseconds by column name and row; of no meaning for a request that has not finished."""
        return dict(zip(self.COLUMNS, self._spent_ns, strict=True))
