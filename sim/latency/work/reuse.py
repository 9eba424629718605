"""What thread blocks read from memory again: a cache holds what was read a short while ago, not what was read long ago.

Query heads that share keys read them one after the other. Where the heads' blocks start together, the keys come from memory
once; where they start far apart, other keys have pushed them out. How much is read in between is the *footprint* of that time:
of every block the time since its keys were last read, but no more than the time that passes (Xiang et al., "HOTL: a higher
order theory of locality", ASPLOS 2013, section 2.2; for caches with equal requests: Che et al. 2002).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.sim.latency.grid import FloatArray

# Keys of one head that a cache may hold.
CACHES: Final = (32768.0, 65536.0, 98304.0, 131072.0, 163840.0, 196608.0, 262144.0, 393216.0)

# Times are sorted into quarters of octaves: exponent and two bits of the mantissa of a float32, from 2^4 to 2^22. The first bin
# holds all shorter times, the last one keys that were never read before.
_SHIFT: Final = 21
_FIRST: Final = int(np.array(16.0, np.float32).view(np.int32)) >> _SHIFT
_NUM_BINS: Final = 4 * 18 + 2
_TIMES: Final = np.concatenate(
    [[0.0], [2.0**octave * (1.125 + quarter / 4) for octave in range(4, 22) for quarter in range(4)], [np.inf]]
)


class Reuse:
    """Of n launches, how many keys were last read how long ago.

    Args:
        n: launches that are played together.
    """

    def __init__(self, n: int) -> None:
        self._first_bin = np.arange(n)[:, None] * _NUM_BINS
        self._keys = np.zeros(n * _NUM_BINS)

    def add(self, ago: npt.NDArray[np.float32], keys: npt.NDArray[np.float32]) -> None:
        """Blocks that read `keys` keys, which were read `ago` before (infinity: never); both of shape (n, blocks)."""
        found = np.clip((ago.view(np.int32) >> _SHIFT) - (_FIRST - 1), 0, _NUM_BINS - 1) + self._first_bin
        self._keys += np.bincount(found.ravel(), keys.ravel(), len(self._keys))

    def missed(self, end: FloatArray, caches: Sequence[float] = CACHES) -> FloatArray:
        """Keys that come from memory in launches that last `end`, of shape (n,), for each cache: shape (n, len(caches)).

        None where as much as a cache holds was read in between, all from twice that on: half of it lies between.
        """
        keys = self._keys.reshape(len(end), _NUM_BINS)
        footprint = keys @ np.minimum(_TIMES[:, None], np.minimum(_TIMES, _TIMES[-2])) / end[:, None]
        footprint[:, -1] = np.inf
        return np.column_stack([(keys * np.clip(footprint / size - 1.0, 0.0, 1.0)).sum(axis=1) for size in caches])
