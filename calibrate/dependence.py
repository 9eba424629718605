"""How much rows tell that depend on their neighbours: the variance of their mean, and how well that is known.

Requests share queues and steps share a machine's mood, so a late row makes the next one late. A mean over such rows
varies by the spectrum of the rows at frequency zero, not by their variance alone: the "long-run variance".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_FEW_ROWS: Final = 5  # dependence cannot be seen in fewer
_LEAST_WAVES: Final = 4
_WAVES: Final = 0.06  # x n^(2/3) waves
_BLOCK: Final = 16  # rows, at most
_LEAST_BLOCKS: Final = 24
_BLOCKS_PER_WAVE: Final = 6


@dataclass(frozen=True, slots=True)
class MeanVariance:
    """What a sample says of how its mean varies.

    Attributes:
        variance: of the mean.
        dof: Student's degrees of freedom of that variance.
        rows: how many independent rows would tell as much; at most those there are.
        skewness: of the mean: positive where few large rows carry it.
    """

    variance: float
    dof: float
    rows: float
    skewness: float = 0.0


def variance_of_mean(series: FloatArray, *, independent: bool = False, bounded: bool = False) -> MeanVariance:
    """How the mean of `series`, shape (n,), varies; rows in the order in which they depend on one another.

    1. An AR(1) is taken out, so that what is left is nearly flat (Andrews & Monahan 1992). Its coefficient is the
       correlation of neighbours, corrected for its bias (1 + 3 rho) / n (Kendall 1954) and bounded by 0 and
       1 - 1 / sqrt(n) (Sul, Phillips & Choi 2005). Then another is taken out of the sums of 16 rows (of fewer, so that
       there are 24 sums) where theirs is more than chance: a slow wave of load under rows that each have a size of
       their own shows in sums only.
    2. The spectrum of the rest at zero is the mean square of its first B cosine coefficients (Mueller 2007; Lazarus,
       Lewis, Stock & Watson 2018, "HAR inference"), B = 0.06 n^(2/3) and at least 4: fewer than the 0.4 n^(2/3) of
       that paper, because queues have longer memories than macroeconomic series. The AR(1) is then put back.
    3. Each of the estimates has a relative variance: 2 / B of the coefficients, excess kurtosis / n where few rows
       carry the sum (of 6 B blocks, so that a burst counts as one), and 4 (1 + rho) / ((1 - rho) n) of an AR(1). The
       degrees of freedom are 2 / their sum (Satterthwaite 1946).
    4. The skewness is that of the same blocks, divided by the root of their number.

    Args:
        series: the rows.
        independent: whether they are known not to depend on one another; then 1. falls away and B is n - 1, which
            makes the variance the usual s^2 / n. So it is for fewer than five rows.
        bounded: whether no row can pull much harder than the others. Then there is no skewness, and kurtosis counts as
            far as rows depend on their neighbours, for a burst of them can.

    Returns:
        A variance of 0 where all rows are alike, an infinite one for a single row.
    """
    n = len(series)
    if n < 2:
        return MeanVariance(np.inf, 1.0, float(n))
    slow = _SlowPart.of(series, independent=independent)
    if slow is None:
        return MeanVariance(0.0, np.inf, float(n))
    waves = len(slow.waves)
    level = float(np.mean(slow.waves**2))
    rows = min(float(n), n * float(np.var(series)) / level) if level > 0 else float(n)
    tails, skewness = _shape_of_sums(slow.rest, waves)
    if bounded:
        tails, skewness = tails * (1 - rows / n), 0.0
    doubt = 2 / waves + tails + slow.doubt
    return MeanVariance(level / n, max(2 / doubt, 1.0), rows, skewness)


def slow_correlation(one: FloatArray, other: FloatArray) -> float:
    """Correlation of what two columns of the same rows do over long stretches: of their first cosine coefficients.

    Positive where the one is high in those parts of a run in which the other is; 0 where either is constant.
    """
    parts = [_SlowPart.of(series) for series in (one, other)]
    if any(part is None or not part.waves.any() for part in parts):
        return 0.0
    first, second = (part.waves / np.linalg.norm(part.waves) for part in parts if part is not None)
    return float(first @ second)


@dataclass(frozen=True, slots=True)
class _SlowPart:
    """A series seen from afar.

    Attributes:
        rest: what is left of the series, or of its blocks, without its AR(1)s.
        waves: the first cosine coefficients of the series, the mean left out; their mean square is the spectrum at 0.
        doubt: relative variance of that spectrum because the AR(1)s are estimates.
    """

    rest: FloatArray
    waves: FloatArray
    doubt: float

    @classmethod
    def of(cls, series: FloatArray, *, independent: bool = False) -> _SlowPart | None:
        """None where all rows are alike."""
        from scipy.fft import dct

        n = len(series)
        rest = series - series.mean()
        if not rest.any():
            return None
        waves, gain, doubt = n - 1, 1.0, 0.0
        if not independent and n >= _FEW_ROWS:
            rest, rho = _without_neighbours(rest)
            waves = min(max(_LEAST_WAVES, int(_WAVES * len(rest) ** (2 / 3))), len(rest) - 1)
            gain, doubt = 1 / (1 - rho), _doubt_of(rho, n)
            rows = min(len(rest) // _LEAST_BLOCKS, _BLOCK)
            blocks = _sums(rest, len(rest) // rows if rows > 1 else 0)
            if len(blocks) and correlation_of_neighbours(blocks) > 1 / np.sqrt(len(blocks)):
                gain /= np.sqrt(len(rest) / len(blocks))  # a sum of 16 rows varies by 16 times as much as one
                rest, rho = _without_neighbours(blocks)
                gain, doubt = gain / (1 - rho), doubt + _doubt_of(rho, len(blocks))
        found: FloatArray = gain * dct(rest, type=2, norm="ortho")[1 : waves + 1]  # orthonormal
        return cls(rest, found, doubt)


def _without_neighbours(centred: FloatArray) -> tuple[FloatArray, float]:
    """What an AR(1) leaves of rows, less its mean, and the coefficient of that AR(1)."""
    n = len(centred)
    rho = correlation_of_neighbours(centred)
    rho = float(np.clip(rho + (1 + 3 * rho) / n, 0.0, 1 - 1 / np.sqrt(n)))
    rest = centred[1:] - rho * centred[:-1]
    return rest - rest.mean(), rho


def _doubt_of(rho: float, n: int) -> float:
    """Relative variance that the estimate of an AR(1) from n rows adds to the spectrum at zero."""
    return 4 * (1 + rho) / ((1 - rho) * n) if rho else 0.0


def _sums(rest: FloatArray, blocks: int) -> FloatArray:
    """Of blocks of rows, as equal as can be, less their mean."""
    if blocks < 1:
        return np.zeros(0)
    sums = np.add.reduceat(rest, np.linspace(0, len(rest), blocks, endpoint=False).astype(np.int64))
    centred: FloatArray = sums - sums.mean()
    return centred


def correlation_of_neighbours(series: FloatArray) -> float:
    """Of each row with the next; 0 where all are alike."""
    centred = series - series.mean()
    square = float(centred @ centred)
    return float(centred[1:] @ centred[:-1]) / square if square > 0 else 0.0


def _shape_of_sums(rest: FloatArray, waves: int) -> tuple[float, float]:
    """What the sums of blocks are like.

    Returns:
        Their excess kurtosis over their number, which is what it adds to the relative variance of a variance, and the
        skewness of their mean.
    """
    blocks = min(_BLOCKS_PER_WAVE * waves, len(rest))
    sums = _sums(rest, blocks)
    variance = float(np.mean(sums**2))
    if blocks < 3 or variance == 0:
        return 0.0, 0.0
    unit = sums / np.sqrt(variance)  # variance**2 may be too small for a float
    normal = 3 * (blocks - 1) / (blocks + 1)  # what so many normal blocks show on average
    tails = max(float(np.mean(unit**4)) - normal, 0.0) / blocks
    return tails, float(np.mean(unit**3)) * float(np.sqrt(blocks - 1)) / (blocks - 2)
