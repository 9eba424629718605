"""SGLang's scheduler against logs of the real one: cases `sched_*` and `hi_*` (see oracle/sglang/README.md).

A case is NAME.json (what to run) beside NAME.jsonl.gz (what the real scheduler decided). Every column of every step is
compared, then every request's line.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_cache_log import CacheLog, taken  # type: ignore[import-not-found]  # beside this file

from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.sglang.batch import DECODE, Batch
from kvtwin.sim.sglang.config import SglangConfig, sglang_config
from kvtwin.sim.sglang.engine import Launched, SglangEngine
from kvtwin.sim.sglang.request import SglangRequest
from kvtwin.sim.sglang.scheduler import UpstreamStopError
from kvtwin.sim.sglang.simulate import build_engine, unset_priority
from kvtwin.sim.sglang.stretch import Stretch
from kvtwin.traces.errors import KvtwinError
from kvtwin.traces.readers.sglang_log import engine_settings
from kvtwin.traces.readers.sglang_workloads import OUTPUT_BASE, OUTPUTS_PER_REQUEST, CaseRequest, make_workload

_FIELDS = (
    "step", "t_start", "t_end", "mode", "t_scheduled", "rows", "context tokens", "waiting queue", "waiting",
    "running batch", "available", "evictable", "protected", "new_token_ratio", "requeued", "finished", "evicted",
    "arrived", "batch_is_full", "hicache events", "host evictions",
)  # fmt: skip
_REQUEST_FIELDS = (
    "R", "i", "src", "arrival", "input_length", "output_length", "first_sched", "first_token", "finish",
    "cached_tokens", "retractions",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a case file and its log hold."""

    path: Path
    settings: Mapping[str, Any]
    steps: list[list[Any]]
    requests: list[list[Any]]
    summary: Mapping[str, Any]


def read_case(path: Path) -> Case:
    """Read NAME.json and NAME.jsonl.gz."""
    with gzip.open(path.with_suffix(".jsonl.gz"), "rt") as log:
        lines = [json.loads(line) for line in log]
    rows = [line for line in lines if isinstance(line, list)]
    steps, requests = ([row for row in rows if (row[0] == "R") == is_request] for is_request in (False, True))
    version = next(line for line in lines if isinstance(line, dict))["sglang"]
    settings = {**json.loads(path.read_text()), "version": version}
    return Case(path, settings, steps, requests, lines[-1])


def case_config(case: Case) -> SglangConfig:
    """The engine of a case."""
    return sglang_config(engine_settings(case.settings, case.settings["version"], case.path), case.path)


def case_requests(case: Case, config: SglangConfig) -> tuple[list[CaseRequest], list[SglangRequest]]:
    """The workload, without the requests that the driver leaves out, and the engine's view of it."""
    room = config.max_total_tokens - 4 * config.page_size - 8
    kept = [r for r in make_workload(case.settings["workload"]) if r.input_length + r.output_length <= room]
    unset = unset_priority(config)
    requests = [
        SglangRequest(
            row=row,
            arrival_ns=request.arrival_ns,
            num_prompt_tokens=request.input_length,
            max_new_tokens=min(request.output_length, config.max_req_len - request.input_length - 1),
            prompt_runs=request.runs,
            output_runs=((OUTPUT_BASE + row * OUTPUTS_PER_REQUEST, OUTPUTS_PER_REQUEST),),
            priority=unset if request.priority is None else request.priority,
        )
        for row, request in enumerate(kept)
    ]
    return kept, requests


class OracleLog:
    """Writes the driver's log."""

    def __init__(self, cache: CacheLog) -> None:
        self.cache = cache
        self.engine: SglangEngine | None = None
        self.steps: list[list[Any]] = []
        self.times: dict[int, dict[str, Any]] = {}
        self._last_rows: list[int] | None = None
        self._finished: list[int] = []
        self._arrived: list[int] = []

    @property
    def now_ns(self) -> int:
        """The virtual clock."""
        assert self.engine is not None
        return self.engine.clock.now_ns

    def arrived(self, request: SglangRequest, now_ns: int) -> None:
        """Note an arrival."""
        self._arrived.append(request.row)

    def launched(self, step: Launched) -> None:
        """Add a step's line."""
        assert self.engine is not None
        self._add(step, self.engine.scheduler.pool.available, self.engine.scheduler.new_token_ratio)

    records_steps = True

    def stretched(self, stretch: Stretch) -> None:
        """Add the line of each of its steps."""
        times_ns = zip(stretch.sched_ns, stretch.start_ns, stretch.end_ns, strict=True)
        for place, times in enumerate(times_ns):
            lens = stretch.cache_lens(place)
            step = Launched(Batch(DECODE, stretch.requests, lens, [1] * len(lens), 0), *times)
            self._add(step, stretch.available[place], stretch.ratios[place])

    def _add(self, step: Launched, available: int, ratio: float) -> None:
        assert self.engine is not None
        scheduler, batch = self.engine.scheduler, step.batch
        context = sum(batch.cache_lens) + sum(batch.input_lens)
        cache = scheduler.cache
        if scheduler.config.hicache_storage_backend:
            # The driver's clock stands at the end of the step when it writes the line, under overlap at its beginning.
            cache.advance(step.end_ns if scheduler.config.disable_overlap_schedule else step.sched_ns)
        line = [len(self.steps) + 1, step.start_ns, step.end_ns, batch.mode, step.sched_ns, self._rows(step), context]
        line += [[request.row for request in scheduler.waiting[:6]], len(scheduler.waiting), len(scheduler.running)]
        line += [available, cache.evictable_size(), cache.protected_size()]
        line += [round(ratio, 6), [request.row for request in scheduler.requeued]]
        line += [self._finished, taken(self.cache.evictions), self._arrived, int(scheduler.batch_is_full)]
        line += [taken(self.cache.events), taken(self.cache.host_evictions)]
        self.steps.append(json.loads(json.dumps(line)))
        self._finished, self._arrived = [], []
        scheduler.requeued.clear()
        for request in batch.requests:
            self.times.setdefault(request.row, {"first_sched": step.start_ns})

    def _rows(self, step: Launched) -> Any:
        batch = step.batch
        names = [request.row for request in batch.requests]
        if batch.mode != DECODE:
            self._last_rows = None
            return [list(row) for row in zip(names, batch.cache_lens, batch.input_lens, strict=True)]
        if names == self._last_rows:
            return 0
        self._last_rows = names
        return names

    def processed(self, step: Launched, finished: Sequence[SglangRequest], now_ns: int) -> None:
        """Note first tokens and finishes."""
        for request in step.batch.requests:
            if request.num_outputs == 1:
                self.times[request.row].setdefault("first_token", step.end_ns)
        for request in finished:
            self._finished.append(request.row)
            self.times[request.row] |= {
                "finish": step.end_ns, "cached": request.num_cached_tokens, "retractions": request.num_retractions
            }  # fmt: skip


def simulate_case(case: Case, *, plain: bool = False) -> tuple[list[list[Any]], list[list[Any]], str]:
    """The twin's log of a case: its steps, its requests' lines, and how it ended."""
    config = case_config(case)
    kept, requests = case_requests(case, config)
    prices = case.settings["latency_ns"]
    latency = LinearLatency(prices["a"], prices["b"] + prices["c"], prices["c"], prices["d"])
    log: OracleLog = OracleLog(CacheLog(levels=config.enable_hierarchical_cache, now_ns=lambda: log.now_ns))
    log.engine = build_engine(config, latency, observer=log, plain=plain)
    if not config.disable_radix_cache:
        log.engine.scheduler.cache.observer = log.cache
    status = "ok"
    try:
        log.engine.run(requests)
    except UpstreamStopError as error:
        status = f"error {error}"
    except KvtwinError as error:
        status = f"deadlock: {error}"
    lines = []
    for row, request in enumerate(kept):
        times = log.times.get(row, {})
        known = [times.get(name) for name in ("first_sched", "first_token", "finish", "cached", "retractions")]
        head = ["R", row, request.src, request.arrival_ns, request.input_length, request.output_length]
        lines.append([*head, *known])
    return log.steps, lines, status


def difference_of(path: Path, *, plain: bool = False) -> tuple[int, str]:
    """Steps recorded in a case, and the first difference of the twin's ("" if there is none)."""
    case = read_case(path)
    steps, requests, status = simulate_case(case, plain=plain)
    for names, recorded, simulated in ((_FIELDS, case.steps, steps), (_REQUEST_FIELDS, case.requests, requests)):
        for expected, actual in zip(recorded, simulated, strict=False):
            if expected == actual:
                continue
            column = next(i for i in range(len(expected)) if expected[i] != actual[i])
            kind = "step" if names is _FIELDS else "request"
            return len(case.steps), (
                f"{kind} {expected[0] if kind == 'step' else expected[1]} differs in {names[column]}\n"
                f"  recorded  {expected[column]}\n  simulated {actual[column]}"
            )
        if len(recorded) != len(simulated):
            return len(case.steps), f"{len(recorded)} lines recorded, {len(simulated)} simulated ({status})"
    same_end = (case.summary["status"] == "ok") == (status == "ok")
    return len(case.steps), "" if same_end else f"recorded ends with {case.summary['status']}, simulated with {status}"
