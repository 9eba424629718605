"""Other simulators' predictions beside a recording: runs, whose numbered requests take the recorded names, or aggregates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers import detect, read_run, vllm_bench
from kvtwin.traces.readers.peers.build import NUMBERED
from kvtwin.traces.readers.summary import is_summary, read_summary
from kvtwin.traces.run import Run
from kvtwin.validate.e2e import Clock, compare_e2e
from kvtwin.validate.gates import NO_GATES, Gates
from kvtwin.validate.result import Check
from kvtwin.validate.summary import compare_summary


def compare_prediction(
    measured: Run, path: Path, *, name: str, clock: Clock, repeats: Sequence[Run] = (), gates: Gates = NO_GATES
) -> list[Check]:
    """Judge whatever a file says of a recorded run: each request of it, or aggregates.

    Args:
        measured: the recording.
        path: a run of any format, or aggregates (`traces.readers.summary`).
        name, clock, repeats, gates: see `e2e.compare_e2e`.

    Raises:
        InputError: neither of them, or of other requests.
    """
    if is_summary(path):
        return compare_summary(measured, read_summary(path), name=name, clock=clock, gates=gates)
    bench = path.is_file() and detect(path) == "vllm_bench"
    predicted = vllm_bench.read(path, measured) if bench else match_requests(measured, read_run(path))
    return compare_e2e(measured, predicted, name=name, clock=clock, repeats=repeats, gates=gates)


def match_requests(measured: Run, predicted: Run) -> Run:
    """Name the requests of a peer that only numbers them: number k is the k-th recorded request by arrival.

    `compare_e2e` then refuses other prompts and fails other output lengths, so a shifted match does not go unnoticed.

    Raises:
        InputError: the runs differ in their number of requests.
    """
    if not predicted.info.source.get(NUMBERED):
        return predicted
    names, table = measured.requests.column("request_id"), predicted.requests
    if len(names) != table.num_rows:
        problem = f"{table.num_rows} requests here, {len(names)} in the measured run; requests are matched by number"
        raise InputError(problem, path=predicted.path or predicted.info.source.get("path"), column="request_id")
    numbers = table.column("request_id").cast(pa.int64()).combine_chunks()
    at = table.schema.get_field_index("request_id")
    renamed = table.set_column(at, table.schema.field(at), names.take(numbers))
    info = replace(predicted.info, source={**predicted.info.source, NUMBERED: False})
    return Run(info, {"requests": renamed}, name=str(predicted.path))
