"""Other simulators' runs made comparable: their numbered requests take the names of the recorded ones."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.peers.build import NUMBERED
from kvtwin.traces.run import Run


def match_requests(measured: Run, predicted: Run) -> Run:
    """Name the requests of a peer that only numbers them: number k is the k-th recorded request by arrival.

    `compare_e2e` then refuses requests of other lengths, so a shifted match does not go unnoticed.

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
