"""Decision logs of the real SGLang scheduler (`sched_*`, `hi_*` of the oracle): one JSON-lines file.

    {"type": "meta", "sglang": "0.5.9", "case": {"workload": {...}, "config": {...}}, "fields": [...]}
    [step, t_start, t_end, mode, t_scheduled, rows, context, queue, waiting, running, available, evictable, ...]
    ["R", i, src, arrival, input, output, first_sched, first_token, finish, cached_tokens, retractions]
    {"type": "summary", ...}

Times are ns of one virtual clock. `rows` of a prefill (mode E or M) are [request, cached, new] each; of a decode (D) the
requests, or 0 for those of the decode before; a decode's cached tokens follow from what was computed before. A step's
finishes are those of the requests that end with it. Free blocks are pages available or evictable.

The prompts are not in the log: `sglang_workloads` makes them anew from `case`. Where they cannot be (a Mooncake trace that
is not below $ORACLE_TRACES), `block_hashes` is null. Where prompts quote answers, `output_block_hashes` says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.sglang_workloads import (
    OUTPUT_BASE,
    OUTPUTS_PER_REQUEST,
    CaseRequest,
    Runs,
    make_workload,
)
from kvtwin.traces.readers.text import MAX_TIME_NS, MAX_TOKENS, provenance, read_lines
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

_RENAMED: Final[Mapping[str, str]] = {
    "pool_tokens": "max_total_tokens", "mixed_chunk": "enable_mixed_chunk", "eviction_policy": "radix_eviction_policy",
    "priority_scheduling": "enable_priority_scheduling", "low_priority_first": "schedule_low_priority_values_first",
    "preemption_threshold": "priority_scheduling_preemption_threshold", "context_len": "context_length",
}  # fmt: skip
_LINK_TIMES: Final = ("_base", "_per_token", "_per_page")
_DEFAULT_CONTEXT: Final = 1 << 17
_MAX_LENGTH: Final = 1 << 20  # of anything in a case's workload, and _MAX_SHARE times as many requests as the log has
_MAX_SHARE: Final = 10
_NUM_FIELDS: Final = 21  # of a step's line
_STEP_COLUMNS: Final = (
    "step", "sched_ns", "start_ns", "end_ns", "request", "cache_len", "input_len", "preempted", "finished",
    "num_waiting", "num_running", "num_free_blocks",
)  # fmt: skip


def read(path: Path) -> Run:
    """Read a decision log into a Run with requests and steps.

    Raises:
        InputError: with file and row.
    """
    log = _Log(path)
    settings = engine_settings(log.case, log.version, path)
    requests = log.requests()
    prompts = _prompts(log, requests["_src"], requests["input_tokens"])
    block_tokens = None
    if prompts is not None:
        quotes = any(first >= OUTPUT_BASE for prompt in prompts for first, _ in prompt.runs)
        block_tokens = _block_tokens(prompts, quotes_outputs=quotes)
        requests["block_hashes"] = [_blocks(prompt.runs, block_tokens) for prompt in prompts]
        requests["priority"] = [prompt.priority for prompt in prompts]
        if quotes:
            requests["output_block_hashes"] = [
                _blocks(((OUTPUT_BASE + row * OUTPUTS_PER_REQUEST, prompt.output_length),), block_tokens)
                for row, prompt in enumerate(prompts)
            ]
    info = RunInfo(
        "recorded",
        engine=f"sglang {log.version}",
        hash_block_tokens=block_tokens,
        engine_config=settings,
        source=provenance(path, "sglang_log", [path]),
        metrics={"status": log.status},
    )
    del requests["_src"]
    steps = log.steps(settings.get("page_size", 1))
    return Run(
        info,
        {"requests": from_columns("requests", requests, path), "steps": from_columns("steps", steps, path)},
        name=str(path),
    )


def engine_settings(case: Mapping[str, Any], version: str, path: Path) -> dict[str, Any]:
    """The server of an oracle case under SGLang's own argument names.

    Args:
        case: what the case file holds: `config`, and `seed` for the random policy.
        version: SGLang's.
        path: the file, for messages.

    Raises:
        InputError: no `config` in it.
    """
    config = case.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("hicache") or {}, dict):
        raise InputError(f"{str(config)[:40]!r} is not a table of settings", path=path, column="config")
    given = dict(config)
    hicache = given.pop("hicache", None)
    settings: dict[str, Any] = {_RENAMED.get(name, name): value for name, value in given.items()}
    settings["disable_overlap_schedule"] = not settings.pop("overlap", False)
    settings.setdefault("context_length", _DEFAULT_CONTEXT)
    settings |= {"engine": "sglang", "version": version, "random_seed": case.get("seed", 0)}
    return settings | (_hicache_settings(hicache) if hicache else {})


def _hicache_settings(hicache: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "enable_hierarchical_cache": True,
        "hicache_ratio": hicache.get("ratio", 2.0),
        "hicache_write_policy": hicache.get("write_policy"),
        "hicache_storage_backend": "oracle" if hicache.get("storage") else "",
        "hicache_storage_prefetch_policy": hicache.get("prefetch_policy", "best_effort"),
        "hicache_storage_backend_extra_config": hicache.get("extra_config") or {},
        "hicache_links": {name: value for name, value in hicache.items() if name.endswith(_LINK_TIMES)},
    }


class _Log:
    """The lines of a log, checked one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.case: Mapping[str, Any] = {}
        self.version, self.status = "", "unknown"
        self._step_lines: list[tuple[int, list[Any]]] = []
        self._request_lines: list[tuple[int, list[Any]]] = []
        for row, text in read_lines(path):
            self._take(row, self._parse(row, text))
        if not self._step_lines or not self._request_lines:
            raise InputError("no step, or no request, in it: sched_* and hi_* logs have both", path=path)

    def _parse(self, row: int, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON ({error})", path=self.path, row=row) from error

    def _take(self, row: int, line: Any) -> None:
        if isinstance(line, dict):
            if line.get("type") == "meta":
                self.version, self.case = str(line.get("sglang")), line.get("case")  # type: ignore[assignment]
                if not isinstance(self.case, dict):
                    self._fail(row, "case", "is not a JSON object")
            self.status = str(line.get("status", self.status))
        elif isinstance(line, list) and line and line[0] == "R":
            self._request_lines.append((row, line))
        elif isinstance(line, list) and len(line) == _NUM_FIELDS:
            self._step_lines.append((row, line))
        else:
            self._fail(
                row, None, f"neither a step of {_NUM_FIELDS} fields nor a request: a sched_* or hi_* log expected"
            )

    def requests(self) -> dict[str, list[Any]]:
        """Columns of the requests table; `_src` is the line of the workload."""
        names = ("arrival_ns", "input_tokens", "output_tokens", "first_token_ns", "finish_ns", "cached_tokens")
        columns: dict[str, list[Any]] = {name: [] for name in ("request_id", "_src", *names, "num_preemptions")}
        for index, (row, line) in enumerate(self._request_lines):
            if len(line) != 11 or line[1] != index:
                self._fail(row, "R", f"request {index} with 11 fields expected")
            _, _, src, arrival, prompt, output, _, first_token, finish, cached, retractions = line
            columns["request_id"].append(str(index))
            columns["_src"].append(self._number(row, "src", src, MAX_TIME_NS))
            numbers = (arrival, prompt, output)
            for name, value in zip(names[:3], numbers, strict=True):
                columns[name].append(
                    self._number(row, name, value, MAX_TIME_NS if name == "arrival_ns" else MAX_TOKENS)
                )
            optional = (first_token, finish, cached, retractions)
            for name, value in zip((*names[3:], "num_preemptions"), optional, strict=True):
                columns[name].append(None if value is None else self._number(row, name, value, MAX_TIME_NS))
        self._finish = columns["finish_ns"]
        columns["scheduled_ns"] = self._first_scheduled()
        return columns

    def _first_scheduled(self) -> list[int | None]:
        first: list[int | None] = [None] * len(self._request_lines)
        for row, line in self._step_lines:
            if line[3] != "D":
                for request, _, _ in self._members(row, line):
                    if first[request] is None:
                        first[request] = self._number(row, "t_scheduled", line[4], MAX_TIME_NS)
        return first

    def steps(self, page_size: int) -> dict[str, list[Any]]:
        """Columns of the steps table."""
        columns: dict[str, list[Any]] = {name: [] for name in _STEP_COLUMNS}
        held = [0] * len(self._request_lines)  # tokens with KV
        decodes: list[int] = []
        for index, (row, line) in enumerate(self._step_lines):
            if line[3] == "D":
                decodes = decodes if line[5] == 0 else self._rows(row, "rows", line[5])
                members = [(request, held[request], 1) for request in decodes]
            else:
                members = self._members(row, line)
            for request, cache_len, input_len in members:
                held[request] = cache_len + input_len
            times = (self._number(row, "times", line[place], MAX_TIME_NS) for place in (4, 1, 2))
            counts = [self._number(row, "counts", line[place], MAX_TIME_NS) for place in (8, 9, 10, 11)]
            lists = zip(*members, strict=True) if members else ((), (), ())
            values = (index, *times, *map(list, lists), self._rows(row, "requeued", line[14]), [], *counts[:2])
            for name, value in zip(_STEP_COLUMNS, (*values, (counts[2] + counts[3]) // page_size), strict=True):
                columns[name].append(value)
        self._add_finishes(columns)
        return columns

    def _add_finishes(self, columns: dict[str, list[Any]]) -> None:
        """Finishes are logged one or two lines late; a request's own line says with which step it ended."""
        step_of = {end_ns: index for index, end_ns in enumerate(columns["end_ns"])}
        logged = [request for row, line in self._step_lines for request in self._rows(row, "finished", line[15])]
        late = {request for request, finish_ns in enumerate(self._finish) if finish_ns is not None} - set(logged)
        last = columns["request"][-1]
        logged += sorted(late, key=lambda request: last.index(request) if request in last else len(last))
        for request in logged:
            step = step_of.get(self._finish[request])
            if step is not None:
                columns["finished"][step].append(request)

    def _members(self, row: int, line: list[Any]) -> list[tuple[int, int, int]]:
        entries = line[5]
        if not isinstance(entries, list) or not all(isinstance(entry, list) and len(entry) == 3 for entry in entries):
            self._fail(row, "rows", "a list of [request, cached, new] expected")
        return [
            (
                self._number(row, "rows", request, len(self._request_lines) - 1),
                self._number(row, "rows", cached, MAX_TOKENS),
                self._number(row, "rows", new, MAX_TOKENS),
            )
            for request, cached, new in entries
        ]

    def _rows(self, row: int, column: str, entries: Any) -> list[int]:
        if not isinstance(entries, list):
            self._fail(row, column, "a list of requests expected")
        return [self._number(row, column, entry, len(self._request_lines) - 1) for entry in entries]

    def _number(self, row: int, column: str, value: Any, most: int) -> int:
        if type(value) is not int or not 0 <= value <= most:
            self._fail(row, column, f"{str(value)[:40]}: an integer from 0 to {most} expected")
        return int(value)

    def _fail(self, row: int, column: str | None, problem: str) -> None:
        raise InputError(problem, path=self.path, row=row, column=column)


def _prompts(log: _Log, sources: list[int], input_tokens: list[int]) -> list[CaseRequest] | None:
    """The case's requests in the log's order; None where they cannot be made."""
    workload = log.case.get("workload")
    if not isinstance(workload, dict) or not _is_bounded(workload, len(sources)):
        return None
    try:
        made = {request.src: request for request in make_workload(workload)}
    except FileNotFoundError:
        return None
    except (TypeError, ValueError, KeyError, ArithmeticError, InputError) as error:
        raise InputError(f"no workload of the oracle ({error})", path=log.path, row=1, column="case") from error
    prompts = [made[source] for source in sources if source in made]
    return prompts if [prompt.input_length for prompt in prompts] == input_tokens else None


def _is_bounded(workload: Mapping[str, Any], num_requests: int) -> bool:
    """Whether making it costs no more than the log itself does."""
    counts = [workload.get(name, 1) for name in ("n", "count", "n_sessions", "turns")]
    numbers = [
        value for name, value in workload.items() if isinstance(value, int | float) and name not in ("seed", "start")
    ]
    if not all(type(count) is int for count in counts) or not all(abs(number) <= _MAX_LENGTH for number in numbers):
        return False
    return bool(math.prod(counts) <= _MAX_SHARE * (num_requests + 100))


def _block_tokens(prompts: list[CaseRequest], *, quotes_outputs: bool) -> int:
    """The largest block that no run of tokens ends within, but for the last of a prompt, or of the answer behind it."""
    ends = None if quotes_outputs else -1
    return math.gcd(*(length for prompt in prompts for _, length in prompt.runs[:ends])) or _MAX_LENGTH


def _blocks(runs: Runs, block_tokens: int) -> Any:
    """The id of the first token of each block: it names the block, as blocks lie within runs of consecutive ids."""
    return np.concatenate([np.arange(first, first + length, block_tokens, dtype=np.uint64) for first, length in runs])
