"""Requests of SGLang's simulator, and of HiSim, which it grew from: request.jsonl of the output folder, in seconds.

    {"rid": "5f3a", "input_length": 10, "output_length": 2, "created_time": 0.0, "queue_start": 0.0, "queue_end": 0.125,
     "gen_token_latencies": [0.5, 0.25], "last_event_time": 0.75, "final_device_hit_len": 4, ...}

Read from sgl-project/sglang, tools/sglang-simulator, simulation/types.py (`RequestStats`) and simulation/sglang/scheduler.py
(`override_profile` writes the file sorted by created_time, the first one's being 0). created_time is the arrival,
queue_start when the scheduler's loop took the request, queue_end its first admission. The first entry of
gen_token_latencies counts from the arrival, each other one from the token before; a request with fewer of them than
output_length did not finish. A queue time that never came is negative: null here. Hit lengths are not read. `rid` is
the server's own name, so requests are matched by their order. Written from the code: no sample was at hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtwin.traces.readers.peers.build import simulated_run
from kvtwin.traces.readers.text import Row, read_jsonl
from kvtwin.traces.run import Run
from kvtwin.traces.time import from_seconds


def read(path: Path) -> Run:
    """Read request.jsonl as a simulated Run.

    Raises:
        InputError: with file, row and column.
    """
    requests = sorted(map(_read_row, read_jsonl(path)), key=lambda request: request["arrival_ns"])
    columns = {name: [request[name] for request in requests] for name in requests[0]}
    return simulated_run(path, "sglang_simulator", "SGLang simulator", columns)


def _read_row(row: Row) -> dict[str, Any]:
    arrival = row.seconds("created_time")
    gaps = row.seconds_list("gen_token_latencies")
    num_tokens = row.tokens("output_length")
    return {
        "arrival_ns": from_seconds(arrival),
        "input_tokens": row.tokens("input_length"),
        "output_tokens": num_tokens,
        "queued_ns": _queue_time(row, "queue_start"),
        "scheduled_ns": _queue_time(row, "queue_end"),
        "first_token_ns": from_seconds(arrival + gaps[0]) if gaps else None,
        "finish_ns": from_seconds(arrival + sum(gaps)) if len(gaps) >= num_tokens else None,
    }


def _queue_time(row: Row, column: str) -> int | None:
    value = row.get(column)
    if isinstance(value, int | float) and value < 0:
        return None
    return from_seconds(row.seconds(column))
