"""Simulate a workload on an engine: from a Run of arrivals to a Run of what would happen."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kvtwin.sim.frontend import at_the_client, order_at_the_engine
from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.progress import Progress
from kvtwin.sim.vllm.config import VllmConfig, rules_version
from kvtwin.sim.vllm.engine import Engine
from kvtwin.sim.vllm.request import IntArray, RequestBook
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.workload import prefix_blocks


def simulate(
    workload: Run,
    config: VllmConfig,
    latency: LatencyModel,
    host: HostTime | None = None,
    *,
    record_steps: bool = True,
    record_cache: bool = False,
    plain: bool = False,
    source: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Serve a workload's requests with one engine.

    Args:
        workload: any Run; only arrivals, lengths, priorities and block hashes are read.
        config: the engine's settings.
        latency: how long the model runs for a batch.
        host: time between steps, before the queue and on the way back to the client.
        record_steps: keep the `steps` table.
        record_cache: keep the `cache` table (no event path then, the result is the same).
        plain: take every step by itself (the specification; the result is the same).
        source: provenance to note in the result.
        progress: told how many requests have finished, whenever some have.

    Raises:
        InputError: a request that the engine would refuse (longer than max_model_len).
    """
    started = time.perf_counter()
    host = host or HostTime()
    arrival_ns, order = order_at_the_engine(workload.requests, host)
    requests = build_requests(workload, config, arrival_ns, order)
    prepared = time.perf_counter()
    engine = Engine(config, latency, host, record_steps=record_steps, record_cache=record_cache, plain=plain)
    times = engine.run(requests, progress)
    tables = {"requests": at_the_client(times.table(workload.requests, order), host)}
    core_s = time.perf_counter() - prepared
    if record_steps:
        tables["steps"] = engine.steps(order)
    if record_cache:
        tables["cache"] = engine.cache(times, requests, order)
    info = RunInfo(
        kind="simulated",
        engine=f"vllm {config.version} (rules of {rules_version(config.version)})",
        hardware=workload.info.hardware,
        model=workload.info.model,
        hash_block_tokens=workload.info.hash_block_tokens,
        engine_config=dataclasses.asdict(config),
        source=dict(source or {}),
        metrics={
            "num_steps": engine.num_steps,
            "prepare_s": round(prepared - started, 6),
            "core_s": round(core_s, 6),
        },
    )
    return Run(info, tables, name="the simulated run")


def build_requests(
    workload: Run, config: VllmConfig, arrival_ns: IntArray | None = None, order: IntArray | None = None
) -> RequestBook:
    """The engine's view of a workload's requests, in order of arrival.

    Args:
        workload: any Run.
        config: the engine's settings.
        arrival_ns: when the engine gets each request, by row of the workload; default: when they arrive.
        order: the rows in that order; default: as they stand.

    Raises:
        InputError: prompt plus output longer than max_model_len; names the row.
    """
    table = workload.requests
    inputs, outputs = (table.column(name).to_numpy() for name in ("input_tokens", "output_tokens"))
    _refuse_too_long(inputs, outputs, config, workload)
    keys, num_shared_keys = _prefix_keys(workload, config)
    order = np.arange(table.num_rows) if order is None else order
    arrival_ns = table.column("arrival_ns").to_numpy() if arrival_ns is None else arrival_ns
    return RequestBook(
        request_ids=table.column("request_id").take(order).to_pylist(),
        arrival_ns=arrival_ns[order].tolist(),
        num_prompt_tokens=inputs[order].tolist(),
        max_tokens=outputs[order].tolist(),
        priority=table.column("priority").fill_null(0).to_numpy()[order].tolist(),
        prefix_keys=keys and [keys[row] for row in order.tolist()],
        num_shared_keys=num_shared_keys,
        block_size=config.block_size,
    )


def _refuse_too_long(inputs: IntArray, outputs: IntArray, config: VllmConfig, workload: Run) -> None:
    too_long = np.flatnonzero(inputs + outputs > config.max_model_len)
    if len(too_long):
        row = int(too_long[0])
        raise InputError(
            f"{inputs[row]} + {outputs[row]} tokens: longer than max_model_len ({config.max_model_len})",
            path=workload.path,
            row=row,
            column="input_tokens",
        )


def _prefix_keys(workload: Run, config: VllmConfig) -> tuple[list[IntArray] | None, int]:
    """Names of each request's full prompt blocks, and how many there are; None if there are none."""
    if not config.enable_prefix_caching:
        return None, 0
    blocks = prefix_blocks(workload.requests, workload.info.hash_block_tokens, config.block_size)
    count = 1 + max((int(ids.max()) for ids in blocks if len(ids)), default=-1)
    return (blocks, count) if count else (None, 0)


def with_metrics(run: Run, **metrics: float) -> Run:
    """The run with more numbers about itself in its head."""
    info = dataclasses.replace(run.info, metrics={**run.info.metrics, **metrics})
    tables: dict[str, pa.Table] = {key: getattr(run, key) for key in ("requests", "steps", "cache") if run.has(key)}
    return Run(info, tables, name="the simulated run")


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the process was before exec as well
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
