"""LLMServingSim's per-request output, every time in integer nanoseconds.

    instance id,request id,model,input,output,arrival,end_time,latency,queuing_delay,TTFT,TPOT,ITL
    0,0,meta-llama/Llama-3.1-8B,2358,531,46926808,14602802369,14555875561,82945408,102441621,27270630,"[...]"

`arrival` and `end_time` are on the simulator's clock, the others are durations: latency = end_time - arrival, TTFT
counts from arrival, TPOT = (latency - TTFT) / (output - 1), rounded down. `output` is the tokens generated (the file
leaves out the prompt). Unit and rules hold in each of the 300 rows of the prediction in ../shared/data, which ends with
TPOT; an ITL column after it (a list in quotes) is known from other repositories' files only, and not read. Requests are
numbered, in the order of the replayed file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from kvtwin.traces.readers.peers.build import simulated_run
from kvtwin.traces.readers.text import MAX_TIME_NS, MAX_TOKENS, Columns, read_csv
from kvtwin.traces.run import Run

TIMES: Final = ("arrival", "end_time", "latency", "queuing_delay", "TTFT", "TPOT")
_KINDS: Final[dict[str, type]] = {
    "instance id": int,
    "request id": int,
    "model": str,
    "input": int,
    "output": int,
    **dict.fromkeys(TIMES, int),
}


def read(path: Path) -> Run:
    """Read a per-request CSV as a simulated Run.

    Raises:
        InputError: with file, row and column; also where the request numbers are not 0 to n - 1 or times disagree.
    """
    table = read_csv(path, _KINDS, {"ITL": str})
    _check(table)
    rows = np.argsort(table["request id"], kind="stable")
    sorted_ids = table["request id"][rows]
    good = np.empty(len(rows), np.bool_)
    good[rows] = sorted_ids == np.arange(len(rows))
    table.require(good, "request id", f"is not a number of its own from 0 to {len(rows) - 1}")
    arrival = table["arrival"][rows]
    columns = {
        "instance": table["instance id"][rows],
        "arrival_ns": arrival,
        "input_tokens": table["input"][rows],
        "output_tokens": table["output"][rows],
        "scheduled_ns": arrival + table["queuing_delay"][rows],
        "first_token_ns": arrival + table["TTFT"][rows],
        "finish_ns": table["end_time"][rows],
    }
    return simulated_run(path, "llmservingsim_requests", "LLMServingSim", columns, str(table["model"][0]))


def _check(table: Columns) -> None:
    for column in ("input", "output"):
        good = (table[column] >= 1) & (table[column] <= MAX_TOKENS)
        table.require(good, column, f"tokens: 1 to {MAX_TOKENS} expected")
    instance = table["instance id"]
    table.require((instance >= 0) & (instance <= MAX_TOKENS), "instance id", "is not an instance number")
    for column in TIMES:
        good = (table[column] >= 0) & (table[column] <= MAX_TIME_NS // 2)
        table.require(good, column, "ns is out of range")
    agrees = table["latency"] == table["end_time"] - table["arrival"]
    table.require(agrees, "latency", "ns is not end_time - arrival")
    table.require(table["TTFT"] <= table["latency"], "TTFT", "ns is more than the latency")
    table.require(table["queuing_delay"] <= table["TTFT"], "queuing_delay", "ns is more than TTFT")
