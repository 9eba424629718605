"""0.32.0's offloading connector: every copy is a job of its own.

A finished request's blocks are free at once; whoever writes one that is still being copied waits for the copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtwin.sim.vllm.block_pool import IntArray
from kvtwin.sim.vllm.offload.connector import Connector, Ended, Scheduled, Tracked
from kvtwin.sim.vllm.offload.level import WRITING
from kvtwin.sim.vllm.offload.worker import Job
from kvtwin.sim.vllm.request import NO_BLOCKS, Request


class JobConnector(Connector):
    """See `Connector`."""

    loads_after_forward = True
    keeps_stepping = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._finished: list[Request] = []  # since the last schedule() call
        self._fences: dict[int, set[Job]] = {}  # GPU blocks of finished requests, and the copies that still read them

    def lookup(self, request: Request, num_local_blocks: int) -> int | None:
        """See `Connector`: a request with copies under way asks again later, as it does where a block is on its way to
        the host (`LookupResult.HIT_PENDING`)."""
        tracked = self._tracked.get(request.row)
        if tracked is not None:
            tracked.blocks = NO_BLOCKS
            if tracked.jobs:
                return None
        keys = request.block_keys(num_local_blocks, request.num_tokens // self._block_size)
        found = self._scan(request, keys)
        if found is not None and found < len(keys) and self.host.state[keys[found]] == WRITING:
            return None
        return found

    def end_schedule(self, scheduled: Scheduled) -> None:
        """See `Connector`."""
        if self.disk is not None:
            self.disk.end_schedule(self._now_ns)
        for request in scheduled.preempted:
            if request.row in self._tracked:
                self._flushed |= self._tracked[request.row].jobs
        if self._fences:
            for block in np.concatenate([NO_BLOCKS, *scheduled.allocated]).tolist():
                self._flushed |= self._fences.get(block, set())
        for request, num_tokens in scheduled.tokens.items():
            self._store(
                request, self._num_offloadable(request, request.num_computed_tokens + num_tokens), request.blocks
            )
        for request in self._finished:
            self._store_last(request, scheduled.allocated)
        for request in self._finished:  # only when all of them have been stored (`on_request_finished`)
            self._end(request)
        self._finished = []

    def _num_offloadable(self, request: Request, num_computed_tokens: int) -> int:
        # Tokens in flight are not known yet, so neither are the keys of their blocks.
        most = request.num_prompt_tokens if self._prompt_only else request.num_tokens
        return min(num_computed_tokens, most)

    def _store_last(self, request: Request, allocated: Sequence[IntArray]) -> None:
        """Store a finished request's last blocks."""
        tracked = self._track(request.row)
        # The last token is sampled and never computed.
        num_tokens = self._num_offloadable(request, max(request.num_prompt_tokens, request.num_tokens - 1))
        job = self._store(request, min(num_tokens, len(tracked.blocks) * self._block_size), tracked.blocks)
        if job is not None:
            self._fence(job)
            if np.isin(job.blocks, np.concatenate([NO_BLOCKS, *allocated])).any():
                self._flushed.add(job)

    def _end(self, request: Request) -> None:
        """Make all that a finished request used the most recent (`CPUOffloadingManager.on_request_finished`)."""
        tracked = self._track(request.row)
        if tracked.seen or tracked.brought:
            keys = request.block_keys(0, request.num_tokens // self._block_size)
            was_seen = np.isin(keys, np.concatenate([NO_BLOCKS, *tracked.brought]))
            for places in tracked.seen:
                was_seen[places] = True
            self.host.touch(keys[was_seen])
        tracked.is_over = True
        if not tracked.jobs:
            self._forget(request.row)

    def _offered(self, tracked: Tracked, first: int, states: npt.NDArray[np.int8]) -> None:
        tracked.seen.append(first + np.flatnonzero(states != WRITING))

    def _fence(self, job: Job) -> None:
        for block in job.blocks.tolist():
            self._fences.setdefault(block, set()).add(job)

    def finished(self, request: Request) -> bool:
        """See `Connector`."""
        tracked = self._track(request.row)
        if len(request.blocks):
            tracked.blocks = request.blocks
        for job in tracked.jobs:
            self._fence(job)
        self._finished.append(request)
        return False

    def take_in(self, ended: Ended, now_ns: int) -> None:
        """See `Connector`."""
        for job in ended.jobs:
            if not job.is_store:
                self._load_done(job, now_ns)
                continue
            self._complete_store(job.keys, now_ns)
            for block in job.blocks.tolist() if self._fences else ():
                if job in self._fences.get(block, ()):
                    self._fences[block].remove(job)
                    if not self._fences[block]:
                        del self._fences[block]
            tracked = self._tracked[job.row]
            tracked.jobs.remove(job)
            if tracked.is_over and not tracked.jobs:
                self._forget(job.row)
