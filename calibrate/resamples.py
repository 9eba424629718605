"""The draws of a block bootstrap: which rows each resample holds, and sums over them that do not visit every row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Resamples:
    """Samples of n rows, each drawn as blocks of neighbours.

    Circular block bootstrap (Politis & Romano 1992; moving blocks: Kuensch 1989): the rows form a circle, so that the
    first and last rows are drawn as often as the others.

    Attributes:
        n: rows of the sample.
        starts: first row of each block, shape (resamples, blocks).
        lengths: rows of each block, shape (blocks,); they sum to n.
    """

    n: int
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    @classmethod
    def draw(cls, n: int, length: int, resamples: int, rng: np.random.Generator) -> Resamples:
        """Blocks of `length` rows until n rows are drawn; the last block is cut short."""
        blocks = -(-n // length)
        lengths = np.full(blocks, length)
        lengths[-1] = n - length * (blocks - 1)
        return cls(n, rng.integers(0, n, (resamples, blocks)), lengths)

    @classmethod
    def whole(cls, n: int) -> Resamples:
        """The sample itself: every row once."""
        return cls(n, np.zeros((1, 1), np.int64), np.array([n]))

    def totals(self, running: FloatArray) -> FloatArray:
        """Sum of a column over each resample's rows, shape (resamples,).

        Args:
            running: the column's running total, from `running_total`: a block's sum is then one difference.
        """
        within, beyond = self._ends
        parts = running[within] - running[self.starts] + running[beyond]
        total: FloatArray = parts.sum(axis=1)
        return total

    @cached_property
    def weights(self) -> FloatArray:
        """How often each row is drawn, shape (resamples, n)."""
        within, beyond = self._ends
        size = len(self.starts) * (self.n + 1)
        row = np.arange(len(self.starts))[:, None] * (self.n + 1)
        # Count +1 where a block begins and -1 where it has ended; one that wraps around begins again at row 0.
        began = np.bincount((row + self.starts).ravel(), minlength=size)
        change = began - np.bincount((row + within).ravel(), minlength=size)
        change -= np.bincount((row + beyond).ravel(), minlength=size)
        change = change.reshape(len(self.starts), self.n + 1)
        change[:, 0] += self.starts.shape[1]
        return np.cumsum(change, axis=1, dtype=np.float64)[:, : self.n]

    @cached_property
    def _ends(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where each block ends before the end of the rows, and where after going on from row 0 (0: it does not)."""
        ends = self.starts + self.lengths
        return np.minimum(ends, self.n), np.maximum(ends - self.n, 0)


def running_total(column: FloatArray) -> FloatArray:
    """Sums of the first 0, 1, ... n rows."""
    return np.concatenate([[0.0], np.cumsum(column)])
