"""The step of the timer that measured a table, read off its times: they stand on a lattice.

Blackwell GPUs (B200, RTX PRO 6000 in aiconfigurator's tables) count 2.048 us at a time: a kernel of 9 us is off by
up to 11 %, whoever predicts it. That is noise of the measurement, so it is in the noise floor.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from kvtwin.sim.latency.grid import FloatArray

_STEPS_US: Final = (2.048, 1.024, 0.512)  # 32 ns, which NVIDIA's timers tick, times powers of two
_FEW_STEPS, _MANY_STEPS = 8, 30  # below, few kernels are so alike that any step fits; beyond, averages blur it
_LEAST_ROWS: Final = 100
_LEAST_CONCENTRATION: Final = 0.4


def timer_step_us(time_us: FloatArray) -> float:
    """The coarsest step on whose lattice (any offset) the times stand; 0 where they stand on none.

    The mean of exp(2 pi i t / step) has length 1 on a lattice and about 0 otherwise (Rayleigh's test of uniformity).

    Args:
        time_us: array of shape (n,).
    """
    for step in _STEPS_US:
        some = time_us[(time_us > _FEW_STEPS * step) & (time_us < _MANY_STEPS * step)]
        if len(some) >= _LEAST_ROWS and abs(np.exp(2j * np.pi * some / step).mean()) >= _LEAST_CONCENTRATION:
            return step
    return 0.0
