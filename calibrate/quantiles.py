"""How a quantile varies: what each row does to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate.dependence import correlation_of_neighbours

FloatArray = npt.NDArray[np.float64]

_WIDTH: Final = 2.0  # of a quantile's window, in standard deviations of its rank
_INDEPENDENT_ROWS: Final = 16  # what the window holds at least where the variance is taken
_WIDER: Final = 1.1


@dataclass(frozen=True, slots=True)
class SmoothQuantiles:
    """The product of the quantiles of columns, each to its power.

    Attributes:
        level: its smooth estimate; NaN where a quantile is not positive.
        influence: of each row on the logarithm of `level`, shape (n,), mean zero.
        spread: how much larger the variance is than the influence shows.
    """

    level: float
    influence: FloatArray
    spread: float

    @classmethod
    def of(cls, columns: Sequence[FloatArray], powers: Sequence[int], q: float) -> SmoothQuantiles:
        """Average the order statistics about the rank of q.

        A quantile's influence hangs on the density around it, so the order statistics are averaged there, with the
        weights of a normal window over ranks (Parzen 1979): twice as wide as the rank itself varies, sqrt(q (1 - q) n),
        because between two strongly correlated columns most of what a narrower window shows is noise in that density.

        In the tail of a small sample, and where neighbours share their fate, such a window holds next to nothing that
        is independent. The variance then comes from a window so wide that it holds 16 independent rows (or a third of
        all), and is scaled back by the numbers of rows in the two.

        Args:
            columns: of the same rows, shape (n,) each.
            powers: 1, or -1 for what the others are divided by.
            q: between 0 and 1.
        """
        n = len(columns[0])
        width = _WIDTH * float(np.sqrt(q * (1 - q) / n))
        level, influence = _in_window(columns, powers, q, width)
        rho = max(correlation_of_neighbours(influence), 0.0)
        wanted = min(_INDEPENDENT_ROWS * (1 + rho) / (1 - rho) if rho < 1 else np.inf, n / 3)
        wide = width
        while _rows_in_window(n, q, wide) < wanted:
            wide *= _WIDER
        if wide == width:
            return cls(level, influence, 1.0)
        _, influence = _in_window(columns, powers, q, wide)
        return cls(level, influence, _rows_in_window(n, q, wide) / _rows_in_window(n, q, width))


def _in_window(
    columns: Sequence[FloatArray], powers: Sequence[int], q: float, width: float
) -> tuple[float, FloatArray]:
    """The product of the smoothed quantiles and the influence of each row on its logarithm."""
    found = [_smooth_quantile(column, q, width) for column in columns]
    if not all(level > 0 for level, _ in found):
        return float("nan"), np.zeros(len(columns[0]))
    level = float(np.prod([level**power for (level, _), power in zip(found, powers, strict=True)]))
    influence: FloatArray = np.sum(
        [power * pull / level for (level, pull), power in zip(found, powers, strict=True)], axis=0
    )
    return level, influence


def _smooth_quantile(values: FloatArray, q: float, width: float) -> tuple[float, FloatArray]:
    """The mean of the order statistics in a normal window about rank q, and what each row does to it.

    T = integral of Q(u) w(u) du has the influence -integral of (1{x <= z} - F(z)) w(F(z)) dz (Serfling 1980, 8.1.1).
    """
    from scipy.special import ndtr

    n = len(values)
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    place = (np.arange(n + 1) / n - q) / width
    below = ndtr(place)
    inside = below[-1] - below[0]
    density = np.exp(-(place[1:-1] ** 2) / 2) / (np.sqrt(2 * np.pi) * width * inside)
    pull = np.empty(n)
    pull[order] = -np.append(np.cumsum((density * np.diff(ranked))[::-1])[::-1], 0.0)
    return float(np.diff(below) @ ranked / inside), pull - pull.mean()


def _rows_in_window(n: int, q: float, width: float) -> float:
    """1 / sum of the squared weights of its rows."""
    from scipy.special import ndtr

    ends = np.array([-q, 1 - q]) / width
    once, twice = (float(np.diff(ndtr(scale * ends))[0]) for scale in (1.0, np.sqrt(2)))
    return 2 * float(np.sqrt(np.pi)) * width * n * once**2 / twice
