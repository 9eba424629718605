"""What steps cost, asked the way an event-driven loop asks: one batch, or a stretch of decode steps.

A stretch is a run of steps with the same decodes, each context one token longer than at the step before. Between
events nothing else happens, so the sums that a latency model sees move by a closed form, and only two questions are
left: how long do m steps take, and after how many steps has a time passed. A linear model answers both in integers
without looking at single steps; a model that has no pricer of its own prices the stretch with one vectorised call.

`pricer_for(model)` gives the same nanoseconds as `model.step_ns` for every step, bit for bit (tests/contract).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Protocol

import numpy as np

from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.stats import COLUMNS, BatchStats, IntArray

_FEW = 32  # so many steps are quicker priced one by one
MAX_PRICED = 128  # most steps priced in one call: what an event cuts off was priced for nothing


class Durations(Protocol):
    """How long the steps of a stretch take, in ns; counts are of steps from its start.

    Valid until the next stretch is priced.

    Attributes:
        num_steps: how many steps are known; asking for more is a fault.
        least_ns: no step takes less.
    """

    @property
    def num_steps(self) -> int:
        """See above."""

    @property
    def least_ns(self) -> int:
        """See above."""

    def total_ns(self, count: int) -> int:
        """Sum of the first `count` durations."""

    def reach(self, time_ns: int, gap_ns: int, most: int) -> tuple[int, int]:
        """Fewest steps, at least 1 and at most `most`, whose durations, each plus `gap_ns`, reach `time_ns`.

        Returns:
            How many, and how long they take, the gaps left out.
        """

    def last_ns(self, count: int) -> int:
        """The `count`-th duration, counted from 1."""

    def list_ns(self, count: int) -> IntArray:
        """The first `count` durations."""


class Pricer(Protocol):
    """Prices the steps of an event-driven loop.

    Attributes:
        needs_spread: the model looks at decode_context_sq or decode_context_max; else both may be given as 0.
    """

    needs_spread: bool

    def step_ns(self, row: tuple[int, ...], step: int) -> int:
        """Duration of one batch: `row` holds its statistics in the order of `stats.COLUMNS`."""

    def stretch(
        self, num_decode: int, context: int, context_sq: int, context_max: int, most: int, step: int
    ) -> Durations:
        """Durations of up to `most` steps from `step` on, from the statistics of the first (as in `stats.COLUMNS`)."""


class Progression:
    """Durations that grow by the same amount from step to step."""

    __slots__ = ("least_ns", "num_steps", "slope_ns")

    def __init__(self, first_ns: int, slope_ns: int, num_steps: int) -> None:
        self.least_ns, self.slope_ns, self.num_steps = first_ns, slope_ns, num_steps

    def total_ns(self, count: int) -> int:
        """See `Durations`."""
        return count * self.least_ns + self.slope_ns * (count * (count - 1) // 2)

    def reach(self, time_ns: int, gap_ns: int, most: int) -> tuple[int, int]:
        """See `Durations`: the root of a quadratic, guessed in floats and settled in integers."""
        if time_ns <= 0:
            return 1, self.least_ns
        each, slope = self.least_ns + gap_ns, self.slope_ns
        # The stable form of the positive root of slope/2 m^2 + (each - slope/2) m = time.
        linear = each - 0.5 * slope
        count = int(2 * time_ns / (linear + sqrt(linear * linear + 2 * slope * time_ns))) + 1
        if count > most:
            count = most
        total = count * each + slope * (count * (count - 1) // 2)
        while count > 1:
            before = total - each - slope * (count - 1)
            if before < time_ns:
                break
            total = before
            count -= 1
        while total < time_ns and count < most:
            total += each + slope * count
            count += 1
        return count, total - count * gap_ns

    def last_ns(self, count: int) -> int:
        """See `Durations`."""
        return self.least_ns + (count - 1) * self.slope_ns

    def list_ns(self, count: int) -> IntArray:
        """See `Durations`."""
        return self.least_ns + self.slope_ns * np.arange(count, dtype=np.int64)


class Listed:
    """Durations priced one by one."""

    __slots__ = ("_durations_ns", "_sums_ns", "num_steps")

    def __init__(self, durations_ns: IntArray) -> None:
        self._durations_ns = durations_ns
        self._sums_ns: IntArray = np.cumsum(durations_ns)
        self.num_steps = len(durations_ns)

    @property
    def least_ns(self) -> int:
        """See `Durations`."""
        return int(self._durations_ns.min())

    def total_ns(self, count: int) -> int:
        """See `Durations`."""
        return int(self._sums_ns[count - 1]) if count else 0

    def reach(self, time_ns: int, gap_ns: int, most: int) -> tuple[int, int]:
        """See `Durations`."""
        sums = self._sums_ns[:most]
        if gap_ns:
            sums = sums + gap_ns * np.arange(1, len(sums) + 1)
        count = min(int(np.searchsorted(sums, time_ns)) + 1, most)
        return count, int(self._sums_ns[count - 1])

    def last_ns(self, count: int) -> int:
        """See `Durations`."""
        return int(self._durations_ns[count - 1])

    def list_ns(self, count: int) -> IntArray:
        """See `Durations`."""
        return self._durations_ns[:count]


class OnDemand:
    """Durations priced as far as they are asked for: the first few one by one, then many in a vectorised call.

    Args:
        model: prices many.
        first: num_decode, decode_context, decode_context_sq and decode_context_max of the first step.
        price_one: duration of the step so many after the first; the same as the model's, bit for bit.
        num_steps: steps that may be asked for.
        grows: no step is quicker than the one before.
    """

    __slots__ = ("_first", "_grows", "_known_ns", "_model", "_price_one", "num_steps")

    def __init__(
        self,
        model: LatencyModel,
        first: tuple[int, int, int, int],
        price_one: Callable[[int], int],
        num_steps: int,
        *,
        grows: bool,
    ) -> None:
        self._grows = grows
        self._model, self._first, self._price_one, self.num_steps = model, first, price_one, num_steps
        self._known_ns: list[int] = []

    @property
    def least_ns(self) -> int:
        """See `Durations`."""
        return self.last_ns(1) if self._grows else 1

    def _price(self, count: int) -> list[int]:
        known = self._known_ns
        while len(known) < min(count, _FEW):
            known.append(self._price_one(len(known)))
        while len(known) < count:
            ahead = len(known)
            num_decode, context, context_sq, context_max = self._first
            context_sq += (2 * context + num_decode * ahead) * ahead
            start = (num_decode, context + num_decode * ahead, context_sq, context_max + ahead)
            batches = decode_batches(start, min(MAX_PRICED, self.num_steps - ahead))
            known += self._model.step_ns(batches, 0).tolist()
        return known

    def total_ns(self, count: int) -> int:
        """See `Durations`."""
        return sum(self._price(count)[:count])

    def reach(self, time_ns: int, gap_ns: int, most: int) -> tuple[int, int]:
        """See `Durations`."""
        known, total_ns = self._known_ns, 0
        for count in range(1, most + 1):
            if count > len(known):
                self._price(count)
            total_ns += known[count - 1]
            if total_ns + count * gap_ns >= time_ns:
                return count, total_ns
        return most, total_ns

    def last_ns(self, count: int) -> int:
        """See `Durations`."""
        return self._price(count)[count - 1]

    def list_ns(self, count: int) -> IntArray:
        """See `Durations`."""
        return np.array(self._price(count)[:count], dtype=np.int64)


class VectorPricer:
    """Prices of any model: `step_ns` with one row, or with a stretch's rows."""

    needs_spread = True

    def __init__(self, model: LatencyModel) -> None:
        self._model = model

    def step_ns(self, row: tuple[int, ...], step: int) -> int:
        """See `Pricer`."""
        return int(self._model.step_ns(BatchStats(np.array([row], dtype=np.int64)), step)[0])

    def stretch(
        self, num_decode: int, context: int, context_sq: int, context_max: int, most: int, step: int
    ) -> Durations:
        """See `Pricer`."""
        batches = decode_batches((num_decode, context, context_sq, context_max), min(most, MAX_PRICED))
        return Listed(self._model.step_ns(batches, step))


def decode_batches(first: Sequence[int], count: int) -> BatchStats:
    """Statistics of `count` steps of a stretch: every context grows by one per step.

    Args:
        first: num_decode, decode_context, decode_context_sq and decode_context_max of the first step.
        count: number of steps.
    """
    num_decode, context, context_sq, context_max = first
    ahead = np.arange(count, dtype=np.int64)
    table = np.zeros((count, len(COLUMNS)), dtype=np.int64)
    table[:, 0] = num_decode
    table[:, 1] = context + num_decode * ahead
    table[:, 2] = context_sq + (2 * context + num_decode * ahead) * ahead
    table[:, 3] = context_max + ahead
    return BatchStats(table)


def pricer_for(model: LatencyModel) -> Pricer:
    """The quickest way to price steps with `model`: its own (`model.pricer()`), where it has one."""
    own = getattr(model, "pricer", None)
    return own() if own is not None else VectorPricer(model)
