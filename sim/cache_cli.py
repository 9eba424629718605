"""`kvtwin cache`: a workload's prompts through a prefix cache alone, for capacity and policy studies."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtwin.traces.errors import InputError

if TYPE_CHECKING:
    from kvtwin.sim.cache_replay import Prompts

_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `cache`."""
    parser = subparsers.add_parser(
        "cache",
        help="hit rate of a prefix cache against capacity and policy, without an engine",
        description="Send WORKLOAD's prompts through SGLang's radix cache at each capacity under each policy. Beside "
        "them: an LRU cache of single pages, and Belady's optimum, the bound. All keep whole pages of one size. "
        "A prompt longer than the radix cache passes it by.",
    )
    parser.add_argument("workload", type=Path, help="a run or trace whose requests carry block hashes")
    parser.add_argument(
        "--capacity",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="cache sizes in tokens (default: 1, 2, 5, 10, 20, 50 and 100 %% of the workload's distinct pages)",
    )
    parser.add_argument(
        "--policy", nargs="+", metavar="NAME", help="lru, lfu, fifo, mru, filo, priority, slru (default: all)"
    )
    parser.add_argument(
        "--page-size", type=int, metavar="TOKENS", help="tokens per page (default: 64, or a hash block if that is less)"
    )
    parser.add_argument(
        "--hash-block-tokens", type=int, metavar="N", help="tokens per block hash, where the format leaves it open"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from kvtwin.sim.cache_replay import prompts_of, replay
    from kvtwin.sim.sglang.eviction import EVICTION_POLICIES, eviction_policy
    from kvtwin.traces.readers import read_run

    policies = args.policy or list(EVICTION_POLICIES)
    for policy in policies:
        eviction_policy(policy)
    prompts = prompts_of(read_run(args.workload, hash_block_tokens=args.hash_block_tokens), args.page_size)
    page_size = prompts.page_size
    capacities = args.capacity or sorted({max(page_size, int(share * prompts.distinct_tokens)) for share in _SHARES})
    for capacity in capacities:
        if capacity < page_size:
            raise InputError(f"--capacity {capacity}: at least a page ({page_size} tokens) expected")
    rows = []
    for capacity, bounds in zip(capacities, _bounds(prompts, capacities), strict=True):
        for policy in policies:
            result = replay(prompts.keys, capacity, policy, page_size)
            rows.append({
                "capacity_tokens": capacity, "policy": policy, "hit_rate": result.hit_rate,
                "hit_tokens": result.hit_tokens, "evicted_tokens": result.evicted_tokens,
                "num_evictions": result.num_evictions, "num_uncached": result.uncached, **bounds,
            })  # fmt: skip
    if args.json:
        document = {
            "requests": len(prompts.keys), "input_tokens": prompts.input_tokens, "page_size": page_size, "results": rows,
        }  # fmt: skip
        print(json.dumps(document, allow_nan=False))
        return 0
    print(f"{len(prompts.keys):,} prompts of {prompts.input_tokens:,} tokens, pages of {page_size}")
    print(
        f"{'capacity':>14} {'policy':>9} {'hit rate':>9} {'LRU pages':>11} {'Belady':>8} {'evictions':>10} {'passed by':>10}"
    )
    for row in rows:
        print(
            f"{row['capacity_tokens']:14,} {row['policy']:>9} {row['hit_rate']:9.2%} {row['lru_page_hit_rate']:11.2%} "
            f"{row['belady_hit_rate']:8.2%} {row['num_evictions']:10,} {row['num_uncached']:10,}"
        )
    return 0


def _bounds(prompts: Prompts, capacities: list[int]) -> list[dict[str, Any]]:
    """Hit rates of an LRU cache of pages and of Belady's optimum at each capacity."""
    import numpy as np

    from kvtwin.sim.cache_replay import belady_hits, lru_curve

    steps, hits = lru_curve(prompts)
    total = prompts.input_tokens
    bounds = []
    for capacity in capacities:
        pages = capacity // prompts.page_size
        reached = int(np.searchsorted(steps, pages, side="right"))
        bounds.append({
            "lru_page_hit_rate": int(hits[reached - 1]) / total if reached else 0.0,
            "belady_hit_rate": belady_hits(prompts, pages) / total,
        })  # fmt: skip
    return bounds
