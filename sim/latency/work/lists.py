"""Thread blocks of two kinds that are handed out in a list: when the last one ends (Graham 1969)."""

from __future__ import annotations

import numpy as np

from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.work.columns import Terms, ceil, waves_of


def two_kinds(
    first: tuple[FloatArray, FloatArray], second: tuple[FloatArray, FloatArray], slots: float, longest: FloatArray
) -> Terms:
    """Terms of a launch with two kinds of thread blocks, (how many, how long)."""
    (many, long), (more, other) = first, second
    total = many * long + more * other
    return {
        "call": np.ones(len(total)),
        "first end": list_end(many, long, more, other, slots),
        "second end": list_end(more, other, many, long, slots),
        "keys of blocks": total / (slots or 1.0),
        "waves": waves_of(many + more, slots),
        "longest": np.maximum(longest, np.maximum(long, other)),
        "blocks": many + more,
    }


def list_end(many: FloatArray, long: FloatArray, more: FloatArray, other: FloatArray, slots: float) -> FloatArray:
    """When the last block ends: `many` blocks of length `long` are handed out first, then `more` of length `other`.

    Greedy list scheduling of two kinds, in closed form. After `rounds` full rounds of the first kind, `busy` slots run
    one more of it. In units of `other`, those come free at q, the rest at 0. By time x a slot that is free from f on has
    taken floor(x - f) blocks, so the count of finished blocks grows at whole x (by the free slots) and at q + whole x
    (by the busy ones): the end is the first of these times at which it reaches `more`.
    """
    if not slots:
        return many * long + more * other
    rounds = np.floor(many / slots)
    busy = many - rounds * slots
    free = slots - busy
    first_end = np.where(many > 0, ceil(many, slots) * long, 0.0)
    step = np.where(other > 0, other, 1.0)
    late = np.where(busy > 0, long / step, 0.0)  # q
    whole = np.floor(late)
    early = ceil(more, np.maximum(free, 1e-9))
    with_busy = late + np.maximum(ceil(more - free * whole, slots), 0.0)
    with_free = whole + 1.0 + np.maximum(ceil(more - free * (whole + 1.0), slots), 0.0)
    last = np.where(early <= whole, early, np.minimum(with_busy, with_free))
    return np.maximum(first_end, np.where(more > 0, rounds * long + last * step, 0.0))
