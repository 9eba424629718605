"""A waterfall: what each stage from the twin to the measurement changes of an error, and who is blamed for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvtwin.calibrate.stats import FloatArray, Interval
from kvtwin.traces.run import Run
from kvtwin.traces.time import NS_PER_MS, NS_PER_S
from kvtwin.validate.attribution.bars import bar_interval, summary
from kvtwin.validate.attribution.evidence import DECIDED, holds_zero, is_doubtful
from kvtwin.validate.e2e import Clock, request_metrics
from kvtwin.validate.gates import TIMES
from kvtwin.validate.result import Attribution, Check, Part
from kvtwin.validate.throughput import lag_interval

UNITS: Final = "units"  # blamed where all times are off by the factor between two units, and those of the steps are not
_NEGLIGIBLE: Final = 0.001
_LEFT_OVER: Final = 0.01  # the host has no measure of its own: a smaller bar may be what the others leave over
_TIMED: Final = ("arrival", "step times")  # layers whose own evidence is a measurement of theirs alone
_STATISTICS: Final = ("mean", "p50", "p90")


@dataclass(frozen=True)
class Side:
    """One stage's times by name in TIMES, in ms, and when each request starts and finishes, in ns; NaN where unknown."""

    times: Mapping[str, FloatArray]
    start_ns: FloatArray
    finish_ns: FloatArray
    tokens: FloatArray

    @classmethod
    def of(cls, run: Run, clock: Clock) -> Side:
        """A run by itself."""
        metrics = request_metrics(run, clock)
        times = {time: metrics[f"{time}_ms"] for time in TIMES}
        start_ns, tokens = (_floats(run.requests, key) for key in (clock, "output_tokens"))
        return cls(times, start_ns, start_ns + NS_PER_MS * times["latency"], tokens)

    @classmethod
    def at(cls, stage: pa.Table, measured: Run, clock: Clock, output_ns: int) -> Side:
        """Times of the requests at one stage, counted from where the measurement counts.

        Args:
            stage: table of schema REQUESTS, rows as in the recording.
            measured: the recording.
            clock: see `e2e.request_metrics`.
            output_ns: from the engine's having a token to the client's seeing it.
        """
        start, tokens = (_floats(measured.requests, key) for key in (clock, "output_tokens"))
        first, finish = (_floats(stage, key) for key in ("first_token_ns", "finish_ns"))
        tpot = np.full(len(tokens), np.nan)
        np.divide((finish - first) / NS_PER_MS, tokens - 1, out=tpot, where=tokens > 1)
        output_ns = output_ns if clock == "arrival_ns" else 0
        times = {
            "ttft": (first + output_ns - start) / NS_PER_MS,
            "tpot": tpot,
            "latency": (finish + output_ns - start) / NS_PER_MS,
        }
        return cls(times, start, finish + output_ns, tokens)

    def throughput(self, rows: npt.NDArray[np.bool_]) -> float:
        """Output tokens per second from the first start to the last finish."""
        span = self.finish_ns[rows].max() - self.start_ns[rows].min()
        return float(self.tokens[rows].sum() * NS_PER_S / span) if span > 0 else float("nan")


@dataclass(frozen=True)
class Chain:
    """The stages from the twin to the measurement, and who is suspected.

    Attributes:
        sides: of the twin, of each stage, and the measurement.
        layers: the bars between them.
        judged: requests that count.
        suspected: layers with evidence against them.
        note: what a reader must know.
    """

    sides: Sequence[Side]
    layers: Sequence[str]
    judged: npt.NDArray[np.bool_]
    suspected: set[str]
    note: str

    def attributions(self, name: str, checks: Sequence[Check]) -> list[Attribution]:
        """A waterfall per time and statistic, and that of the throughput.

        Args:
            name: the recorded run's.
            checks: of that run, for what is known of each error's doubt.
        """
        result = []
        for time in TIMES:
            chain = [side.times[time] for side in self.sides]
            known = self.judged & np.isfinite(chain).all(axis=0)
            columns = [column[known] for column in chain]
            for statistic in _STATISTICS if known.any() else ():
                numbers = [summary(column, statistic) for column in columns]
                bars = pairwise(columns)
                sure = [bar_interval(before, after, columns[-1], statistic) for before, after in bars]
                result.append(self._waterfall(name, checks, f"{time}_{statistic}", "ms", numbers, sure))
        known = self.judged & np.isfinite([side.finish_ns for side in self.sides]).all(axis=0)
        if known.any():
            numbers = [side.throughput(known) for side in self.sides]
            if np.isfinite(numbers).all():
                result.append(
                    self._waterfall(name, checks, "throughput", "tokens/s", numbers, self._lags(known, numbers))
                )
        return result

    def _lags(self, known: npt.NDArray[np.bool_], numbers: Sequence[float]) -> list[Interval | None]:
        """The intervals of the throughput's bars: how far one stage lags behind the next."""
        result: list[Interval | None] = []
        for (before, after), number in zip(pairwise(self.sides), numbers[1:], strict=True):
            order = np.argsort(after.start_ns[known], kind="stable")
            columns = [values[known][order] for values in (after.start_ns, after.finish_ns, before.finish_ns)]
            found = lag_interval(*columns) if np.array_equal(before.tokens, after.tokens) else None
            result.append(None if found is None else (found[0] * number / numbers[-1], found[1] * number / numbers[-1]))
        return result

    def _waterfall(
        self,
        name: str,
        checks: Sequence[Check],
        metric: str,
        unit: str,
        numbers: Sequence[float],
        sure: Sequence[Interval | None],
    ) -> Attribution:
        """Numbers: of the twin, of each stage, and the measurement."""
        measured, simulated = numbers[-1], numbers[0]
        parts = tuple(
            Part(layer, (before - after) / measured, interval)
            for layer, before, after, interval in zip(self.layers, numbers[:-1], numbers[1:], sure, strict=True)
        )
        check = next((check for check in checks if check.metric == metric), None)
        error = simulated / measured - 1
        doubtful = abs(error) < _NEGLIGIBLE or (check is not None and is_doubtful(check))
        blamed = _blamed(parts, error, self.suspected, doubtful=doubtful)
        return Attribution(name, metric, unit, measured, simulated, parts, blamed, self.note)


def _blamed(parts: Sequence[Part], error: float, suspected: set[str], *, doubtful: bool) -> str | None:
    """Of the layers with evidence against them the one that moves the error most.

    A bar whose interval holds zero is nobody's. Other decisions or hits than recorded are faults whatever they do end
    to end. The times of a layer are blamed for an error that is there, and only if they make at least half of it. Wrong
    units are no layer's: they are in all bars.
    """
    if UNITS in suspected:
        return UNITS
    accountable = [
        part
        for part in parts
        if part.layer in suspected
        and (part.layer != "host" or abs(part.change) >= _LEFT_OVER)
        and not (part.interval is not None and holds_zero(part.interval))
        and (part.layer in DECIDED or (not doubtful and 2 * part.change * np.sign(error) >= abs(error)))
    ]
    return max(accountable, key=lambda part: abs(part.change)).layer if accountable else None


def without_trifles(found: Sequence[Attribution]) -> list[Attribution]:
    """Nobody is blamed for a bar that cannot be seen: the layer's own measure names it."""
    return [replace(one, blamed=None) if _is_trifle(one) else one for one in found]


def _is_trifle(found: Attribution) -> bool:
    return any(part.layer == found.blamed and abs(part.change) < _NEGLIGIBLE for part in found.parts)


def with_hidden(found: Sequence[Attribution], suspected: set[str]) -> list[Attribution]:
    """Where nobody is blamed end to end, says who differs nonetheless: errors cancel, or the clock leaves a layer out."""
    hidden = [layer for layer in _TIMED if layer in suspected]
    end_to_end = [one for one in found if len(one.parts) > 1]
    if not hidden or any(one.blamed for one in end_to_end):
        return list(found)
    note = f"not as recorded, though no end-to-end error seen here is theirs: {', '.join(hidden)}"
    return [replace(one, note="; ".join(filter(None, (one.note, note)))) for one in found]


def _floats(table: pa.Table, name: str) -> FloatArray:
    values: FloatArray = table.column(name).cast(pa.float64(), safe=False).to_numpy()
    return values
