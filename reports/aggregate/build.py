"""From what a check found to figures.json, in one pass over each run."""

from __future__ import annotations

from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.reports.aggregate.document import CacheHits, Figures, Pair, RunFigures
from kvtwin.reports.aggregate.sampling import distribution
from kvtwin.reports.aggregate.steps import step_figures
from kvtwin.reports.aggregate.timeline import timeline
from kvtwin.reports.aggregate.tokens import inter_token_ms
from kvtwin.traces.run import Run
from kvtwin.traces.time import to_seconds
from kvtwin.validate.e2e import request_metrics
from kvtwin.validate.result import Comparison, TargetReport

# Cells of the parity plots: for one run, and for all runs of a page together (about 35 bytes each).
MAX_RUN_CELLS: Final = 1500
_MAX_CELLS: Final = 10_000


def aggregate(report: TargetReport) -> Figures:
    """All that the pages draw of the report's comparisons."""
    max_cells = min(MAX_RUN_CELLS, _MAX_CELLS // max(len(report.comparisons), 1))
    return Figures([run_figures(comparison, max_cells) for comparison in report.comparisons])


def run_figures(comparison: Comparison, max_cells: int = MAX_RUN_CELLS) -> RunFigures:
    """All that is drawn of one recorded run and its simulation.

    Args:
        comparison: the two runs.
        max_cells: of the parity plot.
    """
    runs = (comparison.measured, comparison.simulated)
    predictions = comparison.predictions
    some = all(run.requests.num_rows for run in runs)
    return RunFigures(
        name=comparison.name,
        duration_s=_duration_s(comparison.measured),
        num_preemptions=(_total(runs[0].requests, "num_preemptions"), _total(runs[1].requests, "num_preemptions")),
        latencies=_latencies(comparison),
        steps=None if predictions is None else step_figures(predictions, max_cells),
        timeline=timeline(*runs) if some else None,
        cache=(_cache_hits(runs[0].requests), _cache_hits(runs[1].requests)),
    )


def _latencies(comparison: Comparison) -> dict[str, Pair]:
    """Each run's distributions of its own; a time that is unknown is left out."""
    runs = (comparison.measured, comparison.simulated)
    sides = [request_metrics(run, comparison.clock) for run in runs]
    pairs = {name: Pair(*(distribution(side[f"{name}_ms"]) for side in sides)) for name in ("ttft", "tpot", "latency")}
    pairs["itl"] = Pair(*(distribution(inter_token_ms(run)) for run in runs))
    return pairs


def _duration_s(run: Run) -> float:
    finish = pc.max(run.requests["finish_ns"]).as_py()
    return 0.0 if finish is None else to_seconds(finish - run.requests["arrival_ns"][0].as_py())


def _total(table: pa.Table, column: str) -> int | None:
    total: int | None = pc.sum(table[column]).as_py()
    return total


def _cache_hits(requests: pa.Table) -> CacheHits | None:
    """None where no request says what it found."""
    known = requests.filter(requests["cached_tokens"].is_valid())
    if not known.num_rows:
        return None
    return CacheHits(
        input_tokens=_total(known, "input_tokens") or 0,
        hit_tokens=_total(known, "cached_tokens") or 0,
        host_tokens=_total(known, "cached_host_tokens"),
        storage_tokens=_total(known, "cached_storage_tokens"),
    )
