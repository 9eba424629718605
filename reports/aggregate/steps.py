"""Step latency, measured and predicted: parity, error by regime, error by batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.calibrate.stats import relative_errors
from kvtwin.reports.aggregate.document import Distribution, ErrorMap, Pair, ParityCells, StepFigures
from kvtwin.reports.aggregate.sampling import (
    Floats,
    Ints,
    bins_of,
    distribution,
    group_sums,
    rounded,
    token_edges,
)
from kvtwin.sim.latency.stats import REGIMES
from kvtwin.traces.time import NS_PER_MS

OTHER: Final = "other"  # whatever else a file calls a regime: no text of a file goes further than here
_GRIDS: Final = (240, 160, 110, 80, 56, 40, 28, 20)  # cells per side of the parity plot, finest first
_MAX_MAP_BINS: Final = 26


@dataclass(frozen=True, slots=True)
class _Steps:
    """The steps that can be drawn: both times positive, all columns in the same order."""

    number: Ints
    measured_ms: Floats
    predicted_ms: Floats
    regime: npt.NDArray[np.int8]  # index into (*REGIMES, OTHER)
    extrapolated: npt.NDArray[np.bool_]
    cache_tokens: Ints
    input_tokens: Ints

    def groups(self) -> list[tuple[str, npt.NDArray[np.bool_]]]:
        """(regime, its rows) for the regimes that occur."""
        codes = enumerate((*REGIMES, OTHER))
        return [(name, rows) for code, name in codes if (rows := self.regime == code).any()]


def step_figures(predictions: pa.Table, max_cells: int) -> StepFigures | None:
    """Aggregate a table of schema PREDICTIONS; None where no step has two positive times.

    Args:
        predictions: one row per recorded step.
        max_cells: of all parity plots together.
    """
    steps = _drawable(predictions)
    if not steps.number.size:
        return None
    return StepFigures(
        num_left_out=predictions.num_rows - steps.number.size,
        num_extrapolated=int(steps.extrapolated.sum()),
        times=Pair(distribution(steps.measured_ms), distribution(steps.predicted_ms)),
        parity=_parity(steps, max_cells),
        errors=_errors(steps),
        error_map=_error_map(steps),
    )


def _drawable(predictions: pa.Table) -> _Steps:
    """Unknown times are left out; a log axis and a relative error also need positive ones."""
    positive = pc.and_(pc.greater(predictions["measured_ns"], 0), pc.greater(predictions["predicted_ns"], 0))
    rows = predictions.filter(pc.fill_null(positive, False))
    regime = pc.fill_null(pc.index_in(rows["regime"], value_set=pa.array(REGIMES)), len(REGIMES))
    return _Steps(
        number=rows["step"].to_numpy(),
        measured_ms=rows["measured_ns"].to_numpy() / NS_PER_MS,
        predicted_ms=rows["predicted_ns"].to_numpy() / NS_PER_MS,
        regime=regime.to_numpy().astype(np.int8),
        extrapolated=pc.fill_null(rows["extrapolated"], False).to_numpy().astype(np.bool_),
        cache_tokens=rows["context_tokens"].to_numpy(),
        input_tokens=rows["num_tokens"].to_numpy(),
    )


def _parity(steps: _Steps, max_cells: int) -> list[ParityCells]:
    """The finest grid whose filled cells are no more than `max_cells`: a few steps stay themselves."""
    logs = np.log10(np.stack([steps.measured_ms, steps.predicted_ms]))
    low, span = logs.min(), max(float(np.ptp(logs)), 1e-9)
    kinds = steps.regime.astype(np.int64) * 2 + steps.extrapolated
    for grid in _GRIDS:
        across, up = np.minimum(((logs - low) / span * grid).astype(np.int64), grid - 1)
        cells = (kinds * grid + up) * grid + across
        present, first, of = np.unique(cells, return_index=True, return_inverse=True)
        if present.size <= max_cells:
            break
    _, counts, (measured, predicted) = group_sums(of, steps.measured_ms, steps.predicted_ms)
    kind_of_cell = present // (grid * grid)
    parts = []
    for kind in np.unique(kind_of_cell).tolist():
        rows = kind_of_cell == kind
        parts.append(
            ParityCells(
                regime=(*REGIMES, OTHER)[kind // 2],
                extrapolated=bool(kind % 2),
                num_steps=counts[rows].tolist(),
                measured_ms=rounded(measured[rows] / counts[rows]),
                predicted_ms=rounded(predicted[rows] / counts[rows]),
                step=steps.number[first[rows]].tolist(),
            )
        )
    return parts


def _errors(steps: _Steps) -> dict[str, Distribution]:
    error = relative_errors(steps.measured_ms, steps.predicted_ms)
    groups = [*steps.groups(), ("all", np.ones(error.size, np.bool_))]
    return {name: found for name, rows in groups if (found := distribution(error[rows]))}


def _error_map(steps: _Steps) -> ErrorMap:
    error = relative_errors(steps.measured_ms, steps.predicted_ms)
    cache_edges, input_edges = (
        token_edges(int(tokens.max()), _MAX_MAP_BINS) for tokens in (steps.cache_tokens, steps.input_tokens)
    )
    columns = cache_edges.size - 1
    cells = bins_of(steps.input_tokens, input_edges) * columns + bins_of(steps.cache_tokens, cache_edges)
    present, counts, (signed, absolute) = group_sums(cells, error, np.abs(error))
    return ErrorMap(
        cache_edges=cache_edges.tolist(),
        input_edges=input_edges.tolist(),
        cache_bin=(present % columns).tolist(),
        input_bin=(present // columns).tolist(),
        num_steps=counts.tolist(),
        mean_error=rounded(signed / counts),
        mape=rounded(absolute / counts),
    )
