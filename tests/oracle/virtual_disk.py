"""A disk on a virtual clock below vLLM 0.32.0's real `TieringOffloadingManager`, for `random_vllm_offload.py`.

Real are the manager, its host tier and the lookup's book-keeping (`AsyncLookupManager`). The disk stands for the `fs`
tier: one thread each asks, reads and writes, a job takes `base + blocks * per_page` ns, and nothing is ever dropped.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any


class Thread:
    """Does one job after the other."""

    def __init__(self, clock: Any, links: dict[str, float], name: str) -> None:
        self._clock, self._base, self._per_page = clock, links[f"{name}_base"], links[f"{name}_per_page"]
        self._free_ns = 0
        self._jobs: deque[tuple[int, Any]] = deque()

    def send(self, num_blocks: int, job: Any) -> int:
        """Returns when it will have ended."""
        self._free_ns = max(self._clock.now, self._free_ns) + round(self._base + num_blocks * self._per_page)
        self._jobs.append((self._free_ns, job))
        return self._free_ns

    def next_ns(self) -> int | None:
        """When the next job ends."""
        return self._jobs[0][0] if self._jobs else None

    def take(self) -> tuple[int, Any] | None:
        """The next job that has ended by now, and when."""
        return self._jobs.popleft() if self._jobs and self._jobs[0][0] <= self._clock.now else None


def make_manager(clock: Any, num_blocks: int, links: dict[str, float], note: Callable[..., None]) -> tuple[Any, Any]:
    """vLLM's manager and the disk under it.

    Args:
        clock: has `now`, in ns.
        num_blocks: what the host holds.
        links: what the disk's threads take, names of `kv_links`.
        note: told of a kind of event and its keys.
    """
    base = import_module("vllm.v1.kv_offload.tiering.base")
    manager = import_module("vllm.v1.kv_offload.tiering.manager")
    lookup = import_module("vllm.v1.kv_offload.tiering.async_lookup")
    offload = import_module("vllm.v1.kv_offload.base")

    class Memory:
        def create_kv_memoryview(self) -> memoryview:
            return memoryview(bytearray(num_blocks)).cast("B", (num_blocks, 1))

    class Questions(lookup.AsyncLookupManager):  # type: ignore[misc,name-defined]
        """Its thread's two queues, on the clock."""

        def __init__(self, disk: Any) -> None:
            self._lookup_queue: Any
            super().__init__("disk")
            self._lookup_queue.put(None)  # the real thread ends
            self._thread.join()
            self._disk = disk
            self._lookup_queue = self._pending_results = self

        def batch_lookup(self, keys: list[bytes], req_context: Any) -> Iterable[bool]:
            raise NotImplementedError

        def put(self, batch: list[Any]) -> None:
            self._disk.queries.send(len(batch), batch)

        def get_nowait(self) -> list[Any]:
            answer = self._disk.queries.take()
            if answer is None:
                raise queue.Empty
            end_ns, batch = answer
            written = self._disk.written_ns
            return [(key, generation, written.get(key, end_ns + 1) <= end_ns) for key, _, generation in batch]

    class Disk(base.SecondaryTierManager):  # type: ignore[misc,name-defined]
        medium = offload.Medium.STORAGE

        def __init__(self) -> None:
            super().__init__(None, Memory().create_kv_memoryview(), "disk")
            self.queries, self.reads, self.writes = (Thread(clock, links, name) for name in ("query", "read", "write"))
            self.written_ns: dict[bytes, int] = {}  # by key: when it is there
            self._no_work: list[int] = []  # jobs with nothing to write
            self._questions = Questions(self)

        def next_ns(self) -> int | None:
            ends = (thread.next_ns() for thread in (self.queries, self.reads, self.writes))
            return min((end for end in ends if end is not None), default=None)

        def lookup(self, key: bytes, req_context: Any) -> Any:
            found = self._questions.lookup(key, req_context)
            result = offload.LookupResult
            return result.RETRY if found is None else result.HIT if found else result.MISS

        def submit_store(self, job: Any) -> None:
            new = [key for key in job.keys if key not in self.written_ns]
            end_ns = self.writes.send(len(new), (job.job_id, new)) if new else clock.now
            if not new:
                self._no_work.append(job.job_id)
            self.written_ns.update(dict.fromkeys(new, end_ns))

        def submit_load(self, job: Any) -> None:
            note("prefetch_start", job.keys)
            self.reads.send(len(job.keys), (job.job_id, job.keys))

        def get_finished_jobs(self) -> list[Any]:
            ended: list[tuple[int, int, str, list[bytes]]]
            ended = [(clock.now, job_id, "", []) for job_id in self._no_work]
            self._no_work.clear()
            for thread, kind in ((self.reads, "prefetch_done"), (self.writes, "disk_store")):
                while (job := thread.take()) is not None:
                    ended.append((job[0], job[1][0], kind, job[1][1]))
            for _, _, kind, keys in sorted(ended, key=lambda job: job[:2]):
                if kind:
                    note(kind, keys)
            return [
                base.JobResult(job_id=job_id, success=True)
                for _, job_id, _, _ in sorted(ended, key=lambda job: job[:2])
            ]

        def on_new_request(self, req_context: Any) -> Any:
            return offload.RequestOffloadingContext()

        def on_request_finished(self, req_context: Any) -> None:
            self._questions.cleanup(req_context.req_id)

        def on_schedule_end(self, context: Any) -> None:
            self._questions.flush()

        def drain_jobs(self) -> None:
            raise NotImplementedError

    host = manager.CPUPrimaryTierOffloadingManager(num_blocks, Memory())
    disk = Disk()
    return manager.TieringOffloadingManager(host, [disk]), disk
