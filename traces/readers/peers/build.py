"""What the readers of peers' outputs share: from per-request durations to a simulated Run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.traces.readers.text import provenance
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

NUMBERED: Final = "request_ids_are_row_numbers"  # in RunInfo.source


def simulated_run(
    path: Path, reader: str, engine: str, columns: Mapping[str, Sequence[Any]], model: str | None = None
) -> Run:
    """A simulated Run of a peer: requests sorted by arrival, in the queue as they arrive unless queued_ns is given.

    Args:
        path: the file, for errors and provenance.
        reader, engine: names of the format and of the simulator.
        columns: of the `requests` table, without request_id where the peer only numbers its requests in row order.
        model: as the peer names it.

    Raises:
        InputError: a column breaks a rule of the table.
    """
    numbered = "request_id" not in columns
    names = {"request_id": [str(row) for row in range(len(columns["arrival_ns"]))]} if numbered else {}
    values = {name: pa.array(cells) for name, cells in {**names, **columns}.items()}
    rows = pc.sort_indices(pa.table(values), sort_keys=[("arrival_ns", "ascending")])
    ordered = {name: cells.take(rows) for name, cells in values.items()}
    ordered.setdefault("queued_ns", ordered["arrival_ns"])
    info = RunInfo(
        "simulated", engine=engine, model=model, source=provenance(path, reader, [path], **{NUMBERED: numbered})
    )
    return Run(info, {"requests": from_columns("requests", ordered, path)}, name=str(path))
