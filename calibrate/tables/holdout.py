"""Hold-out of a table: whole values of an axis, never cells, and the naive fits that a model must beat.

A fold leaves out some values of one load axis with all their rows, no two of them neighbours. A left-out row is *inside*
where rows that agree with it in every other column stay on both sides of it; elsewhere (the ends of an axis, the corners
of a table) its prediction is extrapolation, and is reported apart. Rows that lie on no grid (batches of uneven lengths)
are inside where each of their columns lies between values that stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate.tables.candidates import fit_all, is_grid
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.octaves import octave
from kvtwin.traces.readers.optable import OpSamples

NUM_FOLDS = 5
_MANY_AXES, _FEW_FOLDS = 4, 3  # grids of five axes and more are filled less often
MIN_VALUES = 4  # of an axis that is held out: two ends and two inner values


@dataclass(frozen=True)
class Fold:
    """Rows left out together.

    Attributes:
        axis: the load whose values are left out.
        left_out: bool of shape (n,).
    """

    axis: str
    left_out: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class HeldOut:
    """Held-out predictions of several models, row by row: arrays of shape (m,), one row per (fold, left-out row).

    Attributes:
        row: index into the samples.
        axis: of the fold.
        inside: of the row.
        group: code of the left-out value, for intervals over whole values.
        predicted: microseconds by model name.
    """

    row: npt.NDArray[np.intp]
    axis: npt.NDArray[np.str_]
    inside: npt.NDArray[np.bool_]
    group: npt.NDArray[np.int64]
    predicted: dict[str, FloatArray]

    def part(self, axis: str, inside: bool) -> npt.NDArray[np.bool_]:
        """Rows of one axis, inside or outside."""
        found: npt.NDArray[np.bool_] = (self.axis == axis) & (self.inside == inside)
        return found


def folds(samples: OpSamples) -> Iterator[Fold]:
    """Every fold of every load axis with enough values: inner values in turn, then each end."""
    for axis, load in samples.load.items():
        values = np.unique(load)
        if len(values) < MIN_VALUES:
            continue
        inner = values[1:-1]
        count = min(NUM_FOLDS if len(samples.load) <= _MANY_AXES else _FEW_FOLDS, max(2, len(inner)))
        for first in range(min(count, len(inner))):
            yield Fold(axis, np.isin(load, inner[first::count]))
        for end in (values[0], values[-1]):
            yield Fold(axis, load == end)


def hold_out(samples: OpSamples, slots: Sequence[float] | None) -> HeldOut:
    """Predict every left-out row by every candidate and by the naive fits, each fitted without it."""
    rows: list[npt.NDArray[np.intp]] = []
    axes: list[npt.NDArray[np.str_]] = []
    inside: list[npt.NDArray[np.bool_]] = []
    groups: list[npt.NDArray[np.int64]] = []
    predicted: dict[str, list[FloatArray]] = {}
    grid = is_grid(samples)
    for fold in folds(samples):
        test = np.flatnonzero(fold.left_out)
        train = samples.where(~fold.left_out)
        if len(train) < MIN_VALUES or not len(test):
            continue
        left_out = samples.where(test)
        rows.append(test)
        axes.append(np.full(len(test), fold.axis))
        inside.append(_bracketed(train, left_out, fold.axis) if grid else _between(train, left_out))
        groups.append(np.unique(left_out.load[fold.axis], return_inverse=True)[1].ravel() + 1000 * len(groups))
        for name, values in _predictions(train, left_out, fold.axis, slots).items():
            predicted.setdefault(name, []).append(values)
    if not rows:
        nothing = np.zeros(0, np.int64)
        return HeldOut(nothing, nothing.astype(np.str_), nothing > 0, nothing, {})
    # What a fold leaves may be too little for a candidate: it counts where every fold has it.
    joined = {name: np.concatenate(values) for name, values in predicted.items() if len(values) == len(rows)}
    return HeldOut(np.concatenate(rows), np.concatenate(axes), np.concatenate(inside), np.concatenate(groups), joined)


def _predictions(train: OpSamples, test: OpSamples, axis: str, slots: Sequence[float] | None) -> dict[str, FloatArray]:
    found = {fitted.name: fitted.time_us(test.columns) for fitted in fit_all(train, slots)}
    return found | {"ols": _ols(train, test), "nearest": _nearest(train, test, axis)}


def _ols(train: OpSamples, test: OpSamples) -> FloatArray:
    """Ordinary least squares on the columns and their product: the naive fit that issues 1 to 4 quote."""

    def design(samples: OpSamples) -> FloatArray:
        columns = [values.astype(np.float64) for values in samples.columns.values()]
        return np.column_stack([np.ones(len(samples)), *columns, np.prod(columns, axis=0)])

    matrix = design(train)
    scale = np.maximum(np.abs(matrix).max(axis=0), 1.0)
    prices, *_ = np.linalg.lstsq(matrix / scale, train.time_us, rcond=None)
    found: FloatArray = np.maximum(design(test) / scale @ prices, 1e-3)
    return found


def _nearest(train: OpSamples, test: OpSamples, axis: str) -> FloatArray:
    """Time of the row that agrees in every other column and is nearest on the left-out axis."""
    known, wanted, order = _on_lines(train, test, axis)
    after = np.clip(np.searchsorted(known, wanted), 0, len(known) - 1)
    before = np.clip(after - 1, 0, None)
    closer = np.where(np.abs(known[after] - wanted) < np.abs(wanted - known[before]), after, before)
    found: FloatArray = train.time_us[order][closer]
    return found


def _bracketed(train: OpSamples, test: OpSamples, axis: str) -> npt.NDArray[np.bool_]:
    """Which rows of `test` have rows of `train` on both sides along the axis, equal in every other column."""
    known, wanted, _ = _on_lines(train, test, axis)
    line, lines = np.floor(wanted), np.floor(known)
    after = np.searchsorted(known, wanted)
    found: npt.NDArray[np.bool_] = (after > 0) & (after < len(known))
    found &= (lines[np.clip(after - 1, 0, None)] == line) & (lines[np.clip(after, None, len(known) - 1)] == line)
    return found


def _between(train: OpSamples, test: OpSamples) -> npt.NDArray[np.bool_]:
    """For scattered rows: which lie within the span of `train` in every column."""
    found = np.ones(len(test), np.bool_)
    for name, values in test.columns.items():
        found &= (values >= train.columns[name].min()) & (values <= train.columns[name].max())
    return found


def _on_lines(train: OpSamples, test: OpSamples, axis: str) -> tuple[FloatArray, FloatArray, npt.NDArray[np.intp]]:
    """Place of each row as line + share of the axis (0 to 1/2): sorted for `train`, with its order; and for `test`."""
    code = _codes(train, test, [name for name in train.columns if name != axis])
    place = octave(np.concatenate([train.load[axis], test.load[axis]]))
    along = code + place / (2 * max(float(place.max()), 1.0))
    n = len(train)
    order = np.argsort(along[:n], kind="stable")
    return along[:n][order], along[n:], order


def _codes(train: OpSamples, test: OpSamples, names: Sequence[str]) -> npt.NDArray[np.int64]:
    total = len(train) + len(test)
    code = np.zeros(total, np.int64)
    for name in names:
        both = np.concatenate([train.columns[name], test.columns[name]])
        _, index = np.unique(both, return_inverse=True)
        _, code = np.unique(code * (int(index.max()) + 1) + index.ravel(), return_inverse=True)
        code = code.ravel()
    return code
