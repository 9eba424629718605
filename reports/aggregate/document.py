"""figures.json: what the pages draw, as plain numbers. Its size does not depend on how many requests or steps there were."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Final

from kvtwin.traces.errors import InputError
from kvtwin.traces.files import write_text
from kvtwin.validate.plain import from_plain, load_object, to_plain

FIGURES_SCHEMA_VERSION: Final = 1
MAX_BYTES: Final = 64 * 1024 * 1024

# Where every distribution is sampled: each half percent, and finer in the tails.
SHARES: Final = (0.0, 0.001, *(index / 200 for index in range(1, 200)), 0.999, 1.0)


@dataclass(frozen=True, slots=True)
class Distribution:
    """An empirical distribution.

    Attributes:
        n: how many values; at least one.
        mean: their mean.
        values: their quantiles at SHARES, each one of the values (the smallest that is no smaller than the share).
    """

    n: int
    mean: float
    values: list[float]

    def quantile(self, share: float) -> float:
        """The value at `share`, one of SHARES."""
        return self.values[SHARES.index(share)]


@dataclass(frozen=True, slots=True)
class Pair:
    """One quantity measured and simulated; None where the run does not know it."""

    measured: Distribution | None
    simulated: Distribution | None


@dataclass(frozen=True, slots=True)
class ParityCells:
    """Steps of one kind, gathered in the cells of a logarithmic grid over (measured, predicted); empty cells left out.

    Attributes:
        regime: "prefill", "decode", "mixed" or "other".
        extrapolated: outside the domain that the profile was fitted on.
        num_steps, measured_ms, predicted_ms: per cell, how many steps, and the means of their two times.
        step: per cell, the number of its first step.
    """

    regime: str
    extrapolated: bool
    num_steps: list[int]
    measured_ms: list[float]
    predicted_ms: list[float]
    step: list[int]


@dataclass(frozen=True, slots=True)
class ErrorMap:
    """Step errors by batch size: columns are tokens in the cache, rows new tokens, both summed over the batch.

    Attributes:
        cache_edges, input_edges: bin i holds edges[i] <= tokens < edges[i + 1].
        cache_bin, input_bin: per cell that holds a step, its column and its row.
        num_steps, mean_error, mape: per cell; predicted / measured - 1, signed and absolute.
    """

    cache_edges: list[int]
    input_edges: list[int]
    cache_bin: list[int]
    input_bin: list[int]
    num_steps: list[int]
    mean_error: list[float]
    mape: list[float]


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Predicted and measured step latency of one recorded run.

    Attributes:
        num_left_out: steps without a positive time on both sides; the rest is drawn.
        num_extrapolated: of the drawn ones, outside the fitted domain.
        times: the two distributions, ms.
        parity: by regime and domain.
        errors: predicted / measured - 1 by regime, and of "all".
        error_map: the same by batch size.
    """

    num_left_out: int
    num_extrapolated: int
    times: Pair
    parity: list[ParityCells]
    errors: dict[str, Distribution]
    error_map: ErrorMap


@dataclass(frozen=True, slots=True)
class Envelope:
    """A count over the intervals of a Timeline: its time-weighted mean, smallest and largest value in each.

    Attributes:
        average, peak: over the whole run.
    """

    mean: list[float]
    low: list[int]
    high: list[int]
    average: float
    peak: int


@dataclass(frozen=True, slots=True)
class EnvelopePair:
    """One count measured and simulated; None where the run does not know it."""

    measured: Envelope | None
    simulated: Envelope | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """Counts over time, both runs on one grid of equal intervals from the first arrival on.

    Attributes:
        source: "steps" (the engine's own counts), "queued_ns" or "arrival_ns" (what waiting begins at).
        interval_s: length of an interval.
        counts: "running", "waiting", "kv_blocks" (blocks in use).
    """

    source: str
    interval_s: float
    counts: dict[str, EnvelopePair]


@dataclass(frozen=True, slots=True)
class CacheHits:
    """Prefix-cache hits of one run, in tokens; None where unknown.

    Attributes:
        input_tokens: prompt tokens of the requests whose hits are known.
        hit_tokens: of them, found in a cache of any level.
        host_tokens, storage_tokens: of those, loaded from host DRAM and from storage.
    """

    input_tokens: int
    hit_tokens: int
    host_tokens: int | None
    storage_tokens: int | None


@dataclass(frozen=True, slots=True)
class RunFigures:
    """All figures of one recorded run.

    Attributes:
        name: the recorded run's, as in checks.json.
        duration_s: from the first arrival to the last finish of the recording; 0 where no finish is known.
        num_preemptions: measured and simulated; None where unknown.
        latencies: "ttft", "tpot", "itl", "latency", in ms.
        steps: None without recorded steps.
        timeline: None where one of the runs knows no scheduling times.
        cache: measured and simulated.
    """

    name: str
    duration_s: float
    num_preemptions: tuple[int | None, int | None]
    latencies: dict[str, Pair]
    steps: StepFigures | None
    timeline: Timeline | None
    cache: tuple[CacheHits | None, CacheHits | None]


@dataclass(frozen=True, slots=True)
class Figures:
    """The whole document."""

    runs: list[RunFigures] = field(default_factory=list)


def write(figures: Figures, path: str | PathLike[str]) -> Path:
    """Write figures.json, replacing an older one: all of it or nothing.

    Raises:
        InputError: the place cannot be written to.
    """
    document = {"schema_version": FIGURES_SCHEMA_VERSION, "shares": SHARES, **to_plain(figures)}
    return write_text(path, json.dumps(document, allow_nan=False, separators=(",", ":")) + "\n")


def read(path: str | PathLike[str]) -> Figures:
    """Read figures.json back; every list is as long as its neighbours.

    Raises:
        InputError: not readable, of another schema version, or not such a document.
    """
    document = load_object(Path(path), MAX_BYTES)
    version, shares = document.get("schema_version"), document.get("shares")
    if version != FIGURES_SCHEMA_VERSION or shares != list(SHARES):
        problem = f"is {version!r}; this kvtwin reads {FIGURES_SCHEMA_VERSION}: make it again with kvtwin check"
        raise InputError(problem, path=path, column="schema_version")
    figures: Figures = from_plain(Figures, {"runs": document.get("runs")}, path)
    for run in figures.runs:
        _check_lengths(run, path)
    return figures


def _check_lengths(run: RunFigures, path: str | PathLike[str]) -> None:
    """Refuse columns that do not belong together: the pages pair them by position."""
    distributions = [side for pair in run.latencies.values() for side in (pair.measured, pair.simulated)]
    columns: list[Sequence[Sequence[float]]] = []
    if run.steps is not None:
        distributions += [run.steps.times.measured, run.steps.times.simulated, *run.steps.errors.values()]
        columns += [[part.num_steps, part.measured_ms, part.predicted_ms, part.step] for part in run.steps.parity]
        cells = run.steps.error_map
        columns.append([cells.cache_bin, cells.input_bin, cells.num_steps, cells.mean_error, cells.mape])
        if not _inside(cells.cache_bin, cells.cache_edges) or not _inside(cells.input_bin, cells.input_edges):
            raise InputError("a cell lies outside its edges", path=path, column=f"{run.name}.error_map")
    if run.timeline is not None:
        sides = [side for pair in run.timeline.counts.values() for side in (pair.measured, pair.simulated) if side]
        columns.append([column for side in sides for column in (side.mean, side.low, side.high)])
    columns.append([side.values for side in distributions if side] + [list(SHARES)])
    if any(len({len(column) for column in group}) > 1 for group in columns):
        raise InputError("has columns of different lengths", path=path, column=f"runs: {run.name}")


def _inside(bins: list[int], edges: list[int]) -> bool:
    return all(0 <= index < len(edges) - 1 for index in bins)
