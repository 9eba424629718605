"""The end-to-end level: TTFT, TPOT, latency and throughput of a recorded run beside its simulation.

Both are Runs, so the same code compares two recordings, two versions, or another simulator's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.calibrate import noise, stats
from kvtwin.calibrate.stats import FloatArray, Interval, Load, Statistic
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run
from kvtwin.traces.time import NS_PER_MS, NS_PER_S
from kvtwin.validate.arrivals import sent_check, way_check
from kvtwin.validate.gates import EXACT, NO_GATES, STATISTICS, TIMES, Gates, judge
from kvtwin.validate.result import Check
from kvtwin.validate.throughput import lag_interval
from kvtwin.validate.units import unit_note

Clock = Literal["queued_ns", "arrival_ns"]
Rows = npt.NDArray[np.bool_]

NAN: Final = float("nan")
QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def request_metrics(run: Run, clock: Clock) -> dict[str, FloatArray]:
    """Each request's times in milliseconds, in the order of the `requests` table; NaN where unknown.

    Args:
        run: any Run.
        clock: whose view: "queued_ns" (from when the engine's loop has the request to when the engine has the token)
            or "arrival_ns" (from when the client sends it to when the client sees the token, or the engine has it
            where the client's view is not known).

    Returns:
        "ttft_ms": clock to first token; "tpot_ms": (finish - first token) / (output tokens - 1), NaN for a single
        output token; "latency_ms": clock to last token.

    Raises:
        InputError: the run does not know `clock` of any request, or a time runs backwards.
    """
    table = run.requests
    start = table.column(clock)
    if table.num_rows and start.null_count == table.num_rows:
        problem = "is unknown in this run; compare by the other clock (arrival_ns or queued_ns)"
        raise InputError(problem, path=run.path or run.info.source.get("path"), column=clock)
    gaps = table.column("output_tokens").to_numpy() - 1
    first, finish = _ends(run, clock)
    decode = _elapsed_ms(run, first, finish)
    tpot: FloatArray = np.full(len(gaps), np.nan)
    np.divide(decode, gaps, out=tpot, where=gaps > 0)
    return {
        "ttft_ms": _elapsed_ms(run, clock, first),
        "tpot_ms": tpot,
        "latency_ms": _elapsed_ms(run, clock, finish),
    }


def _ends(run: Run, clock: Clock) -> tuple[str, str]:
    """The columns of first and last token in a clock's view."""
    seen = run.requests.column("client_finish_ns")
    if clock == "arrival_ns" and seen.null_count < len(seen):
        return "client_first_token_ns", "client_finish_ns"
    return "first_token_ns", "finish_ns"


def throughput(run: Run, clock: Clock) -> float:
    """Output tokens per second from the first start to the last finish, of requests that know both; NaN without any.

    Raises:
        InputError: see `request_metrics`.
    """
    side = _Side.of(run, clock)
    return side.throughput(side.served())


def compare_e2e(
    measured: Run,
    simulated: Run,
    *,
    name: str,
    clock: Clock,
    repeats: Sequence[Run] = (),
    gates: Gates = NO_GATES,
) -> list[Check]:
    """Judge the simulation of one recorded run, request by request and as distributions.

    Args:
        measured, simulated: the two runs; the same requests, in any order.
        name: the recorded run's name.
        clock: see `request_metrics`.
        repeats: all recordings of this workload, `measured` among them; fewer than two give no noise floor.
        gates: see `gates.parse_gates`.

    Returns:
        Judged checks: mean, p50, p90, p99 and per-request MAPE of TTFT, TPOT and latency, throughput, and under the
        queue's clock what the way to it adds to the client's TTFT (`arrivals.way_check`). Where requests were sent at
        other times, how many were not (`arrivals.sent_check`). Where requests generate other
        numbers of tokens, `output_tokens` fails (its gate is 0 unless another is given), their latencies are left out,
        and the throughput is that of each run's own tokens. Requests
        that the recording knows no time of are left out. Where the simulation lacks a time that was measured, the
        error is NaN, which fails a gate: leaving the request out would flatter a twin that never finishes it.

    Raises:
        InputError: a request is in one run only, or has another prompt in the other run; see also `request_metrics`.
    """
    simulated = in_order_of(measured, simulated, "the simulated run")
    _refuse_other_prompts(measured, simulated)
    again = [in_order_of(measured, run, "a repeated recording") for run in repeats]
    sides = [_Side.of(run, clock) for run in (measured, simulated, *again)]
    pair = _Pair(sides[0], sides[1], sides[2:], _finished(measured) & (sides[0].tokens != sides[1].tokens), name)
    checks = [check for time in TIMES for check in _time_checks(pair, time)]
    checks.append(_throughput_check(pair))
    way = way_check(measured, simulated, name=name, repeats=again) if clock == "queued_ns" else None
    sent = sent_check(measured, simulated, "the simulated run", name=name)
    more = [check for check in (way, sent, output_check(measured, simulated, name=name)) if check is not None]
    return [judge(check, {"output_tokens": EXACT, **gates}) for check in (*checks, *more)]


def output_check(measured: Run, simulated: Run, *, name: str) -> Check | None:
    """How many requests generate as many tokens as recorded; None where all that finished do.

    Args:
        measured, simulated: the same requests in the same order.
        name: the recorded run's name.
    """
    recorded, others = (run.requests.column("output_tokens").to_numpy() for run in (measured, simulated))
    finished = _finished(measured)
    n, same = int(finished.sum()), int((recorded == others)[finished].sum())
    if n == same:
        return None
    note = (
        f"{n - same} of {n} requests generate other numbers of tokens ({recorded[finished].sum():,} recorded, "
        f"{others[finished].sum():,} simulated): replay the recorded lengths"
    )
    return Check(name, "e2e", "output_tokens", "requests", float(n), float(same), same / n - 1, None, n, note=note)


@dataclass(frozen=True)
class _Side:
    """One run's times, rows in the order of the measured run."""

    times: Mapping[str, FloatArray]  # by name in TIMES, ms
    start_ns: FloatArray
    finish_ns: FloatArray
    tokens: npt.NDArray[np.int64]

    @classmethod
    def of(cls, run: Run, clock: Clock) -> _Side:
        """A run by itself."""
        metrics = request_metrics(run, clock)
        # From the first start on: floats hold such spans exactly, epoch nanoseconds they do not.
        origin = pc.min(run.requests.column(clock))
        start, finish = (
            _floats(pc.subtract(run.requests.column(key), origin)) for key in (clock, _ends(run, clock)[1])
        )
        times = {time: metrics[f"{time}_ms"] for time in TIMES}
        return cls(times, start, finish, run.requests.column("output_tokens").to_numpy())

    def served(self) -> Rows:
        """Requests with a known start and finish."""
        return np.isfinite(self.start_ns) & np.isfinite(self.finish_ns)

    def throughput(self, rows: Rows) -> float:
        """Output tokens per second between the first start and the last finish; NaN without either."""
        if not rows.any():
            return NAN
        span_s = float(self.finish_ns[rows].max() - self.start_ns[rows].min()) / NS_PER_S
        return float(self.tokens[rows].sum()) / span_s if span_s > 0 else NAN


@dataclass(frozen=True)
class _Pair:
    """What all checks of one comparison share."""

    measured: _Side
    simulated: _Side
    repeats: Sequence[_Side]
    other_length: Rows  # finished requests that generate another number of tokens in the simulation
    name: str

    def check(self, metric: str, unit: str, found: _Finding, n: int, notes: Sequence[str]) -> Check:
        """The Check of one metric, not yet judged."""
        return Check(
            run=self.name,
            level="e2e",
            metric=metric,
            unit=unit,
            measured=found.measured,
            simulated=found.simulated,
            error=found.error,
            interval=found.interval,
            n=n,
            noise_floor=found.floor,
            note="; ".join([*([found.how] if found.how else []), *notes]),
        )


@dataclass(frozen=True, slots=True)
class _Finding:
    """The numbers of one metric; the defaults say that it could not be computed."""

    measured: float = NAN
    simulated: float = NAN
    error: float = NAN
    interval: Interval | None = None
    floor: float | None = None
    how: str = ""

    @classmethod
    def of(cls, error: Statistic, floor: float | None, values: tuple[float, float] = (NAN, NAN)) -> _Finding:
        """An error, of two values or by itself, with its interval and what that rests on."""
        how = stats.describe(error, "requests")
        return cls(*values, error.value, stats.interval(error), floor, how)


def _time_checks(pair: _Pair, time: str) -> list[Check]:
    """The checks of TTFT, TPOT or latency; none where no request can have one (TPOT of single tokens)."""
    measured, simulated = pair.measured.times[time], pair.simulated.times[time]
    possible = pair.measured.tokens > 1 if time == "tpot" else np.ones(len(measured), np.bool_)
    if not possible.any():
        return []
    known = np.isfinite(measured)
    notes = _gaps_in(known, possible, np.isfinite(simulated))
    if time == "latency" and pair.other_length.any():
        known &= ~pair.other_length
        notes.append(f"{pair.other_length.sum()} requests of another output length left out")
    n = int(known.sum())
    findings = {name: _Finding(_summary(measured[known], name) if n else NAN) for name in STATISTICS}
    findings["mape"] = _Finding()
    if n and np.isfinite(simulated[known]).all():
        findings = _time_findings(pair, time, known)
        warning = unit_note(measured[known], simulated[known])
        notes = [*([warning] if warning else []), *notes]
    paired = ["paired: each request with itself"]
    return [
        pair.check(f"{time}_{name}", "ms", found, n, notes)
        if name != "mape"
        else pair.check(f"{time}_{name}", "%", found, n, [*paired, *notes])
        for name, found in findings.items()
    ]


def _time_findings(pair: _Pair, time: str, known: Rows) -> dict[str, _Finding]:
    """mean, p50, p90, p99 and per-request MAPE of the `known` requests."""
    measured, simulated = pair.measured.times[time][known], pair.simulated.times[time][known]
    errors, positive = stats.relative_errors(measured, simulated), measured > 0
    sizes = np.abs(np.where(positive, errors, 0.0))
    statistics = {
        "mean": stats.ratio_of_sums(simulated, measured),
        **{name: stats.quantile_ratio(measured, simulated, q) for name, q in QUANTILES.items()},
        "mape": stats.mean(sizes, positive),
    }
    if time == "latency":  # of which most is the request's own length
        statistics["mean"] = stats.or_shared(statistics["mean"], measured, simulated)
    load = _load(pair, time, known)
    statistics = {name: replace(statistic, load=load) for name, statistic in statistics.items()}
    repeats = [side.times[time] for side in pair.repeats]
    complete = np.isfinite(repeats).all(axis=0)
    repeats = [values[complete] for values in repeats]
    findings = {}
    for name in STATISTICS:
        values = (_summary(measured, name), _summary(simulated, name))
        floor = noise.rms_floor([_summary(values, name) for values in repeats if values.size])
        findings[name] = _Finding.of(statistics[name], floor, values)
    findings["mape"] = _Finding.of(statistics["mape"], noise.paired_floor(repeats))
    return findings


def _load(pair: _Pair, time: str, known: Rows) -> Load:
    """What tells how busy it was when each of the `known` requests came: the time itself.

    A latency is mostly the request's own length; of it, TTFT and TPOT the one with the longest memory tells.
    """
    loads = []
    for name in TIMES if time == "latency" else (time,):
        sides = [side.times[name][known] for side in (pair.measured, pair.simulated)]
        if all(np.isfinite(values).any() for values in sides):
            loads.append(Load(*(np.where(np.isfinite(values), values, np.nanmean(values)) for values in sides)))
    return min(loads, key=lambda load: load.num_seen)


def _throughput_check(pair: _Pair) -> Check:
    """Output tokens per second; where both runs generate the same tokens, the error is that of the span."""
    known, simulated = pair.measured.served(), pair.simulated.served()
    n, notes = int(known.sum()), _gaps_in(known, np.ones(len(known), np.bool_), simulated)
    found = _Finding()
    if n and simulated[known].all():
        rows = np.flatnonzero(known)
        rows = rows[np.argsort(pair.measured.start_ns[rows], kind="stable")]
        spans = (pair.measured.start_ns[rows], pair.measured.finish_ns[rows], pair.simulated.finish_ns[rows])
        interval = None if pair.other_length.any() else lag_interval(*spans)
        values = (pair.measured.throughput(known), pair.simulated.throughput(known))
        floor = noise.rms_floor([side.throughput(side.served()) for side in pair.repeats])
        found = _Finding(*values, stats.relative_error(*values), interval, floor)
    return pair.check("throughput", "tokens/s", found, n, notes)


def _summary(values: FloatArray, statistic: str) -> float:
    return float(values.mean() if statistic == "mean" else np.quantile(values, QUANTILES[statistic]))


def _gaps_in(known: Rows, possible: Rows, simulated: Rows) -> list[str]:
    """What a reader must know about requests that lack a time in either run."""
    unknown, lost = int((possible & ~known).sum()), int((known & ~simulated).sum())
    notes = [f"{unknown} requests without a recorded time left out"] if unknown else []
    if lost:
        notes.append(f"error: {lost} of {int(known.sum())} recorded times are missing in the simulation")
    return notes


def in_order_of(measured: Run, other: Run, what: str = "the other run", *, may_hold_more: bool = False) -> Run:
    """The requests of another run in the order of the measured one's.

    Raises:
        InputError: a request is in one of the two only (`may_hold_more`: in the measured one only).
    """
    wanted, held = (run.requests.column("request_id").combine_chunks() for run in (measured, other))
    rows = pc.index_in(wanted, value_set=held)
    should = "both must hold the same requests"
    if rows.null_count:
        row = pc.index(rows.is_null(), True).as_py()
        problem = f"{wanted[row].as_py()!r} is not among the requests of {what} ({_place(other)}); {should}"
        raise InputError(problem, path=measured.path, row=row, column="request_id")
    if len(held) > len(wanted) and not may_hold_more:
        row = pc.index(pc.is_in(held, value_set=wanted), False).as_py()
        problem = (
            f"{held[row].as_py()!r} of {what} is not among those of the measured run ({_place(measured)}); {should}"
        )
        raise InputError(problem, path=other.path, row=row, column="request_id")
    return Run(other.info, {"requests": other.requests.take(rows)}, name=_place(other))


def _place(run: Run) -> str:
    return "in memory" if run.path is None else str(run.path)


def _finished(run: Run) -> Rows:
    """Requests that the engine or the client saw end."""
    ends = [run.requests.column(name).is_valid().to_numpy() for name in ("finish_ns", "client_finish_ns")]
    found: Rows = np.logical_or(*ends)
    return found


def _refuse_other_prompts(measured: Run, simulated: Run) -> None:
    """Refuse runs in which a request that finished has another prompt: their times measure different things."""
    one, two = (run.requests.column("input_tokens").to_numpy() for run in (measured, simulated))
    differs = np.flatnonzero(_finished(measured) & (one != two))
    if differs.size:
        row = int(differs[0])
        name = measured.requests.column("request_id")[row].as_py()
        problem = f"{name!r} has {one[row]} in the measured run and {two[row]} in the simulated run; replay its prompts"
        raise InputError(problem, path=measured.path, row=row, column="input_tokens")


def _floats(column: pa.ChunkedArray) -> FloatArray:
    """Nanoseconds as floats (exact up to 2^53 ns, 104 days), NaN for null."""
    values: FloatArray = column.cast(pa.float64(), safe=False).to_numpy()
    return values


def _elapsed_ms(run: Run, start: str, end: str) -> FloatArray:
    """Milliseconds between two columns, NaN where either is null.

    Raises:
        InputError: the end is before the start.
    """
    table = run.requests
    elapsed = pc.subtract(table.column(end), table.column(start))
    row = pc.index(pc.less(elapsed, 0), True).as_py()
    if row >= 0:
        num_early = pc.sum(pc.less(elapsed, 0)).as_py()
        problem = (
            f"{table.column(end)[row].as_py()} is before {start} ({table.column(start)[row].as_py()}), as in {num_early} of "
            f"{table.num_rows} requests: is one of the two of another clock, or in another unit?"
        )
        raise InputError(problem, path=run.path, row=row, column=end)
    return _floats(elapsed) / NS_PER_MS
