"""Attention of one layer from a kernel table: decodes, prefills, and both in one launch.

Each part is fitted as any other table of operators is (`calibrate/tables/`): the candidate that predicts left-out values
best prices the nodes of the composed step's grids, those between measured values too. Parts with too few values to
hold any out are interpolated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate.kernels.table import Table, filled, hardware_of, kv_heads_of
from kvtwin.calibrate.models import ModelSpec
from kvtwin.calibrate.prefills import several_prefills
from kvtwin.calibrate.tables.calibrate import Fitted, fit_samples
from kvtwin.calibrate.tables.checks import MIN_ROWS
from kvtwin.calibrate.tables.fill import fill_bank
from kvtwin.calibrate.tables.holdout import folds
from kvtwin.sim.latency.grid import FloatArray, Grid
from kvtwin.sim.latency.work.columns import Columns
from kvtwin.sim.latency.work.schedule import PIECE
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.llmservingsim_profile import KernelProfile
from kvtwin.traces.readers.optable import OpSamples, plain_samples

_QUERY_TILE: Final = 64.0  # rows of queries per thread block of FlashAttention-2's paged kernel
PARTS: Final = ("decode", "prefill", "mixed")
_LEAST_ROWS: Final = 4  # to interpolate


@dataclass(frozen=True)
class Attention:
    """Attention of one layer; times in microseconds.

    Attributes:
        decode: by (decodes, context of each).
        prefill: by (chunk, prefix) of one prefill.
        several: by (tokens, number) of prefills without a prefix; None where prefills are too few to fit.
        increment: what decodes add to a prefill, by (chunk, prefix, decodes, context of each).
        fitted: the parts that were fitted, by name.
    """

    decode: Grid
    prefill: Grid
    several: Grid | None
    increment: Grid
    fitted: Mapping[str, Fitted]


def fit_attention(kernels: KernelProfile, model: ModelSpec, progress: Callable[[str], None]) -> Attention:
    """Fit the attention table of a kernel profile. Raises InputError where a part has too few rows to interpolate."""
    table = Table.of(kernels.attention)
    prefills, decodes = table.prefill_chunk > 0, table.n_decode > 0
    parts = dict(zip(PARTS, map(table.where, (~prefills, ~decodes, prefills & decodes)), strict=True))
    for name, part in parts.items():
        if len(part) < _LEAST_ROWS:
            raise InputError(f"attention.csv has {len(part)} {name} rows: too few to interpolate", path=kernels.path)
    parts["mixed"] = parts["mixed"].where(parts["mixed"].kv_prefill >= 0)
    fitted = {}
    for name, part in parts.items():
        samples = _samples(name, part, kernels, model)
        if len(samples) >= MIN_ROWS and any(True for _ in folds(samples)):  # else nothing tells candidates apart
            progress(samples.op)
            fitted[name] = fit_samples(samples, hardware_of(kernels))
    prefill = _prefill_grid(parts["prefill"], fitted.get("prefill"))
    return Attention(
        decode=_decode_grid(parts["decode"], fitted.get("decode")),
        prefill=prefill,
        several=several_prefills(fitted["prefill"], prefill.axes[0], {}) if "prefill" in fitted else None,
        increment=_increment(parts["mixed"], prefill, fitted.get("mixed")),
        fitted=fitted,
    )


def _samples(name: str, part: Table, kernels: KernelProfile, model: ModelSpec) -> OpSamples:
    degree = kernels.tensor_parallel_size
    heads = {
        "num_heads": float(max(model.num_attention_heads // degree, 1)),
        "num_key_value_heads": float(kv_heads_of(kernels, model)),
    }
    load: dict[str, npt.NDArray[Any]] = {}
    if name != "decode":
        load = {"chunk": part.prefill_chunk, "prefix": part.kv_prefill}
        if (part.kv_prefill < 0).any():  # batches of several prefills too
            keys = part.kv_prefill + part.prefill_chunk / 2
            load = {"prefill_tokens": part.prefill_chunk, "prefill_key": keys}
    if name != "prefill":
        load |= {"num_decode": part.n_decode, "context": part.kv_decode}
    return plain_samples(f"{name} attention", f"{name}_attention", load, part.time_us, constants=heads)


def _decode_grid(part: Table, found: Fitted | None) -> Grid:
    if found is None:
        return filled([part.n_decode, part.kv_decode], part.time_us)
    return _evaluated(found, {"num_decode": _and_between(part.n_decode), "context": _values(part.kv_decode)})


def _prefill_grid(part: Table, found: Fitted | None) -> Grid:
    """With the steps of thread blocks between measured chunks."""
    if found is None:
        return filled([part.prefill_chunk, part.kv_prefill], part.time_us)
    chunks = with_tile_ends(np.unique(part.prefill_chunk).astype(np.float64), (_QUERY_TILE,))
    return _evaluated(found, {"chunk": chunks, "prefix": _values(np.maximum(part.kv_prefill, 0))})


def _increment(part: Table, prefill: Grid, found: Fitted | None) -> Grid:
    """What decodes add to a prefill's attention, by (chunk, prefix, decodes, context); 0 decodes add nothing."""
    if found is None:
        added = part.time_us - prefill(part.prefill_chunk, part.kv_prefill)
        grid = filled([part.prefill_chunk, part.kv_prefill, part.n_decode, part.kv_decode], added)
    else:
        place = {"chunk": _values(part.prefill_chunk), "prefix": _values(part.kv_prefill)}
        both = _evaluated(
            found, place | {"num_decode": _and_between(part.n_decode), "context": _values(part.kv_decode)}
        )
        alone = prefill(*(values.ravel() for values in np.meshgrid(*place.values(), indexing="ij")))
        grid = Grid([axis.tolist() for axis in both.axes], both.values - alone.reshape(*both.values.shape[:2], 1, 1))
    chunks, prefixes, decodes, contexts = (axis.tolist() for axis in grid.axes)
    nothing = np.zeros((len(chunks), len(prefixes), 1, len(contexts)))
    return Grid([chunks, prefixes, [0.0, *decodes], contexts], np.concatenate([nothing, grid.values], axis=2))


def _evaluated(found: Fitted, axes: Mapping[str, FloatArray]) -> Grid:
    """What was fitted, on the product of axes; times its ratios to what was measured, where its candidate has none."""
    columns = dict(zip(axes, (values.ravel() for values in np.meshgrid(*axes.values(), indexing="ij")), strict=True))
    if "chunk" in columns:  # by either name, as older and newer tables have it
        columns |= {"prefill_tokens": columns["chunk"], "prefill_key": columns["prefix"] + columns["chunk"] / 2}
    load = found.samples.load
    ratio = found.samples.time_us / found.model.time_us(found.samples.columns)
    rest = fill_bank({}, load, ratio, octaves=True)({name: columns[name] for name in load})
    together = "chunk" in columns and "context" in columns
    time_us = rest * (time_of_unlike_lengths(found.model, columns) if together else found.model.time_us(columns))
    return Grid([axis.tolist() for axis in axes.values()], time_us.reshape([len(axis) for axis in axes.values()]))


class _TimeModel(Protocol):
    def time_us(self, columns: Columns) -> FloatArray: ...


def time_of_unlike_lengths(model: _TimeModel, columns: Columns) -> FloatArray:
    """Microseconds of n batches of prefills and decodes with about these contexts and prefixes, but not just these.

    There no context is split and a thread block takes whole pieces of keys. Tables are measured where pieces are full (prefixes)
    or have just begun (128, 256 ... keys and a decode's new one); in a batch the last pieces are half full on average, as
    those of a quarter of a piece less and more are.
    """
    shifts = {name: np.minimum(PIECE / 4, columns[name] - least) for name, least in (("context", 1.0), ("prefix", 0.0))}
    less, more = (
        model.time_us({**columns, **{name: columns[name] + sign * shift for name, shift in shifts.items()}})
        for sign in (-1.0, 1.0)
    )
    return (less + more) / 2


def _values(measured: npt.NDArray[np.int64]) -> FloatArray:
    return np.unique(measured).astype(np.float64)


def _and_between(measured: npt.NDArray[np.int64]) -> FloatArray:
    """Measured values, and a whole number in the middle of each gap, in octaves: waves of thread blocks bend times there."""
    values = _values(measured)
    return np.unique(np.concatenate([values, np.sqrt(values[1:] * values[:-1]).round()]))


def with_tile_ends(axis: FloatArray, tiles: Sequence[float]) -> FloatArray:
    """The axis, and the last row of each tile and the first of the next between its ends."""
    ends = [np.arange(tile, axis[-1], tile) for tile in tiles]
    nodes = np.unique(np.concatenate([axis, *ends, *(end + 1 for end in ends)]))
    inside: FloatArray = nodes[(nodes >= axis[0]) & (nodes <= axis[-1])]
    return inside
