"""HiCache's corners, one at a time."""

from __future__ import annotations

import pytest

from kvtwin.sim.links import LinkTimes
from kvtwin.sim.sglang.clock import Clock
from kvtwin.sim.sglang.hi_tree import HiRadixTree, HiRules
from kvtwin.sim.sglang.pool import KvPool
from kvtwin.sim.sglang.runs import Runs

FIRST, SECOND = ((1_000, 40),), ((2_000, 40),)


def insert(tree: HiRadixTree, device: KvPool, key: Runs) -> None:
    """Compute a key of 40 tokens and keep it."""
    assert device.alloc(40)
    device.free(tree.insert(key, 40))


@pytest.mark.parametrize("version", ["0.5.6", "0.5.9"])
def test_write_back_loads_what_it_has_just_dropped_and_counts_it_twice(version: str) -> None:
    newer = version == "0.5.9"
    device, host, clock = KvPool(50, 1), KvPool(50, 1), Clock()
    rules = HiRules("write_back", lists_host_leaves=newer, stores_written_back=newer)
    tree = HiRadixTree("lru", device, host, clock, LinkTimes(), rules)
    insert(tree, device, FIRST)
    tree.evict(40)
    insert(tree, device, SECOND)
    _, _, host_hit, host_node = tree.match_path(FIRST, 40)
    assert host_hit == 40
    # To make room, the second is copied to a full host, which drops the first.
    assert tree.load_back(host_node) is host_node
    assert tree.match_path(FIRST, 40)[2] == 0
    assert device.available + tree.evictable + tree.protected == device.size
    # The request that asked for it inserts its slots again.
    tree.insert(FIRST, 40)
    assert device.available + tree.evictable + tree.protected == device.size + 40
    tree.start_loading()
    clock.advance(10**9)
    tree.check_loads()
    assert (tree.protected, tree.evictable) == (0, 80)
    assert tree.evict(80) == (80 if newer else 40)
