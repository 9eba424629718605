"""Whole steps as Splitwise has them: what the physics of prompt and token steps must follow, on known truths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvtwin.calibrate.tables.calibrate import fit_samples
from kvtwin.calibrate.tables.candidates import Trend
from kvtwin.calibrate.tables.checks import prepare
from kvtwin.calibrate.tables.choice import choose
from kvtwin.calibrate.tables.holdout import HeldOut
from kvtwin.calibrate.tables.suspects import faster_than_less
from kvtwin.traces.readers.op_tables import read_op_table
from kvtwin.traces.readers.optable import OpSamples

SamplesOf = Callable[..., OpSamples]
Column = npt.NDArray[np.float64]

BATCHES = np.array([1, 2, 4, 8, 16, 32, 64])
LENGTHS = np.array([128, 256, 512, 1024, 2048, 4096, 8192])


def measured(at: int, sizes: npt.NDArray[np.int64]) -> tuple[Column, Column]:
    """Splitwise's cross: batches of 512-token prompts, and single prompts of every length."""
    batch = np.concatenate([BATCHES, np.ones(len(sizes))])
    return batch, np.concatenate([np.full(len(BATCHES), at), sizes]).astype(np.float64)


def left_out(samples: OpSamples, held: npt.NDArray[np.bool_]) -> Column:
    """Relative errors of the physics fitted without the held-out rows."""
    columns = {name: values[held] for name, values in samples.columns.items()}
    return np.abs(Trend().fit(samples.where(~held)).time_us(columns) / samples.time_us[held] - 1)


@pytest.mark.parametrize("batch", [16, 32])
def test_a_prompt_step_that_takes_another_path_beyond_some_size(samples_of: SamplesOf, batch: int) -> None:
    """The path shows in single prompts as long as the batch that was left out, or in larger batches."""
    seqs, prompt = measured(512, LENGTHS)
    tokens = seqs * prompt
    time_us = 5e4 + 150.0 * tokens + 9e5 * (tokens > 4096)
    samples = samples_of("prompt_step", {"num_seqs": seqs, "prompt_tokens": prompt}, time_us)
    assert left_out(samples, seqs == batch).max() < 0.01


def test_decodes_that_wait_for_the_weights_do_not_bend_before_tens_of_them(samples_of: SamplesOf) -> None:
    seqs, context = measured(576, LENGTHS)
    time_us = 5e4 + 200.0 * seqs + 0.2 * seqs * context + 600.0 * np.maximum(seqs - 32, 0)
    samples = samples_of("token_step", {"num_decode": seqs, "context": context}, time_us)
    assert left_out(samples, seqs == 32).max() < 0.01
    assert left_out(samples, seqs == 16).max() < 0.01


def test_a_step_that_is_faster_than_one_with_less_work_is_suspect(samples_of: SamplesOf) -> None:
    seqs, prompt = measured(512, LENGTHS)
    time_us = 5e4 + 150.0 * seqs * prompt
    time_us[seqs == 64] = 8e5
    samples = samples_of("prompt_step", {"num_seqs": seqs, "prompt_tokens": prompt}, time_us)
    assert np.array_equal(faster_than_less(samples), seqs == 64)


def test_one_step_that_is_too_slow_casts_no_doubt_on_larger_ones(samples_of: SamplesOf) -> None:
    seqs, prompt = measured(512, LENGTHS)
    time_us = 5e4 + 150.0 * seqs * prompt
    time_us[seqs == 4] *= 20
    samples = samples_of("prompt_step", {"num_seqs": seqs, "prompt_tokens": prompt}, time_us)
    assert np.array_equal(faster_than_less(samples), seqs == 4)


def pairs_apart(samples: OpSamples) -> npt.NDArray[np.bool_]:
    """The rule of `faster_than_less` as its docstring says it, pair by pair."""
    loads, index = np.unique(np.column_stack(list(samples.load.values())), axis=0, return_inverse=True)
    index = index.ravel()
    median = np.array([np.median(samples.time_us[index == batch]) for batch in range(len(loads))])
    less = np.all(loads[:, None] <= loads[None, :], axis=2)  # the first of a pair has no more of anything
    apart = less & (median[None, :] < 0.75 * median[:, None])
    doubted = np.zeros(len(samples), np.bool_)
    while apart.any():
        worst = int(np.argmax(apart.sum(axis=0) + apart.sum(axis=1)))
        doubted |= index == worst
        apart[worst], apart[:, worst] = False, False
    return doubted


@pytest.mark.parametrize("seed", range(40))
def test_steps_that_are_too_fast_are_those_that_all_pairs_show(seed: int, samples_of: SamplesOf) -> None:
    """Grids and scattered batches, with repeats and equal times, few and so many that pairs are not compared."""
    rng = np.random.default_rng(seed)
    num_rows, num_values = int(rng.choice([1, 30, 900])), int(rng.choice([3, 40, 10_000]))
    load = {name: rng.integers(1, 1 + num_values, num_rows) for name in ("num_decode", "context")}
    if seed % 2:
        load["output_tokens"] = rng.integers(1, 1 + num_values, num_rows)
    time_us = np.round(5e4 + 1e4 * sum(load.values()) * rng.lognormal(0, rng.choice([0.05, 0.5]), num_rows), -3)
    samples = samples_of("token_step", load, time_us)
    assert np.array_equal(faster_than_less(samples), pairs_apart(samples))


def test_splitwise_marks_its_suspect_rows_and_the_rule_finds_them_unmarked(shared: Path) -> None:
    table = prepare(read_op_table(shared / "data/profiles/splitwise/perf_model_clean.csv.gz"))
    for samples in table.samples:
        doubted = faster_than_less(replace(samples, suspect=np.zeros(len(samples), np.bool_)))
        marked = samples.suspect if samples.op == "prompt_time" else np.zeros(len(samples), np.bool_)
        assert np.array_equal(doubted, marked), samples.name


def test_batches_of_long_prompts_are_priced_by_physics_where_only_a_cross_was_measured(samples_of: SamplesOf) -> None:
    """A straight line fits the arms as well as physics does, and knows nothing between them."""
    seqs, prompt = measured(512, LENGTHS)
    time_us = 5e4 + 150.0 * seqs * prompt
    samples = samples_of("prompt_step", {"num_seqs": seqs, "prompt_tokens": prompt}, time_us)
    batch = {"num_seqs": np.array([16.0]), "prompt_tokens": np.array([4096.0])}
    assert fit_samples(samples, None).model.time_us(batch)[0] == pytest.approx(5e4 + 150.0 * 16 * 4096, rel=0.02)
    held = HeldOut(
        np.arange(len(seqs)), np.full(len(seqs), "num_seqs"), np.ones(len(seqs), np.bool_), np.arange(len(seqs)),
        {"trend": 1.1 * time_us, "linear": time_us},
    )  # fmt: skip
    assert choose(samples, held).name == "trend"
