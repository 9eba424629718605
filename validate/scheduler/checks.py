"""The scheduler level in numbers: one Check per claim, with its interval."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate import stats
from kvtwin.calibrate.stats import FloatArray, Interval
from kvtwin.traces.run import Run
from kvtwin.traces.time import to_ms
from kvtwin.validate.gates import QUEUES, Gates, judge
from kvtwin.validate.result import Check
from kvtwin.validate.scheduler.align import NO_STEP, Alignment
from kvtwin.validate.scheduler.decisions import NOT_THERE, Decisions, IntArray
from kvtwin.validate.scheduler.residency import derived_residency, recorded_queues, recorded_residency

BoolArray = npt.NDArray[np.bool_]

_NAN: Final = float("nan")
_QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_ORDERS: Final = (
    ("admission_order", "scheduled_ns"), ("first_token_order", "first_token_ns"), ("finish_order", "finish_ns")
)  # fmt: skip
_SIZES: Final = (("batch_size", "requests", "num_reqs"), ("step_tokens", "tokens", "num_tokens"))


class ScheduleChecks:
    """Collects the checks of one comparison.

    Args:
        name: of the recorded run.
        gates: see `gates.parse_gates`.

    Attributes:
        checks: judged.
        not_judged: what there is no check for, and why, in words.
    """

    def __init__(self, name: str, gates: Gates) -> None:
        self._name, self._gates = name, gates
        self.checks: list[Check] = []
        self.not_judged: list[str] = []

    def add_steps(self, rows: Alignment, same: BoolArray, ours: Decisions, theirs: Decisions) -> None:
        """Identical steps, and among them those with as many free blocks."""
        self._add_share("identical_steps", same, "same batch in order, cache_len, input_len, preempted, finished")
        free, other = free_blocks(rows, same, ours, theirs)
        known = (free != NOT_THERE) & (other != NOT_THERE)
        if known.any():
            self._add_share("free_blocks", (free == other)[known], "identical steps that leave as many blocks free")
        else:
            self.not_judged.append("free blocks: not recorded, or no identical step")

    def add_sizes(self, rows: Alignment, ours: Decisions, theirs: Decisions) -> None:
        """Distributions of the batch size and of the tokens per step (of the token budget)."""
        for metric, unit, column in _SIZES:
            self._add_distribution(metric, unit, rows, getattr(ours, column), getattr(theirs, column))

    def add_residency(self, measured: Run, simulated: Run, common: tuple[IntArray, IntArray]) -> None:
        """Mean time in each queue.

        Args:
            measured, simulated: the two runs.
            common: rows of the requests that both have, in each.
        """
        recorded = set(recorded_queues(measured)) & set(recorded_queues(simulated))
        derived = [derived_residency(run) for run in (measured, simulated)]
        for queue in QUEUES:
            if queue in recorded:
                values = [recorded_residency(run, queue) for run in (measured, simulated)]
            elif queue in derived[0]:
                values = [found[queue] for found in derived]
            else:
                self.not_judged.append(f"time in the {queue.capitalize()} queue: not recorded by both")
                continue
            note = "" if queue in recorded else "from the stamps of requests and steps"
            ours, theirs = (found[rows] for found, rows in zip(values, common, strict=True))
            self._add_queue(queue, ours, theirs, note)

    def add_orders(self, measured: Run, simulated: Run, common: tuple[IntArray, IntArray]) -> None:
        """Kendall's tau-b of first admissions, first tokens and finishes (arguments as of `add_residency`)."""
        from scipy.stats import kendalltau

        for metric, column in _ORDERS:
            times = [
                run.requests.column(column).take(rows).to_pandas().to_numpy(np.float64)
                for run, rows in zip((measured, simulated), common, strict=True)
            ]
            known = np.isfinite(times[0]) & np.isfinite(times[1])
            tau = float(kendalltau(times[0][known], times[1][known]).statistic) if known.sum() > 1 else _NAN
            if np.isnan(tau):
                self.not_judged.append(f"{metric}: fewer than two requests with different {column} in both runs")
                continue
            self._add(metric, "tau", 1.0, tau, tau - 1, None, int(known.sum()), f"Kendall's tau-b of {column}")

    def _add_share(self, metric: str, same: BoolArray, note: str) -> None:
        if not len(same):
            return
        hits = same.astype(np.float64)
        interval = _interval(hits, np.ones(len(hits)))
        if interval is not None:  # wide, and still a share
            interval = (max(interval[0], -1.0), min(interval[1], 0.0))
        self._add(
            metric, "steps", float(len(hits)), float(hits.sum()), float(hits.mean()) - 1, interval, len(hits), note
        )

    def _add_distribution(self, metric: str, unit: str, rows: Alignment, ours: IntArray, theirs: IntArray) -> None:
        from scipy.stats import wasserstein_distance

        if not len(ours) or not len(theirs):
            self.not_judged.append(f"{metric}: a run without steps")
            return
        # The means' ratio, step beside step: what both took alike moves it little.
        top, bottom = _by_row(theirs, rows.simulated) / len(theirs), _by_row(ours, rows.measured) / len(ours)
        interval = _interval(top, bottom)
        self._add_pair(f"{metric}_mean", unit, float(ours.mean()), float(theirs.mean()), interval, len(ours))
        for name, q in _QUANTILES.items():
            measured, simulated = (float(np.quantile(values, q)) for values in (ours, theirs))
            self._add_pair(f"{metric}_{name}", unit, measured, simulated, None, len(ours))
        counted = [np.unique(values, return_counts=True) for values in (ours, theirs)]
        distance = wasserstein_distance(counted[0][0], counted[1][0], counted[0][1], counted[1][1]) / ours.mean()
        note = "Wasserstein distance of the two distributions, relative to the measured mean"
        self._add(f"{metric}_distance", "%", _NAN, _NAN, float(distance), None, len(ours), note)

    def _add_queue(self, queue: str, measured: FloatArray, simulated: FloatArray, note: str) -> None:
        known = np.isfinite(measured) & np.isfinite(simulated)
        if not known.any():
            self.not_judged.append(
                f"time in the {queue.capitalize()} queue: no request with both ends known in both runs"
            )
            return
        measured, simulated = measured[known], simulated[known]
        if not measured.any() and not simulated.any():
            return  # a queue that neither engine used
        interval = _interval(simulated, measured)
        means = to_ms(float(measured.mean())), to_ms(float(simulated.mean()))
        self._add_pair(f"{queue}_time", "ms", *means, interval, len(measured), note)

    def _add_pair(
        self,
        metric: str,
        unit: str,
        measured: float,
        simulated: float,
        interval: Interval | None,
        n: int,
        note: str = "",
    ) -> None:
        self._add(metric, unit, measured, simulated, stats.relative_error(measured, simulated), interval, n, note)

    def _add(
        self, metric: str, unit: str, measured: float, simulated: float, error: float, interval: Interval | None, n: int,
        note: str,
    ) -> None:  # fmt: skip
        check = Check(self._name, "scheduler", metric, unit, measured, simulated, error, interval, n, note=note)
        self.checks.append(judge(check, self._gates))


def free_blocks(rows: Alignment, same: BoolArray, ours: Decisions, theirs: Decisions) -> tuple[IntArray, IntArray]:
    """Free blocks after each identical step, in both runs; -1 where unknown."""
    return ours.num_free_blocks[rows.measured[same]], theirs.num_free_blocks[rows.simulated[same]]


def _by_row(values: IntArray, steps: IntArray) -> FloatArray:
    """Values of steps by row of an alignment, 0 where the row has none."""
    return np.where(steps == NO_STEP, 0, values[steps]).astype(np.float64)


def _interval(top: FloatArray, bottom: FloatArray) -> Interval | None:
    """Of sum(top) / sum(bottom) - 1, over rows that depend on their neighbours."""
    return stats.interval(stats.ratio_of_sums(top, bottom))
