"""What many simulators and benchmarks publish instead of a run: a few aggregates of all requests.

    vllm bench serve          {"mean_ttft_ms": ..., "median_tpot_ms": ..., "p99_e2el_ms": ..., "output_throughput": ...}
    SGLang bench_serving      the same, with "..._e2e_latency_ms": one JSON object per benchmark, a line each
    HiSim, SGLang simulator   the same: metrics.json of the output folder, or bench_serving's own file
    Dynamo replay, AISimulate "mean_e2e_latency_ms", "output_throughput_tok_s", "completed_requests"; in AISimulate's
                              prediction.json perhaps within "summary"
    BLIS                      {"ttft_mean_ms": ..., "e2e_p99_ms": ..., "tokens_per_sec": ...}
    aiconfigurator            best_config_topn.csv, pareto.csv: ttft, tpot, request_latency (ms), tokens/s; one a line

Fields read from vllm/benchmarks/serve.py (0.32.0), sglang/bench_serving.py (0.5.6.post2, 0.5.23), sglang's
tools/sglang-simulator (`calc_metrics`), ai-dynamo-runtime 1.6.1 (its `run_mocker_trace_replay(...).summary`, run here),
aisimulate 0.13.0.dev (output.py, runner.py), sim/metrics_utils.go of inference-sim, aiconfigurator (`ColumnsAgg`,
`ColumnsDisagg`; estimates of a steady state, taken for means). A file may hold more; what has no name below is not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.text import Row, csv_rows, read_json, read_jsonl, read_lines

_TIMES: Final = {"ttft": "ttft", "tpot": "tpot", "e2el": "latency", "e2e_latency": "latency", "e2e": "latency"}
_STATISTICS: Final = {"mean": "mean", "median": "p50", "p50": "p50", "p90": "p90", "p99": "p99"}
# "mean_ttft_ms" or "ttft_mean_ms"
_TIME_FIELD: Final = re.compile(
    rf"(?:(?P<first>{'|'.join(_STATISTICS)})_)?(?P<time>{'|'.join(_TIMES)})(?:_(?P<last>{'|'.join(_STATISTICS)}))?_ms"
)
_THROUGHPUTS: Final = ("output_throughput", "output_throughput_tok_s", "tokens_per_sec")
# Of aiconfigurator's tables, in the names above.
_COLUMNS: Final = {
    "ttft": "mean_ttft_ms",
    "tpot": "mean_tpot_ms",
    "request_latency": "mean_e2e_latency_ms",
    "tokens/s": "output_throughput",
}
# Fields of the formats that are read as runs: benchmarks with their details, BLIS.
_REQUESTS: Final = frozenset({"ttfts", "requests"})
_COUNTS: Final = ("completed", "completed_requests")


@dataclass(frozen=True)
class Summary:
    """Aggregates of a run of which nothing else is known.

    Attributes:
        path: the file.
        num_requests: that were served; None if it does not say.
        metrics: by kvtwin's names: `ttft_mean`, `ttft_p50`, ... of ttft, tpot and latency in ms, and `throughput` in
            output tokens per second; what it does not say is absent.
    """

    path: Path
    num_requests: int | None
    metrics: Mapping[str, float]


def is_summary(path: Path) -> bool:
    """Whether a file's first object has aggregates that `read_summary` knows, and not the requests behind them."""
    try:
        fields = next(_objects(path)).values if path.is_file() else {}
    except InputError:
        return False
    return any(_metric(name) for name in fields) and not _REQUESTS & fields.keys()


def read_summary(path: Path) -> Summary:
    """Read the aggregates of one benchmark or simulation.

    Raises:
        InputError: no such aggregates, several results in one file, or a value that is no number.
    """
    row = read_result(path)
    if row.values.get("prediction_status") == "invalid":
        row.fail("prediction_status", "AISimulate calls this prediction invalid")
    metrics = {
        metric: row.seconds(name, "tokens per second" if metric == "throughput" else "milliseconds")
        for name in row.values
        if (metric := _metric(name)) and row.has(name)
    }
    if not metrics:
        raise InputError("no aggregates such as mean_ttft_ms or ttft_mean_ms", path=path)
    count = next((name for name in _COUNTS if row.has(name)), None)
    return Summary(path, None if count is None else _count(row, count), metrics)


def read_result(path: Path) -> Row:
    """The one result that a file holds.

    Raises:
        InputError: not JSON or CSV, or several results.
    """
    objects = list(_objects(path))
    if len(objects) > 1:
        problem = f"{len(objects)} results, one a line: which one is meant? Keep that line alone in a file"
        raise InputError(problem, path=path)
    return objects[0]


def _objects(path: Path) -> Iterator[Row]:
    """One per line, or the one that fills the file; at least one."""
    first = next((text.strip() for _, text in read_lines(path)), "")
    if {"ttft", "tpot"} <= set(first.split(",")):
        yield from _deployments(path)
    elif first == "{":
        yield _unwrapped(Row(path, 1, read_json(path)))
    else:
        yield from map(_unwrapped, read_jsonl(path))


def _deployments(path: Path) -> Iterator[Row]:
    """The lines of an aiconfigurator table, under the names that bench_serving has for them."""
    lines = csv_rows(path)
    _, header = next(lines)
    number = 0
    for number, cells in lines:
        if len(cells) != len(header):
            raise InputError(f"{len(cells)} fields, but the header has {len(header)}", path=path, row=number)
        row = Row(path, number, dict(zip(header, cells, strict=True)))
        yield Row(
            path, number, {name: _number(row, column) for column, name in _COLUMNS.items() if row.values.get(column)}
        )
    if not number:
        raise InputError("holds no rows", path=path)


def _number(row: Row, column: str) -> float:
    try:
        value = float(row.values[column])
    except ValueError:
        value = math.nan
    if not value >= 0:
        row.fail(column, f"{row.values[column][:40]!r} is not a number from 0")
    return value


def _unwrapped(row: Row) -> Row:
    """AISimulate puts its aggregates beside details where these are asked for."""
    inner = row.values.get("summary")
    return Row(row.path, row.number, inner) if isinstance(inner, dict) else row


def _count(row: Row, name: str) -> int:
    """A number of requests; AISimulate writes 8.0."""
    value = row.get(name)
    whole = isinstance(value, float) and value.is_integer()
    return Row(row.path, row.number, {name: int(value)} if whole else row.values).integer(name, 0, 1 << 40)


def _metric(field: str) -> str | None:
    """Our name of a field; None if it is not read."""
    if field in _THROUGHPUTS:
        return "throughput"
    found = _TIME_FIELD.fullmatch(field)
    if found is None or (found["first"] is None) == (found["last"] is None):
        return None
    return f"{_TIMES[found['time']]}_{_STATISTICS[found['first'] or found['last']]}"
