"""What a trend misses, learnt by a forest: factor = product over trees of the factor of the leaf that a batch falls in.

Trees split physical coordinates (`coordinates.py`), so a forest knows of sizes that were not measured what sizes that
fill a device alike have shown. Factors are multiplied, so that no exponential function is needed: only comparisons and
*, the same numbers on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.octaves import digits
from kvtwin.sim.latency.work.columns import Columns

_MIN_FACTOR: Final = 0.1
_MAX_FACTOR: Final = 10.0


class Forest:
    """Complete binary trees of one depth, as arrays. Children of node i are 2 i + 1 (at or below) and 2 i + 2 (above).

    Args:
        names: coordinates that splits refer to.
        coordinate: int array of shape (num_trees, 2**depth - 1), indices into `names`.
        threshold: array of the same shape, finite.
        factor: array of shape (num_trees, 2**depth), positive and finite.
    """

    def __init__(
        self, names: Sequence[str], coordinate: npt.ArrayLike, threshold: npt.ArrayLike, factor: npt.ArrayLike
    ) -> None:
        """Raises ValueError where the parts do not fit together."""
        self.names = tuple(names)
        self.coordinate = np.asarray(coordinate, np.intp)
        self.threshold = np.asarray(threshold, np.float64)
        self.factor = np.asarray(factor, np.float64)
        if self.factor.ndim != 2 or (size := self.factor.shape[1]) < 2 or size & (size - 1):
            raise ValueError("factors of trees that are not complete")
        expected = (len(self.factor), size - 1)
        if self.coordinate.shape != expected or self.threshold.shape != expected:
            raise ValueError(f"splits of shape {self.coordinate.shape}, not {expected}")
        if np.any((self.coordinate < 0) | (self.coordinate >= len(self.names))):
            raise ValueError("a split of a coordinate that is not named")
        if not np.all(np.isfinite(self.threshold)) or not np.all((self.factor > 0) & np.isfinite(self.factor)):
            raise ValueError("every threshold must be finite and every factor positive")
        self.depth = size.bit_length() - 1

    def __call__(self, found: Columns) -> FloatArray:
        """Factors of n batches from their coordinates: float64 of shape (n,), between 0.1 and 10."""
        n = len(next(iter(found.values())))
        values = np.concatenate([found[name] for name in self.names])
        own, total = np.arange(n), np.ones(n)
        for coordinate, threshold, factor in zip(self.coordinate * n, self.threshold, self.factor, strict=True):
            node = np.zeros(n, np.intp)
            for _ in range(self.depth):  # in place: this is all the time that a prediction takes
                place = coordinate.take(node)
                place += own
                above = values.take(place) > threshold.take(node)
                node *= 2
                node += 1
                node += above
            total *= factor.take(node - len(threshold))
        return np.clip(total, _MIN_FACTOR, _MAX_FACTOR)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Forest:
        """Read `to_json`'s output. Raises KeyError, TypeError or ValueError on anything else."""
        return cls(data["names"], data["coordinate"], data["threshold"], data["factor"])

    def to_json(self) -> dict[str, Any]:
        """Numbers and names only; factors to six digits."""
        return {
            "names": list(self.names),
            "coordinate": self.coordinate.tolist(),
            "threshold": self.threshold.tolist(),
            "factor": digits(self.factor).tolist(),
        }
