"""What a table must be before it is fitted: one engine version, enough rows, plausible units.

A wrong unit is off by a thousand, a wrong model by a factor: the bounds leave a decade of room on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from kvtwin.calibrate.models import MODELS
from kvtwin.calibrate.tables.suspects import faster_than_smallest, with_suspects
from kvtwin.calibrate.tables.timer import timer_step_us
from kvtwin.sim.latency.work.columns import context_of_each
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.optable import FloatArray, OpSamples, OpTable

MIN_ROWS: Final = 8  # of one operator under one key: fewer leave nothing to hold out
_WITH_HEADS: Final = ("prefill_attention", "decode_attention", "mixed_attention", "uneven_decode", "uneven_mixed")

# Multiply-adds per microsecond of the fastest device (NVL72's share in 4 bits is 15e15 operations/s) and of a slow core.
_MOST_PRODUCTS_PER_US: Final = 2e10
_LEAST_PRODUCTS_PER_US: Final = 2e4
# Keys (one per sequence, position and key-value head; 256 bytes or more) read per microsecond, from cache at best.
_MOST_KEYS_PER_US: Final = 4e5
_LEAST_KEYS_PER_US: Final = 0.2
# Bounds of the shortest time of any kernel in a table: a launch takes about 1 us on a GPU, and the smallest batch little
# more (24 us is the most seen). A linear operator alone may read a gigabyte of weights (lm_head).
_SHORTEST_US: Final = (0.05, 500.0)
_SHORTEST_ALONE_US: Final = (0.05, 50_000.0)
# The shortest step of a whole model, for each kind of step.
_SHORTEST_STEP_US: Final = (200.0, 10e6)


def prepare(table: OpTable) -> OpTable:
    """Check a table and complete its samples; doubtful rows are marked, never dropped.

    Raises:
        InputError: two engine versions, an implausible unit, or no operator with MIN_ROWS rows.
    """
    samples = prepare_test(table).samples
    kept = [sample for sample in samples if np.count_nonzero(~sample.suspect) >= MIN_ROWS]
    if not kept:
        most = max(np.count_nonzero(~sample.suspect) for sample in samples)
        problem = (
            f"{most} rows of one operator under one key at most: {MIN_ROWS} or more are needed to fit and hold out"
        )
        raise InputError(problem, path=table.path)
    return replace(table, samples=kept)


def prepare_test(table: OpTable) -> OpTable:
    """The same for a table that only judges: any number of rows will do."""
    _one_version(table)
    samples = [_with_heads(sample, table) for sample in table.samples]
    _require_plausible(table, samples)
    samples = _with_timer_step([_with_usual_heads(sample) for sample in samples])
    return replace(table, samples=[with_suspects(sample) for sample in samples])


def too_small(table: OpTable) -> list[str]:
    """Names of the operators that `prepare` leaves out for want of rows."""
    return [sample.name for sample in table.samples if np.count_nonzero(~sample.suspect) < MIN_ROWS]


def _one_version(table: OpTable) -> None:
    for name in ("version", "framework"):
        found = sorted({sample.key[name] for sample in table.samples if name in sample.key})
        if len(found) > 1:
            problem = f"holds {len(found)} engine versions ({', '.join(found)}), which are never averaged over: "
            problem += f"choose one with --filter {name}={found[-1]}"
            raise InputError(problem, path=table.path, column=name)


def _with_heads(sample: OpSamples, table: OpTable) -> OpSamples:
    """Heads on each GPU, where the file says which model was measured."""
    model = MODELS.get(table.facts.get("model", ""))
    degree = sample.key.get("tensor_parallel_size", "")
    if model is None or not degree.isdigit() or "num_heads" in sample.constants or "attention" not in sample.op:
        return sample
    heads = max(model.num_attention_heads // int(degree), 1)
    kv_heads = max(model.num_key_value_heads // int(degree), 1)
    found = {"num_heads": float(heads), "num_key_value_heads": float(kv_heads)}
    return replace(sample, constants={**sample.constants, **found})


def _with_timer_step(samples: list[OpSamples]) -> list[OpSamples]:
    """The timer's step, where the file's reader does not know it and its times show it."""
    if not samples or any(sample.resolution_us for sample in samples):
        return samples
    step = timer_step_us(np.concatenate([sample.time_us for sample in samples]))
    return [replace(sample, resolution_us=step) for sample in samples]


def _with_usual_heads(sample: OpSamples) -> OpSamples:
    """Attention of an unknown model as if it had 64 query heads in groups of four on each GPU.

    What its times show is thread blocks at once for each head, and the fit looks for 1 to 8 on a multiprocessor: with 8
    to 64 heads in truth, the right number is among them.
    """
    if "num_heads" in sample.columns or "num_heads" in sample.constants or sample.work not in _WITH_HEADS:
        return sample
    return replace(sample, constants={**sample.constants, "num_heads": 64.0, "num_key_value_heads": 16.0})


def _require_plausible(table: OpTable, samples: Sequence[OpSamples]) -> None:
    kernels: dict[str, float] = {}  # operators: their shortest times
    for sample in samples:
        shortest, kind = float(sample.time_us.min()), _kind(sample)
        if kind == "kernel":
            kernels[sample.op] = min(shortest, kernels.get(sample.op, np.inf))
        else:  # modules are many kernels
            _require_shortest(table, kind, shortest, _SHORTEST_STEP_US if kind == "step" else _SHORTEST_ALONE_US)
    if kernels:
        may_be_weights = len(kernels) == 1 and all(sample.work == "tokens" for sample in samples)
        bounds = _SHORTEST_ALONE_US if may_be_weights else _SHORTEST_US
        _require_shortest(table, "kernel", min(kernels.values()), bounds)
    for sample in samples:
        work, (least, most), unit = _amount(sample)
        if work is None:
            continue
        rate = float(np.quantile(work / sample.time_us, 0.99))
        if not least <= rate <= most:
            raise _wrong_unit(table, f"{sample.op}: {rate:,.3g} {unit} per microsecond at best", rate < least)


def _require_shortest(table: OpTable, kind: str, time_us: float, bounds: tuple[float, float]) -> None:
    if not bounds[0] <= time_us <= bounds[1]:
        raise _wrong_unit(table, f"the shortest {kind} takes {time_us:,.4g} us", time_us > bounds[1])


def _kind(sample: OpSamples) -> str:
    if sample.work.endswith("_step"):
        return "step"
    return "module" if "module" in sample.op or "mla" in sample.op else "kernel"


def _amount(sample: OpSamples) -> tuple[FloatArray | None, tuple[float, float], str]:
    """Work of each row that a roofline bounds, and the bounds of its rate."""
    column = {name: np.asarray(values, np.float64) for name, values in sample.columns.items()}
    if sample.work == "gemm":
        return column["m"] * column["n"] * column["k"], (_LEAST_PRODUCTS_PER_US, _MOST_PRODUCTS_PER_US), "multiply-adds"
    if sample.work == "decode_attention" and _kind(sample) == "kernel":
        if "num_key_value_heads" in column:
            heads: FloatArray | float = column["num_key_value_heads"]
        else:
            heads = sample.constants.get("num_key_value_heads", 1.0)
        keys = column["num_decode"] * context_of_each(column) * heads
        keep = ~faster_than_smallest(sample) if not sample.constants.get("window_size") else np.zeros(len(keys), bool)
        if keep.any():
            return np.where(keep, keys, 0.0), (_LEAST_KEYS_PER_US, _MOST_KEYS_PER_US), "keys"
    return None, (0.0, np.inf), ""


def _wrong_unit(table: OpTable, found: str, too_long: bool) -> InputError:
    guess = "microseconds read as milliseconds" if too_long else "milliseconds read as microseconds"
    remedy = "divide" if too_long else "multiply"
    return InputError(
        f"the unit looks wrong: {found}, which no hardware does ({guess}?): {remedy} the times by 1000", path=table.path
    )
