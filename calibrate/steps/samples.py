"""The steps of several recordings, checked and one after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from kvtwin.calibrate.agree import agreed_facts, place_of
from kvtwin.calibrate.units import refuse_wrong_units
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.stats import BatchStats, IntArray, durations_ns
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run

MIN_STEPS: Final = 50  # fewer cannot be split into a part to fit and a part to judge
_MIN_DAYS: Final = 3  # recordings from which the speed of each is told apart
TIME_BLOCKS: Final = 5  # hold-out parts of a single recording


@dataclass(frozen=True)
class Samples:
    """All steps of all runs, one after the other.

    Attributes:
        batches, latency_ns: n rows.
        fold: which part a row is left out with, shape (n,).
        day: which run a row comes from, shape (n,); None for so few runs that their speeds are not told apart.
        names, rows, digests: by run; `rows` are the places of its steps.
    """

    batches: BatchStats
    latency_ns: FloatArray
    fold: IntArray
    day: IntArray | None
    names: tuple[str, ...]
    rows: tuple[range, ...]
    digests: tuple[str, ...]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Samples:
        """Check the runs and join them; see `calibrate_steps` for what is refused."""
        if not runs:
            raise InputError("no recording to calibrate on: at least one run with steps is needed")
        agreed_facts(runs)
        tables = [checked_steps(run) for run in runs]
        ends = np.cumsum([0, *(table.num_rows for table in tables)]).tolist()
        if ends[-1] < MIN_STEPS:
            raise InputError(f"{ends[-1]} steps in all: at least {MIN_STEPS} are needed to fit and to judge the fit")
        run_of = np.repeat(np.arange(len(runs)), np.diff(ends))
        return cls(
            batches=BatchStats(np.concatenate([BatchStats.of_steps(table).table for table in tables])),
            latency_ns=np.concatenate([durations_ns(table) for table in tables]).astype(np.float64),
            fold=run_of if len(runs) > 1 else np.arange(ends[-1]) * TIME_BLOCKS // ends[-1],
            day=run_of if len(runs) >= _MIN_DAYS else None,
            names=names_of(runs),
            rows=tuple(range(*bounds) for bounds in pairwise(ends)),
            digests=tuple(_digest(table) for table in tables),
        )

    def loss(self, predicted: FloatArray) -> FloatArray:
        """Gamma deviance of each step, halved."""
        ratio = self.latency_ns / predicted
        return ratio - 1 - np.log(ratio)


def checked_steps(run: Run) -> pa.Table:
    """A run's steps. Raises InputError for none, and for a step that took no time or has an empty batch."""
    if not run.has("steps"):
        raise InputError("no steps table: step latencies are fitted to recorded steps", path=place_of(run))
    steps = run.steps
    if not steps.num_rows:
        raise InputError("the steps table is empty: nothing to calibrate on", path=place_of(run))
    bad = np.flatnonzero(durations_ns(steps) <= 0)
    if bad.size:
        start = steps.column("start_ns")[int(bad[0])].as_py()
        problem = f"the step ends where it starts ({start} ns): a duration of at least 1 ns expected"
        raise InputError(problem, path=place_of(run), row=int(bad[0]), column="end_ns")
    empty = np.flatnonzero(np.diff(steps.column("cache_len").combine_chunks().offsets.to_numpy()) == 0)
    if empty.size:
        raise InputError("the batch is empty", path=place_of(run), row=int(empty[0]), column="request")
    refuse_wrong_units(run)
    return steps


def names_of(runs: Sequence[Run]) -> tuple[str, ...]:
    """Short names, made unique by a number where needed."""
    names: list[str] = []
    for index, run in enumerate(runs):
        place = place_of(run)
        name = Path(place).name if place else f"run {index + 1}"
        names.append(name if name not in names else f"{name} ({index + 1})")
    return tuple(names)


def _digest(steps: pa.Table) -> str:
    """SHA-256 of times and batches: the same for a recording and for the run folder imported from it."""
    digest = hashlib.sha256()
    cache_len = steps.column("cache_len").combine_chunks()
    input_len = steps.column("input_len").combine_chunks()
    sizes = np.diff(cache_len.offsets.to_numpy())
    starts, ends = (steps.column(name).to_numpy() for name in ("start_ns", "end_ns"))
    for values in (starts, ends, sizes, cache_len.flatten().to_numpy(), input_len.flatten().to_numpy()):
        digest.update(np.ascontiguousarray(values, dtype="<i8").tobytes())
    return digest.hexdigest()
