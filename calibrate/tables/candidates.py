"""Models of one operator's times, each with `fit(samples) -> self`, `time_us(columns)` and `to_model()`.

From simple to rich: `Trend` (physics alone: a handful of prices), `Linear` (the table alone), `Corrected` and `Hybrid`
(physics plus the table's rests, or times its ratios), `Smooth` (the same, with ratios refined by a monotone cubic);
`Pooled`, `Surfaced` and `Forested` put between physics and table what models of other heads, or other sizes of the same
work, show.
Only numbers leave this file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Protocol, Self

import numpy as np

from kvtwin.calibrate.steps.regression import NotFittedError
from kvtwin.calibrate.tables.fill import fill_bank, refined
from kvtwin.calibrate.tables.forest import fit_forest
from kvtwin.calibrate.tables.geometry import kernel_terms, search_geometry
from kvtwin.calibrate.tables.prices import relative_nnls
from kvtwin.calibrate.tables.surface import fit_surface
from kvtwin.sim.latency.bank import ShapeBank
from kvtwin.sim.latency.coordinates import COORDINATES
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.operators import OperatorModel
from kvtwin.sim.latency.repeats import numbered, rows_of
from kvtwin.sim.latency.surface import PAIRS
from kvtwin.sim.latency.work.columns import Columns, pooled
from kvtwin.traces.readers.optable import OpSamples

_MAX_CELLS: Final = 200_000  # of a refined grid
_SINGLE_HEAD: Final = 0.01  # weight of rows with one key-value head in a pool
_CALM_SHARE: Final = 0.5  # 0.3 to 0.7: within 0.5 percentage points on three tables
_CELLS_PER_ROW: Final = 60  # a table of more cells is no grid (skewed decodes, six axes: 40)
# Loads that kernels take in tiles of rows, and the tiles worth trying.
_TILED: Final = ("m", "num_tokens", "chunk", "prefill_tokens")
_FORESTS: Final = ("gemm",)  # works whose kernels a library chooses by size: nothing is smooth
_FOREST_SHAPES: Final = 8  # fewer have little to tell one another
_CHOSEN_TILES: Final = (64.0,)  # ratios on forests: trees know of larger tiles, 16 is as good
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
    _fitted: tuple[OpSamples, FloatArray] | None = None

    def to_model(self) -> OperatorModel:
        """See `Candidate`."""
        if not hasattr(self, "model_"):
            raise NotFittedError("call fit first")
        return self.model_

    def time_us(self, columns: Columns) -> FloatArray:
        """See `Candidate`."""
        return self.to_model().time_us(columns)

    def fitted_us(self, samples: OpSamples) -> FloatArray:
        """Times of the samples that it was fitted to, computed once for all that stands on it."""
        if self._fitted is None or self._fitted[0] is not samples:
            self._fitted = samples, self.time_us(samples.columns)
        return self._fitted[1]


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
        steps = _steps(samples, self.tiles)
        bank = fill_bank(samples.shape, samples.load, samples.time_us, octaves=False, steps=steps)
        self.model_ = OperatorModel(samples.op, samples.work, samples.key, samples.constants, {}, bank=bank)
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
        at = search_geometry(samples.work, columns, samples.time_us, self.slots)
        prices = relative_nnls(kernel_terms(samples.work, columns, at), samples.time_us)
        self.model_ = OperatorModel(samples.op, samples.work, samples.key, samples.constants, prices, at.tile, at.slots)
        return self


class _Factored(_Fitted, ABC):
    """Physics times a factor that is learnt in physical coordinates (`sim/latency/coordinates.py`).

    Args:
        base: the trend, fitted to the same samples.
    """

    def __init__(self, base: Trend) -> None:
        self.base = base

    def fit(self, samples: OpSamples) -> Self:
        """See `Candidate`."""
        base = self.base.to_model()
        coordinates = COORDINATES[samples.work](_all_columns(samples), base.slots)
        self.model_ = self._times_factor(base, self.base.fitted_us(samples), samples, coordinates)
        return self

    @abstractmethod
    def _times_factor(
        self, base: OperatorModel, base_us: FloatArray, samples: OpSamples, coordinates: Columns
    ) -> OperatorModel:
        """The base, which says `base_us`, with its factor."""


class Surfaced(_Factored):
    """A factor that is smooth (`sim/latency/surface.py`)."""

    name = "surface"

    def _times_factor(
        self, base: OperatorModel, base_us: FloatArray, samples: OpSamples, coordinates: Columns
    ) -> OperatorModel:
        return replace(base, surface=fit_surface(samples.work, coordinates, base_us / samples.time_us))


class Forested(_Factored):
    """A factor that trees have learnt (`sim/latency/forest.py`)."""

    name = "forest"

    def _times_factor(
        self, base: OperatorModel, base_us: FloatArray, samples: OpSamples, coordinates: Columns
    ) -> OperatorModel:
        return replace(base, forest=fit_forest(coordinates, samples.time_us / base_us))


class Pooled(_Fitted):
    """Attention of all heads together: what a base misses, by group, thread blocks and length (`work.columns.pooled`).

    A number of requests that was left out was measured all the same, as fewer requests of a model with more heads.

    Args:
        base: a trend, with or without its surface, fitted to the same samples.
    """

    def __init__(self, base: Trend | Surfaced) -> None:
        self.base = base
        self.name = "pool" if isinstance(base, Trend) else "pooled surface"

    def fit(self, samples: OpSamples) -> Self:
        """See `Candidate`."""
        base = self.base.to_model()
        load = pooled(_all_columns(samples))
        shape = {"group": load.pop("group")}
        # With one key-value head engines run other kernels around attention: it counts where nothing else is known.
        weights = np.where(samples.columns["num_key_value_heads"] > 1, 1.0, _SINGLE_HEAD)
        rest = samples.time_us - self.base.fitted_us(samples)
        self.model_ = replace(base, pool=fill_bank(shape, load, rest, octaves=False, weights=weights))
        return self


class _OnBase(_Fitted, ABC):
    """Physics and a table on top of it.

    Args:
        slots: as for `Trend`.
        base: what the table corrects, fitted to the same samples; None for a trend, fitted here.
        tiles: as for `Linear`.
    """

    kind: str

    def __init__(
        self,
        slots: Sequence[float] | None = None,
        base: Trend | Surfaced | Forested | Pooled | None = None,
        tiles: Sequence[float] = (),
    ) -> None:
        self.slots, self.base, self.tiles = slots, base, tuple(tiles)

    @property
    def name(self) -> str:
        """With what it stands on, and its tiles."""
        own = self.kind if self.base is None or isinstance(self.base, Trend) else f"{self.kind} on {self.base.name}"
        return _stepped(own, self.tiles)

    def fit(self, samples: OpSamples) -> Self:
        """See `Candidate`."""
        base = self.base or Trend(self.slots).fit(samples)
        self.model_ = replace(base.to_model(), bank=self._bank(samples, base.fitted_us(samples)))
        return self

    @abstractmethod
    def _bank(self, samples: OpSamples, base_us: FloatArray) -> ShapeBank:
        """The table of ratios or rests, where the base says `base_us`."""


class Corrected(_OnBase):
    """Physics plus what the table says it misses, linear in the loads: waves bend the table between its points."""

    kind = "corrected"

    def _bank(self, samples: OpSamples, base_us: FloatArray) -> ShapeBank:
        rest, steps = samples.time_us - base_us, _steps(samples, self.tiles)
        return fill_bank(samples.shape, samples.load, rest, octaves=False, steps=steps)


class Hybrid(_OnBase):
    """Physics times the table's ratios, linear in octaves of the loads (or on a staircase)."""

    kind = "hybrid"

    def _bank(self, samples: OpSamples, base_us: FloatArray) -> ShapeBank:
        steps = _steps(samples, self.tiles)
        return fill_bank(samples.shape, samples.load, samples.time_us / base_us, octaves=True, steps=steps)


class Smooth(Hybrid):
    """A hybrid whose ratios bend: each axis gets points between its own from a monotone cubic of the logarithms."""

    kind = "smooth"

    def _bank(self, samples: OpSamples, base_us: FloatArray) -> ShapeBank:
        bank = super()._bank(samples, base_us)
        return bank if bank.values.size * 4 ** len(bank.axes) > _MAX_CELLS else refined(bank)


class Calm(Hybrid):
    """Half of a hybrid's ratios, each the median of three along the load: spikes of a measurement pass by.

    Where two calls of one kernel differ by a tenth, a ratio says half about its kernel and half about its call.
    """

    kind = "calm"

    def _bank(self, samples: OpSamples, base_us: FloatArray) -> ShapeBank:
        bank = super()._bank(samples, base_us)
        # Of one load axis: several are calmed by one another already.
        ends = np.concatenate([bank.values[:, :1], bank.values, bank.values[:, -1:]], axis=1)
        median = np.median(np.stack([ends[:, :-2], ends[:, 1:-1], ends[:, 2:]]), axis=0)
        values = 1.0 + _CALM_SHARE * (median - 1.0)
        return ShapeBank(bank.shape_names, bank.shapes, bank.axes, values, octaves=True, steps=bank.steps)


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
    if len(samples.load) <= 2:
        candidates.append(Smooth(slots, base).fit(samples))
    if samples.work in _FORESTS and _num_shapes(samples) >= _FOREST_SHAPES:
        return [*candidates, *_on_forest(samples, slots, base)]
    return [*candidates, *_on_richer_bases(samples, slots, base)]


def _on_richer_bases(samples: OpSamples, slots: Sequence[float] | None, base: Trend) -> list[Candidate]:
    """Tables on what other heads and other sizes of the same work show, where there are any."""
    found: list[Candidate] = []
    bases: list[Pooled | Surfaced] = []
    several_heads = "num_key_value_heads" in samples.shape
    if several_heads:
        bases.append(Pooled(base).fit(samples))
    if samples.work in PAIRS:
        surface = Surfaced(base).fit(samples)
        found.append(surface)
        bases += [surface, Pooled(surface).fit(samples)] if several_heads else [surface]
    if len(samples.load) == 1:
        found += [Calm(slots, richer).fit(samples) for richer in bases]
    return found + [Hybrid(slots, richer).fit(samples) for richer in bases]


def _on_forest(samples: OpSamples, slots: Sequence[float] | None, base: Trend) -> list[Candidate]:
    """A forest, and the table's ratios on top of it."""
    forest = Forested(base).fit(samples)
    return [forest, *(kind(slots, forest, _CHOSEN_TILES).fit(samples) for kind in (Calm, Hybrid))]


def is_grid(samples: OpSamples) -> bool:
    """Whether the rows lie on grids: few cells for each row. Batches of uneven lengths are scattered instead."""
    cells = 1
    for values in samples.load.values():
        cells *= len(numbered(values)[0])
    return cells * _num_shapes(samples) <= _CELLS_PER_ROW * len(samples)


def _num_shapes(samples: OpSamples) -> int:
    return len(rows_of(map(numbered, samples.shape.values()))[0]) if samples.shape else 1


def _stepped(name: str, tiles: Sequence[float]) -> str:
    return f"{name}, tiles of {' and '.join(f'{tile:g}' for tile in tiles)}" if tiles else name


def _steps(samples: OpSamples, tiles: Sequence[float]) -> dict[str, Sequence[float]]:
    return {name: tiles for name in samples.load if name in _TILED} if tiles else {}


def _all_columns(samples: OpSamples) -> dict[str, FloatArray]:
    n = len(samples)
    found = {name: values.astype(np.float64) for name, values in samples.columns.items()}
    return found | {name: np.full(n, value) for name, value in samples.constants.items()}
