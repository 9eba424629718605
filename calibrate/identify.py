"""Which parameters a fit can tell apart: covariance under dependent residuals, intervals, unknown combinations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate import stats
from kvtwin.calibrate.blocks import block_length
from kvtwin.sim.latency.grid import FloatArray

# A parameter whose 95 % interval is wider than the parameter itself, on either side, is not known.
_KNOWN_WITHIN: Final = 0.5
# Directions of the parameters, scaled to the parameters' own size, that are known worse than this, are named.
_VAGUE: Final = 0.25
_NAMED: Final = 0.3  # weight from which a parameter is named in a direction
_NULL: Final = 1e-6  # of the largest eigenvalue: below, rounding decides
_LEAST_BLOCKS: Final = 10
_MOST_BLOCKS: Final = 200


@dataclass(frozen=True)
class Parameter:
    """What a fit says of one parameter.

    Attributes:
        value: in its own unit.
        interval: 95 %; starts at 0 where the fit cannot tell it from nothing.
        known: the interval lies within 50 % of the value.
    """

    value: float
    interval: stats.Interval
    known: bool


@dataclass(frozen=True)
class Doubt:
    """What a fit knows and does not know.

    Attributes:
        parameters: by name.
        vague: combinations that are hardly known: weights by parameter (relative changes that leave the data almost
            as well explained) and the standard deviation along them, as a share; None where the data say nothing at all.
        correlation: between the estimates, shape (k, k); rows of parameters that do not matter at all are 0.
    """

    parameters: dict[str, Parameter]
    vague: tuple[tuple[dict[str, float], float | None], ...]
    correlation: FloatArray

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "parameters": {
                name: {"value": found.value, "interval": _finite(found.interval), "known": found.known}
                for name, found in self.parameters.items()
            },
            "vague": [{"direction": direction, "relative_sd": sd} for direction, sd in self.vague],
        }


def find_doubt(
    names: Sequence[str],
    values: FloatArray,
    residuals: FloatArray,
    jacobian: FloatArray,
    weight: FloatArray,
    order: npt.NDArray[np.int64],
    *,
    widen: float = 1.0,
) -> Doubt:
    """Intervals and combinations from residuals and their derivatives at the optimum.

    The covariance is the jackknife over whole blocks of neighbouring requests (Quenouille 1956; Bell & McCaffrey 2002
    for clustered rows): how the linearised fit moves when a block is left out. Blocks, because a request that waited
    makes the next one wait; left out, because a block that decides a price must not also judge it. The intervals take Student's quantile for the number of blocks. Parameters are
    at least 0. Measured coverage: `tests/calibrate/test_logs.py`.

    Args:
        names: of k parameters.
        values: their estimates, shape (k,).
        residuals: shape (n,), in units of their scale.
        jacobian: of the residuals by `values`, shape (n, k).
        weight: of each row in the fit, shape (n,): below 1 for outliers.
        order: place in time of each residual, shape (n,): residuals of one request have one place.
        widen: factor on every interval, for what the derivatives leave out.
    """
    from scipy.special import stdtrit

    rows = np.argsort(order, kind="stable")
    residuals, jacobian, weight, order = residuals[rows], jacobian[rows], weight[rows], order[rows]
    block, num_blocks = _blocks(order, jacobian * (residuals * weight)[:, None])
    covariance, moving = _jackknife(jacobian, residuals * weight, weight, block, num_blocks)
    covariance *= widen * widen
    sd = np.sqrt(np.diag(covariance))
    reach = float(stdtrit(max(num_blocks - 1, 1), 0.975)) * sd
    reach[~moving] = np.inf
    null = _null_directions(jacobian, weight)
    low, high = _free_range(values, null)
    ends = zip(np.maximum(low - reach, 0.0).tolist(), (high + reach).tolist(), strict=True)
    parameters = {
        name: Parameter(value, (first, last), value > 0 and max(value - first, last - value) <= _KNOWN_WITHIN * value)
        for name, value, (first, last) in zip(names, values.tolist(), ends, strict=True)
    }
    share = np.outer(sd, sd)
    correlation = np.divide(covariance, share, out=np.zeros_like(covariance), where=share > 0)
    unknown = tuple((_named(names, _relative(direction, values)), None) for direction in null)
    return Doubt(parameters, (*unknown, *_vague(names, values, covariance)), correlation)


def _null_directions(jacobian: FloatArray, weight: FloatArray) -> FloatArray:
    """Changes of the parameters that change no residual: rows, shape (m, k). Parameters that never matter are left out.

    An eigenvector of J'WJ, each column scaled to length 1, whose eigenvalue is nothing beside the largest.
    """
    length = np.sqrt((jacobian * jacobian * weight[:, None]).sum(axis=0))
    used = np.flatnonzero(length > 0)
    if not len(used):
        return np.empty((0, len(length)))
    columns = jacobian[:, used] / length[used]
    eigenvalues, vectors = np.linalg.eigh(columns.T @ (columns * weight[:, None]))
    found = np.zeros((len(used), len(length)))
    found[:, used] = vectors.T / length[used]
    null: FloatArray = found[eigenvalues < _NULL * eigenvalues[-1]]
    return null


def _free_range(values: FloatArray, null: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Least and largest value of each parameter along the null directions, all parameters staying at 0 or above."""
    low, high = values.copy(), values.copy()
    for direction in null:
        with np.errstate(divide="ignore", invalid="ignore"):
            limits = -values / direction
        noticed = np.abs(direction) * np.max(values, initial=0.0) > 1e-12 * np.abs(direction).max()
        steps = [
            np.max(limits[noticed & (direction > 0)], initial=-np.inf),
            np.min(limits[noticed & (direction < 0)], initial=np.inf),
        ]
        with np.errstate(invalid="ignore"):
            moved = np.stack([np.where(noticed, values + step * direction, values) for step in steps])
        low, high = np.minimum(low, moved.min(axis=0)), np.maximum(high, moved.max(axis=0))
    return np.maximum(low, 0.0), high


def _relative(direction: FloatArray, values: FloatArray) -> FloatArray:
    """A direction in shares of the values (of the largest one's for those at 0), of length 1."""
    size = np.where(values > 0, values, 1.0)
    shares = np.where(values > 0, direction / size, 0.0)
    length = float(np.linalg.norm(shares))
    found: FloatArray = shares / length if length > 0 else direction / np.linalg.norm(direction)
    return found


def _jackknife(
    jacobian: FloatArray, scores: FloatArray, weight: FloatArray, block: npt.NDArray[np.int64], num_blocks: int
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Covariance, shape (k, k), and which parameters matter at all; rows in the order of their blocks."""
    size = np.abs(jacobian).max(axis=0, initial=0.0)
    moving: npt.NDArray[np.bool_] = size > 0
    used = jacobian[:, moving] / size[moving]
    edges = np.searchsorted(block, np.arange(num_blocks + 1))
    parts = [slice(*bounds) for bounds in pairwise(edges.tolist())]
    squares = [used[part].T @ (used[part] * weight[part, None]) for part in parts]
    sums = [used[part].T @ scores[part] for part in parts]
    whole = np.sum(squares, axis=0)
    change = np.stack([_solve(whole - square, total) for square, total in zip(squares, sums, strict=True)])
    covariance = np.zeros((len(size), len(size)))
    share = (num_blocks - 1) / num_blocks
    covariance[np.ix_(moving, moving)] = share * (change.T @ change) / np.outer(size[moving], size[moving])
    return covariance, moving


def _solve(matrix: FloatArray, right: FloatArray) -> FloatArray:
    found: FloatArray = np.linalg.pinv(matrix, rcond=1e-12, hermitian=True) @ right
    return found


def _vague(
    names: Sequence[str], values: FloatArray, covariance: FloatArray
) -> tuple[tuple[dict[str, float], float | None], ...]:
    """Eigenvectors of the covariance in relative units that are known worse than _VAGUE, worst first."""
    alive = np.flatnonzero((values > 0) & (np.diag(covariance) > 0))
    if not len(alive):
        return ()
    relative = covariance[np.ix_(alive, alive)] / np.outer(values[alive], values[alive])
    variances, vectors = np.linalg.eigh(relative)
    found: list[tuple[dict[str, float], float | None]] = []
    for variance, vector in zip(variances[::-1], vectors.T[::-1], strict=True):
        sd = float(np.sqrt(max(variance, 0.0)))
        if sd <= _VAGUE:
            break
        full = np.zeros(len(names))
        full[alive] = vector
        found.append((_named(names, full), sd))
    return tuple(found)


def _named(names: Sequence[str], direction: FloatArray) -> dict[str, float]:
    """The parameters that a direction of length 1 is about, the heaviest one positive."""
    signed = direction * np.sign(direction[np.argmax(np.abs(direction))])
    pairs = zip(names, signed.tolist(), strict=True)
    return {name: round(weight, 3) for name, weight in pairs if abs(weight) >= _NAMED}


def _blocks(order: npt.NDArray[np.int64], scores: FloatArray) -> tuple[npt.NDArray[np.int64], int]:
    """Block of each row: neighbours in time, as many as the longest-lived score asks for, at least ten blocks in all.

    Args:
        order: place in time of each row.
        scores: shape (n, k): what each row says against each parameter.
    """
    _, place = np.unique(order, return_inverse=True)
    place = place.ravel()
    size = int(place.max(initial=0)) + 1
    series = [np.bincount(place, weights=column, minlength=size).astype(np.float64) for column in scores.T]
    wanted = max((block_length(column) for column in series), default=1)
    length = min(max(wanted, -(-size // _MOST_BLOCKS)), max(size // _LEAST_BLOCKS, 1))
    block = place // length
    return block, int(block.max(initial=0)) + 1


def _finite(interval: stats.Interval) -> list[float | None]:
    return [end if np.isfinite(end) else None for end in interval]
