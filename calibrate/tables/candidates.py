"""Models of one operator's times, each with `fit(samples) -> self`, `time_us(columns)` and `to_model()`.

From simple to rich: `Trend` (physics alone: a handful of prices), `Linear` (the table alone), `Hybrid` (physics times
the table's ratios) and `Smooth` (the same, with ratios refined by a monotone cubic). Only numbers leave this file.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Final, Protocol, Self

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate.steps import NotFittedError
from kvtwin.sim.latency.bank import MIN_TIME_US, OperatorModel, ShapeBank, octave
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.work import TILES, WAVES, Columns, terms
from kvtwin.traces.readers.optable import OpSamples

# Thread blocks that a device runs at once, where its GPU is not known: streaming multiprocessors of common GPUs (and
# twice as many), per query head where the table does not hold heads. 0: no waves (TPU, CPU, or nothing to see).
_COMMON_SLOTS: Final = (58, 72, 82, 84, 108, 114, 128, 132, 142, 148, 170, 188, 216, 264, 296, 376)
_SEARCH_ROWS: Final = 600  # of a table, to choose tile and slots on
_MAX_CELLS: Final = 200_000  # of a refined grid
_CELLS_PER_ROW: Final = 60  # a table of more cells is no grid (skewed decodes, six axes: 40)
_MIN_RATIO: Final = 1e-6
# Loads that kernels take in tiles of rows, and the tiles worth trying.
_TILED: Final = ("m", "num_tokens", "chunk")
STAIRCASES: Final = ((), (16.0,), (64.0,), (128.0,), (64.0, 128.0))


class Candidate(Protocol):
    """What every model of an operator offers; the constructor only stores settings."""

    @property
    def name(self) -> str:
        """How the choice calls it."""

    def fit(self, samples: OpSamples) -> Self:
        """Learn from every row of `samples`; times must be positive."""

    def time_us(self, columns: Columns) -> FloatArray:
        """Microseconds of n batches."""

    def to_model(self) -> OperatorModel:
        """Plain numbers that `sim/latency` evaluates."""


class _Fitted:
    """What candidates share: the fitted model, once there is one."""

    model_: OperatorModel

    def to_model(self) -> OperatorModel:
        """See `Candidate`."""
        if not hasattr(self, "model_"):
            raise NotFittedError("call fit first")
        return self.model_

    def time_us(self, columns: Columns) -> FloatArray:
        """See `Candidate`."""
        return self.to_model().time_us(columns)


class Linear(_Fitted):
    """The table alone: multilinear interpolation in the loads themselves, going on in a straight line.

    Args:
        tiles: place the loads that kernels take in tiles on a staircase of these; () for none.
    """

    def __init__(self, tiles: Sequence[float] = ()) -> None:
        self.tiles = tuple(tiles)
        self.name = _stepped("linear", self.tiles)

    def fit(self, samples: OpSamples) -> Self:
        """See `Candidate`."""
        bank = fill_bank(samples, samples.time_us, octaves=False, steps=_steps(samples, self.tiles))
        self.model_ = OperatorModel(samples.op, samples.work, samples.key, samples.constants, {}, 1.0, 0.0, bank)
        return self


class Trend(_Fitted):
    """Physics alone: non-negative prices of the work's terms, by least relative squares.

    Args:
        slots: thread blocks that the device may run at once, to choose among; None for common GPUs.
    """

    name = "trend"

    def __init__(self, slots: Sequence[float] | None = None) -> None:
        self.slots = slots

    def fit(self, samples: OpSamples) -> Self:
        """See `Candidate`."""
        columns = _all_columns(samples)
        self.tile_, self.slots_ = self._geometry(samples.work, columns, samples.time_us)
        self.prices_ = relative_nnls(terms(samples.work, columns, self.tile_, self.slots_), samples.time_us)
        self.model_ = self.model_with(samples, None)
        return self

    def model_with(self, samples: OpSamples, bank: ShapeBank | None) -> OperatorModel:
        """The trend and a bank on top of it."""
        return OperatorModel(
            samples.op, samples.work, samples.key, samples.constants, self.prices_, self.tile_, self.slots_, bank
        )

    def _geometry(self, work: str, columns: Columns, time_us: FloatArray) -> tuple[float, float]:
        """Tile and slots whose prices fit best, on some of the rows."""
        tiles = TILES.get(work, (128.0,))
        slots = [0.0, *(self.slots if self.slots is not None else _COMMON_SLOTS)] if work in WAVES else [0.0]
        step = max(1, len(time_us) // _SEARCH_ROWS)
        few, times = {name: values[::step] for name, values in columns.items()}, time_us[::step]
        best = (np.inf, tiles[0], 0.0)
        for tile, count in itertools.product(tiles, slots):
            found = terms(work, few, tile, count)
            total = sum(price * found[name] for name, price in relative_nnls(found, times).items())
            error = float(np.mean(np.abs(total / times - 1)))
            if error < best[0] - 1e-12:
                best = (error, tile, count)
        return best[1], best[2]


class _OnTrend(_Fitted):
    """A trend and a table on top of it.

    Args:
        base: the trend, fitted to the same samples, where it is at hand; otherwise it is fitted here.
        slots: as for `Trend`.
        tiles: as for `Linear`.
    """

    def __init__(
        self, slots: Sequence[float] | None = None, base: Trend | None = None, tiles: Sequence[float] = ()
    ) -> None:
        self.slots, self.base, self.tiles = slots, base, tuple(tiles)

    def fit(self, samples: OpSamples) -> Self:
        """See `Candidate`."""
        base = self.base or Trend(self.slots).fit(samples)
        found = np.maximum(base.time_us(samples.columns), MIN_TIME_US)
        self.model_ = base.model_with(samples, self._bank(samples, found))
        return self

    def _bank(self, samples: OpSamples, trend_us: FloatArray) -> ShapeBank:
        raise NotImplementedError


class Corrected(_OnTrend):
    """Physics plus what the table says it misses, linear in the loads: waves bend the table between its points."""

    @property
    def name(self) -> str:
        """With its tiles."""
        return _stepped("corrected", self.tiles)

    def _bank(self, samples: OpSamples, trend_us: FloatArray) -> ShapeBank:
        return fill_bank(samples, samples.time_us - trend_us, octaves=False, steps=_steps(samples, self.tiles))


class Hybrid(_OnTrend):
    """Physics times the table's ratios, linear in octaves of the loads."""

    name = "hybrid"

    def _bank(self, samples: OpSamples, trend_us: FloatArray) -> ShapeBank:
        return fill_bank(samples, samples.time_us / trend_us, octaves=True)


class Smooth(_OnTrend):
    """A hybrid whose ratios bend: each axis gets points between its own from a monotone cubic of the logarithms."""

    name = "smooth"

    def _bank(self, samples: OpSamples, trend_us: FloatArray) -> ShapeBank:
        bank = fill_bank(samples, samples.time_us / trend_us, octaves=True)
        return bank if bank.values.size * 4 ** len(bank.axes) > _MAX_CELLS else _refined(bank)


def fit_all(samples: OpSamples, slots: Sequence[float] | None) -> list[Candidate]:
    """Every candidate fitted to the same samples, simplest first; those with a trend share it."""
    base = Trend(slots).fit(samples)
    if not is_grid(samples):
        return [base]
    staircases = STAIRCASES if any(name in samples.load for name in _TILED) and len(samples.load) <= 2 else ((),)
    candidates: list[Candidate] = [base]
    candidates += [Linear(tiles).fit(samples) for tiles in staircases]
    candidates += [Corrected(slots, base, tiles).fit(samples) for tiles in staircases]
    candidates.append(Hybrid(slots, base).fit(samples))
    return candidates if len(samples.load) > 2 else [*candidates, Smooth(slots, base).fit(samples)]


def is_grid(samples: OpSamples) -> bool:
    """Whether the rows lie on grids: few cells for each row. Batches of uneven lengths are scattered instead."""
    cells = 1
    for values in samples.load.values():
        cells *= len(np.unique(values))
    if samples.shape:
        cells *= len(np.unique(np.column_stack(list(samples.shape.values())), axis=0))
    return cells <= _CELLS_PER_ROW * len(samples)


def _stepped(name: str, tiles: Sequence[float]) -> str:
    return f"{name}, tiles of {' and '.join(f'{tile:g}' for tile in tiles)}" if tiles else name


def _steps(samples: OpSamples, tiles: Sequence[float]) -> dict[str, Sequence[float]]:
    return {name: tiles for name in samples.load if name in _TILED} if tiles else {}


def _all_columns(samples: OpSamples) -> dict[str, FloatArray]:
    n = len(samples)
    found = {name: values.astype(np.float64) for name, values in samples.columns.items()}
    return found | {name: np.full(n, value) for name, value in samples.constants.items()}


def relative_nnls(
    found: Mapping[str, FloatArray], time_us: FloatArray, weights: FloatArray | None = None
) -> dict[str, float]:
    """Prices >= 0 that minimise sum w (predicted / measured - 1)^2 (Lawson & Hanson 1974, chapter 23).

    Terms are scaled to a largest value of 1 first; terms that come out at 0 are left out.
    """
    from scipy.optimize import nnls

    names = list(found)
    matrix = np.column_stack([found[name] / time_us for name in names])
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    # The normal equations keep the problem at the number of terms, whatever the number of rows.
    scaled = matrix / scale
    weighted = scaled if weights is None else scaled * weights[:, None]
    gram, target = weighted.T @ scaled, weighted.sum(axis=0)
    factor = np.linalg.cholesky(gram + np.eye(len(names)) * (1e-10 * max(np.trace(gram), 1e-300)))
    prices, _ = nnls(factor.T, np.linalg.solve(factor, target), maxiter=30 * len(names))
    return {name: float(price / size) for name, price, size in zip(names, prices, scale, strict=True) if price > 0}


# ---- banks ---------------------------------------------------------------------------------------------------


def fill_bank(
    samples: OpSamples, values: FloatArray, *, octaves: bool, steps: Mapping[str, Sequence[float]] | None = None
) -> ShapeBank:
    """Values on the union of the load axes, for each shape; repeats averaged, holes filled along the axes.

    Holes are interpolated along the last axis first, then along the others; what lies outside on every axis takes the
    nearest known value of its line (ratios) or goes on in a straight line (times).
    """
    names = tuple(samples.shape)
    shapes, group = np.zeros((1, 0)), np.zeros(len(samples), np.intp)
    if names:
        found, group = np.unique(np.column_stack(list(samples.shape.values())), axis=0, return_inverse=True)
        shapes = found.astype(np.float64)
    places, axes = [group.ravel()], {}
    for name, load in samples.load.items():
        axis, place = np.unique(load, return_inverse=True)
        axes[name] = axis.astype(np.float64)
        places.append(place.ravel())
    size = (len(shapes), *(len(axis) for axis in axes.values()))
    flat = np.ravel_multi_index(tuple(places), size)
    count = np.bincount(flat, minlength=int(np.prod(size))).reshape(size)
    total = np.bincount(flat, weights=values, minlength=int(np.prod(size))).reshape(size)
    table = np.divide(total, count, out=np.full(size, np.nan), where=count > 0)
    empty = ShapeBank(names, shapes, axes, np.zeros(size), octaves, steps)
    coordinates = [empty.place(name, axis) for name, axis in axes.items()]
    for beyond in (None, "hold" if octaves else "straight"):
        for dimension in reversed(range(1, table.ndim)):
            table = _filled_along(table, dimension, coordinates[dimension - 1], beyond)
    return ShapeBank(names, shapes, axes, table, octaves, steps)


def _filled_along(table: FloatArray, dimension: int, axis: FloatArray, beyond: str | None) -> FloatArray:
    """Fill holes between known values of each line; with `beyond`, also outside them."""
    lines = np.moveaxis(table, dimension, -1)
    known = ~np.isnan(lines)
    size = lines.shape[-1]
    place = np.arange(size)
    before = np.maximum.accumulate(np.where(known, place, -1), axis=-1)
    after = np.flip(np.minimum.accumulate(np.flip(np.where(known, place, size), -1), axis=-1), -1)
    low, high = np.clip(before, 0, size - 1), np.clip(after, 0, size - 1)
    at_low, at_high = np.take_along_axis(lines, low, -1), np.take_along_axis(lines, high, -1)
    gap = axis[high] - axis[low]
    share = np.divide(axis[place] - axis[low], gap, out=np.zeros(lines.shape), where=gap > 0)
    inside = at_low + (at_high - at_low) * share
    filled = np.where(known, lines, np.where((before >= 0) & (after < size), inside, np.nan))
    if beyond is not None:
        filled = np.where(np.isnan(filled) & (before >= 0), at_low, filled)
        filled = np.where(np.isnan(filled) & (after < size), at_high, filled)
        if beyond == "straight":
            filled = _straight(lines, filled, known, axis)
    result: FloatArray = np.moveaxis(filled, -1, dimension)
    return result


def _straight(lines: FloatArray, filled: FloatArray, known: npt.NDArray[np.bool_], axis: FloatArray) -> FloatArray:
    """Go on beyond the last two known values of each line; a line with fewer keeps its one value."""
    size = lines.shape[-1]
    place = np.broadcast_to(np.arange(size), lines.shape)
    out = filled
    for flip in (False, True):
        mask = np.flip(known, -1) if flip else known
        values = np.flip(lines, -1) if flip else lines
        where = axis[::-1] if flip else axis
        last = np.where(mask, place, -1).max(axis=-1, keepdims=True)
        earlier = np.where(mask & (place < last), place, -1).max(axis=-1, keepdims=True)
        near, far = np.clip(last, 0, None), np.clip(earlier, 0, None)
        at_near, at_far = np.take_along_axis(values, near, -1), np.take_along_axis(values, far, -1)
        gap = where[near] - where[far]
        slope = np.divide(at_near - at_far, gap, out=np.zeros(gap.shape), where=(gap != 0) & (earlier >= 0))
        beyond = at_near + slope * (where - where[near])
        goes_on = (place > last) & (earlier >= 0)
        if flip:
            beyond, goes_on = np.flip(beyond, -1), np.flip(goes_on, -1)
        out = np.where(goes_on, beyond, out)
    return out


def _refined(bank: ShapeBank) -> ShapeBank:
    """Three midpoints in each cell of each axis, from a monotone cubic of the log-ratios (Fritsch & Carlson 1980)."""
    from scipy.interpolate import PchipInterpolator

    axes, values = dict(bank.axes), np.log(np.maximum(bank.values, _MIN_RATIO))
    for dimension, (name, axis) in enumerate(bank.axes.items(), start=1):
        if len(axis) < 4:
            continue
        between = np.concatenate([axis[:-1] + (axis[1:] - axis[:-1]) * part for part in (0.25, 0.5, 0.75)])
        # Loads are counts: whole numbers only.
        finer = np.unique(np.concatenate([axis, np.floor(between), np.floor(np.sqrt(axis[:-1] * axis[1:]))]))
        values = PchipInterpolator(octave(axis), values, axis=dimension)(octave(finer))
        axes[name] = finer
    return ShapeBank(bank.shape_names, bank.shapes, axes, np.exp(values), octaves=True)
