"""When the thread blocks of prefills and decodes in one launch end: greedy list scheduling, head by head, in numpy.

FlashAttention-2's grid runs over tiles of queries first, then over sequences, then over heads (`flash_fwd_launch_template.h`):
a head's prefill, then its decodes, then the next head's. A free slot takes the next block. No closed form knows how such a
list ends (a bound says at most one block later than it could; Graham 1969), so it is played: with each head the slots are
sorted, and the i-th block goes to the i-th slot that comes free.
"""

from __future__ import annotations

import itertools
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.work.columns import Columns, attention_heads, prefills
from kvtwin.sim.latency.work.reuse import CACHES, Reuse

BLOCK_START: Final = 50.0  # keys that a thread block could read while it starts and ends
EMPTY_BLOCK: Final = 16.0  # and one that finds nothing to do: a decode's, beyond its first tile
PIECE: Final = 128.0  # keys that a block takes at a time (`kBlockN`)
MANY_SLOTS: Final = 376  # thread blocks at once, where the trend saw no waves
_MOST_KNOWN: Final = 1 << 18
_ROWS_AT_ONCE: Final = 512  # whose slots fit a core's cache


class _Played:
    """What was played before, by a row's numbers: a hold-out asks for the same rows again and again."""

    def __init__(self) -> None:
        self._place: dict[bytes, int] = {}
        self._results = np.zeros((0, 1 + len(CACHES)))

    def __call__(self, rows: FloatArray, num_blocks: FloatArray, tile: float) -> FloatArray:
        """`_played` of every row; rows with about as many blocks (of shape (n,)) are played together."""
        keys = rows.view(f"V{rows.itemsize * rows.shape[1]}").ravel().tolist()
        if len(self._place) > _MOST_KNOWN:
            self._place, self._results = {}, self._results[:0]
        new = sorted({key: at for at, key in enumerate(keys) if key not in self._place}.values(), key=num_blocks.item)
        for first in range(0, len(new), _ROWS_AT_ONCE):
            here = new[first : first + _ROWS_AT_ONCE]
            self._place.update(zip((keys[at] for at in here), itertools.count(len(self._place))))
            self._results = np.concatenate([self._results, _played(rows[here], tile)])
        found: FloatArray = self._results[[self._place[key] for key in keys]]
        return found


_remembered: Final = _Played()


def play(columns: Columns, tile: float, slots: float) -> tuple[FloatArray, FloatArray]:
    """When the last block of n batches ends, in keys that a block reads, and the keys of decodes that come from memory.

    Columns as of `mixed_attention`, or of `uneven_mixed` (decodes of two lengths, the long ones first).

    Returns:
        float64 of shape (n,), and of shape (n, len(reuse.CACHES)).
    """
    num_prefills, chunk, prefix = prefills(columns)
    decodes, short = columns["num_decode"], columns["context"]
    num_long = np.rint(decodes * columns["long_share"]) if "long_share" in columns else np.zeros(len(chunk))
    longer = short * columns["skew"] if "skew" in columns else short
    heads, kv_heads = attention_heads(columns)
    fixed = np.full((len(chunk), 2), [tile, slots or MANY_SLOTS])
    rows = np.column_stack(
        [num_prefills, chunk, prefix, num_long, longer, decodes - num_long, short, heads, heads / kv_heads, fixed]
    )
    found = _remembered(rows, num_prefills * np.ceil(chunk / tile) + decodes, tile)
    return found[:, 0], found[:, 1:]


def _played(rows: FloatArray, tile: float) -> FloatArray:
    """`play` of rows: prefills, decodes of either length, heads, group, (tile) and slots, which is one for all."""
    slots, num_heads, group = int(rows[0, -1]), rows[:, 7], rows[:, 8]
    blocks, keys, tiles = _blocks(rows, tile)
    empty = EMPTY_BLOCK * (rows[:, 3] + rows[:, 5]) * (tiles - 1) / slots  # so small and many that they spread evenly
    free = np.zeros((len(rows), slots), np.float32)
    start, reuse = np.zeros_like(blocks), Reuse(len(rows))
    for head in range(int(num_heads.max())):
        runs = (num_heads > head)[:, None]
        before = np.where((head % group == 0)[:, None], np.float32(-np.inf), start)
        for first in range(0, blocks.shape[1], slots):
            free.sort(axis=1)
            part = blocks[:, first : first + slots]
            start[:, first : first + slots] = free[:, : part.shape[1]]
            free[:, : part.shape[1]] += np.where(runs, part, np.float32(0))
        reuse.add(start - before, np.where(runs, keys, np.float32(0)))
        free += np.where(runs, empty.astype(np.float32)[:, None], np.float32(0))
    end = free.max(axis=1).astype(np.float64)
    return np.column_stack([end, reuse.missed(end)])


def _blocks(rows: FloatArray, tile: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], FloatArray]:
    """Blocks of one head in order, 0 where a row has fewer; keys of those that decode; tiles of queries of each prefill."""
    num_prefills, chunk, prefix, num_long, longer, num_short, short = (column[:, None] for column in rows[:, :7].T)
    tiles = np.ceil(chunk / tile)
    of_prefills = num_prefills * tiles
    index = np.arange(int((of_prefills + num_long + num_short).max()))[None, :]
    seen = prefix + np.minimum((index % tiles + 1) * tile, chunk)
    decoded = np.where(index < of_prefills + num_long, longer, short)
    there, decodes = index < of_prefills + num_long + num_short, index >= of_prefills
    reads = np.where(decodes, decoded + 1, seen)  # a decode's own key too
    blocks = np.ceil(reads / PIECE) * PIECE + BLOCK_START
    return (
        np.where(there, blocks, 0.0).astype(np.float32),
        np.where(there & decodes, decoded, 0.0).astype(np.float32),
        tiles[:, 0],
    )
