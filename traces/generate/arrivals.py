"""When requests or conversations arrive: Poisson, bursty, or at a constant rate."""

from __future__ import annotations

import math

import numpy as np

from kvtwin.traces.errors import InputError
from kvtwin.traces.generate.distribution import IntArray
from kvtwin.traces.readers.text import MAX_TIME_NS
from kvtwin.traces.time import NS_PER_S


def arrival_times(n: int, rate_per_s: float, burstiness: float, rng: np.random.Generator) -> IntArray:
    """n arrivals from time 0 on, in ns, in order: int64 of shape (n,).

    The gaps are gamma distributed with shape `burstiness` and mean 1 / rate, as `get_request` of `vllm bench serve`
    draws them: their coefficient of variation is 1 / sqrt(burstiness).

    Args:
        n: how many.
        rate_per_s: arrivals per second; infinite for all at once.
        burstiness: 1 for a Poisson process, below 1 for bursts, above 1 for more even arrivals, infinite for a constant
            rate.
        rng: the stream to draw from.

    Raises:
        InputError: a rate or burstiness that is not above 0, or arrivals beyond 146 years.
    """
    for name, value in (("rate", rate_per_s), ("burstiness", burstiness)):
        if not value > 0:
            raise InputError(f"{name} is {value}: above 0 expected")
    if math.isinf(rate_per_s):
        return np.zeros(n, dtype=np.int64)
    num_gaps = max(n - 1, 0)
    if math.isinf(burstiness):
        gaps_s = np.full(num_gaps, 1 / rate_per_s)
    else:
        gaps_s = rng.gamma(burstiness, 1 / (rate_per_s * burstiness), num_gaps)
    times_s = np.concatenate(([0.0], np.cumsum(gaps_s)))[:n]
    if n and not times_s[-1] * NS_PER_S <= MAX_TIME_NS:
        raise InputError(f"rate is {rate_per_s}: the last arrival lies beyond {MAX_TIME_NS} ns")
    times_ns: IntArray = np.rint(times_s * NS_PER_S).astype(np.int64)
    return times_ns
