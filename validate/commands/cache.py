"""`kvtwin validate cache`: hits, moves and evictions of two cache event traces."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvtwin.validate.commands import common


def add(levels: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the level."""
    parser = levels.add_parser("cache", help="hits, moves and evictions per cache level: two cache event traces")
    parser.add_argument("measured", type=Path, help="run, trace with block hashes, Tair log, KV events, HiCache log")
    parser.add_argument("predicted", type=Path, nargs="?", help="another such trace (or --capacity)")
    parser.add_argument("--capacity", type=int, metavar="BLOCKS", help="replay MEASURED through a cache of this size")
    parser.add_argument("--policy", default="lru", help="eviction policy of the replay (default: lru)")
    common.add_judging(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from kvtwin.traces.errors import InputError
    from kvtwin.traces.readers.cache_events import read_cache_events
    from kvtwin.validate.cache import compare_cache, replay_events

    if (args.predicted is None) == (args.capacity is None):
        raise InputError("either PREDICTED or --capacity expected")
    measured = read_cache_events(args.measured)
    if args.predicted is not None:
        predicted = read_cache_events(args.predicted)
    else:
        predicted = replay_events(measured, args.capacity, args.policy)
    checks = compare_cache(measured, predicted, name=args.measured.name, gates=common.read_gates(args))
    if args.json:
        common.print_json({"checks": checks})
    else:
        common.print_checks(checks)
    return common.verdict_code(checks)
