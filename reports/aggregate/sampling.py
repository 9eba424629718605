"""Many values become few: quantiles, cells of a grid, rounded numbers."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.reports.aggregate.document import SHARES, Distribution

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_DIGITS: Final = 4  # more cannot be seen


def distribution(values: npt.NDArray[np.floating]) -> Distribution | None:
    """The distribution of the known (finite) values; None where none is known.

    >>> from kvtwin.reports.aggregate.document import SHARES
    >>> found = distribution(np.array([3.0, 1.0, np.nan, 2.0, 4.0]))
    >>> found.n, found.mean, [found.quantile(share) for share in (0.0, 0.5, 0.505, 1.0)]
    (4, 2.5, [1.0, 2.0, 3.0, 4.0])
    """
    known = values[np.isfinite(values)]
    if not known.size:
        return None
    known.sort()  # the copy, in place: there may be tens of millions
    # The smallest value whose share is at least this one; the tiny step back keeps 0.5 x 4 from becoming 3.
    ranks = np.ceil(np.array(SHARES) * known.size - 1e-9).astype(np.int64) - 1
    return Distribution(
        known.size, rounded_one(float(known.mean(dtype=np.float64))), rounded(known[np.maximum(ranks, 0)])
    )


def rounded(values: npt.NDArray[np.floating], digits: int = _DIGITS) -> list[float]:
    """Significant digits that a screen can show, so that the page stays small."""
    return [rounded_one(value, digits) for value in values.tolist()]


def rounded_one(value: float, digits: int = _DIGITS) -> float:
    """One value with so many significant digits."""
    return float(f"{value:.{digits}g}")


def token_edges(largest: int, max_bins: int) -> Ints:
    """Edges of bins for token counts from 0 to `largest`: zero alone, then equal steps of the logarithm.

    As many bins per doubling (4, 2 or 1) as `max_bins` allows; edges are whole numbers.

    >>> token_edges(9, 5).tolist(), token_edges(9, 8).tolist()
    ([0, 1, 2, 4, 8, 16], [0, 1, 2, 3, 4, 6, 8, 11])
    """
    doublings = math.log2(largest + 1)
    for per_doubling in (4, 2, 1):
        powers = 2.0 ** (np.arange(math.ceil(doublings * per_doubling) + 2) / per_doubling)
        edges = np.unique(np.concatenate([[0, 1], np.round(powers).astype(np.int64)]))
        edges = edges[: int(np.searchsorted(edges, largest, side="right")) + 1]
        if edges.size - 1 <= max_bins:
            break
    return edges


def bins_of(values: Ints, edges: Ints) -> Ints:
    """The bin of each value."""
    return np.searchsorted(edges, values, side="right") - 1


def group_sums(cells: Ints, *weights: Floats) -> tuple[Ints, Ints, list[Floats]]:
    """(the cells that occur, how often, the sum of each weight over them); `cells` are small non-negative numbers."""
    counts = np.bincount(cells)
    present = np.flatnonzero(counts)
    return present, counts[present], [np.bincount(cells, weight)[present].astype(np.float64) for weight in weights]
