"""Step latency composed from kernel tables: dense operators, attention, per-sequence work, launch gaps.

    step = tokens(T) + sequences(n) + num_layers * attention + num_kernels * launch_gap

Attention of a step with d decodes (total context C, largest M, spread s) and prefill chunks of P tokens in all:

    decode only   decode(d, C/d)                            + unevenness_decode(d, v) * (M - C/d)
    with prefill  prefill(P, K) + increment(P, K, d, C/d)   + unevenness_mixed(d, v)  * (M - C/d)

The tables are measured with equal contexts. Where contexts differ, the thread blocks of the longest one end
last: time grows with the excess of the longest over the mean, by a slope that falls with the number of
decodes (more waves fill the tail) and with v = s / (M - C/d), the share of long ones. K is the prefix
length that gives one chunk of P tokens as many (query, key) pairs as the step's chunks have in all. Where they have
fewer than P tokens in one chunk, they are several: several(P, q) stands for prefill(P, K), with the number q of equal
chunks that have as many pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvtwin.sim.latency.grid import FloatArray, Grid
from kvtwin.sim.latency.pricing import Durations, OnDemand, Pricer
from kvtwin.sim.latency.stats import BatchRow, BatchStats, IntArray

_STEPS_AT_ONCE: Final = 8192  # what is made of them on the way fits the processor's cache


@dataclass(frozen=True)
class ComposedLatency:
    """Tables in microseconds; see the module's formula.

    Attributes:
        num_layers: layers that each run attention.
        num_kernels: kernels launched per step, each preceded by a gap.
        launch_gap_us: idle time of the device before each kernel.
        tokens: 1-D parts by new tokens, already summed over layers, by name ("dense", "moe", "collectives").
        sequences: by number of requests (lm_head, sampler).
        decode, prefill, increment: attention of one layer.
        several: attention of one layer by (P, q); None for times of one chunk whatever the prompts.
        unevenness_decode, unevenness_mixed: slope in us per token, by (decodes, v).
    """

    num_layers: int
    num_kernels: int
    launch_gap_us: float
    tokens: Mapping[str, Grid]
    sequences: Grid
    decode: Grid
    prefill: Grid
    increment: Grid
    unevenness_decode: Grid
    unevenness_mixed: Grid
    several: Grid | None = None

    def step_ns(self, batches: BatchStats, first_step: int) -> IntArray:  # noqa: ARG002 - the contract's
        """See `LatencyModel.step_ns`."""
        result = np.empty(len(batches), np.int64)
        for start in range(0, len(batches), _STEPS_AT_ONCE):
            part = slice(start, start + _STEPS_AT_ONCE)
            columns = np.asfortranarray(batches.table[part])  # each column in one piece
            result[part] = self._step_ns(BatchStats(columns))
        return result

    def _step_ns(self, batches: BatchStats) -> FloatArray:
        time_us = sum(self.parts_us(batches).values())
        return np.maximum(np.rint(np.asarray(time_us) * 1e3), 1)

    def parts_us(self, batches: BatchStats) -> dict[str, FloatArray]:
        """What each step's time is made of, in microseconds: arrays of shape (n,) by part."""
        parts = {name: grid(batches.num_tokens) for name, grid in self.tokens.items()}
        parts["sequences"] = self.sequences(batches.num_reqs)
        parts["attention"] = self.num_layers * self.attention_us(batches)
        parts["launch gaps"] = np.full(len(batches), self.num_kernels * self.launch_gap_us)
        return parts

    def attention_us(self, batches: BatchStats) -> FloatArray:
        """Attention of one layer, in microseconds."""
        decodes = batches.num_decode
        mean = batches.decode_context / np.maximum(decodes, 1)
        time_us = np.empty(len(batches))
        pure = batches.num_prefill == 0
        for kind, price in ((pure, self._decode_us), (~pure, self._mixed_us)):
            if kind.all():
                return price(batches, mean)
            here = BatchStats(batches.table.T.compress(kind, axis=1).T)  # columns stay in one piece
            time_us[kind] = price(here, mean[kind])
        return time_us

    def _decode_us(self, batches: BatchStats, mean: FloatArray) -> FloatArray:
        time_us = self.decode(batches.num_decode, mean)
        return np.maximum(time_us + _unevenness_us(self.unevenness_decode, batches, mean), 0.0)

    def _mixed_us(self, batches: BatchStats, mean: FloatArray) -> FloatArray:
        tokens, pairs = batches.prefill_tokens, batches.prefill_pairs
        prefix = np.maximum(pairs - tokens * (tokens + 1) // 2, 0) / tokens
        chunk = np.maximum(tokens, self.prefill.axes[0][0])  # below the smallest measured chunk time is flat
        time_us = self.prefill(chunk, prefix)
        if self.several is not None:
            shared = prefix == 0
            count = tokens[shared] * tokens[shared] / (2 * pairs[shared] - tokens[shared])
            time_us[shared] = self.several(chunk[shared], count)
        time_us = time_us + self.increment(chunk, prefix, batches.num_decode, mean)
        return np.maximum(time_us + _unevenness_us(self.unevenness_mixed, batches, mean), 0.0)

    def pricer(self) -> Pricer:
        """See `pricing.pricer_for`."""
        return ComposedPricer(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ComposedLatency:
        """Read `to_json`'s output. Raises KeyError, TypeError or ValueError on anything else."""
        grids = {
            name: _grid(data[name])
            for name in ("sequences", "decode", "prefill", "increment", "unevenness_decode", "unevenness_mixed")
        }
        return cls(
            num_layers=int(data["num_layers"]),
            num_kernels=int(data["num_kernels"]),
            launch_gap_us=float(data["launch_gap_us"]),
            tokens={name: _grid(grid) for name, grid in data["tokens"].items()},
            several=_grid(data["several"]) if "several" in data else None,
            **grids,
        )

    def to_json(self) -> dict[str, Any]:
        """Numbers and names only; times in microseconds to a tenth of a nanosecond."""
        data = {key: value for key, value in vars(self).items() if not isinstance(value, Grid | Mapping | None)}
        data["tokens"] = {name: _grid_json(grid) for name, grid in self.tokens.items()}
        data.update({key: _grid_json(value) for key, value in vars(self).items() if isinstance(value, Grid)})
        return data


class ComposedPricer:
    """Prices of `ComposedLatency` for one batch at a time, in plain floats: the same sums in the same order."""

    needs_spread = True

    def __init__(self, model: ComposedLatency) -> None:
        self._model = model
        self._gaps_us = model.num_kernels * model.launch_gap_us

    def step_ns(self, row: tuple[int, ...], step: int) -> int:  # noqa: ARG002 - the contract's
        """See `Pricer`."""
        batch = BatchRow(*row)
        return self._total_ns(self._before_attention_us(batch), self._attention_us(batch))

    def stretch(
        self,
        num_decode: int,
        context: int,
        context_sq: int,
        context_max: int,
        most: int,
        step: int,  # noqa: ARG002 - the contract's
    ) -> Durations:
        """See `Pricer`."""
        first = (num_decode, context, context_sq, context_max)
        before_us = self._before_attention_us(BatchRow(*first, 0, 0, 0, 0, 0))

        def price_one(ahead: int) -> int:
            squares = context_sq + (2 * context + num_decode * ahead) * ahead
            batch = BatchRow(num_decode, context + num_decode * ahead, squares, context_max + ahead, 0, 0, 0, 0, 0)
            return self._total_ns(before_us, self._attention_us(batch))

        # Measured tables need not grow everywhere.
        return OnDemand(self._model, first, price_one, most, grows=False)

    def _before_attention_us(self, batch: BatchRow) -> float:
        time_us = 0.0
        for grid in self._model.tokens.values():
            time_us += grid.at(batch.num_tokens)
        return time_us + self._model.sequences.at(batch.num_reqs)

    def _total_ns(self, before_attention_us: float, attention_us: float) -> int:
        time_us = before_attention_us + self._model.num_layers * attention_us + self._gaps_us
        return max(round(time_us * 1e3), 1)

    def _attention_us(self, batch: BatchRow) -> float:
        model, decodes = self._model, batch.num_decode
        mean = batch.decode_context / max(decodes, 1)
        if batch.num_prefill:
            tokens, pairs = batch.prefill_tokens, batch.prefill_pairs
            prefix = max(pairs - tokens * (tokens + 1) // 2, 0) / tokens
            chunk = max(float(tokens), model.prefill.axes[0].item(0))
            if prefix == 0 and model.several is not None:
                time_us = model.several.at(chunk, tokens * tokens / (2 * pairs - tokens))
            else:
                time_us = model.prefill.at(chunk, prefix)
            time_us += model.increment.at(chunk, prefix, decodes, mean)
            slopes = model.unevenness_mixed
        else:
            time_us = model.decode.at(decodes, mean)
            slopes = model.unevenness_decode
        excess = batch.decode_context_max - mean
        variance = batch.decode_context_sq / max(decodes, 1) - mean * mean
        share = math.sqrt(max(variance, 0.0)) / max(excess, 1.0)
        (num_low, num_high), (share_low, share_high) = ((axis.item(0), axis.item(-1)) for axis in slopes.axes)
        slope = slopes.at(min(max(float(decodes), num_low), num_high), min(max(share, share_low), share_high))
        return max(time_us + max(slope, 0.0) * excess, 0.0)


def _unevenness_us(slopes: Grid, batches: BatchStats, mean: FloatArray) -> FloatArray:
    excess = batches.decode_context_max - mean
    variance = batches.decode_context_sq / np.maximum(batches.num_decode, 1) - mean * mean
    share = np.sqrt(np.maximum(variance, 0.0)) / np.maximum(excess, 1.0)
    return np.maximum(_clamped(slopes, batches.num_decode, share), 0.0) * excess


def _clamped(grid: Grid, *coordinates: FloatArray | IntArray) -> FloatArray:
    """Interpolate, holding the edge values outside the grid."""
    pairs = zip(coordinates, grid.axes, strict=True)
    return grid(*(np.clip(values.astype(np.float64), axis[0], axis[-1]) for values, axis in pairs))


def _grid(data: Mapping[str, Any]) -> Grid:
    return Grid(data["axes"], data["values"])


def _grid_json(grid: Grid) -> dict[str, Any]:
    return {"axes": [axis.tolist() for axis in grid.axes], "values": np.round(grid.values, 4).tolist()}
