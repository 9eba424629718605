"""What holds in the tables of every simulated SGLang run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from kvtwin.traces.run import Run


def check_tables(run: Run) -> None:
    """Times are in order, each request's tokens add up to its length at its last step, its queues to its time."""
    served = run.requests.column("finish_ns").is_valid().to_numpy()
    assert run.info.metrics["num_lost"] == run.requests.num_rows - served.sum()
    times: dict[str, Any] = {
        name: run.requests.column(name).filter(served).to_pylist()
        for name in ("arrival_ns", "queued_ns", "scheduled_ns", "first_token_ns", "finish_ns")
    }
    for row in zip(*times.values(), strict=True):
        assert list(row) == sorted(row)
    reached: dict[int, int] = {}
    for members, cached, new in zip(
        *(run.steps.column(name).to_pylist() for name in ("request", "cache_len", "input_len")), strict=True
    ):
        reached |= {row: before + tokens for row, before, tokens in zip(members, cached, new, strict=True)}
    totals = run.requests.column("input_tokens").to_numpy() + run.requests.column("output_tokens").to_numpy()
    # Under overlap a finished request may decode once more than it needs.
    rows = np.flatnonzero(served).tolist()
    assert all(totals[row] - 1 <= reached[row] <= totals[row] for row in rows)
    assert sorted(row for members in run.steps.column("finished").to_pylist() for row in members) == rows
    check_queues(run, served)
    check_levels(run)


def check_queues(run: Run, served: np.ndarray) -> None:
    """The four queues add up to finish - queued exactly; who has never finished is in none."""
    table = run.requests.filter(served)
    queues = [table.column(f"{queue}_ns").to_numpy() for queue in ("waiting", "prefetch", "running", "swapped")]
    assert all(np.all(spent_ns >= 0) for spent_ns in queues)
    queued_ns, scheduled_ns, finish_ns = (
        table.column(name).to_numpy() for name in ("queued_ns", "scheduled_ns", "finish_ns")
    )
    assert np.array_equal(sum(queues), finish_ns - queued_ns)
    # Waiting for loads from the host is Prefetch, though the request runs by the steps.
    loads_ns = running_by_the_steps(run)[served] - queues[2]
    assert np.all((loads_ns >= 0) & (loads_ns <= queues[1]))
    once = table.column("num_preemptions").to_numpy() == 0
    assert np.array_equal((queues[0] + queues[1] - loads_ns)[once], (scheduled_ns - queued_ns)[once])
    assert run.requests.filter(~served).column("waiting_ns").null_count == run.requests.num_rows - served.sum()


def running_by_the_steps(run: Run) -> np.ndarray:
    """Time from the step that admits a request to the one that takes it out, or to its finish, by row."""
    finish_ns = run.requests.column("finish_ns").to_pylist()
    spent_ns = np.zeros(run.requests.num_rows, np.int64)
    since_ns: dict[int, int] = {}
    columns = (run.steps.column(name).to_pylist() for name in ("sched_ns", "request", "preempted"))
    for sched_ns, members, preempted in zip(*columns, strict=True):
        for row in preempted:
            spent_ns[row] += sched_ns - since_ns.pop(row)
        for row in members:
            since_ns.setdefault(row, sched_ns)
    for row, start_ns in since_ns.items():
        spent_ns[row] += (finish_ns[row] or start_ns) - start_ns
    return spent_ns


def check_levels(run: Run) -> None:
    """What came from lower levels is part of the hit; blocks go only if there are that many."""
    cached, host, storage = (
        run.requests.column(name).to_numpy()
        for name in ("cached_tokens", "cached_host_tokens", "cached_storage_tokens")
    )
    assert np.all((host >= 0) & (storage >= 0) & (host + storage <= cached))
    config = run.info.engine_config
    if not config["enable_hierarchical_cache"]:
        assert not host.any() and not any(run.requests.column("prefetch_ns").drop_null().to_pylist())
    if not config["hicache_storage_backend"]:
        assert not storage.any()
    if run.has("cache"):
        check_events(run)
    evicted = run.steps.column("num_evicted_blocks").to_numpy()
    assert np.all((evicted >= 0) & (evicted <= config["max_total_tokens"] // config["page_size"]))


def check_events(run: Run) -> None:
    """No level drops more than it was given; the clock is monotone; steps and events agree on what left the device."""
    tokens = Counter[tuple[int, str]]()
    for event in run.cache.select(["level", "kind", "tokens"]).to_pylist():
        tokens[event["level"], event["kind"]] += event["tokens"]
    assert tokens[2, "evict"] <= tokens[2, "store"] + tokens[3, "prefetch_done"]
    assert tokens[3, "evict"] <= tokens[3, "store"]
    assert tokens[3, "prefetch_done"] <= tokens[3, "prefetch_start"]
    assert tokens[1, "hit"] + tokens[2, "hit"] + tokens[3, "hit"] <= tokens[1, "lookup"]
    assert tokens[2, "hit"] + tokens[3, "hit"] <= tokens[1, "load_back"]
    assert tokens[3, "hit"] <= tokens[3, "prefetch_done"]
    assert np.all(np.diff(run.cache.column("time_ns").to_numpy()) >= 0)
    in_steps = sum(run.steps.column("num_evicted_blocks").to_pylist()) * run.info.engine_config["page_size"]
    assert in_steps == tokens[1, "evict"]
