"""The simulator against logs of the real schedulers: `make oracle CASES=DIR`.

Every case below DIR is simulated and compared step by step: vLLM's (a folder with trace, config, steps and requests,
see oracle/README_VLLM.md) and SGLang's (NAME.json beside NAME.jsonl.gz, see oracle/sglang/README.md; those cut from a
Mooncake trace find it below $ORACLE_TRACES). One line per case; exit 1 if any differs, 2 if there is none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.vllm.config import VllmConfig, vllm_config
from kvtwin.sim.vllm.simulate import simulate
from kvtwin.traces.errors import KvtwinError
from kvtwin.traces.readers import vllm_recording
from kvtwin.traces.run import Run

# The Makefile sets PYTHONSAFEPATH, which keeps a script's own folder out of the search path.
sys.path.insert(0, str(Path(__file__).parent))

_LATENCY_NS = {"base": 6_000_000, "per_new_token": 25_000, "per_context_token": 20, "per_req": 10_000}

_STEP_COLUMNS = (
    "request", "cache_len", "input_len", "preempted", "finished", "num_waiting", "num_running",
    "num_free_blocks", "num_evicted_blocks", "start_ns", "end_ns",
)  # fmt: skip
_REQUEST_COLUMNS = ("scheduled_ns", "first_token_ns", "finish_ns", "cached_tokens", "num_preemptions")
_NAMES = ("request", "preempted", "finished")  # columns of request rows, shown by name


@dataclass(frozen=True)
class Result:
    """What came of one case: steps compared, and the first difference ("" if there is none)."""

    case: Path
    num_steps: int
    difference: str

    def __str__(self) -> str:
        return f"{self.case}: {self.difference or f'identical, {self.num_steps} steps'}"


def find_cases(folder: Path) -> list[Path]:
    """Every case below a folder (or the folder itself), in order of its path."""
    return sorted(path.parent for path in folder.rglob("steps.jsonl.gz") if (path.parent / "config.json").exists())


def find_sglang_cases(folder: Path) -> list[Path]:
    """Every SGLang case below a folder (or the one file named), in order of its path."""
    files = [folder] if folder.is_file() else folder.rglob("*.json")
    return sorted(path for path in files if path.with_suffix(".jsonl.gz").exists())


def compare_sglang_case(case: Path) -> Result:
    """Simulate a case of SGLang's scheduler or caches and find the first difference."""
    import compare_sglang_cache  # type: ignore[import-not-found]  # beside this file
    import compare_sglang_sched  # type: ignore[import-not-found]  # beside this file

    # Only what runs a scheduler has step times.
    kind = compare_sglang_sched if "latency_ns" in json.loads(case.read_text()) else compare_sglang_cache
    try:
        return Result(case, *kind.difference_of(case))
    except FileNotFoundError as error:
        return Result(case, 0, f"cannot be compared: {error}")


def version_of(case: Path) -> str:
    """vLLM version that wrote the case: timing.json says it, else the folder (`vllm019`)."""
    timing = case / "timing.json"
    if timing.exists() and "vllm" in (facts := json.loads(timing.read_text())):
        return str(facts["vllm"])
    return "0.19" if "019" in case.parent.name else "0.32"


def engine_of(case: Path, recorded: Run) -> tuple[VllmConfig, LinearLatency]:
    """The settings and the step latency of a case."""
    settings = dict(recorded.info.engine_config)
    prices = {**_LATENCY_NS, **settings.pop("latency_ns", {})}
    config = vllm_config({**settings, "version": version_of(case)}, case / "config.json")
    names = ("base", "per_new_token", "per_context_token", "per_req")
    return config, LinearLatency(*(prices[name] for name in names))


def simulate_case(case: Path, recorded: Run, *, plain: bool = False) -> Run:
    """The twin's run of a case; `plain` takes every step by itself."""
    config, latency = engine_of(case, recorded)
    return simulate(recorded, config, latency, plain=plain)


def compare_case(case: Path, *, plain: bool = False) -> Result:
    """Simulate a case and find the first difference."""
    recorded = vllm_recording.read(case)
    twin = simulate_case(case, recorded, plain=plain)
    difference = first_difference(recorded, twin)
    return Result(case, recorded.steps.num_rows, difference)


def first_difference(recorded: Run, twin: Run) -> str:
    """The first step, else the first request, in which two runs differ, side by side; "" if none does."""
    names = recorded.requests.column("request_id").to_pylist()
    for table, columns in (("steps", _STEP_COLUMNS), ("requests", _REQUEST_COLUMNS)):
        real, ours = getattr(recorded, table), getattr(twin, table)
        known = [column for column in columns if not _all_null(real, column)]
        if table == "steps" and not _all_null(real, "sched_ns"):
            known.append("sched_ns")
        for row, column, expected, actual in _differences(real.select(known), ours.select(known)):
            if column in _NAMES:
                expected, actual = ([names[item] for item in items] for items in (expected, actual))
            return f"{table[:-1]} {row} differs in {column}\n  recorded  {expected}\n  simulated {actual}"
        if real.num_rows != ours.num_rows:
            return f"{real.num_rows} {table} recorded, {ours.num_rows} simulated"
    return ""


def _all_null(table: Any, column: str) -> bool:
    return bool(table.column(column).null_count == table.num_rows)


def _differences(real: Any, ours: Any) -> Iterator[tuple[int, str, Any, Any]]:
    """Rows that differ, in order, as (row, column, recorded, simulated)."""
    rows = min(real.num_rows, ours.num_rows)
    real, ours = real.slice(0, rows), ours.slice(0, rows)
    if real.equals(ours):
        return
    pairs = zip(real.to_pylist(), ours.to_pylist(), strict=True)
    for row, (expected, actual) in enumerate(pairs):
        for column, value in expected.items():
            if value != actual[column]:
                yield row, column, value, actual[column]


def main(arguments: list[str]) -> int:
    """Compare every case below the folders named."""
    if not arguments:
        print("which cases? make oracle CASES=DIR", file=sys.stderr)
        return 2
    cases: list[tuple[Path, Callable[[Path], Result]]]
    cases = [(case, compare_case) for folder in arguments for case in find_cases(Path(folder))]
    cases += [(case, compare_sglang_case) for folder in arguments for case in find_sglang_cases(Path(folder))]
    if not cases:
        print(
            f"no case below {', '.join(arguments)}: a case is a folder with steps.jsonl.gz and config.json (vLLM), or "
            "NAME.json beside NAME.jsonl.gz (SGLang)",
            file=sys.stderr,
        )
        return 2
    failures = 0
    for case, compare in cases:
        try:
            result = compare(case)
        except KvtwinError as error:
            result = Result(case, 0, f"cannot be compared: {error}")
        failures += bool(result.difference)
        print(result, flush=True)
    print(f"{len(cases) - failures} of {len(cases)} cases identical")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
