"""BLIS (inference-sim) metrics file with a row per request: one JSON object.

    {"instance_id": "cluster", "completed_requests": 2, "ttft_mean_ms": 20.5, ..., "requests": [
      {"arrived_at": 0.25, "requestID": "request_0", "num_prefill_tokens": 374, "num_decode_tokens": 44,
       "ttft_ms": 20.5, "itl_ms": 8.1, "e2e_ms": 368.8, "scheduling_delay_ms": 1.5}, ...]}

Read from inference-sim/inference-sim, sim/metrics_utils.go (`RequestMetrics`, `MetricsOutput`) and sim/metrics.go
(`EmitOutput`). Three units in one simulator: the clock ticks in microseconds; `arrived_at` is seconds
(`NewRequestMetrics(req, float64(req.ArrivalTime)/1e6)`); ttft_ms, e2e_ms and scheduling_delay_ms are milliseconds
(ticks / 1e3). The scheduling delay is not read.
A request that did not finish has 0 for times that never came: null here. Rows are sorted by arrival; the ids are
generated, so requests are matched by that order. Written from the code: no sample of a real file was at hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.peers.build import simulated_run
from kvtwin.traces.readers.text import Row, read_json
from kvtwin.traces.run import Run
from kvtwin.traces.time import NS_PER_MS, from_seconds


def read(path: Path) -> Run:
    """Read a BLIS metrics file as a simulated Run.

    Raises:
        InputError: with file, row (of `requests`, from 1) and column; also where the file holds only the summary.
    """
    rows = read_json(path).get("requests")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        problem = "a list of requests expected (BLIS writes it to its metrics file, not to stdout)"
        raise InputError(problem, path=path, column="requests")
    requests = [_read_row(Row(path, number, values)) for number, values in enumerate(rows, 1)]
    columns = {name: [request[name] for request in requests] for name in requests[0]}
    return simulated_run(path, "blis", "BLIS", columns)


def _read_row(row: Row) -> dict[str, Any]:
    arrival = from_seconds(row.seconds("arrived_at"))
    return {
        "arrival_ns": arrival,
        "input_tokens": row.tokens("num_prefill_tokens"),
        "output_tokens": row.tokens("num_decode_tokens"),
        "first_token_ns": _after(row, "ttft_ms", arrival),
        "finish_ns": _after(row, "e2e_ms", arrival),
    }


def _after(row: Row, column: str, arrival: int) -> int | None:
    """Arrival plus a duration in milliseconds; None where it is 0, which BLIS writes for what never happened."""
    elapsed = row.seconds(column, "milliseconds")
    return arrival + round(elapsed * NS_PER_MS) if elapsed else None
