"""What the residuals of a fit say against it: noise that depends on the batch, and rows that decide it alone."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.stats import REGIMES, BatchStats

_SHOWN: Final = 5  # most influential rows
_HIGH_LEVERAGE: Final = 3.0  # times the mean (Hoaglin & Welsch 1978 name 2, which real tables exceed everywhere)


def diagnose(
    batches: BatchStats, latency_ns: FloatArray, design: FloatArray, coefficients: FloatArray
) -> dict[str, Any]:
    """Residual diagnostics of a relative fit, as plain numbers.

    The fit takes the noise for a share of the latency. So the *relative* residuals should scatter alike everywhere:
    the Breusch-Pagan test (1979; Koenker's studentised form) asks whether their square follows the predicted latency,
    the share of prefill tokens or the context. With thousands of steps any small dependence is significant, so its
    strength, R2, stands beside p. Leverage and Cook's distance (1977) name rows that decide the fit by themselves.

    Args:
        batches, latency_ns: n rows.
        design: their features, shape (n, k).
        coefficients: shape (k,).

    Returns:
        `heteroscedasticity`: p, r2, and the scatter (standard deviation of the relative residuals) by regime;
        `leverage`: mean, largest, and the number of rows above three times the mean;
        `influence`: the number of rows with Cook's distance above 4 / n, and the largest ones with their batches.
        A test that the rows are too few or too uniform for is None.
    """
    predicted = design @ coefficients
    used = design[:, design.any(axis=0) & (coefficients > 0)] / predicted[:, None]
    residual = latency_ns / predicted - 1
    hat, cook = _influence(used, residual)
    top = np.argsort(cook)[::-1][:_SHOWN]
    return {
        "heteroscedasticity": {**_breusch_pagan(batches, predicted, residual), "scatter": _scatter(batches, residual)},
        "leverage": {
            "mean": float(hat.mean()),
            "largest": float(hat.max()),
            "high": int(np.count_nonzero(hat > _HIGH_LEVERAGE * hat.mean())),
        },
        "influence": {
            "high": int(np.count_nonzero(cook > 4 / len(cook))),
            "largest": [
                {"row": int(row), "cooks_distance": float(cook[row]), "residual": float(residual[row]),
                 "num_reqs": int(batches.num_reqs[row]), "num_tokens": int(batches.num_tokens[row]),
                 "context_tokens": int(batches.decode_context[row] + batches.prefill_context[row])}
                for row in top.tolist()
            ],
        },
    }  # fmt: skip


def _influence(rows: FloatArray, residual: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Leverage and Cook's distance of each row of the weighted problem."""
    from statsmodels.regression.linear_model import OLS
    from statsmodels.stats.outliers_influence import OLSInfluence

    size = np.abs(rows).max(axis=0)
    # The relative residuals are what is left of the weighted problem: refitting them keeps that fit's coefficients.
    found = OLSInfluence(OLS(residual, rows / size).fit())
    return np.asarray(found.hat_matrix_diag), np.asarray(found.cooks_distance[0])


def _breusch_pagan(batches: BatchStats, predicted: FloatArray, residual: FloatArray) -> dict[str, float | None]:
    from statsmodels.stats.diagnostic import het_breuschpagan

    context = batches.decode_context + batches.prefill_context
    candidates = [np.log(predicted), batches.prefill_tokens / batches.num_tokens, np.log1p(context)]
    columns = [np.ones(len(residual)), *(column for column in candidates if np.ptp(column) > 1e-9)]
    if len(columns) == 1 or len(residual) <= len(columns) or not np.ptp(np.abs(residual)) > 1e-9:
        return {"p": None, "r2": None}
    statistic, p, *_ = het_breuschpagan(residual, np.column_stack(columns))
    return {"p": float(p), "r2": float(statistic / len(residual))}


def _scatter(batches: BatchStats, residual: FloatArray) -> dict[str, float]:
    regime = batches.regime
    return {name: float(np.std(residual[regime == name])) for name in REGIMES if name in regime}
