"""Simulate a workload on an engine: from a Run of arrivals to a Run of what would happen."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from kvtwin.sim.config import VllmConfig, rules_version
from kvtwin.sim.engine import Engine
from kvtwin.sim.frontend import at_the_client, at_the_engine
from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.request import Request
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
    plain: bool = False,
    source: Mapping[str, Any] | None = None,
) -> Run:
    """Serve a workload's requests with one engine.

    Args:
        workload: any Run; only arrivals, lengths, priorities and block hashes are read.
        config: the engine's settings.
        latency: how long the model runs for a batch.
        host: time between steps, before the queue and on the way back to the client.
        record_steps: keep the `steps` table.
        plain: take every step by itself (the specification; the result is the same).
        source: provenance to note in the result.

    Raises:
        InputError: a request that the engine would refuse (longer than max_model_len).
    """
    started = time.perf_counter()
    requests = build_requests(workload, config)
    engine = Engine(config, latency, host, record_steps=record_steps, plain=plain)
    times = engine.run(at_the_engine(requests, host) if host else requests)
    core_s = time.perf_counter() - started
    table = times.table(workload.requests, requests)
    tables = {"requests": at_the_client(table, host) if host else table}
    if record_steps:
        tables["steps"] = engine.steps()
    info = RunInfo(
        kind="simulated",
        engine=f"vllm {config.version} (rules of {rules_version(config.version)})",
        hardware=workload.info.hardware,
        model=workload.info.model,
        hash_block_tokens=workload.info.hash_block_tokens,
        engine_config=dataclasses.asdict(config),
        source=dict(source or {}),
        metrics={"num_steps": engine.num_steps, "core_s": round(core_s, 6)},
    )
    return Run(info, tables, name="the simulated run")


def build_requests(workload: Run, config: VllmConfig) -> list[Request]:
    """The engine's view of a workload's requests, in order of arrival.

    Raises:
        InputError: prompt plus output longer than max_model_len; names the row.
    """
    table = workload.requests
    inputs, outputs = (table.column(name).to_pylist() for name in ("input_tokens", "output_tokens"))
    _refuse_too_long(inputs, outputs, config, workload)
    keys, own_base = _prefix_keys(workload, config)
    requests = []
    columns = (table.column(name).to_pylist() for name in ("request_id", "arrival_ns", "priority"))
    for row, (name, arrival_ns, priority) in enumerate(zip(*columns, strict=True)):
        requests.append(
            Request(
                row=row,
                request_id=name,
                arrival_ns=arrival_ns,
                num_prompt_tokens=inputs[row],
                max_tokens=outputs[row],
                priority=priority or 0,
                prefix_keys=keys[row],
                own_key_base=own_base,
            )
        )
        own_base += (inputs[row] + outputs[row]) // config.block_size + 1
    return requests


def _refuse_too_long(inputs: Sequence[int], outputs: Sequence[int], config: VllmConfig, workload: Run) -> None:
    for row, (prompt, output) in enumerate(zip(inputs, outputs, strict=True)):
        if prompt + output > config.max_model_len:
            raise InputError(
                f"{prompt} + {output} tokens: longer than max_model_len ({config.max_model_len})",
                path=workload.path,
                row=row,
                column="input_tokens",
            )


def _prefix_keys(workload: Run, config: VllmConfig) -> tuple[list[list[int]], int]:
    """Names of each request's full prompt blocks, and the first number that is not a name of these."""
    if not config.enable_prefix_caching:
        return [[] for _ in range(workload.requests.num_rows)], 0
    blocks = prefix_blocks(workload.requests, workload.info.hash_block_tokens, config.block_size)
    unused = 1 + max((int(ids.max()) for ids in blocks if len(ids)), default=-1)
    return [ids.tolist() for ids in blocks], unused


def with_metrics(run: Run, **metrics: float) -> Run:
    """The run with more numbers about itself in its head."""
    info = dataclasses.replace(run.info, metrics={**run.info.metrics, **metrics})
    tables: dict[str, pa.Table] = {key: getattr(run, key) for key in ("requests", "steps", "cache") if run.has(key)}
    return Run(info, tables, name="the simulated run")


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
