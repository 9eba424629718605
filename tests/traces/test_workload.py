"""Prefix blocks against the naive definition on token lists."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtwin.traces.table import from_columns
from kvtwin.traces.workload import intern_token_blocks, prefix_blocks

Prompts = list[tuple[int, list[int] | None]]


def _table(prompts: Prompts) -> pa.Table:
    columns: dict[str, Any] = {
        "request_id": [str(row) for row in range(len(prompts))],
        "arrival_ns": [0] * len(prompts),
        "input_tokens": [length for length, _ in prompts],
        "output_tokens": [1] * len(prompts),
        "block_hashes": pa.array([ids for _, ids in prompts], pa.list_(pa.uint64())),
    }
    return from_columns("requests", columns, "test")


@st.composite
def hashed_prompts(draw: st.DrawFn) -> tuple[int, Prompts]:
    """Prompts as the oracle gives them: a length and one id per block, the last block perhaps partial."""
    block = draw(st.integers(1, 6))
    prompts: Prompts = []
    for _ in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 24))
        size = -(-length // block)
        ids = draw(st.none() | st.lists(st.integers(0, 3), min_size=size, max_size=size))
        prompts.append((length, ids))
    return block, prompts


def _tokens(length: int, ids: list[int], block: int) -> list[int]:
    """README_VLLM.md: prompt token j is hash_ids[j // H] * H + j % H."""
    return [ids[j // block] * block + j % block for j in range(length)]


def _assert_same_sharing(found: list[np.ndarray], tokens: list[list[int] | None], block_size: int) -> None:
    for ids, prompt in zip(found, tokens, strict=True):
        assert ids.dtype == np.int64
        assert len(ids) == (0 if prompt is None else len(prompt) // block_size)
        assert len(ids) == 0 or ids.min() >= 0
    names: dict[int, tuple[int, ...]] = {}
    for ids, prompt in zip(found, tokens, strict=True):
        for i, name in enumerate(ids.tolist()):
            assert prompt is not None
            content = tuple(prompt[: (i + 1) * block_size])
            assert names.setdefault(name, content) == content  # one id, one prefix ...
    assert len(set(names.values())) == len(names)  # ... and one prefix, one id


@given(hashed_prompts(), st.integers(1, 9))
def test_hash_ids_share_exactly_where_their_tokens_do(case: tuple[int, Prompts], block_size: int) -> None:
    block, prompts = case
    tokens = [None if ids is None else _tokens(length, ids, block) for length, ids in prompts]
    _assert_same_sharing(prefix_blocks(_table(prompts), block, block_size), tokens, block_size)


@given(st.integers(1, 4), st.integers(1, 3), st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=16), min_size=1))
def test_interned_tokens_share_exactly_where_the_tokens_do(block: int, multiple: int, prompts: list[list[int]]) -> None:
    hashes = intern_token_blocks(prompts, block)
    table = _table([(len(p), None if h is None else h.tolist()) for p, h in zip(prompts, hashes, strict=True)])
    size = block * multiple
    _assert_same_sharing(prefix_blocks(table, block, size), list(prompts), size)


@given(st.lists(st.lists(st.integers(0, 1), max_size=9)), st.integers(1, 4))
def test_interned_ids_count_up_from_zero_by_first_appearance(prompts: list[list[int]], block: int) -> None:
    flat = [int(name) for ids in intern_token_blocks(prompts, block) if ids is not None for name in ids]
    first_seen = list(dict.fromkeys(flat))
    assert first_seen == list(range(len(first_seen)))


@given(hashed_prompts(), st.integers(1, 9))
def test_slices_and_chunks_change_nothing(case: tuple[int, Prompts], block_size: int) -> None:
    block, prompts = case
    table = _table(prompts)
    whole = prefix_blocks(table, block, block_size)
    for other in (
        pa.concat_tables([table.slice(0, 1), table.slice(1)]),
        pa.concat_tables([table, table]).slice(len(prompts)),
    ):
        for expected, found in zip(whole, prefix_blocks(other, block, block_size), strict=True):
            assert np.array_equal(expected, found)


def test_unknown_prompts_share_nothing() -> None:
    table = _table([(40, None), (40, None)])
    for hash_block_tokens in (None, 16):
        assert [len(ids) for ids in prefix_blocks(table, hash_block_tokens, 16)] == [0, 0]
    assert intern_token_blocks([None, [1, 2]], 2)[0] is None
    assert prefix_blocks(_table([]), 16, 16) == []


def test_blocks_beyond_the_hashes_are_left_out() -> None:
    table = _table([(40, [1, 2])])  # tokens 32 to 39 have no hash
    assert [ids.tolist() for ids in prefix_blocks(table, 16, 8)] == [[0, 1, 2, 3]]
    assert [ids.tolist() for ids in prefix_blocks(table, 16, 16)] == [[0, 1]]


def test_an_id_alone_says_nothing() -> None:
    """The same id after another block is another prefix; as the first block it is the same."""
    found = prefix_blocks(_table([(8, [1, 2]), (8, [3, 2]), (8, [1, 2])]), 4, 4)
    assert found[0].tolist() == found[2].tolist()
    assert not set(found[0].tolist()) & set(found[1].tolist())


@pytest.mark.parametrize("hash_block_tokens", [1, 7, 512, 1 << 20])
def test_memory_follows_the_prompts_not_the_hashes(hash_block_tokens: int) -> None:
    """A file that claims a thousand huge blocks for a prompt of a few tokens expands to those few tokens."""
    (ids,) = prefix_blocks(_table([(10, list(range(1000)))]), hash_block_tokens, 2)
    assert len(ids) == 5


def test_oracle_cache_hits_are_found_in_real_traces(shared: Any) -> None:
    """Upper bound: with every block cached for ever, at least as many tokens hit as the real scheduler found."""
    from kvtwin.traces.readers import read_run

    run = read_run(shared / "oracle" / "vllm" / "c_synth_300")
    assert run.info.hash_block_tokens is not None
    seen: set[int] = set()
    cached = run.requests.column("cached_tokens").to_pylist()
    for ids, hit in zip(prefix_blocks(run.requests, run.info.hash_block_tokens, 16), cached, strict=True):
        known = sum(1 for _ in itertools.takewhile(seen.__contains__, ids.tolist()))
        assert known * 16 >= hit
        seen.update(ids.tolist())
    assert sum(cached) > 0
