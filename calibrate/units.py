"""Times that no engine can have taken: a column in another unit than it says, or two tables on different clocks."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvtwin.calibrate.agree import place_of
from kvtwin.sim.latency.stats import durations_ns
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run

# A step launches kernels and moves weights: none takes less than this, and none of a server more.
LEAST_STEP_NS: Final = 20_000
MOST_STEP_NS: Final = 100_000_000_000
_UNITS: Final = {1e3: "microseconds", 1e6: "milliseconds", 1e9: "seconds"}
_SLACK_NS: Final = 1_000_000_000


def refuse_wrong_units(run: Run) -> None:
    """Check the steps of a run against what engines do and against its own requests.

    Raises:
        InputError: the median step is shorter than 20 us or longer than 100 s; or most first tokens lie outside the
            time that the steps cover.
    """
    steps = run.steps
    refuse_implausible(float(np.median(durations_ns(steps))), "a step", run, "end_ns")
    first = run.requests.column("first_token_ns").drop_null().to_numpy()
    begin, end = int(steps.column("start_ns").to_numpy().min()), int(steps.column("end_ns").to_numpy().max())
    if len(first) and np.mean((first < begin - _SLACK_NS) | (first > end + _SLACK_NS)) > 0.5:
        problem = (
            f"first tokens lie at {first.min() / 1e9:,.3f} .. {first.max() / 1e9:,.3f} s, but the steps cover "
            f"{begin / 1e9:,.3f} .. {end / 1e9:,.3f} s: bring both tables to one unit (ns) and one clock"
        )
        raise InputError(problem, path=place_of(run), column="first_token_ns")


def refuse_implausible(median_ns: float, what: str, run: Run, column: str) -> None:
    """Refuse a median time per step that no engine has; names the unit that would make it plausible."""
    if LEAST_STEP_NS <= median_ns <= MOST_STEP_NS:
        return
    wanted = 5e6 / median_ns
    factor = min(_UNITS, key=lambda unit: abs(np.log(unit / wanted)))
    hint = f" (are these {_UNITS[factor]}?)" if median_ns < LEAST_STEP_NS else ""
    problem = f"{what} takes {median_ns:,.0f} ns in the median: 20 us to 100 s expected{hint}; give nanoseconds"
    raise InputError(problem, path=place_of(run), column=column)
