"""Terms of work: closed forms against what they stand for, and prices of terms that are known."""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtwin.calibrate.tables.candidates import Trend
from kvtwin.sim.latency.work.lists import list_end
from kvtwin.sim.latency.work.terms import WORKS, trend
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.optable import plain_samples


@given(st.integers(1, 12), st.integers(0, 40), st.integers(1, 9), st.integers(0, 40), st.integers(1, 9))
def test_list_scheduling_in_closed_form(slots: int, many: int, long: int, more: int, other: int) -> None:
    ends = [0.0] * slots
    for block in [long] * many + [other] * more:
        heapq.heapreplace(ends, ends[0] + block)
    first, length, second, span = (np.array([float(value)]) for value in (many, long, more, other))
    assert list_end(first, length, second, span, float(slots))[0] == pytest.approx(max(ends))


def test_a_price_of_another_version_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="prices 'missed keys', which this version does not know: calibrate it anew"):
        trend("tokens", {"num_tokens": np.array([1.0])}, {"call": 1.0, "missed keys": 2.0}, 16.0, 0.0)


def test_every_work_has_non_negative_finite_terms() -> None:
    names = {
        "chunk": 300, "prefix": 1000, "num_decode": 7, "context": 900, "num_seqs": 3, "long_share": 0.25, "skew": 2.0,
        "prompt_tokens": 700, "longest": 500, "squares": 90_000, "m": 300, "n": 4096, "k": 4096, "num_tokens": 300,
        "hidden_size": 2048, "inter_size": 768, "topk": 8, "num_experts": 128, "num_bytes": 1 << 20, "num_gpus": 4,
    }  # fmt: skip
    columns = {name: np.array([float(value)]) for name, value in names.items()}
    for work, found in WORKS.items():
        for slots in (0.0, 188.0):
            for name, values in found(columns, 64.0, slots).items():
                assert np.all(np.isfinite(values)) and np.all(values >= 0), (work, name)


def test_trend_is_the_sum_of_its_priced_terms() -> None:
    columns = {"num_tokens": np.array([100.0, 300.0])}
    assert trend("tokens", columns, {"call": 2.0, "tiles": 1.0}, 64.0, 0.0).tolist() == [4.0, 7.0]


@pytest.mark.parametrize("work", ["prefill_attention", "mixed_attention"])
def test_prefills_by_their_keys_are_as_few_equal_ones_as_can_have_so_short_a_past(work: str) -> None:
    decodes = {"num_decode": np.array([4.0, 4.0]), "context": np.array([100.0, 100.0])}
    # 64 tokens whose queries see 16 keys: two prefills of 32 tokens, without a past; 300 keys: one, with 268 behind it.
    together = {"prefill_tokens": np.array([64.0, 64.0]), "prefill_key": np.array([16.0, 300.0])}
    each = {"num_seqs": np.array([2.0, 1.0]), "chunk": np.array([32.0, 64.0]), "prefix": np.array([0.0, 268.0])}
    found, expected = (WORKS[work](columns | decodes, 64.0, 8.0) for columns in (together, each))
    assert {name: values.tolist() for name, values in found.items()} == {
        name: values.tolist() for name, values in expected.items()
    }


def prompts(counts: list[float], chunks: list[float]) -> dict[str, np.ndarray]:
    seqs, chunk = (values.ravel() for values in np.meshgrid(counts, chunks, indexing="ij"))
    heads = {"num_heads": np.full(len(seqs), 32.0), "num_key_value_heads": np.full(len(seqs), 8.0)}
    return {**heads, "num_seqs": seqs, "chunk": chunk}


def test_prompts_of_one_token_that_run_as_decodes_are_recognised() -> None:
    """FlashAttention-2 packs the queries of a group for them: a quarter of the blocks (`seqlenq_ngroups_swapped`)."""
    columns = prompts([2.0**power for power in range(9)], [1.0, 16.0, 64.0, 256.0])
    blocks = columns["num_seqs"] * np.where(columns["chunk"] == 1, 8.0, 32.0) * np.ceil(columns["chunk"] / 64)
    time_us = 5.0 + 3.0 * np.ceil(blocks / 132)
    load = {name: columns[name] for name in ("num_seqs", "chunk")}
    shape = {name: columns[name] for name in ("num_heads", "num_key_value_heads")}
    samples = replace(plain_samples("attention", "prefill_attention", load, time_us), shape=shape)
    model = Trend([132.0]).fit(samples).to_model()
    assert model.time_us(columns) == pytest.approx(time_us, rel=0.02)
    assert all(
        "packed" not in name for name in Trend([132.0]).fit(samples.where(columns["chunk"] > 1)).to_model().prices
    )


def test_a_cliff_where_the_rows_of_a_call_leave_the_cache_is_found_on_its_diagonal() -> None:
    columns = prompts([2.0**power for power in range(9)], [2.0**power for power in range(4, 11)])
    rows = 80.0 * columns["num_seqs"] * columns["chunk"]  # queries, outputs, keys and values
    time_us = 6.0 + np.where(rows >= 524288, 2e-4 * rows, 2e-5 * rows)
    load = {name: columns[name] for name in ("num_seqs", "chunk")}
    shape = {name: columns[name] for name in ("num_heads", "num_key_value_heads")}
    samples = replace(plain_samples("attention", "prefill_attention", load, time_us), shape=shape)
    known = columns["chunk"] != 64  # prompts of 64 tokens go over the cliff at 128, as 64 of 128 tokens do
    model = Trend([132.0]).fit(samples.where(known)).to_model()
    assert np.abs(model.time_us(columns) / time_us - 1)[~known].mean() < 0.05


def test_a_mean_decode_step_of_a_generation_has_the_context_of_its_middle() -> None:
    mean = {"num_decode": np.array([4.0]), "prompt_tokens": np.array([512.0]), "output_tokens": np.array([129.0])}
    one = {"num_decode": np.array([4.0]), "context": np.array([576.0])}
    found, expected = (WORKS["token_step"](columns, 64.0, 0.0) for columns in (mean, one))
    assert {name: values.tolist() for name, values in found.items()} == {
        name: values.tolist() for name, values in expected.items()
    }


def test_kernels_that_pack_the_heads_of_a_group_are_recognised() -> None:
    """FlashAttention-3 and FlashInfer: 16 tokens of four heads that share keys fill a tile of 64 rows."""
    columns = prompts([2.0**power for power in range(9)], [2.0**power for power in range(2, 10)])
    blocks = columns["num_seqs"] * 8.0 * np.ceil(columns["chunk"] * 4 / 64)
    time_us = 5.0 + 3.0 * np.ceil(blocks / 132)
    load = {name: columns[name] for name in ("num_seqs", "chunk")}
    shape = {name: columns[name] for name in ("num_heads", "num_key_value_heads")}
    samples = replace(plain_samples("attention", "prefill_attention", load, time_us), shape=shape)
    assert Trend([132.0]).fit(samples).time_us(columns) == pytest.approx(time_us, rel=0.02)
