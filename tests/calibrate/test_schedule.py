"""Thread blocks played head by head: against a heap of slots that takes block after block, and what a fit makes of it."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtwin.calibrate.tables.candidates import Trend
from kvtwin.sim.latency.work.reuse import CACHES, Reuse
from kvtwin.sim.latency.work.schedule import play
from kvtwin.sim.latency.work.terms import trend
from kvtwin.traces.readers.optable import plain_samples

TILE, PIECE, START, EMPTY = 64, 128, 50.0, 16.0


def block(keys: float) -> float:
    return float(np.ceil(keys / PIECE) * PIECE + START)


def blocks_of_a_head(chunk: int, prefix: int, long: tuple[int, int], short: tuple[int, int]) -> list[float]:
    tiles = -(-chunk // TILE)
    prefill = [block(prefix + min((tile + 1) * TILE, chunk)) for tile in range(tiles)]
    return prefill + [block(long[1] + 1)] * long[0] + [block(short[1] + 1)] * short[0]


def last_end(columns: dict[str, np.ndarray], tile: float, slots: float) -> np.ndarray:
    return play(columns, tile, slots)[0]


def batch(chunk: int, prefix: int, long: tuple[int, int], short: tuple[int, int], heads: int) -> dict[str, np.ndarray]:
    decodes = long[0] + short[0]
    values = {
        "num_heads": heads, "num_key_value_heads": heads, "chunk": chunk, "prefix": prefix, "num_decode": decodes,
        "context": short[1], "long_share": long[0] / decodes, "skew": long[1] / short[1],
    }  # fmt: skip
    return {name: np.array([float(value)]) for name, value in values.items()}


@given(
    chunk=st.integers(1, 300), prefix=st.integers(0, 3000), num_long=st.integers(0, 20), num_short=st.integers(1, 60),
    short=st.integers(1, 500), times=st.integers(1, 8), heads=st.integers(1, 12), slots=st.integers(1, 120),
)  # fmt: skip
def test_the_end_of_a_list_lies_between_its_work_and_a_block_more(
    chunk: int, prefix: int, num_long: int, num_short: int, short: int, times: int, heads: int, slots: int
) -> None:
    long = num_long, short * times
    lengths = blocks_of_a_head(chunk, prefix, long, (num_short, short))
    empty = EMPTY * (num_long + num_short) * (-(-chunk // TILE) - 1)
    work = heads * (sum(lengths) + empty) / slots
    end = float(last_end(batch(chunk, prefix, long, (num_short, short), heads), TILE, slots)[0])
    assert end >= max(work, max(lengths)) * (1 - 1e-5)
    # A slot gets one of its next `slots` blocks before it is known which slot comes free first: two blocks at most.
    assert end <= (work + 2 * max(lengths)) * (1 + 1e-5)


def test_the_end_is_about_that_of_a_heap_which_takes_block_after_block() -> None:
    cases = [(64, 500, (8, 4096), (56, 1024)), (16, 0, (0, 512), (64, 512)), (512, 1024, (16, 2048), (16, 128))]
    for chunk, prefix, long, short in cases:
        empty = EMPTY * (long[0] + short[0]) * (-(-chunk // TILE) - 1) / 188
        free = [0.0] * 188
        for _ in range(32):
            for length in blocks_of_a_head(chunk, prefix, long, short):
                heapq.heapreplace(free, free[0] + length)
        exact = max(free) + 32 * empty
        assert last_end(batch(chunk, prefix, long, short, 32), TILE, 188.0)[0] == pytest.approx(exact, rel=0.05)


def test_each_of_several_prefills_has_its_own_blocks() -> None:
    """Three prefills of 128 tokens whose queries see 64 keys, two tiles each: six blocks of one head, on six slots or on one."""
    columns = batch(384, 0, (0, 64), (1, 64), 1) | {
        "prefill_tokens": np.array([384.0]),
        "prefill_key": np.array([64.0]),
    }
    ends = [float(last_end(columns, TILE, slots)[0]) for slots in (7.0, 1.0)]
    assert ends == pytest.approx([block(128) + EMPTY / 7, 3 * (block(64) + block(128)) + block(65) + EMPTY])


def test_rows_do_not_depend_on_their_company() -> None:
    one, other = batch(64, 500, (8, 4096), (56, 1024), 32), batch(2048, 0, (1, 64), (3, 32), 32)
    both = {name: np.concatenate([one[name], other[name]]) for name in one}
    alone = [float(last_end(columns, 128.0, 108.0)[0]) for columns in (one, other)]
    assert last_end(both, 128.0, 108.0).tolist() == alone


def test_a_kernel_that_hands_out_blocks_head_by_head_is_priced_by_its_last_block() -> None:
    rng = np.random.default_rng(0)
    load = {
        "chunk": rng.choice([16.0, 64.0, 256.0, 1024.0], 400), "prefix": rng.choice([0.0, 512.0, 4096.0], 400),
        "num_decode": rng.choice([2.0, 4.0, 8.0, 16.0, 32.0, 64.0], 400), "context": rng.choice([64.0, 512.0, 4096.0], 400),
    }  # fmt: skip
    heads = {"num_heads": 32.0, "num_key_value_heads": 8.0}
    columns = load | {name: np.full(400, value) for name, value in heads.items()}
    time_us = 4.0 + 0.0185 * last_end(columns, 64.0, 188.0)
    model = Trend([188.0]).fit(plain_samples("mixed", "mixed_attention", load, time_us, constants=heads)).to_model()
    assert model.time_us(load) == pytest.approx(time_us, rel=0.02)
    without = {name: price for name, price in model.prices.items() if "end" not in name.split()}
    assert np.abs(trend("mixed_attention", columns, without, model.tile, model.slots) / time_us - 1).mean() > 0.2


def lru_misses(accesses: list[int], size: int) -> int:
    cache: dict[int, None] = {}
    missed = 0
    for key in accesses:
        missed += cache.pop(key, 0) is not None
        cache[key] = None
        if len(cache) > size:
            del cache[next(iter(cache))]
    return missed


@pytest.mark.parametrize("ago", [20, 60, 200])
def test_what_a_cache_holds_is_what_was_read_a_short_while_ago(ago: int) -> None:
    """Twelve sequences of 300 keys, each read by two heads that start `ago` apart: an LRU cache, access by access."""
    accesses = [
        (at - late) * 12 + seq
        for at in range(300 + ago) for late in (0, ago) for seq in range(12) if 0 <= at - late < 300
    ]  # fmt: skip
    reuse = Reuse(1)
    for since in (np.inf, float(ago)):
        reuse.add(np.full((1, 12), since, np.float32), np.full((1, 12), 300.0, np.float32))
    footprint = 12 * ago
    first, all_of_them = 12 * 300, 2 * 12 * 300
    missed = {size: reuse.missed(np.array([300.0 + ago]), [size])[0, 0] for size in (footprint / 3, footprint * 3.0)}
    assert missed == {footprint / 3: all_of_them, footprint * 3.0: first}
    assert [lru_misses(accesses, int(size)) for size in missed] == [all_of_them, first]


def test_heads_that_start_together_share_their_keys_and_heads_that_start_apart_do_not() -> None:
    """Two query heads of one key-value head, 64 decodes of 16,384 keys: at once on 128 slots, one after the other on 64."""
    columns = batch(1, 0, (0, 16384), (64, 16384), 2) | {"num_key_value_heads": np.array([1.0])}
    keys, cache = 64 * 16384.0, CACHES.index(262144.0)
    together, apart = (play(columns, TILE, slots)[1][0, cache] for slots in (130.0, 65.0))
    assert (together, apart) == (keys, 2 * keys)


def test_a_kernel_that_waits_for_memory_is_priced_by_what_it_reads_again() -> None:
    rng = np.random.default_rng(1)
    load = {
        "chunk": rng.choice([16.0, 64.0, 256.0], 500), "prefix": rng.choice([0.0, 512.0, 4096.0], 500),
        "num_decode": rng.choice([8.0, 32.0, 64.0, 128.0], 500), "context": rng.choice([512.0, 2048.0, 8192.0, 16384.0], 500),
    }  # fmt: skip
    heads = {"num_heads": 32.0, "num_key_value_heads": 4.0}
    end, missed = play(load | {name: np.full(500, value) for name, value in heads.items()}, 64.0, 188.0)
    waits = np.maximum(missed[:, CACHES.index(196608.0)] / (0.35 * 188.0) - end, 0.0)
    assert (waits > end / 4).mean() > 0.1
    time_us = 4.0 + 0.0185 * (end + waits)
    model = Trend([188.0]).fit(plain_samples("mixed", "mixed_attention", load, time_us, constants=heads)).to_model()
    assert model.time_us(load) == pytest.approx(time_us, rel=0.01)
