"""Our offloading against logs of vLLM's real one: `.venv/bin/python tests/oracle/compare_vllm_offload.py OUT...`

Every case that `random_vllm_offload.py` wrote below OUT is simulated. One line per case: `identical`, or the first
difference in time, be it of a step, a request or the host; exit 1 if any differs.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from kvtwin.sim.vllm.cache_log import HBM, HOST, STORAGE
from kvtwin.sim.vllm.simulate import build_requests, simulate
from kvtwin.traces.errors import KvtwinError
from kvtwin.traces.readers import kvtwin_jsonl, vllm_recording
from kvtwin.traces.run import Run

# The Makefile sets PYTHONSAFEPATH, which keeps a script's own folder out of the search path.
sys.path.insert(0, str(Path(__file__).parent))
import compare  # type: ignore[import-not-found]  # beside this file

_KINDS = {
    (HOST, "evict"): "evict",
    (HOST, "store"): "store",
    (HBM, "load_back"): "load_back",
    (STORAGE, "prefetch_start"): "prefetch_start",
    (STORAGE, "prefetch_done"): "prefetch_done",
    (STORAGE, "store"): "disk_store",
}

Events = dict[tuple[int, str], list[str]]  # by time and kind: blocks, victims in order, others sorted


def recorded_events(case: Path) -> Events:
    """What the real host level did."""
    events: Events = defaultdict(list)
    with gzip.open(case / "host.jsonl.gz", "rt") as file:
        for event in map(json.loads, file):
            if event["kind"] in _KINDS.values():
                events[event["t_ns"], event["kind"]] += event["blocks"]
    return _sorted(events)


def simulated_events(run: Run, names: dict[int, str]) -> Events:
    """What ours did."""
    events: Events = defaultdict(list)
    for row in run.cache.select(["time_ns", "level", "kind", "block_hash"]).to_pylist():
        kind = _KINDS.get((row["level"], row["kind"]))
        if kind is not None:
            events[row["time_ns"], kind].append(names[row["block_hash"]])
    return _sorted(events)


def _sorted(events: Events) -> Events:
    return {key: blocks if key[1] == "evict" else sorted(blocks) for key, blocks in events.items()}


def block_names(recorded: Run, config: Any) -> dict[int, str]:
    """Our keys by the first request that has the block, and its place there, as the log names them."""
    book = build_requests(recorded, config)
    names: dict[int, str] = {}
    for row in range(len(book)):
        request = book[row]
        last = (request.num_prompt_tokens + request.max_tokens) // config.block_size
        for place, key in enumerate(request.block_keys(0, last).tolist()):
            names.setdefault(key, f"{row}:{place}")
    return names


def first_event_difference(recorded: Events, ours: Events) -> tuple[int, str] | None:
    """When, and what."""
    for key in sorted({*recorded, *ours}):
        if recorded.get(key) != ours.get(key):
            time_ns, kind = key
            return time_ns, f"{kind} at {time_ns}\n  recorded  {recorded.get(key)}\n  simulated {ours.get(key)}"
    return None


def compare_case(case: Path) -> compare.Result:
    """Simulate a case and find the first difference."""
    if "refusal" in json.loads((case / "timing.json").read_text()):
        return compare.Result(case, 0, "" if _is_refused(case) else "the real scheduler hangs, ours does not")
    recorded = vllm_recording.read(case)
    config, latency = compare.engine_of(case, recorded)
    run = simulate(recorded, config, latency, record_cache=True)
    difference = compare.first_difference(recorded, run)
    real, ours = recorded_events(case), simulated_events(run, block_names(recorded, config))
    if not config.rules.offloads_by_job:  # 0.19 stops with its last request, we let its copies end
        last_ns = recorded.requests.column("finish_ns").to_numpy().max()
        ours = {key: blocks for key, blocks in ours.items() if key in real or key[0] <= last_ns}
    events = first_event_difference(real, ours)
    if events is not None:
        time_ns, what = events
        if not difference or time_ns <= _time_of(difference, recorded):
            difference = what
    return compare.Result(case, recorded.steps.num_rows, difference)


def _is_refused(case: Path) -> bool:
    settings = json.loads((case / "config.json").read_text())
    workload = kvtwin_jsonl.read(case / "trace.jsonl.gz", settings["hash_id_tokens"])
    info = dataclasses.replace(workload.info, engine_config=settings)
    config, latency = compare.engine_of(case, Run(info, {"requests": workload.requests}, name=str(case)))
    try:
        simulate(workload, config, latency)
    except KvtwinError:
        return True
    return False


def _time_of(difference: str, recorded: Run) -> int:
    """When a difference of steps was decided; other differences are found last."""
    word, number, *_ = difference.split()
    if word != "step":
        return 1 << 62
    step = recorded.steps.slice(int(number), 1).to_pylist()[0]
    return int(step["start_ns"] if step["sched_ns"] is None else step["sched_ns"])


def judge(case: Path) -> compare.Result:
    """`compare_case`, with what ours cannot simulate as a difference."""
    try:
        return compare_case(case)
    except (KvtwinError, ArithmeticError, AssertionError, LookupError) as error:
        return compare.Result(case, 0, f"cannot be simulated: {error!r}")


def main(arguments: list[str]) -> int:
    """Compare every case below the folders named."""
    cases = [case for folder in arguments for case in compare.find_cases(Path(folder))]
    failures = 0
    for case in cases:
        result = judge(case)
        failures += bool(result.difference)
        print(result, flush=True)
    print(f"{len(cases) - failures} of {len(cases)} cases identical")
    return int(failures > 0 or not cases)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
