"""Prices of terms: non-negative least squares of relative errors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvtwin.sim.latency.grid import FloatArray


def relative_nnls(
    found: Mapping[str, FloatArray], time_us: FloatArray, weights: FloatArray | None = None
) -> dict[str, float]:
    """Prices >= 0 that minimise sum w (predicted / measured - 1)^2 (Lawson & Hanson 1974, chapter 23).

    Terms are scaled to a largest value of 1 first; terms that are 0 throughout, or come out at 0, are left out.
    """
    from scipy.optimize import nnls

    matrix = np.array(list(found.values()))
    shown = np.flatnonzero(matrix.any(axis=1))
    names, matrix = np.array(list(found))[shown].tolist(), matrix[shown] / time_us
    scale = np.abs(matrix).max(axis=1)
    # The normal equations keep the problem at the number of terms, whatever the number of rows.
    scaled = matrix / scale[:, None]
    weighted = scaled if weights is None else scaled * weights
    gram, target = weighted @ scaled.T, weighted.sum(axis=1)
    factor = np.linalg.cholesky(gram + np.eye(len(names)) * (1e-10 * max(np.trace(gram), 1e-300)))
    prices, _ = nnls(factor.T, np.linalg.solve(factor, target), maxiter=30 * len(names))
    return {name: float(price / size) for name, price, size in zip(names, prices, scale, strict=True) if price > 0}
