"""Results of `vllm bench serve --save-result --save-detailed` and SGLang's `bench_serving --output-details`, in seconds.

    {"model_id": "llama", "input_lens": [10, ...], "output_lens": [3, ...], "ttfts": [0.25, ...],
     "itls": [[0.125, 0.125], ...], "start_times": [100.5, ...], "errors": ["", ...], ...}

Read from vllm-project/vllm, vllm/benchmarks/serve.py (`benchmark`, `calculate_metrics`): start_times are the client's
monotonic clock, a token comes at start_time + ttft + the sum of the itls before it (it is the client who sees it, so
the engine's columns stay null: compare by `--clock arrival`). A request that failed has 0 output tokens: left out, and
counted in `failed_requests` of the run's source. Origin: the first start.
Results without start_times (older vLLM; SGLang, sglang/benchmark/serving.py of 0.5.23, `result_details`) say nothing of
arrivals: they are a Run only beside the recording whose requests they sent, in their order.
Written from the code: no sample of a real file was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.summary import read_result
from kvtwin.traces.readers.text import MAX_TOKENS, Row, provenance
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.traces.time import from_seconds

_LISTS: Final = ("input_lens", "output_lens", "ttfts", "itls", "start_times")

_REMEDIES: Final = {
    "": "; `vllm bench serve --save-detailed` of a recent vLLM writes it",
    "start_times": "; without it the file can only be compared: kvtwin validate e2e RECORDING FILE --clock arrival",
}


def read(path: Path, recording: Run | None = None) -> Run:
    """Read a detailed benchmark result as a recorded Run; request ids are row numbers.

    Args:
        path: the file.
        recording: for a file without start_times: its k-th request has the name and the arrival of the k-th here.

    Raises:
        InputError: with file, row (of the lists, from 1) and column; also where every request failed, or where
            `recording` has more or fewer requests.
    """
    result = read_result(path).values
    replayed = None if "start_times" in result else recording
    names = _LISTS if replayed is None else _LISTS[:-1]
    lists = [_list(result, column, path) for column in names]
    if len({len(values) for values in lists}) != 1:
        problem = f"{', '.join(names)} differ in length: {', '.join(str(len(values)) for values in lists)}"
        raise InputError(problem, path=path)
    rows = [Row(path, at, dict(zip(names, cells, strict=True))) for at, cells in enumerate(zip(*lists, strict=True), 1)]
    served = [row for row in rows if row.integer("output_lens", 0, MAX_TOKENS)]
    if not served:
        raise InputError("holds no request that succeeded", path=path, column="output_lens")
    sent = _started(served) if replayed is None else _as_recorded(rows, replayed)
    requests = sorted((_read_row(row, *sent[row.number]) for row in served), key=lambda request: request["arrival_ns"])
    columns = {name: [request[name] for request in requests] for name in requests[0]}
    model = result.get("model_id")
    source = provenance(path, "vllm_bench", [path], failed_requests=len(rows) - len(served))
    info = RunInfo("recorded", model=model if isinstance(model, str) else None, source=source)
    return Run(info, {"requests": from_columns("requests", columns, path)}, name=str(path))


def _list(result: Mapping[str, Any], column: str, path: Path) -> list[Any]:
    values = result.get(column)
    if not isinstance(values, list) or not values:
        remedy = _REMEDIES.get(column, _REMEDIES[""]) if column not in result else ""
        raise InputError(f"a list with an entry per request expected{remedy}", path=path, column=column)
    return values


_Sent = dict[int, tuple[str, int]]  # by row: request id and arrival


def _started(rows: list[Row]) -> _Sent:
    origin = min(row.seconds("start_times") for row in rows)
    return {row.number: (str(row.number - 1), from_seconds(row.seconds("start_times") - origin)) for row in rows}


def _as_recorded(rows: list[Row], recording: Run) -> _Sent:
    columns = [recording.requests.column(name).to_pylist() for name in ("request_id", "arrival_ns")]
    if len(rows) != len(columns[0]):
        problem = f"{len(rows)} requests here, {len(columns[0])} in the recording; without start_times they are matched"
        raise InputError(f"{problem} by number", path=rows[0].path, column="input_lens")
    return {row.number: (name, arrival) for row, name, arrival in zip(rows, *columns, strict=True)}


def _read_row(row: Row, name: str, arrival: int) -> dict[str, Any]:
    first = arrival + from_seconds(row.seconds("ttfts"))
    waits = sum(row.seconds_list("itls"))
    return {
        "request_id": name,
        "arrival_ns": arrival,
        "input_tokens": row.tokens("input_lens"),
        "output_tokens": row.tokens("output_lens"),
        "client_first_token_ns": first,
        "client_finish_ns": first + from_seconds(waits),
    }
