"""Vidur's `request_metrics.csv`: a row per request, every time in seconds, as durations.

    Request Id,request_e2e_time,...,prefill_e2e_time,...,request_inter_arrival_delay,...,request_num_prefill_tokens,...
    0,1.52,...,0.11,...,,...,374,...

Read from microsoft/vidur, vidur/metrics/metrics_store.py (`on_request_arrival`, `_on_request_end`, `_save_as_csv`) and
vidur/entities/request.py: request_e2e_time = completed - arrived, prefill_e2e_time = prefill completed - arrived, and
the end of the prefill gives the first output token (`Request.on_batch_end`), so it is TTFT. request_scheduling_delay =
first scheduled - arrived. Arrivals are not stored: they are the running sum of request_inter_arrival_delay (empty for
the first request, which is our origin). A request that did not finish has empty times, here null. The other columns
(normalised and execution times, restarts) are not read. Written from the code: no sample of a real file was at hand.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Final

import numpy as np

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.peers.build import simulated_run
from kvtwin.traces.readers.text import MAX_TOKENS, Row, read_lines
from kvtwin.traces.run import Run
from kvtwin.traces.time import from_decimal_seconds

DELAY: Final = "request_inter_arrival_delay"
TIMES: Final = {
    "request_scheduling_delay": "scheduled_ns",
    "prefill_e2e_time": "first_token_ns",
    "request_e2e_time": "finish_ns",
}
TOKENS: Final = {"request_num_prefill_tokens": "input_tokens", "request_num_decode_tokens": "output_tokens"}
COLUMNS: Final = ("Request Id", DELAY, *TIMES, *TOKENS)
MAX_SECONDS: Final = 1e8


def read(path: Path) -> Run:
    """Read request_metrics.csv as a simulated Run.

    Raises:
        InputError: with file, row and column; also where request ids are not 0, 1, 2, ... in order.
    """
    columns: dict[str, list[int | None]] = {name: [] for name in ("arrival_ns", *TOKENS.values(), *TIMES.values())}
    arrival = 0
    for number, row in enumerate(_rows(path)):
        if row.values["Request Id"] not in (str(number), f"{number}.0"):
            row.fail("Request Id", f"{number} expected: requests in order, none left out")
        delay = _time_ns(row, DELAY)
        if delay is None and number:
            row.fail(DELAY, "is empty: only the first request has no request before it")
        arrival += (delay or 0) if number else 0
        columns["arrival_ns"].append(arrival)
        for theirs, ours in TOKENS.items():
            columns[ours].append(_tokens(row, theirs))
        for theirs, ours in TIMES.items():
            elapsed = _time_ns(row, theirs)
            columns[ours].append(None if elapsed is None else arrival + elapsed)
    return simulated_run(path, "vidur_requests", "Vidur", columns)


def _rows(path: Path) -> list[Row]:
    lines = list(read_lines(path))
    try:
        header = next(csv.reader([lines[0][1]]), []) if lines else []
    except csv.Error as error:
        raise InputError(f"not a header of CSV ({error})", path=path, row=1) from error
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise InputError("column is missing", path=path, row=1, column=missing[0])
    rows = []
    for number, line in lines[1:]:
        cells = line.split(",")
        if len(cells) != len(header):
            raise InputError(f"{len(cells)} fields, but the header has {len(header)}", path=path, row=number)
        rows.append(Row(path, number, dict(zip(header, cells, strict=True))))
    if not rows:
        raise InputError("holds no rows", path=path)
    return rows


def _time_ns(row: Row, column: str) -> int | None:
    """Seconds as nanoseconds; None for an empty cell."""
    cell = row.values[column]
    return from_decimal_seconds(cell) if cell and _number(row, column, MAX_SECONDS) is not None else None


def _tokens(row: Row, column: str) -> int:
    """A count that a data frame may have written as 374.0."""
    value = _number(row, column, MAX_TOKENS)
    if value < 1 or value != int(value):
        row.fail(column, f"{value} tokens: a whole number from 1 expected")
    return int(value)


def _number(row: Row, column: str, high: float) -> float:
    cell = row.values[column]
    try:
        value = float(cell)
    except ValueError:
        value = np.nan
    if not 0 <= value <= high or "_" in cell:
        row.fail(column, f"{cell[:40]!r} is not a number from 0 to {high:g}")
    return value
