"""Random cases for the real SGLang scheduler: tight memory, all policies, chunks, priorities, HiCache with slow links.

    PYTHONPATH=SGLANG PYTHON tests/oracle/random_sglang.py DRIVER OUT [--first 0] [--count 100]
    make oracle CASES=OUT

DRIVER is `drive_scheduler.py` of the oracle, SGLANG the unpacked package and PYTHON has what it imports (the oracle's
README says how to install 0.5.6.post2 and 0.5.9); kvtwin is not needed. Seed n always gives the same case. Each case runs
in a process of its own, as the driver patches what it imports. Not run by pytest: it needs gigabytes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

LATENCIES_NS = (
    {"a": 5_000_000, "b": 20_000, "c": 200, "d": 50_000},
    {"a": 1_000, "b": 0, "c": 0, "d": 0},
    {"a": 1, "b": 100_000, "c": 1_000, "d": 1},
)
_LONGEST_S = 120  # a case that takes longer is given up


def random_config(rng: random.Random) -> dict[str, Any]:
    """Server settings as the driver reads them."""
    page_size = rng.choice([1, 1, 4, 16, 16, 64])
    levels = rng.random() < 0.55
    config = {
        "page_size": page_size,
        "pool_tokens": page_size * rng.choice([640, 1_280, 2_560, 5_120]) // min(page_size, 16),
        "max_running_requests": rng.choice([1, 2, 5, 16, 64]),
        "chunked_prefill_size": rng.choice([-1, 64, 128, 512, 2_048]),
        "max_prefill_tokens": rng.choice([128, 1_024, 16_384]),
        "schedule_policy": rng.choice(["fcfs", "lpm", "lpm", "dfs-weight", "lof", "random"]),
        "schedule_conservativeness": rng.choice([1.0, 1.0, 0.1, 0.3, 2.0]),
        "mixed_chunk": rng.random() < 0.3,
        "overlap": rng.random() < 0.5,
        "eviction_policy": rng.choice(["lru", "lru", "lfu", "fifo", "mru", "filo", "priority"]),
        "context_len": rng.choice([1 << 17, 2_000]),
    }
    if not levels and rng.random() < 0.15:
        config["disable_radix_cache"] = True
    if rng.random() < 0.25:
        config |= {
            "schedule_policy": rng.choice(["fcfs", "lof"]),
            "priority_scheduling": True,
            "low_priority_first": rng.random() < 0.5,
            "preemption_threshold": rng.choice([0, 1, 10]),
        }
    if levels:
        config["hicache"] = random_levels(rng)
    return config


def random_levels(rng: random.Random) -> dict[str, Any]:
    """Host and storage below the device, and what their links take."""
    slow = rng.choice([1, 1, 30, 300])
    levels = {
        "ratio": rng.choice([1.2, 1.5, 2.0, 4.0]),
        "write_policy": rng.choice(["write_through", "write_through_selective", "write_back"]),
        "d2h_base": 20_000, "d2h_per_token": 300 * slow,
        "h2d_base": 20_000, "h2d_per_token": 300 * slow,
        "query_base": 20_000 * slow, "query_per_page": 1_000,
        "read_base": 20_000 * slow, "read_per_page": 10_000 * slow,
        "write_base": 100_000, "write_per_page": 2_000 * slow,
    }  # fmt: skip
    if rng.random() < 0.6:
        levels |= {
            "storage": True,
            "prefetch_policy": rng.choice(["best_effort", "wait_complete", "timeout"]),
            "extra_config": {
                "prefetch_threshold": rng.choice([16, 64, 256]),
                "prefetch_timeout_base": rng.choice([0.005, 0.05, 1]),
                "prefetch_timeout_per_ki_token": rng.choice([0.01, 0.25]),
            },
        }
    return levels


def random_workload(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    """Conversations or independent prompts, most of which the pool has room for."""
    longest = min(config["pool_tokens"], config["context_len"]) // 3
    if rng.random() < 0.5:
        turns = rng.choice([2, 4, 6])
        share = max(8, longest // (turns + 2))
        return {
            "kind": "multiturn", "seed": rng.randrange(1 << 20), "n_sessions": rng.choice([3, 10, 25]), "turns": turns,
            "sys_len": rng.randint(1, share), "user_len": rng.randint(2, share), "out_len": rng.randint(1, share // 2),
            "rate": rng.choice([1.0, 5.0, 100.0]), "think_s": rng.choice([0.05, 0.5, 4.0]),
        }  # fmt: skip
    low = rng.randint(1, longest // 2)
    out = rng.choice([1, 20, 100, longest])
    return {
        "kind": "poisson", "seed": rng.randrange(1 << 20), "n": rng.choice([5, 30, 80]),
        "rate": rng.choice([2.0, 20.0, 1_000.0]), "in_lo": low, "in_hi": rng.randint(low, longest), "out_lo": 1,
        "out_hi": rng.randint(1, out), "n_prefix": rng.choice([0, 1, 4]), "prefix_len": rng.randint(1, longest),
        "priorities": rng.choice([2, 30]) if config.get("priority_scheduling") else None,
    }  # fmt: skip


def random_case(seed: int) -> dict[str, Any]:
    """The case of a seed."""
    rng = random.Random(seed)
    config = random_config(rng)
    return {
        "workload": random_workload(rng, config), "config": config, "latency_ns": rng.choice(LATENCIES_NS), "seed": seed
    }  # fmt: skip


def write_case(driver: Any, path: Path, case: dict[str, Any]) -> str:
    """Write a case and what the real scheduler decides on it; returns how that ended."""
    path.write_text(json.dumps(case))
    log = path.with_suffix(".jsonl.gz")
    child = os.fork()
    if child == 0:
        signal.alarm(_LONGEST_S)
        code = 1
        try:
            print(f"{path.stem}: {driver.run(case, str(log))['status']}", flush=True)
            code = 0
        except Exception:  # noqa: BLE001 - whatever the real code or the driver raises
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status == 0:
        return "written"
    log.unlink(missing_ok=True)
    path.unlink()
    return f"given up (status {status})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("driver", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--count", type=int, default=100)
    args = parser.parse_args()
    sys.path.insert(0, str(args.driver.parent))  # it imports its neighbours
    driver = importlib.import_module(args.driver.stem)
    for name in ("managers.scheduler", "mem_cache.hiradix_cache", "mem_cache.chunk_cache"):
        importlib.import_module(f"sglang.srt.{name}")  # once, not in each case's process
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in range(args.first, args.first + args.count):
        ended = write_case(driver, args.out / f"sched_seed{seed}.json", random_case(seed))
        if ended != "written":
            print(f"seed {seed}: {ended}")


if __name__ == "__main__":
    main()
