"""Two cache event traces compared: what was found on each level, what moved between them, what was dropped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import groupby
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.sim.sglang.observer import CacheObserver
from kvtwin.sim.sglang.radix_tree import RadixTree, TreeNode
from kvtwin.sim.sglang.runs import Runs, merge_runs
from kvtwin.traces.errors import InputError
from kvtwin.traces.table import from_columns
from kvtwin.validate.gates import LEVELS, MOVES, NO_GATES, Gates, judge
from kvtwin.validate.result import Check


def cache_figures(events: pa.Table) -> dict[str, tuple[float, int]]:
    """What a cache event trace adds up to.

    Args:
        events: table of schema.CACHE.

    Returns:
        By metric its value and how many events it rests on: `hit_rate` (share of what was looked up), then
        `hit_tokens`, `store_tokens`, `evict_tokens` per level (suffix `_l1` HBM, `_l2` host, `_l3` storage) and the
        volume of each kind of move; blocks (`hit_blocks_l1`, ...) where no event says its tokens. Evictions are told
        apart by what triggered them, the first of these of the same instant: a store on their level (`evict_for_store_l2`),
        a load from the host (`evict_for_load_back_l1`), a prefetch that takes room on the host (`evict_for_prefetch_l2`),
        the admission of a prompt (`evict_for_prompt_l1`); else `evict_alone_l1`, such as for decodes.
    """
    unit = "blocks" if events.column("tokens").null_count == events.num_rows else "tokens"
    amounts = [1] * events.num_rows if unit == "blocks" else events.column("tokens").to_pylist()
    kinds, levels, times = (events.column(name).to_pylist() for name in ("kind", "level", "time_ns"))
    sums: dict[tuple[str, int], list[int]] = {}
    happened = {(kind, time, level) for kind, time, level in zip(kinds, times, levels, strict=True) if kind != "evict"}
    triggered: dict[tuple[str, int], list[int]] = {}
    for kind, level, time, amount in zip(kinds, levels, times, amounts, strict=True):
        entries = [sums.setdefault((kind, level), [0, 0])]
        if kind == "evict":
            entries.append(triggered.setdefault((_cause(happened, time, level), level), [0, 0]))
        for entry in entries:
            entry[0] += amount or 0
            entry[1] += 1
    figures: dict[str, tuple[float, int]] = {}
    looked_up = sum(entry[0] for (kind, _), entry in sums.items() if kind == "lookup")
    if looked_up:
        lookups = sum(entry[1] for (kind, _), entry in sums.items() if kind == "lookup")
        hits = sum(entry[0] for (kind, _), entry in sums.items() if kind == "hit")
        figures["hit_rate"] = hits / looked_up, lookups
    for name in ("hit", "store", "evict", *MOVES):
        for level in LEVELS:
            if (name, level) in sums:
                figures[f"{name}_{unit}_l{level}"] = float(sums[name, level][0]), sums[name, level][1]
    for (cause, level), entry in sorted(triggered.items()):
        figures[f"{cause}_l{level}"] = float(entry[0]), entry[1]
    return figures


_NO_NAMES: Final = "evictions name no blocks that both traces know: which blocks, and in which order, is not compared"

# What makes room on a level: the kind of event, how far below the evictions' level it is noted, and the cause's name.
_TRIGGERS: Final = (
    ("store", 0, "evict_for_store"),
    ("load_back", 0, "evict_for_load_back"),
    ("prefetch_start", 1, "evict_for_prefetch"),
    ("lookup", 0, "evict_for_prompt"),
)


def _cause(happened: AbstractSet[tuple[str, int, int]], time_ns: int, level: int) -> str:
    """The member of EVICTION_CAUSES that an eviction counts under."""
    found = (cause for kind, below, cause in _TRIGGERS if (kind, time_ns, level + below) in happened)
    return next(found, "evict_alone")


def compare_cache(measured: pa.Table, predicted: pa.Table, *, name: str, gates: Gates = NO_GATES) -> list[Check]:
    """A Check per figure that either trace has (`cache_figures`); one that a trace lacks counts as 0 there.

    Where evictions name their blocks, also how many are of the same blocks, and whether those come in the same order.

    Args:
        measured, predicted: tables of schema.CACHE.
        name: of the measured trace.
        gates: see `gates.parse_gates`.

    Raises:
        InputError: one counts tokens and the other blocks.
    """
    units = {table.column("tokens").null_count == table.num_rows for table in (measured, predicted)}
    if len(units) > 1:
        raise InputError("one trace counts tokens, the other blocks: they cannot be compared")
    real, ours = cache_figures(measured), cache_figures(predicted)
    # Traces that share no block at all name them differently, or not at all.
    names = [table.column("block_hash").drop_null().to_numpy() for table in (measured, predicted)]
    share_names = len(np.intersect1d(*names)) > 0
    checks = []
    for metric in [*real, *(metric for metric in ours if metric not in real)]:
        value, count = real.get(metric, (0.0, 0))
        other = ours.get(metric, (0.0, 0))[0]
        error = other / value - 1 if value else (0.0 if other == value else math.inf)
        unit = "" if metric == "hit_rate" else ("blocks" if units == {True} else "tokens")
        notes = [] if math.isfinite(error) else ["the measured trace has none"]
        notes += [_NO_NAMES] if metric.startswith("evict_") and not share_names else []
        error = error if math.isfinite(error) else math.nan
        checks.append(Check(name, "cache", metric, unit, value, other, error, None, count, note="; ".join(notes)))
    if share_names:
        checks += [check for level in LEVELS for check in _eviction_checks(measured, predicted, level, name)]
    return [judge(check, gates) for check in checks]


def _eviction_checks(measured: pa.Table, predicted: pa.Table, level: int, name: str) -> list[Check]:
    """Evictions of one level that both traces have (a block's k-th is the same in both), and Kendall's tau-b of their order."""
    from scipy.stats import kendalltau

    ours, theirs = (_evictions(table, level) for table in (measured, predicted))
    if not ours:
        return []
    both = [eviction for eviction in ours if eviction in theirs]
    share = len(both) / len(ours)
    checks = [
        Check(
            name, "cache", f"same_evictions_l{level}", "blocks", float(len(ours)), float(len(both)), share - 1, None,
            len(ours), note="evictions of the same block for as many times",
        )
    ]  # fmt: skip
    if len(both) > 1:
        tau = float(kendalltau(range(len(both)), [theirs[eviction] for eviction in both]).statistic)
        note = "Kendall's tau-b of the order in which both evict the same blocks: -1 is reversed"
        order = Check(name, "cache", f"eviction_order_l{level}", "tau", 1.0, tau, tau - 1, None, len(both), note=note)
        checks.append(order)
    return checks


def _evictions(events: pa.Table, level: int) -> dict[tuple[int, int], int]:
    """Rank of each eviction of a level by block and by how many times that block was evicted before."""
    evicted = events.filter((pc.field("kind") == "evict") & (pc.field("level") == level))
    counts: dict[int, int] = {}
    ranks: dict[tuple[int, int], int] = {}
    for block in evicted.column("block_hash").drop_null().to_pylist():
        counts[block] = counts.get(block, 0) + 1
        ranks[block, counts[block]] = len(ranks)
    return ranks


def replay_events(events: pa.Table, capacity_blocks: int, policy: str = "lru") -> pa.Table:
    """What a cache of `capacity_blocks` would have done with the lookups and stores of a trace of block hashes.

    Consecutive lookups, and consecutive stores, of one instant and request are one prompt's blocks, in order.

    Raises:
        InputError: lookups or stores without block hashes, or a capacity below 1.
    """
    if capacity_blocks < 1:
        raise InputError(f"capacity is {capacity_blocks} blocks: at least 1 expected")
    wanted = events.filter(pc.is_in(events.column("kind"), value_set=pa.array(["lookup", "store"])))
    if wanted.column("block_hash").null_count or not wanted.num_rows:
        raise InputError("a replay needs the block hashes of lookups and stores")
    blocks, lengths = (wanted.column(name).to_pylist() for name in ("block_hash", "tokens"))
    cache = _BlockCache(capacity_blocks, policy, dict(zip(blocks, lengths, strict=True)))
    columns = (wanted.column(name).to_pylist() for name in ("time_ns", "level", "kind", "request"))
    for (time, level, kind, request), group in groupby(zip(*columns, blocks, strict=True), key=lambda event: event[:4]):
        cache.take(time, level, kind, request, [event[4] for event in group])
    return from_columns("cache", cache.rows, "the replay")


class _BlockCache(CacheObserver):
    """A radix tree over block hashes, a block being its token; `lengths` says how many tokens it really holds."""

    def __init__(self, capacity: int, policy: str, lengths: Mapping[int, int | None]) -> None:
        names = ("time_ns", "level", "request", "kind", "block_hash", "tokens")
        self.rows: dict[str, list[Any]] = {name: [] for name in names}
        self._lengths = lengths
        self._tree = RadixTree(1, policy, counts_hits=True)
        self._tree.observer = self
        self._capacity, self._free = capacity, capacity
        self._now: tuple[int, int, int | None] = (0, 0, None)
        self._prompt: list[int] = []
        self._hashes: dict[int, int] = {}
        self._names: dict[int, int] = {}

    def _key(self, blocks: Sequence[int]) -> Runs:
        # Names are even, so that no two blocks look like consecutive tokens.
        for block in blocks:
            name = self._names.setdefault(block, 2 * len(self._names))
            self._hashes[name] = block
        return merge_runs((self._names[block], 1) for block in blocks)

    def _note(self, kind: str, block: int) -> None:
        for name, value in zip(self.rows, (*self._now, kind, block, self._lengths[block]), strict=True):
            self.rows[name].append(value)

    def take(self, time_ns: int, level: int, kind: str, request: int | None, blocks: list[int]) -> None:
        """Look up or store one prompt's blocks."""
        self._now = time_ns, level, request
        if kind == "lookup":
            self._prompt = blocks
            matched, _ = self._tree.match_prefix(self._key(blocks), len(blocks))
            for place, block in enumerate(blocks):
                self._note("lookup", block)
                if place < matched:
                    self._note("hit", block)
            return
        # A store names new blocks only: they continue what its prompt found.
        prefix = self._prompt[: self._prompt.index(blocks[0])] if blocks[0] in self._prompt else []
        chain = [*prefix, *blocks]
        key = self._key(chain)
        matched, node = self._tree.match_prefix(key, len(chain))
        missing = len(chain) - matched
        if len(chain) > self._capacity:
            return
        if missing > self._free:
            self._tree.inc_lock_ref(node)
            self._free += self._tree.evict(missing - self._free)
            self._tree.dec_lock_ref(node)
        self._tree.insert(key, len(chain))
        self._free -= missing
        for block in chain[matched:]:
            self._note("store", block)

    def evicted(self, node: TreeNode) -> None:
        """Note each of its blocks."""
        for name, _ in node.runs:
            self._note("evict", self._hashes[name])
