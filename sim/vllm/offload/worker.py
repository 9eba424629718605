"""When the copies between device and host run: the worker's side of vLLM's offloading connector.

Follows 0.32.0 `kv_connector/v1/offloading/worker.py` (`handle_preemptions`, `start_kv_transfers`, `prepare_store_kv`,
`get_finished`), `kv_offload/cpu/gpu_worker.py` and `worker/gpu/kv_connector.py` (`pre_forward`, `post_forward`), and
0.19.0's of the same names. The host of a step submits, launches and asks what has ended, all before the device has run
it, so what a step reports has ended by its launch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from kvtwin.sim.links import Link
from kvtwin.sim.vllm.block_pool import IntArray
from kvtwin.sim.vllm.request import NO_BLOCKS

NEVER_NS: Final = 1 << 62


@dataclass(slots=True, eq=False)
class Job:
    """A copy of blocks.

    Attributes:
        row: the request it belongs to.
        keys: what is copied, shape (n,).
        is_store: device to host, else host to device.
        blocks: the device's blocks of a store, shape (n,).
        end_ns: when the copy ends; NEVER_NS until it is submitted.
    """

    row: int
    keys: IntArray
    is_store: bool
    blocks: IntArray = field(default_factory=lambda: NO_BLOCKS)
    end_ns: int = NEVER_NS


class Worker:
    """Runs the jobs of the steps, in order in each direction.

    Args:
        d2h, h2d: the links.
        block_size: tokens per block.
        loads_after_forward: loads are submitted behind the step that they are scheduled beside, and wait for it (0.32),
            else they begin at once (0.19).
    """

    def __init__(self, d2h: Link, h2d: Link, block_size: int, *, loads_after_forward: bool) -> None:
        self._d2h, self._h2d, self._block_size = d2h, h2d, block_size
        self._loads_after_forward = loads_after_forward
        self._unsent: list[Job] = []  # stores; the next step submits them
        self._loads: Sequence[Job] = ()
        self._running: dict[bool, deque[Job]] = {True: deque(), False: deque()}  # by whether they store
        self._last_end_ns = 0  # of the last step on the device

    def next_ns(self) -> int | None:
        """When the next copy ends; 0 if some wait for a step to submit them."""
        if self._unsent:
            return 0
        return min((jobs[0].end_ns for jobs in self._running.values() if jobs), default=None)

    @property
    def has_jobs(self) -> bool:
        """Whether some are under way or wait for the next step."""
        return bool(self._unsent) or any(self._running.values())

    def before_forward(self, now_ns: int, stores: list[Job], loads: Sequence[Job], flushed: set[Job]) -> int:
        """Submit what the steps before left, and wait for what must be out of the way; returns when that is.

        Args:
            now_ns: when the host gets to it.
            stores: of the step's schedule() call; they read what the step computes, so the next one submits them.
            loads: the same call's.
            flushed: stores whose blocks the step writes; those among `stores` read older blocks.
        """
        for job in (*self._unsent, *(job for job in stores if job in flushed)):
            self._submit(job, self._d2h, max(now_ns, self._last_end_ns))
        self._unsent = [job for job in stores if job not in flushed]
        self._loads = loads
        return max([now_ns, *(job.end_ns for job in flushed)])

    def after_launch(self, now_ns: int, end_ns: int | None) -> list[Job]:
        """The step has been launched; returns the jobs that have ended by now, and that nobody has been told of.

        Args:
            now_ns: when.
            end_ns: when the step ends on the device; None if there is nothing to run.
        """
        self._last_end_ns = end_ns or self._last_end_ns
        start_ns = max(now_ns, self._last_end_ns) if self._loads_after_forward else now_ns
        for job in self._loads:
            self._submit(job, self._h2d, start_ns)
        self._loads = ()
        ended = []
        for jobs in self._running.values():
            while jobs and jobs[0].end_ns <= now_ns:
                ended.append(jobs.popleft())
        return ended

    def _submit(self, job: Job, link: Link, start_ns: int) -> None:
        job.end_ns = link.send(start_ns, len(job.keys) * self._block_size)
        self._running[job.is_store].append(job)
