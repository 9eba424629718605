"""What 95 % intervals hold, by traffic, length and metric: `python tests/fidelity/coverage.py --cases 100 --lengths 100`.

The truth is the error over an endless recording of the same traffic on both systems: what a user wants to know who
asks whether the twin can be trusted on the traffic to come. (Of the very same requests served again and again it would
be less in doubt; the intervals are too wide for that question.)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from kvtwin.traces.run import Run
from kvtwin.validate.e2e import compare_e2e
from kvtwin.validate.result import Check

sys.path.insert(0, str(Path(__file__).parent))
from known_truth import LONG, MANY, SEEN, UNSEEN  # type: ignore[import-not-found]  # beside this file

MAKERS = {**SEEN, **UNSEEN}
LENGTHS = (100, 300, 1000)
CASES = 200


@dataclass(frozen=True)
class Covered:
    """One metric in all recordings of one kind and length.

    Attributes:
        truth: over an endless recording.
        given: share of the recordings that have an interval.
        share: of these intervals, those that hold the truth.
        below, above: those that the truth lies below or above.
        of_length: those that hold the mean error of all recordings of this length, which is what an experiment of that
            length shows on average.
        width: the median one.
        ideal: what would hold 95 % of the errors themselves: 3.92 of their standard deviations.
    """

    truth: float
    given: float
    share: float
    below: float
    above: float
    of_length: float
    width: float
    ideal: float


def paired(one: Run, two: Run) -> list[Check]:
    return compare_e2e(one, two, name="x", clock="queued_ns")


@cache
def truth_of(kind: str) -> Mapping[str, float]:
    """By metric, from recordings so long that what is left of their doubt is small beside the intervals'."""
    n, recordings = LONG.get(kind, (MANY, 1))
    found = [paired(*MAKERS[kind](np.random.default_rng([1, row]), n)) for row in range(recordings)]
    errors = {
        metrics[0].metric: float(np.mean([check.error for check in metrics])) for metrics in zip(*found, strict=True)
    }
    return {**errors, "throughput": 0.0}  # whoever keeps up generates what arrives


def coverage(
    make: Callable[[int], Sequence[Check]], truth: Mapping[str, float], cases: int = CASES
) -> dict[str, Covered]:
    """By metric of `truth`, of the checks that `make` gives for each case."""
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in truth}
    for case in range(cases):
        for check in make(case):
            if check.metric in truth:
                rows[check.metric].append((check.error, *(check.interval or (np.nan, np.nan))))
    found = {}
    for metric, values in rows.items():
        error, low, high = np.array(values or [(np.nan,) * 3]).T
        given = np.isfinite(low)
        if not given.any():
            continue
        x, low, high = truth[metric], low[given], high[given]
        around = (low <= error.mean()) & (error.mean() <= high)
        found[metric] = Covered(
            x,
            float(given.sum() / cases),
            float(np.mean((low <= x) & (x <= high))),
            float(np.mean(x < low)),
            float(np.mean(x > high)),
            float(around.mean()),
            float(np.median(high - low)),
            float(3.92 * error.std()),
        )
    return found


def coverage_of(kind: str, n: int, cases: int = CASES) -> dict[str, Covered]:
    """Of recordings of n requests and their twins."""

    def make(case: int) -> list[Check]:
        return paired(*MAKERS[kind](np.random.default_rng([2, n, case]), n))

    return coverage(make, truth_of(kind), cases)


def of_times(found: Mapping[str, Covered]) -> dict[str, Covered]:
    """Those of TTFT, TPOT and latency."""
    return {name: one for name, one in found.items() if name != "throughput"}


def told(what: str, found: Mapping[str, Covered]) -> None:
    print(f"\n{what}")
    for name, one in found.items():
        print(
            f"  {name:18s} truth {one.truth:+7.2%}  given {one.given:4.0%}  covered {one.share:6.1%}"
            f"  below {one.below:5.1%}  above {one.above:5.1%}  of that length {one.of_length:6.1%}"
            f"  width {one.width:.4f}, {one.width / one.ideal if one.ideal else 1:.2f} of ideal",
            flush=True,
        )


def cell(found: Mapping[str, Covered]) -> str:
    """A cell of the table in validate/README.md: lowest and highest metric, and the mean."""
    shares = [100 * one.share for one in found.values()]
    return f"{min(shares):.0f} to {max(shares):.0f}, {np.mean(shares):.1f}"


def main() -> None:
    """Every kind of traffic, metric by metric, and the table for validate/README.md."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--kinds", nargs="+", default=list(MAKERS), metavar="KIND")
    args = parser.parse_args()
    table = []
    for kind in args.kinds:
        cells, given, wide = [], 1.0, []
        for n in args.lengths:
            found = coverage_of(kind, n, args.cases)
            told(f"{kind}, {n} requests, {args.cases} recordings", found)
            times = of_times(found)
            cells.append(cell(times))
            given = min(given, *(one.given for one in times.values()))
            wide.append(np.median([one.width / one.ideal for one in times.values()]))
        table.append(f"| {kind} | {' | '.join(cells)} | {given:.0%} | {min(wide):.1f} to {max(wide):.1f} |")
    print("\n" + "\n".join(table))


if __name__ == "__main__":
    main()
