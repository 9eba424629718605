"""Gates: how large an error a target accepts, as written in the `[gates]` table of its target.toml.

[gates]
ttft = 0.05                                          # mean, p50, p90 and p99 of TTFT: at most 5 % off
ttft_p99 = 0.10                                      # the more specific name wins
step_mape = { max_error = 0.10, floor_factor = 1.5 } # the larger of 10 % and 1.5 x the noise floor
tpot = { max_error = 0.05, max_drift = 0.01 }        # and at most one point worse than the accepted report
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Final

from kvtwin.sim.latency.stats import REGIMES
from kvtwin.traces.errors import InputError
from kvtwin.validate.result import Check, Verdict

TIMES: Final = ("ttft", "tpot", "latency")
STATISTICS: Final = ("mean", "p50", "p90", "p99")
QUEUES: Final = ("waiting", "prefetch", "running", "swapped")
SIZES: Final = ("batch_size", "step_tokens")
LEVELS: Final = (1, 2, 3)  # of a KV cache: HBM, host, storage
EVICTION_CAUSES: Final = (
    "evict_for_store", "evict_for_load_back", "evict_for_prefetch", "evict_for_prompt", "evict_alone"
)  # fmt: skip
MOVES: Final = ("load_back", "write_back", "prefetch_start", "prefetch_done", "prefetch_drop")


def _on_levels(*kinds: str) -> tuple[str, ...]:
    """The metrics of `cache.cache_figures`, in tokens and in blocks."""
    return tuple(f"{kind}_{unit}_l{level}" for kind in kinds for unit in ("tokens", "blocks") for level in LEVELS)


# A family's gate holds for each of its members. The per-request MAPE is in no family: it is several times the error
# of a mean, so one number cannot serve both.
FAMILIES: Final[Mapping[str, tuple[str, ...]]] = {
    **{time: tuple(f"{time}_{statistic}" for statistic in STATISTICS) for time in TIMES},
    "ttft": (*(f"ttft_{statistic}" for statistic in STATISTICS), "ttft_arrival"),
    "step_mape": tuple(f"step_mape_{regime}" for regime in REGIMES),
    "queue_time": tuple(f"{queue}_time" for queue in QUEUES),
    "order": ("admission_order", "first_token_order", "finish_order"),
    **{size: tuple(f"{size}_{statistic}" for statistic in (*STATISTICS, "distance")) for size in SIZES},
    "cache_hits": ("hit_rate", *_on_levels("hit")),
    "cache_stores": _on_levels("store"),
    "cache_evictions": (
        *_on_levels("evict"),
        *(f"{cause}_l{level}" for cause in EVICTION_CAUSES for level in LEVELS),
        *(f"{name}_l{level}" for name in ("same_evictions", "eviction_order") for level in LEVELS),
    ),
    "cache_moves": _on_levels(*MOVES),
}

MAX_ERROR: Final = 1.0
MAX_FACTOR: Final = 100.0

# Every metric that a Check may carry.
METRICS: Final = (
    *(name for time in TIMES for name in (*FAMILIES[time], f"{time}_mape")),
    "throughput",
    "output_tokens",
    "identical_arrivals",
    "step_mape",
    *FAMILIES["step_mape"],
    "step_bias",
    "step_mean_error",
    "step_p50_ape",
    "step_p90_ape",
    "step_p99_ape",
    "identical_steps",
    "free_blocks",
    *(name for family in ("queue_time", "order", *SIZES) for name in FAMILIES[family]),
    *(name for family in FAMILIES if family.startswith("cache_") for name in FAMILIES[family]),
)


@dataclass(frozen=True, slots=True)
class Gate:
    """The largest |error| allowed: max(max_error, floor_factor x noise floor).

    Attributes:
        max_error: as a fraction of the measurement (0.05 is 5 %).
        floor_factor: multiples of the noise floor; 0 ignores it. Without repeats only `max_error` counts.
        max_drift: how much larger the error may be than in the accepted report (`kvtwin check --baseline`), as a
            fraction of the measurement; None for as much as `max_error` allows.
    """

    max_error: float
    floor_factor: float = 0.0
    max_drift: float | None = None

    def threshold(self, noise_floor: float | None) -> float:
        """The largest |error| allowed for a metric with this noise floor."""
        return max(self.max_error, self.floor_factor * noise_floor) if noise_floor is not None else self.max_error


Gates = Mapping[str, Gate]

NO_GATES: Final[Gates] = {}

EXACT: Final = Gate(0.0)  # of what is right or wrong, without noise

# Of a target without a [gates] table: decisions exact, times about as good as the best published simulators', and
# never tighter than what repeats differ. Tails have none: few requests decide them.
DEFAULT_GATES: Final[Gates] = {
    "identical_steps": EXACT,
    "step_bias": Gate(0.05, floor_factor=1.5),
    **{f"ttft_{statistic}": Gate(0.1, floor_factor=1.5) for statistic in ("mean", "p50", "arrival")},
    **{f"tpot_{statistic}": Gate(0.05, floor_factor=1.5) for statistic in ("mean", "p50")},
    **{f"latency_{statistic}": Gate(0.05, floor_factor=1.5) for statistic in ("mean", "p50")},
    "throughput": Gate(0.05, floor_factor=1.5),
    "hit_rate": Gate(0.01),
    **{f"{name}_l{level}": Gate(0.05) for name in ("same_evictions", "eviction_order") for level in LEVELS},
}


def parse_gates(table: Mapping[str, Any], path: str | PathLike[str] | None = None) -> dict[str, Gate]:
    """Read a `[gates]` table.

    Args:
        table: metric or family name to a number, or to {max_error = ..., floor_factor = ...}.
        path: the file it stands in, for messages.

    Raises:
        InputError: an unknown name (with the closest known one), or a value that is no fraction from 0 to 1.
    """
    if not isinstance(table, Mapping):
        raise InputError(f"{table!r} is not a table of metric = max error", path=path, column="gates")
    return {name: _gate(name, value, path) for name, value in table.items()}


def judge(check: Check, gates: Gates) -> Check:
    """Return `check` with its threshold and verdict.

    Within the noise floor nothing can be told apart, so no gate is asked: "not distinguishable". An error that could
    not be computed (NaN) fails its gate.
    """
    gate = find_gate(check.metric, gates)
    threshold = None if gate is None else gate.threshold(check.noise_floor)
    return replace(check, threshold=threshold, verdict=_verdict(abs(check.error), check.noise_floor, threshold))


def find_gate(metric: str, gates: Gates) -> Gate | None:
    """The gate of a metric: its own, else that of its family, else None."""
    if metric in gates:
        return gates[metric]
    return next((gates[family] for family, members in FAMILIES.items() if metric in members and family in gates), None)


def _verdict(error: float, noise_floor: float | None, threshold: float | None) -> Verdict:
    if noise_floor is not None and error <= noise_floor:
        return "not distinguishable"
    if threshold is None:
        return "no gate"
    return "pass" if error <= threshold else "fail"


def _gate(name: str, value: Any, path: str | PathLike[str] | None) -> Gate:
    column = f"gates.{name}"
    metrics = (*METRICS, *(family for family in FAMILIES if family not in METRICS))
    if name not in metrics:
        close = difflib.get_close_matches(str(name), metrics, n=1, cutoff=0.0)
        raise InputError(f"unknown metric; did you mean {close[0]!r}?", path=path, column=column)
    if not isinstance(value, Mapping):
        return Gate(_number(value, path, column, limit=MAX_ERROR))
    known = ("max_error", "floor_factor", "max_drift")
    unknown = sorted(str(key) for key in value if key not in known)
    if unknown:
        problem = f"unknown key {unknown[0]!r}; known: {', '.join(known)}"
        raise InputError(problem, path=path, column=column)
    if "max_error" not in value:
        raise InputError("max_error is missing: it holds where there is no noise floor", path=path, column=column)
    factor = _number(value.get("floor_factor", 0.0), path, f"{column}.floor_factor", limit=MAX_FACTOR)
    drift = value.get("max_drift")
    if drift is not None:
        drift = _number(drift, path, f"{column}.max_drift", limit=MAX_ERROR)
    return Gate(_number(value["max_error"], path, f"{column}.max_error", limit=MAX_ERROR), factor, drift)


def _number(value: Any, path: str | PathLike[str] | None, column: str, limit: float) -> float:
    """A number from 0 to `limit`; TOML's booleans, nan and inf are none."""
    nan = isinstance(value, float) and math.isnan(value)
    if nan or isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{value!r} is not a number", path=path, column=column)
    if value < 0:
        raise InputError(f"{value!r} is negative", path=path, column=column)
    if value > limit:
        hint = ": an error is a fraction of the measurement (0.05 for 5 %)" if limit == MAX_ERROR else ""
        raise InputError(f"{value!r} is above {limit:g}{hint}", path=path, column=column)
    return float(value)
