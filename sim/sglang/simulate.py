"""Simulate a workload on one SGLang server: from a Run of arrivals to a Run of what would happen."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from typing import Any

from kvtwin.sim.frontend import at_the_client, order_at_the_engine
from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.progress import Progress
from kvtwin.sim.sglang.build_cache import build_cache
from kvtwin.sim.sglang.cache_record import CacheRecorder
from kvtwin.sim.sglang.clock import Clock
from kvtwin.sim.sglang.collector import collector_off
from kvtwin.sim.sglang.config import SglangConfig, rules_version
from kvtwin.sim.sglang.engine import Observer, SglangEngine
from kvtwin.sim.sglang.hi_cache import HiRadixCache
from kvtwin.sim.sglang.pool import KvPool
from kvtwin.sim.sglang.record import Recorder
from kvtwin.sim.sglang.request import SglangRequest
from kvtwin.sim.sglang.runs import cut, merge_runs
from kvtwin.sim.sglang.scheduler import SglangScheduler
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.workload import sequence_nodes


def simulate_sglang(
    workload: Run,
    config: SglangConfig,
    latency: LatencyModel,
    host: HostTime | None = None,
    *,
    record_steps: bool = True,
    record_cache: bool = False,
    plain: bool = False,
    source: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Serve a workload's requests with one SGLang server; arguments as of `kvtwin.sim.vllm.simulate.simulate`.

    Every request runs to its output length (`ignore_eos`), which is also its `max_new_tokens`. One that SGLang itself
    loses (see `SglangScheduler`) has no finish_ns; the run's metric `num_lost` counts them. With storage,
    `num_prefetches_limited` counts the requests that could not prefetch because others' prefetches filled the host.

    Raises:
        InputError: a request that the server would refuse, cut short, or never schedule.
        KvtwinError: the server would stop, or wait for ever.
    """
    started = time.perf_counter()
    requests = build_requests(workload, config)
    recorder = Recorder(len(requests), record_steps=record_steps, progress=progress)
    engine = build_engine(config, latency, host, observer=recorder, plain=plain)
    recorder.scheduler = engine.scheduler
    cache_recorder = CacheRecorder(engine.clock)
    if record_cache and not config.disable_radix_cache:
        engine.scheduler.cache.observer = cache_recorder
    host = host or HostTime()
    arrival_ns, order = order_at_the_engine(workload.requests, host)
    for request, time_ns in zip(requests, arrival_ns.tolist(), strict=True):
        request.arrival_ns = time_ns
    with collector_off():
        engine.run([requests[row] for row in order.tolist()])
    core_s = time.perf_counter() - started
    tables = recorder.tables(workload.requests, requests)
    if record_cache:
        tables["cache"] = cache_recorder.table(requests, tables["requests"].column("scheduled_ns").to_pylist())
    tables["requests"] = at_the_client(tables["requests"], host)
    info = RunInfo(
        kind="simulated",
        engine=f"sglang {config.version} (rules of {rules_version(config.version)})",
        hardware=workload.info.hardware,
        model=workload.info.model,
        hash_block_tokens=workload.info.hash_block_tokens,
        engine_config=dataclasses.asdict(config),
        source=dict(source or {}),
        metrics={
            "num_steps": engine.num_steps,
            "core_s": round(core_s, 6),
            "num_lost": sum(not request.finished for request in requests),
            **_storage_metrics(engine, config),
        },
    )
    return Run(info, tables, name="the simulated run")


def _storage_metrics(engine: SglangEngine, config: SglangConfig) -> dict[str, int]:
    cache = engine.scheduler.cache
    if isinstance(cache, HiRadixCache) and config.hicache_storage_backend:
        return {"num_prefetches_limited": cache.num_prefetches_limited}
    return {}


def build_engine(
    config: SglangConfig,
    latency: LatencyModel,
    host: HostTime | None = None,
    *,
    observer: Observer,
    plain: bool = False,
) -> SglangEngine:
    """An idle server."""
    clock = Clock()
    pool = KvPool(config.max_total_tokens, config.page_size)
    cache = build_cache(config, pool, clock)
    return SglangEngine(SglangScheduler(config, pool, cache), clock, latency, host, observer=observer, plain=plain)


def build_requests(workload: Run, config: SglangConfig) -> list[SglangRequest]:
    """The server's view of a workload's requests, by row.

    Raises:
        InputError: prompt plus output longer than the server takes; names the row.
    """
    table = workload.requests
    columns = [table.column(name).to_pylist() for name in ("arrival_ns", "input_tokens", "output_tokens", "priority")]
    block_tokens = workload.info.hash_block_tokens or 0
    nodes = sequence_nodes(table, block_tokens) if block_tokens else [[] for _ in range(table.num_rows)]
    is_answered = table.column("output_block_hashes").is_valid().to_pylist()
    # Ids that nobody has, each range a token apart from the one before: no run goes on into another.
    unused = block_tokens * (1 + max((max(chain) for chain in nodes if chain), default=-1)) + 1
    unset = unset_priority(config)
    requests = []
    for row, (arrival_ns, prompt, output, priority) in enumerate(zip(*columns, strict=True)):
        _refuse_too_long(prompt, output, config, workload, row)
        known_end = min(block_tokens * len(nodes[row]), prompt + output if is_answered[row] else prompt)
        known = cut(merge_runs([(node * block_tokens, block_tokens) for node in nodes[row]]), 0, known_end)
        left = max(prompt - known_end, 0)
        own_outputs = unused + left + 1, prompt + output + 1 - max(known_end, prompt)
        requests.append(
            SglangRequest(
                row=row,
                arrival_ns=arrival_ns,
                num_prompt_tokens=prompt,
                max_new_tokens=output,
                prompt_runs=cut(known, 0, prompt) + (((unused, left),) if left else ()),
                output_runs=(*cut(known, prompt, known_end), own_outputs),
                priority=unset if priority is None else priority,
            )
        )
        unused += left + 1 + output + 1
    return requests


def unset_priority(config: SglangConfig) -> int:
    """The priority of a request that has none: the last there is, where it counts (`_set_or_validate_priority`)."""
    if not config.enable_priority_scheduling:
        return 0
    return sys.maxsize if config.schedule_low_priority_values_first else -sys.maxsize - 1


def _refuse_too_long(prompt: int, output: int, config: SglangConfig, workload: Run, row: int) -> None:
    # The server needs room for the request and, at admission, for a page more than that.
    room = min(config.max_req_len - 1, config.max_total_tokens - 4 * config.page_size - 8)
    if prompt + output > room:
        raise InputError(
            f"{prompt} + {output} tokens: more than the {room} that context_length ({config.context_length}) and "
            f"max_total_tokens ({config.max_total_tokens}) leave for one request",
            path=workload.path,
            row=row,
            column="input_tokens",
        )
