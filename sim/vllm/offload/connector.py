"""What vLLM's offloading connector decides: which blocks go to the host, and which come back.

What 0.19.0's and 0.32.0's `OffloadingConnectorScheduler` (`kv_connector/v1/offloading/scheduler.py`) with their
`kv_offload/cpu/manager.py` have in common; what they do each in its own way is in `by_request.py` and `by_job.py`. When
copies run is `worker.py`'s.

Ours: where vLLM goes through a set of request ids, whose order is that of their hashes, requests go in order of their
ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvtwin.sim.links import Link, LinkTimes
from kvtwin.sim.vllm.block_pool import IntArray, Pool
from kvtwin.sim.vllm.cache_log import HBM, HOST, STORAGE, CacheLog
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.offload.disk import Disk
from kvtwin.sim.vllm.offload.level import ABSENT, Level
from kvtwin.sim.vllm.offload.worker import Job, Worker
from kvtwin.sim.vllm.recorder import UNKNOWN, RequestTimes
from kvtwin.sim.vllm.request import NO_BLOCKS, Request


@dataclass(slots=True)
class Scheduled:
    """What a schedule() call has decided, as far as the connector is told.

    Attributes:
        tokens: new tokens of the batch, in the scheduler's order.
        preempted: those that have lost their blocks.
        allocated: GPU blocks that it has given out, or that whoever it admitted holds.
    """

    tokens: Mapping[Request, int]
    preempted: Sequence[Request]
    allocated: Sequence[IntArray]


@dataclass(slots=True)
class Ended:
    """What a step reports.

    Attributes:
        jobs: copies that have ended.
        rows: finished requests whose blocks may go (0.19).
    """

    jobs: list[Job]
    rows: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.jobs or self.rows)


@dataclass(slots=True)
class Tracked:
    """A request's copies.

    Attributes:
        num_stored: blocks that have been sent to the host, or come from it.
        jobs: under way.
        blocks: its GPU blocks at its last preemption.
        seen: which of its blocks the host was asked to take or to give, by place in the request (0.32).
        brought: keys that the disk was asked to bring (0.32).
        is_over: it has finished, and its last blocks are sent.
    """

    num_stored: int = 0
    jobs: set[Job] = field(default_factory=set)
    blocks: IntArray = field(default_factory=lambda: NO_BLOCKS)
    seen: list[IntArray] = field(default_factory=list)
    brought: list[IntArray] = field(default_factory=list)
    is_over: bool = False


class Connector(ABC):
    """Blocks on the host, and the disk below it.

    Args:
        config: the engine's settings.
        num_keys: every key of a block is below it.
        links: what transfers take.
        d2h, h2d: the links between device and host.
        pool: the GPU's blocks.
        times: told of the requests' hits and waiting for transfers.
        log: told of every block that moves, when the engine learns of it.

    Attributes:
        host: what it holds.
        disk: the level below; None if there is none.
    """

    loads_after_forward: bool
    keeps_stepping: bool  # as long as copies are under way (`has_pending_push_work`)

    def __init__(
        self,
        config: VllmConfig,
        num_keys: int,
        links: LinkTimes,
        d2h: Link,
        h2d: Link,
        pool: Pool,
        times: RequestTimes,
        log: CacheLog | None,
    ) -> None:
        self._prompt_only = config.offload_prompt_only
        self._block_size, self._pool, self._times, self._log = config.block_size, pool, times, log
        self.host = Level(config.num_host_blocks, num_keys, lambda keys: self._note(HOST, "evict", keys))
        self.disk: Disk | None = None
        if config.num_disk_blocks:

            def note(kind: str, keys: IntArray, row: int) -> None:
                self._note(STORAGE, kind, keys, row)

            self.disk = Disk(
                config.num_disk_blocks, num_keys, self.host, links, note, self._note_promotion, self._note_access
            )
        self._worker = Worker(d2h, h2d, config.block_size, loads_after_forward=self.loads_after_forward)
        self._now_ns = 0
        self._tracked: dict[int, Tracked] = {}
        self._arriving: dict[int, int] = {}  # rows whose blocks are on their way to the GPU: since when
        # Rows whose blocks are on their way to the host: since when, and in how many reads.
        self._promoting: dict[int, tuple[int, int]] = {}
        self._is_loading = np.zeros(num_keys, np.bool_)  # by key
        self._num_loading = 0
        # Of the schedule() call that is being made.
        self._loads: list[Job] = []
        self._stores: list[Job] = []
        self._flushed: set[Job] = set()

    def _note(self, level: int, kind: str, keys: IntArray, row: int = UNKNOWN) -> None:
        if self._log is not None:
            self._log.blocks(level, kind, keys.tolist(), row)

    def _note_promotion(self, row: int, begins: bool, time_ns: int) -> None:
        if begins:
            since_ns, count = self._promoting.get(row, (time_ns, 0))
            self._promoting[row] = since_ns, count + 1
        elif row in self._promoting:
            since_ns, count = self._promoting.pop(row)
            if count > 1:
                self._promoting[row] = since_ns, count - 1
            else:
                self._times.prefetch[row] += time_ns - since_ns

    def _note_access(self, row: int, keys: IntArray) -> None:
        self._track(row).brought.append(keys)

    def _track(self, row: int) -> Tracked:
        return self._tracked.setdefault(row, Tracked())

    def _forget(self, row: int) -> None:
        self._tracked.pop(row, None)
        if self.disk is not None:
            self.disk.forget(row)

    # --- time ------------------------------------------------------------------------------------------------------

    def next_ns(self) -> int | None:
        """When the next transfer ends; 0 if the next step can do something for one."""
        times = (self._worker.next_ns(), self.disk.next_ns() if self.disk is not None else None)
        return min((time_ns for time_ns in times if time_ns is not None), default=None)

    @property
    def has_jobs(self) -> bool:
        """Whether transfers are under way."""
        return self._worker.has_jobs or (self.disk is not None and self.disk.has_jobs)

    def begin_schedule(self, now_ns: int) -> None:
        """A schedule() call begins."""
        self._now_ns = now_ns
        if self.disk is not None:
            self.disk.take_answers(now_ns)

    @abstractmethod
    def end_schedule(self, scheduled: Scheduled) -> None:
        """It is over: decide what is stored (`build_connector_meta`). Its tokens do not count as computed yet."""

    def before_forward(self, now_ns: int) -> int:
        """The step that was scheduled gets to the worker; returns when the host can launch it."""
        stores, loads, flushed = self._stores, self._loads, self._flushed
        self._stores, self._loads, self._flushed = [], [], set()
        return self._worker.before_forward(now_ns, stores, loads, flushed)

    def after_launch(self, now_ns: int, end_ns: int | None) -> Ended:
        """It has been launched, to end at `end_ns` (None if it is empty); returns what it reports."""
        return Ended(self._worker.after_launch(now_ns, end_ns))

    @abstractmethod
    def take_in(self, ended: Ended, now_ns: int) -> None:
        """The engine learns what a step has reported (`update_connector_output`)."""

    def drain(self) -> None:
        """The last request has finished: let the transfers end."""
        while self.has_jobs:
            self._now_ns = self.before_forward(max(self._now_ns, self.next_ns() or 0))
            if self._log is not None:
                self._log.now_ns = self._now_ns
            self.take_in(self.after_launch(self._now_ns, None), self._now_ns)
            if self.disk is not None:
                self.disk.end_schedule(self._now_ns)

    # --- loads -----------------------------------------------------------------------------------------------------

    def is_arriving(self, request: Request) -> bool:
        """Whether blocks are on their way to the GPU for a waiting request."""
        return request.row in self._arriving

    @abstractmethod
    def lookup(self, request: Request, num_local_blocks: int) -> int | None:
        """Blocks that the host has ready beyond the GPU's hit (`get_num_new_matched_tokens`).

        Args:
            request: waits for its admission.
            num_local_blocks: the GPU's hit.

        Returns:
            None where it has to ask again later.
        """

    def _scan(self, request: Request, keys: IntArray) -> int | None:
        """How many blocks of a prefix are ready; None while the disk brings some, or while some of them are on their
        way for another request, which will leave them on the GPU."""
        if self.disk is None:
            found: int | None = self.host.num_ready(keys)
        else:
            self.disk.poll(self._now_ns)
            found = self.disk.scan(request.row, keys)
        if found and self._num_loading and self._is_loading[keys[:found]].any():
            return None
        return found

    def start_load(self, request: Request, num_local_blocks: int, num_blocks: int) -> None:
        """Copy blocks of the host to those that the request has been given (`update_state_after_alloc`)."""
        row, last = request.row, num_local_blocks + num_blocks
        keys = request.block_keys(num_local_blocks, last)
        self.host.read(keys)
        self._is_loading[keys] = True
        self._num_loading += num_blocks
        self._arriving[row] = self._now_ns
        tracked = self._track(row)
        tracked.num_stored = last
        tracked.seen.append(np.arange(num_local_blocks, last))
        job = Job(row, keys, is_store=False)
        tracked.jobs.add(job)
        self._loads.append(job)
        num_tokens = min(last * self._block_size, request.num_tokens - 1) - num_local_blocks * self._block_size
        num_promoted = self.disk.num_promoted(row, keys) if self.disk is not None else 0
        from_disk = min(num_tokens, self._block_size * num_promoted)
        self._times.note_load(row, num_tokens - from_disk, from_disk)

    def _load_done(self, job: Job, now_ns: int) -> None:
        if job.row in self._tracked:
            self._tracked[job.row].jobs.discard(job)
        self._times.prefetch[job.row] += now_ns - self._arriving.pop(job.row)
        self._is_loading[job.keys] = False
        self._num_loading -= len(job.keys)
        self.host.read_done(job.keys)
        self._note(HBM, "load_back", job.keys, job.row)

    def admitted(self, request: Request) -> None:
        """It runs: what may still be on its way to the host keeps it waiting no longer."""
        if request.row in self._promoting:
            since_ns, _ = self._promoting.pop(request.row)
            self._times.prefetch[request.row] += self._now_ns - since_ns

    # --- stores ----------------------------------------------------------------------------------------------------

    def preempted(self, request: Request) -> None:
        """It is about to lose its blocks."""
        if request.row in self._tracked:
            self._tracked[request.row].blocks = request.blocks

    @abstractmethod
    def finished(self, request: Request) -> bool:
        """It has finished; whether its GPU blocks have to stay for now (`request_finished`)."""

    def _store(self, request: Request, num_tokens: int, blocks: IntArray) -> Job | None:
        """Send full blocks to the host that have not been; None if there are none."""
        tracked = self._tracked.get(request.row)
        first, last = tracked.num_stored if tracked is not None else 0, num_tokens // self._block_size
        if first >= last:
            return None
        tracked = tracked or self._track(request.row)
        if self.disk is not None:
            self.disk.poll(self._now_ns)
        keys = request.block_keys(first, last)
        states = self.host.state[keys]
        self._offered(tracked, first, states)
        wanted = self.host.prepare_store(keys)
        if wanted is None:  # tried again with its next step
            return None
        tracked.num_stored = last
        if not len(wanted):
            return None
        job = Job(request.row, wanted, is_store=True, blocks=blocks[first:last][states == ABSENT])
        tracked.jobs.add(job)
        self._stores.append(job)
        return job

    @abstractmethod
    def _offered(self, tracked: Tracked, first: int, states: npt.NDArray[np.int8]) -> None:
        """Blocks from `first` on, in these states, are being offered to the host."""

    def _complete_store(self, keys: IntArray, now_ns: int) -> None:
        self._note(HOST, "store", self.host.complete_store(keys))
        if self.disk is not None:
            self.disk.store(keys, now_ns)
