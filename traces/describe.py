"""What a run holds, in numbers: for people (`kvtwin trace info`) and for provenance."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvtwin.traces.run import Run
from kvtwin.traces.time import to_ms, to_seconds
from kvtwin.traces.workload import prefix_blocks


def describe(run: Run) -> dict[str, Any]:
    """Summarise a run as a tree of plain values, ready for JSON (unknown is None, never NaN).

    Lengths are in tokens, durations in seconds or milliseconds as their names say. `prefix_sharing` counts the prompt
    tokens that an endless prefix cache with blocks of hash_block_tokens would have seen before, requests taken one by
    one by arrival: an upper bound, as running requests cannot share what is not computed yet.
    """
    requests = run.requests
    arrival = requests.column("arrival_ns").to_numpy()
    span_s = to_seconds(int(arrival[-1] - arrival[0])) if len(arrival) else 0.0
    known = [name for name in requests.column_names if requests.column(name).null_count < requests.num_rows]
    info = run.info
    return {
        "kind": info.kind,
        "engine": info.engine,
        "hardware": info.hardware,
        "model": info.model,
        "num_requests": requests.num_rows,
        "num_steps": run.steps.num_rows if run.has("steps") else None,
        "num_cache_events": run.cache.num_rows if run.has("cache") else None,
        "arrivals_span_s": span_s,
        "arrivals_per_s": (requests.num_rows - 1) / span_s if span_s else None,
        "input_tokens": _spread(requests.column("input_tokens").to_numpy()),
        "output_tokens": _spread(requests.column("output_tokens").to_numpy()),
        "prefix_sharing": _sharing(requests, info.hash_block_tokens),
        "latency_ms": _latencies(requests),
        "columns": known,
    }


def _spread(values: npt.NDArray[Any]) -> dict[str, float] | None:
    if not len(values):
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return {"mean": float(values.mean()), "p50": p50, "p90": p90, "p99": p99, "max": float(values.max())}


def _sharing(requests: pa.Table, hash_block_tokens: int | None) -> dict[str, Any] | None:
    if hash_block_tokens is None:
        return None
    chains = prefix_blocks(requests, hash_block_tokens, hash_block_tokens)
    blocks = np.concatenate(chains) if chains else np.empty(0, dtype=np.int64)
    seen_before = (len(blocks) - len(np.unique(blocks))) * hash_block_tokens
    total = int(requests.column("input_tokens").to_numpy().sum())
    return {
        "hash_block_tokens": hash_block_tokens,
        "tokens_seen_before": seen_before,
        "share_of_input": seen_before / total if total else None,
    }


def _latencies(requests: pa.Table) -> dict[str, dict[str, float] | None] | None:
    """Times that the run recorded, counted from arrival."""
    names = {"queued_ns": "queued", "scheduled_ns": "scheduled", "first_token_ns": "ttft", "finish_ns": "e2e"}
    found = {}
    for column, label in names.items():
        known = requests.column(column).is_valid().to_numpy()
        if known.any():
            table = requests.filter(pa.array(known))
            waited = table.column(column).to_numpy() - table.column("arrival_ns").to_numpy()
            found[label] = _spread(to_ms(1) * waited)
    return found or None
