"""Samples -> `sim.latency.forest.Forest`: gradient boosting of complete trees, by least absolute errors.

minimise sum over rows of |log(predicted / measured)|, one tree after another: each is grown level by level on a random
half of the rows, splits where the clipped errors of the two sides differ most (histograms, as LightGBM does; Ke et al.
2017), and its leaves take a share of the median of their rows' errors (Friedman 2001, "LAD TreeBoost"), so a spike of a
single call moves nothing. Thresholds lie in the middle between two measured values in octaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.sim.latency.forest import Forest
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.octaves import digits

_NUM_TREES: Final = 50
_DEPTH: Final = 8
_SHARE: Final = 0.2  # of a leaf's median error that one tree takes away
_PART: Final = 0.5  # of the rows, and of the coordinates at each level, that a tree sees
_MAX_BINS: Final = 128  # of a coordinate's own values
_QUANTILES: Final = 32  # of a coordinate with more values
_CLIP: Final = 0.03  # errors beyond count alike
_LEAST_ROWS: Final = 10  # of a side of a split
_SHRINK_ROWS: Final = 3.0  # a leaf of as many rows takes half its share
_NEVER: Final = 1e300  # a threshold that no batch is above

_Index = npt.NDArray[np.intp]


@dataclass(frozen=True)
class _Binned:
    """Coordinates as whole numbers: rows in bin b lie above b thresholds."""

    names: tuple[str, ...]
    thresholds: list[FloatArray]
    bins: _Index  # of shape (number of coordinates, n)


def fit_forest(coordinates: Mapping[str, FloatArray], ratio: FloatArray) -> Forest:
    """The forest of n rows.

    Args:
        coordinates: positive arrays of shape (n,).
        ratio: measured time over the trend's, shape (n,).
    """
    binned = _binned(coordinates)
    rng = np.random.default_rng(0)
    target = np.log(ratio)
    fitted = np.zeros(len(ratio))
    trees = []
    for _ in range(_NUM_TREES):
        coordinate, threshold, leaf = _grown(binned, np.clip((target - fitted) / _CLIP, -1.0, 1.0), rng)
        value = _SHARE * _medians(leaf, target - fitted)
        fitted += value[leaf]
        trees.append((coordinate, threshold, np.exp(value)))
    splits, thresholds, factors = (np.array(part) for part in zip(*trees, strict=True))
    return Forest(binned.names, splits, thresholds, digits(factors))


def _binned(coordinates: Mapping[str, FloatArray]) -> _Binned:
    thresholds, bins = [], []
    for values in coordinates.values():
        own = np.unique(values)
        between = np.sqrt(own[1:] * own[:-1])
        if len(own) > _MAX_BINS:
            inner = np.quantile(values, np.arange(1, _QUANTILES) / _QUANTILES)
            between = np.unique(between[np.clip(np.searchsorted(own, inner), 0, len(between) - 1)])
        thresholds.append(between)
        bins.append(np.searchsorted(between, values))
    return _Binned(tuple(coordinates), thresholds, np.array(bins))


def _grown(binned: _Binned, errors: FloatArray, rng: np.random.Generator) -> tuple[_Index, FloatArray, _Index]:
    """One tree: its splits' coordinates and thresholds, node by node, and the leaf of every row."""
    n = len(errors)
    some = np.flatnonzero(rng.random(n) < _PART)
    seen, few = binned.bins[:, some], errors[some]
    leaf = np.zeros(n, np.intp)
    coordinates, thresholds = [], []
    for level in range(_DEPTH):
        tried = rng.choice(len(seen), max(1, round(_PART * len(seen))), replace=False)
        where, at = _best_splits(seen, tried, leaf[some], few, 1 << level)
        coordinates.append(where)
        thresholds.append([binned.thresholds[w][b] if b >= 0 else _NEVER for w, b in zip(where, at, strict=True)])
        leaf = 2 * leaf + ((binned.bins[where[leaf], np.arange(n)] > at[leaf]) & (at[leaf] >= 0))
    return np.concatenate(coordinates), np.concatenate(thresholds), leaf


def _best_splits(
    bins: _Index, tried: _Index, leaf: _Index, errors: FloatArray, num_leaves: int
) -> tuple[_Index, _Index]:
    """For each leaf the coordinate to split and the last bin below the split (-1: none gains anything)."""
    count = np.bincount(leaf, minlength=num_leaves)
    total = np.bincount(leaf, errors, num_leaves).astype(np.float64)
    best = np.zeros(num_leaves)
    where, at = np.zeros(num_leaves, np.intp), np.full(num_leaves, -1)
    for name in tried:
        size = int(bins[name].max()) + 1
        if size == 1:
            continue
        cell = leaf * size + bins[name]
        below = np.bincount(cell, errors, num_leaves * size).reshape(num_leaves, size).cumsum(axis=1)[:, :-1]
        rows = np.bincount(cell, minlength=num_leaves * size).reshape(num_leaves, size).cumsum(axis=1)[:, :-1]
        gain = _gain(below, rows, total[:, None], count[:, None])
        place = gain.argmax(axis=1)
        found = gain[np.arange(num_leaves), place]
        better = found > best
        best[better], where[better], at[better] = found[better], name, place[better]
    return where, at


def _gain(below: FloatArray, rows: _Index, total: FloatArray, count: _Index) -> FloatArray:
    """What the squared errors lose if the two sides of each split get means of their own; 0 where a side has few rows."""
    above, rest = total - below, count - rows
    gain = below**2 / (rows + _SHRINK_ROWS) + above**2 / (rest + _SHRINK_ROWS) - total**2 / (count + _SHRINK_ROWS)
    return np.where((rows >= _LEAST_ROWS) & (rest >= _LEAST_ROWS), gain, 0.0)


def _medians(leaf: _Index, errors: FloatArray) -> FloatArray:
    """Median error of each leaf's rows, less where they are few."""
    size = 1 << _DEPTH
    order = errors.argsort()
    ordered = errors[order[leaf[order].astype(np.uint8).argsort(kind="stable")]]
    count = np.bincount(leaf, minlength=size)
    first = np.cumsum(count) - count
    low, high = (np.minimum(first + half, len(errors) - 1) for half in (np.maximum(count - 1, 0) // 2, count // 2))
    return (ordered[low] + ordered[high]) / 2 * count / (count + _SHRINK_ROWS)
