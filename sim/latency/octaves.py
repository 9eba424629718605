"""Octaves of a load, exact on every machine, and how the numbers of a profile are written."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtwin.sim.latency.grid import FloatArray


def octave(values: npt.ArrayLike) -> FloatArray:
    """e + 2 m - 1 of x + 1 = m * 2^e: monotone, linear between powers of two, and exact.

    >>> octave([0.0, 1.0, 2.0, 3.0, 7.0]).tolist()
    [0.0, 1.0, 1.5, 2.0, 3.0]
    """
    found, exponent = np.frexp(np.asarray(values, np.float64) + 1.0)
    found *= 2.0
    found += exponent
    found -= 2.0
    return found


def plain(value: float) -> float | int:
    """Whole numbers without a point."""
    return int(value) if value == int(value) else value


def digits(values: FloatArray) -> FloatArray:
    """Six significant digits: a millionth, far below any timer's noise."""
    flat = [float(f"{value:.6g}") for value in values.ravel().tolist()]
    return np.array(flat, np.float64).reshape(values.shape)
