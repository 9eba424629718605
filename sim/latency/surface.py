"""What a trend misses, smooth in physical coordinates: factor = 1 + sum over parts of part(coordinates).

A part is a table over one or two coordinates (keys, thread blocks, products ...), linear in octaves between its points
and held beyond them. Coordinates are products of columns, so that a kernel's behaviour at 64 requests of 1,000 tokens
is seen where 16 requests of 4,000 tokens were measured: a bend at some number of bytes lies on a diagonal of the table
of loads, where interpolation along the loads cannot find it. Only +, -, *, / and comparisons, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.octaves import digits, octave, plain
from kvtwin.sim.latency.work import Columns, attention_heads, best_products, context_of_each, prefills

_MIN_FACTOR: Final = 0.1
_USUAL_SLOTS: Final = 132.0  # tiles at once, where the trend saw no waves

# (which points of the flattened table of a part, with which weight), each of shape (n, 2) or (n, 4)
Weights = tuple[npt.NDArray[np.intp], FloatArray]


@dataclass(frozen=True)
class Part:
    """Values over one or two coordinates: array of shape (points of each)."""

    names: tuple[str, ...]
    values: FloatArray


class Surface:
    """Factors on a trend.

    Args:
        axes: coordinate to its increasing points, in octaves; two at least.
        parts: tables over them.
    """

    def __init__(self, axes: Mapping[str, npt.ArrayLike], parts: Sequence[Part]) -> None:
        """Raises ValueError where the parts do not fit together."""
        self.axes = {name: np.asarray(axis, np.float64) for name, axis in axes.items()}
        self.parts = list(parts)
        if any(len(axis) < 2 or np.any(np.diff(axis) <= 0) for axis in self.axes.values()):
            raise ValueError("every axis must have two points and be strictly increasing")
        for part in self.parts:
            if part.values.shape != tuple(len(self.axes[name]) for name in part.names):
                raise ValueError(f"values of shape {part.values.shape} do not fit the axes {', '.join(part.names)}")
            if not np.all(np.isfinite(part.values)):
                raise ValueError("every value must be finite")

    def __call__(self, found: Columns) -> FloatArray:
        """Factors of n batches from their coordinates: float64 of shape (n,)."""
        cells = {name: cell(axis, found[name]) for name, axis in self.axes.items()}
        total = np.ones(len(next(iter(found.values()))))
        for part in self.parts:
            points, weights = weights_of([cells[name] for name in part.names], part.values.shape)
            table = part.values.ravel()
            for column in range(points.shape[1]):
                total = total + weights[:, column] * table[points[:, column]]
        return np.maximum(total, _MIN_FACTOR)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Surface:
        """Read `to_json`'s output. Raises KeyError, TypeError or ValueError on anything else."""
        parts = [Part(tuple(part["names"]), np.asarray(part["values"], np.float64)) for part in data["parts"]]
        return cls(data["axes"], parts)

    def to_json(self) -> dict[str, Any]:
        """Numbers and names only; values to six digits."""
        return {
            "axes": {name: [plain(value) for value in axis.tolist()] for name, axis in self.axes.items()},
            "parts": [{"names": list(part.names), "values": digits(part.values).tolist()} for part in self.parts],
        }


def cell(axis: FloatArray, values: FloatArray) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Index of the point at or below each value, in octaves, and the share of the way to the next one (0 to 1)."""
    where = np.clip(octave(values), axis[0], axis[-1])
    low = np.clip(np.searchsorted(axis, where, side="right") - 1, 0, len(axis) - 2)
    return low, (where - axis[low]) / (axis[low + 1] - axis[low])


def weights_of(cells: Sequence[tuple[npt.NDArray[np.intp], FloatArray]], shape: Sequence[int]) -> Weights:
    """Points of a part's flattened table around each batch, and their weights."""
    points, weights = np.zeros((len(cells[0][0]), 1), np.intp), np.ones((len(cells[0][0]), 1))
    for (low, share), size in zip(cells, shape, strict=True):
        points = np.concatenate([points * size + low[:, None], points * size + low[:, None] + 1], axis=1)
        weights = np.concatenate([weights * (1.0 - share)[:, None], weights * share[:, None]], axis=1)
    return points, weights


# ---- coordinates ---------------------------------------------------------------------------------------------


def _decode(columns: Columns, slots: float) -> dict[str, FloatArray]:  # noqa: ARG001 - the contract's
    heads, kv_heads = attention_heads(columns)
    seqs, context = columns["num_decode"], context_of_each(columns)
    blocks = seqs * kv_heads
    return {
        "blocks": blocks, "context": context, "keys": blocks * context, "queries": seqs * heads,
        "num_decode": seqs, "kv_heads": kv_heads,
    }  # fmt: skip


def _prefill(columns: Columns, slots: float) -> dict[str, FloatArray]:  # noqa: ARG001 - the contract's
    heads, kv_heads = attention_heads(columns)
    seqs, chunk, prefix = prefills(columns)
    return {
        "blocks": seqs * heads, "chunk": chunk, "queries": seqs * heads * chunk, "num_seqs": seqs,
        "kv_heads": kv_heads, "prefix": prefix, "pairs": seqs * heads * chunk * (prefix + chunk / 2),
    }  # fmt: skip


def _mixed(columns: Columns, slots: float) -> dict[str, FloatArray]:  # noqa: ARG001 - the contract's
    seqs, context = columns["num_decode"], columns["context"]
    num_prefills, chunk, prefix = prefills(columns)
    key = prefix + chunk / 2
    return {
        "num_decode": seqs, "context": context, "keys": seqs * context, "chunk": num_prefills * chunk, "prefix": prefix,
        "pairs": num_prefills * chunk * key, "keys of blocks": num_prefills * np.ceil(chunk / 64) * key + seqs * context,
    }  # fmt: skip


def _gemm(columns: Columns, slots: float) -> dict[str, FloatArray]:
    m, n, k = columns["m"], columns["n"], columns["k"]
    slots = slots or _USUAL_SLOTS
    small, large = np.ceil(m / 64) * np.ceil(n / 64), np.ceil(m / 128) * np.ceil(n / 128)
    return {
        "m": m, "n": n, "k": k, "products": m * n * k, "weights": n * k, "inputs": m * k, "outputs": m * n,
        "best": best_products(m, n, k, slots), "small tiles": small, "tiles": large,
        "idle with small tiles": _idle(small, slots), "idle": _idle(large, slots),
    }  # fmt: skip


def _idle(tiles: FloatArray, slots: float) -> FloatArray:
    """Slots of all waves over tiles, in thousandths: how much of the last wave is idle."""
    return 1000.0 * (np.ceil(tiles / slots) * slots / tiles)


# By `OpSamples.work`: the coordinates, and the pairs of them that have a table together.
COORDINATES: Final[Mapping[str, Callable[[Columns, float], dict[str, FloatArray]]]] = {
    "decode_attention": _decode,
    "prefill_attention": _prefill,
    "mixed_attention": _mixed,
    "gemm": _gemm,
}
PAIRS: Final[Mapping[str, Sequence[tuple[str, str]]]] = {
    "decode_attention": (
        ("blocks", "context"), ("num_decode", "context"), ("queries", "keys"), ("context", "queries"),
        ("kv_heads", "num_decode"), ("kv_heads", "context"),
    ),
    "prefill_attention": (
        ("blocks", "chunk"), ("num_seqs", "chunk"), ("kv_heads", "chunk"), ("kv_heads", "num_seqs"), ("chunk", "prefix"),
    ),
    "mixed_attention": (
        ("num_decode", "keys"), ("num_decode", "chunk"), ("context", "num_decode"), ("keys", "pairs"),
        ("num_decode", "pairs"),
    ),
    "gemm": (
        ("m", "n"), ("m", "k"), ("n", "k"), ("m", "products"), ("n", "products"), ("k", "products"), ("tiles", "k"),
        ("idle", "tiles"), ("idle with small tiles", "small tiles"),
    ),
}  # fmt: skip
