"""How a kernel cuts its work up: rows of a tile, thread blocks at once, and which of several kernels runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from kvtwin.calibrate.tables.prices import relative_nnls
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.work.columns import Columns, Terms
from kvtwin.sim.latency.work.prefill import alternatives
from kvtwin.sim.latency.work.terms import PLAYED, TILES, WAVES, dear_terms, terms

# Thread blocks that a device runs at once, where its GPU is not known: 1 to 8 on each streaming multiprocessor of common
# GPUs. 0: no waves (TPU, CPU, or nothing to see).
_COMMON_SMS: Final = (58, 72, 82, 84, 108, 114, 128, 132, 142, 148, 170, 188)
_COMMON_SLOTS: Final = tuple(float(num_sms * blocks) for blocks in (1, 2, 4, 8) for num_sms in _COMMON_SMS)
_SEARCH_ROWS: Final = 600  # of a table, to search on
_CLEARLY: Final = 0.05  # how much better a kernel that packs must fit than the plain one
# Where blocks are played: geometries that fit nearly as well without, so much worse at most, and on how many rows.
_NEARLY: Final = 0.2
_PLAYED_ROWS: Final = 100


class Geometry(NamedTuple):
    """Tile, slots and kernel (one of `alternatives`)."""

    tile: float
    slots: float
    kernel: str


def search_geometry(work: str, columns: Columns, time_us: FloatArray, slots: Sequence[float] | None) -> Geometry:
    """The geometry whose prices fit best, on some of the rows: time_us of shape (n,) in microseconds.

    Args:
        slots: those to choose among, besides none; None for those of common GPUs.
    """
    counts = [0.0, *(slots if slots is not None else _COMMON_SLOTS)] if work in WAVES else [0.0]
    few, times = _some(columns, time_us, _SEARCH_ROWS)
    found = [
        (_misfit(cheap, times) * (1.0 + _CLEARLY * bool(kernel)), order, Geometry(tile, count, kernel))
        for order, (tile, count) in enumerate(itertools.product(TILES.get(work, (128.0,)), counts))
        for kernel, cheap in alternatives(terms(work, few, tile, count), few).items()
    ]
    found.sort()
    if work not in PLAYED:
        return found[0][-1]
    few, times = _some(columns, time_us, _PLAYED_ROWS)
    played = [(order, at) for misfit, order, at in found if misfit <= found[0][0] * (1.0 + _NEARLY)]
    return min((_misfit(kernel_terms(work, few, at), times), order, at) for order, at in played)[-1]


def kernel_terms(work: str, columns: Columns, at: Geometry) -> Terms:
    """All terms of n batches, those that are played too."""
    cheap = alternatives(terms(work, columns, at.tile, at.slots), columns)[at.kernel]
    return cheap | dear_terms(work, columns, at.tile, at.slots)


def _some(columns: Columns, time_us: FloatArray, most: int) -> tuple[Columns, FloatArray]:
    step = max(1, len(time_us) // most)
    return {name: values[::step] for name, values in columns.items()}, time_us[::step]


def _misfit(found: Terms, time_us: FloatArray) -> float:
    total = sum(price * found[name] for name, price in relative_nnls(found, time_us).items())
    return round(float(np.mean(np.abs(total / time_us - 1))), 12)  # sums of the same terms may differ in the last bit
