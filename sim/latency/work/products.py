"""Matrix products and mixtures of experts."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.work.columns import Columns, Terms, ceil, column, waves_of

# Tiles of rows and columns that matrix products are cut into, with the share of the peak that each reaches, and into how
# many pieces of k; the library picks what ends first (NVIDIA, "Matrix Multiplication Background", "Tile Quantization").
_TILINGS: Final = (
    (64.0, 64.0, 0.5),
    (64.0, 128.0, 0.7),
    (128.0, 128.0, 0.85),
    (128.0, 256.0, 1.0),
    (256.0, 128.0, 1.0),
)
_PIECES_OF_K: Final = (1.0, 2.0, 4.0, 8.0)
_LEAST_K: Final = 256.0  # of a piece; starting and ending a tile takes about as long


def best_products(m: FloatArray, n: FloatArray, k: FloatArray, slots: float) -> FloatArray:
    """Products that a multiprocessor works through under the tiling that ends first, with idle slots counted."""
    best = np.full(len(m), np.inf)
    for rows, columns, share in _TILINGS:
        tiles = ceil(m, rows) * ceil(n, columns)
        for pieces in _PIECES_OF_K:
            found = ceil(tiles * pieces, slots) * (rows * columns / share) * (k / pieces + _LEAST_K)
            best = np.where((pieces == 1.0) | (k >= _LEAST_K * pieces), np.minimum(best, found), best)
    return best


def gemm(columns: Columns, tile: float, slots: float) -> Terms:
    """m x k by k x n."""
    m, n, k = columns["m"], columns["n"], columns["k"]
    tiles = ceil(m, tile) * ceil(n, 128.0)
    waves = waves_of(tiles, slots)
    return {
        "call": np.ones(len(m)),
        "waves": waves,
        "wave products": waves * k,
        "products": m * n * k,
        "tile products": tiles * k,
        "weights": n * k,
        "inputs": m * k,
        "outputs": m * n,
        "depth": k,
    } | ({"best tiling": best_products(m, n, k, slots)} if slots else {})


def moe(columns: Columns, tile: float, slots: float) -> Terms:  # noqa: ARG001 - the contract's
    """A mixture of experts: those that any token is routed to are read whole."""
    tokens = columns["num_tokens"]
    size = (
        column(columns, "hidden_size", 1.0) * column(columns, "inter_size", 1.0) / column(columns, "moe_tp_size", 1.0)
    )
    spread = column(columns, "moe_ep_size", 1.0)
    experts = np.maximum(column(columns, "num_experts", 1.0) / spread, 1.0)
    routed = tokens * column(columns, "topk", 1.0) / spread
    active = columns["activated_experts"] if "activated_experts" in columns else np.minimum(experts, np.ceil(routed))
    return {
        "call": np.ones(len(tokens)),
        "tokens": tokens,
        "routed": routed,
        "weights": active * size,
        "products": routed * size,
        "tile products": active * ceil(routed / np.maximum(active, 1.0), tile) * tile * size,
        "inputs": tokens * column(columns, "hidden_size", 1.0),
        "experts": experts,
    }
