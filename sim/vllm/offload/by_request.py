"""0.19.0's offloading connector: the copies of a request count when all of them have ended.

Its blocks on the host can be read once it has finished, or was preempted; its blocks on the GPU stay until then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtwin.sim.vllm.block_pool import IntArray
from kvtwin.sim.vllm.offload.connector import Connector, Ended, Scheduled, Tracked
from kvtwin.sim.vllm.recorder import UNKNOWN
from kvtwin.sim.vllm.request import Request


class RequestConnector(Connector):
    """See `Connector`."""

    loads_after_forward = False
    keeps_stepping = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._being_stored: dict[int, list[IntArray]] = {}  # keys by row (`_reqs_being_stored`)
        self._held: dict[int, IntArray] = {}  # by row, the GPU blocks of finished requests
        self._finished: list[int] = []  # rows since the last schedule() call
        self._ending: dict[
            int, None
        ] = {}  # whom the worker knows to have finished (`_finished_reqs_waiting_for_store`)

    def lookup(self, request: Request, num_local_blocks: int) -> int | None:
        """See `Connector`: whoever asks makes its blocks the most recent, and what is not ready ends the hit."""
        keys = request.block_keys(0, request.num_tokens // self._block_size)
        self.host.touch(keys)
        return self._scan(request, keys[num_local_blocks:])

    def end_schedule(self, scheduled: Scheduled) -> None:
        """See `Connector`."""
        if self.disk is not None:
            self.disk.end_schedule(self._now_ns)
        # `yield_req_data`: requests that have never run go first.
        for request in sorted(scheduled.tokens, key=lambda request: self._times.scheduled[request.row] != UNKNOWN):
            num_tokens = request.num_computed_tokens + scheduled.tokens[request]
            num_tokens = min(num_tokens, request.num_tokens)  # tokens in flight are not known yet
            job = self._store(request, num_tokens, request.blocks)
            if job is not None:
                self.host.touch(request.block_keys(0, num_tokens // self._block_size))
                self._being_stored.setdefault(request.row, []).append(job.keys)
        for request in scheduled.preempted:
            if request.row in self._being_stored:
                self._flushed |= self._tracked[request.row].jobs
                self._complete(request.row)

    def _offered(self, tracked: Tracked, first: int, states: npt.NDArray[np.int8]) -> None:
        """See `Connector`: only what is taken counts."""

    def _complete(self, row: int) -> None:
        for keys in self._being_stored[row]:
            self._complete_store(keys, self._now_ns)
        self._being_stored[row] = []

    def finished(self, request: Request) -> bool:
        """See `Connector`."""
        if request.row not in self._being_stored:
            self._forget(request.row)
            return False
        self._held[request.row] = request.blocks
        self._finished.append(request.row)
        return True

    @property
    def has_jobs(self) -> bool:
        """See `Connector`."""
        return bool(self._held) or super().has_jobs

    def after_launch(self, now_ns: int, end_ns: int | None) -> Ended:
        """See `Connector`; the worker keeps account of a request's stores (`get_finished`)."""
        ended = super().after_launch(now_ns, end_ns)
        for job in ended.jobs:
            if job.is_store:
                self._tracked[job.row].jobs.remove(job)
        self._ending.update(dict.fromkeys(self._finished))
        self._finished = []
        ended.rows = [row for row in self._ending if not self._tracked[row].jobs]
        for row in ended.rows:
            del self._ending[row]
        return ended

    def take_in(self, ended: Ended, now_ns: int) -> None:
        """See `Connector`."""
        self._now_ns = now_ns
        for row in ended.rows:
            self._complete(row)
            del self._being_stored[row]
            self._forget(row)
        for job in ended.jobs:
            if not job.is_store:
                self._load_done(job, now_ns)
        for row in ended.rows:
            self._pool.free(self._held.pop(row))
