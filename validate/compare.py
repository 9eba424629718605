"""Runs side by side, the first one the baseline: what a setting, a version or a cache level brings.

Nothing is judged here. The runs may be of any kind and of different workloads; where they did not serve the same
requests, a note says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from kvtwin.calibrate.stats import FloatArray, relative_error
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run
from kvtwin.traces.time import NS_PER_MS
from kvtwin.validate.e2e import QUANTILES, Clock, request_metrics, throughput
from kvtwin.validate.gates import QUEUES, TIMES

Group = Literal["latency", "throughput", "cache", "queues"]

NAN: Final = float("nan")


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of every run.

    Attributes:
        name: such as "ttft_p90".
        group: what it belongs to.
        unit: of the values: "ms", "tokens/s", "tokens", "share" ("" for plain counts).
        values: one per run; NaN where the run does not know it.
        changes: value / baseline - 1, one per run; NaN where either is unknown or the baseline is 0.
    """

    name: str
    group: Group
    unit: str
    values: tuple[float, ...]
    changes: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SideBySide:
    """What a comparison found.

    Attributes:
        names: of the runs; the first is the baseline.
        clock: what TTFT and latency count from.
        facts: of each run: what is known of kind, engine, hardware, model, and its number of requests.
        settings: engine settings that are not the same in all runs, as text, one per run ("-" where a run has none).
        metrics: in reading order.
        notes: what a reader must know.
    """

    names: tuple[str, ...]
    clock: Clock
    facts: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, tuple[str, ...]]
    metrics: tuple[Metric, ...]
    notes: tuple[str, ...]

    def metric(self, name: str) -> Metric:
        """The metric called `name`."""
        return next(metric for metric in self.metrics if metric.name == name)


def compare_runs(runs: Sequence[Run], names: Sequence[str], clock: Clock) -> SideBySide:
    """Latencies, throughput, cache hits by level and time in each queue of several runs.

    Args:
        runs: at least one; the first is the baseline.
        names: one per run, all different.
        clock: see `e2e.request_metrics`.

    Raises:
        InputError: names that do not fit the runs, or a run in which no request has a first token or a finish.
    """
    if len(names) != len(runs) or len(set(names)) != len(names):
        raise InputError(f"{len(runs)} runs and the names {', '.join(names)}: a name of its own for each expected")
    columns = [_values(run, clock) for run in runs]
    metrics = []
    for (name, group, unit), first in columns[0].items():
        values = tuple(column[name, group, unit] for column in columns)
        metrics.append(Metric(name, group, unit, values, tuple(relative_error(first, value) for value in values)))
    return SideBySide(
        tuple(names), clock, tuple(_facts(run) for run in runs), _settings(runs), tuple(metrics), _notes(runs, names)
    )


_Values = dict[tuple[str, Group, str], float]


def _values(run: Run, clock: Clock) -> _Values:
    """All metrics of one run by name, group and unit, in reading order."""
    times = request_metrics(run, clock)
    if not any(np.isfinite(values).any() for values in times.values()):
        raise InputError("no request has a first token or a finish: nothing to compare", path=run.path)
    found: _Values = {}
    for time in TIMES:
        known = times[f"{time}_ms"]
        known = known[np.isfinite(known)]
        found[f"{time}_mean", "latency", "ms"] = _mean(known)
        for name, share in QUANTILES.items():
            found[f"{time}_{name}", "latency", "ms"] = float(np.quantile(known, share)) if known.size else NAN
    found["throughput", "throughput", "tokens/s"] = throughput(run, clock)
    found["num_preemptions", "throughput", ""] = _total(run, "num_preemptions")
    for name, tokens in _tokens_by_level(run).items():
        found[name, "cache", "tokens"] = tokens
    inputs = _total(run, "input_tokens")
    found["hit_rate", "cache", "share"] = _total(run, "cached_tokens") / inputs
    for queue in QUEUES:
        found[f"{queue}_mean", "queues", "ms"] = _mean(_known(run, f"{queue}_ns")) / NS_PER_MS
    return found


def _tokens_by_level(run: Run) -> dict[str, float]:
    """Prompt tokens that the first admission found in the caches, in each level, and nowhere: these were computed.

    Of a run that does not say from which level they came, all that were found count as of unknown level.
    """
    cached, host, storage = (
        _total(run, name) for name in ("cached_tokens", "cached_host_tokens", "cached_storage_tokens")
    )
    device = cached - host - storage
    return {
        "cached_tokens": cached,
        "cached_unknown_tokens": cached if math.isnan(device) else 0.0,
        "cached_device_tokens": device,
        "cached_host_tokens": host,
        "cached_storage_tokens": storage,
        "computed_tokens": _total(run, "input_tokens") - cached,
    }


def _known(run: Run, column: str) -> FloatArray:
    known: FloatArray = run.requests.column(column).drop_null().to_numpy().astype(np.float64)
    return known


def _mean(values: FloatArray) -> float:
    return float(values.mean()) if values.size else NAN


def _total(run: Run, column: str) -> float:
    """Sum over the requests that know it; NaN where none does."""
    values = _known(run, column)
    return float(values.sum()) if values.size else NAN


def _facts(run: Run) -> dict[str, Any]:
    facts = {key: getattr(run.info, key) for key in ("kind", "engine", "hardware", "model")}
    known = {key: value for key, value in facts.items() if value is not None}
    return {**known, "num_requests": run.requests.num_rows}


def _settings(runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    """Engine settings that differ, in the order of the first run that has them."""
    configs = [_flat(run.info.engine_config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: tuple(config.get(key, "-") for config in configs) for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    """Settings as text; those of a table are called `table.setting`."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": text for name, text in _flat(value).items()}
        else:
            found[key] = value if isinstance(value, str) and value else json.dumps(value)
    return found


def _notes(runs: Sequence[Run], names: Sequence[str]) -> tuple[str, ...]:
    work = [run.requests.select(["request_id", "arrival_ns", "input_tokens", "output_tokens"]) for run in runs]
    others = [name for name, table in zip(names, work, strict=True) if not table.equals(work[0])]
    notes = [f"Not the requests of {names[0]}, so the workload differs too: {', '.join(others)}."] if others else []
    for name, run in zip(names, runs, strict=True):
        lost = run.requests.column("finish_ns").null_count
        if lost:
            notes.append(f"{lost} of {run.requests.num_rows} requests of {name} have no finish and are left out of it.")
    return tuple(notes)
