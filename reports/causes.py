"""Which layer causes the errors, in words that tell what to look at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from kvtwin.reports.numbers import percent
from kvtwin.reports.words import AnyReport
from kvtwin.validate.notes import loud_words
from kvtwin.validate.result import Attribution, ScheduleFinding

_LOOK_AT: Final[Mapping[str, str]] = {
    "units": "times are read in another unit than they are in",
    "output": "the simulation generates other numbers of tokens than were recorded",
    "arrival": "requests reach the engine's queue at another time after arrival_ns: a clock that is off, or a frontend "
    "that takes longer",
    "cache": "other prefix-cache hits: compare num_gpu_blocks, block_size, the eviction order and the prompts",
    "schedule": "other decisions at the same times: compare the engine settings with those of the recording",
    "cache and schedule": "other decisions at the same times: compare the engine settings (budget, cache size, eviction "
    "policy) and the prompts with those of the recording",
    "step times": "the profile's step latencies are off, or the recorded ones: see step_bias and step_mape by regime",
    "host": "time between the steps: see the profile's host times",
}


def causes(report: AnyReport) -> list[str]:
    """Which layer causes the errors of the means, a line per run and layer; none where nobody is to blame."""
    found: dict[tuple[str, str], list[Attribution]] = {}
    for attribution in report.attributions:
        is_mean = not attribution.metric.endswith(("_p50", "_p90", "throughput"))  # or a layer's own measure
        if attribution.blamed is not None and is_mean:
            found.setdefault((attribution.run, attribution.blamed), []).append(attribution)
    schedules = {schedule.run: schedule for schedule in report.schedules}
    return [_line(run, layer, rows, schedules.get(run)) for (run, layer), rows in found.items()]


def _line(run: str, layer: str, rows: Sequence[Attribution], schedule: ScheduleFinding | None) -> str:
    errors = ", ".join(f"{row.metric} {percent(_change(row, layer), signed=True)}" for row in rows)
    words = [
        *filter(None, [_LOOK_AT.get(layer)]),
        *dict.fromkeys(word.removeprefix("step times: ") for row in rows for word in loud_words(row.note)),
    ]
    if layer in ("schedule", "cache and schedule") and schedule is not None:
        words += _first_divergence(schedule)
    return f"{run}: {layer} ({errors}){': ' if words else ''}{'; '.join(words)}"


def _change(row: Attribution, layer: str) -> float:
    """What the layer does; all of the error where it is no part, as with wrong units."""
    error = row.simulated / row.measured - 1 if row.measured else math.nan
    return {part.layer: part.change for part in row.parts}.get(layer, error)


def _first_divergence(schedule: ScheduleFinding) -> Iterator[str]:
    first = schedule.first
    if first is None:
        return
    sizes = [_num_tokens(step) for step in (first.measured, first.simulated)]
    counts = "" if None in sizes else f", {sizes[0]} tokens recorded, {sizes[1]} simulated"
    yield f"first at step {first.step}: {first.what}{counts}"


def _num_tokens(step: Mapping[str, Any]) -> int | None:
    """New tokens that the step computes; None where there is no such step, or a file holds something else."""
    batch = step.get("batch")
    try:
        return sum(int(input_len) for _, _, input_len in batch) if batch else None
    except (TypeError, ValueError):
        return None
