"""Results of `vllm bench serve --save-result --save-detailed`: one JSON object, times in seconds.

    {"model_id": "llama", "input_lens": [10, ...], "output_lens": [3, ...], "ttfts": [0.25, ...],
     "itls": [[0.125, 0.125], ...], "start_times": [100.5, ...], "errors": ["", ...], ...}

Read from vllm-project/vllm, vllm/benchmarks/serve.py (`benchmark`, `calculate_metrics`): start_times are the client's
monotonic clock, a token comes at start_time + ttft + the sum of the itls before it (it is the client who sees it, so
the engine's columns stay null: compare by `--clock arrival`). A request that failed has 0 output tokens: left out, and
counted in `failed_requests` of the run's source. Results without start_times (older vLLM; SGLang's bench_serving,
python/sglang/bench_serving.py) say nothing of arrivals and are refused. Origin: the first start.
Written from the code: no sample of a real file was at hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.text import MAX_TOKENS, Row, provenance, read_json
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.traces.time import from_seconds

_LISTS: Final = ("input_lens", "output_lens", "ttfts", "itls", "start_times")


def read(path: Path) -> Run:
    """Read a detailed benchmark result as a recorded Run; request ids are row numbers.

    Raises:
        InputError: with file, row (of the lists, from 1) and column; also where every request failed.
    """
    result = read_json(path)
    lists = [_list(result, column, path) for column in _LISTS]
    if len({len(values) for values in lists}) != 1:
        problem = f"{', '.join(_LISTS)} differ in length: {', '.join(str(len(values)) for values in lists)}"
        raise InputError(problem, path=path)
    rows = [
        Row(path, at, dict(zip(_LISTS, cells, strict=True))) for at, cells in enumerate(zip(*lists, strict=True), 1)
    ]
    served = [row for row in rows if row.integer("output_lens", 0, MAX_TOKENS)]
    if not served:
        raise InputError("holds no request that succeeded", path=path, column="output_lens")
    origin = min(row.seconds("start_times") for row in served)
    requests = sorted((_read_row(row, origin) for row in served), key=lambda request: request["arrival_ns"])
    columns = {name: [request[name] for request in requests] for name in requests[0]}
    model = result.get("model_id")
    source = provenance(path, "vllm_bench", [path], failed_requests=len(rows) - len(served))
    info = RunInfo("recorded", model=model if isinstance(model, str) else None, source=source)
    return Run(info, {"requests": from_columns("requests", columns, path)}, name=str(path))


def _list(result: dict[str, Any], column: str, path: Path) -> list[Any]:
    values = result.get(column)
    if not isinstance(values, list) or not values:
        remedy = "; `vllm bench serve --save-detailed` of a recent vLLM writes it" if column not in result else ""
        raise InputError(f"a list with an entry per request expected{remedy}", path=path, column=column)
    return values


def _read_row(row: Row, origin: float) -> dict[str, Any]:
    gaps = row.get("itls")
    if not isinstance(gaps, list):
        row.fail("itls", "a list of seconds expected")
    arrival = from_seconds(row.seconds("start_times") - origin)
    first = arrival + from_seconds(row.seconds("ttfts"))
    waits = sum(Row(row.path, row.number, {"itls": gap}).seconds("itls") for gap in gaps)
    if not waits < 1e9:
        row.fail("itls", "s add up to more than kvtwin can hold")
    return {
        "request_id": str(row.number - 1),
        "arrival_ns": arrival,
        "input_tokens": row.tokens("input_lens"),
        "output_tokens": row.tokens("output_lens"),
        "client_first_token_ns": first,
        "client_finish_ns": first + from_seconds(waits),
    }
