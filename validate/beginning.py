"""The first part of a long run, for what would take minutes on the whole."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.traces.run import Run

_STAMPS = ("scheduled_ns", "first_token_ns", "finish_ns", "client_first_token_ns", "client_finish_ns")
_TOTALS = ("num_preemptions", "waiting_ns", "prefetch_ns", "running_ns", "swapped_ns")


def beginning(run: Run, max_steps: int) -> tuple[Run, int]:
    """The run as it stood after its first steps.

    Args:
        run: with steps.
        max_steps: how many of them to keep.

    Returns:
        The run: the requests up to the last that was served by then; what happened to them later is null. And when its
        last step began, in ns.
    """
    steps = run.steps.slice(0, max_steps)
    cut_ns = int(steps.column("start_ns")[-1].as_py())
    if run.steps.num_rows <= max_steps:
        return run, cut_ns
    num_requests = int(pc.max(steps.column("request").combine_chunks().flatten()).as_py()) + 1
    requests = run.requests.slice(0, num_requests)
    end_ns = pc.max(steps.column("end_ns"))
    unfinished = pc.fill_null(pc.greater(requests.column("finish_ns"), end_ns), True)
    for names, later in ((_STAMPS, None), (_TOTALS, unfinished)):
        for name in names:
            column = requests.column(name)
            gone = pc.fill_null(pc.greater(column, end_ns), True) if later is None else later
            kept = pc.if_else(gone, pa.scalar(None, column.type), column)
            requests = requests.set_column(requests.schema.get_field_index(name), requests.schema.field(name), kept)
    return Run(run.info, {"requests": requests, "steps": steps}, name=str(run.path or "the run")), cut_ns
