"""What an operator's work is: columns of a batch to non-negative terms whose prices a fit finds.

    trend = sum over terms of price * term

Terms are shaped like a roofline: a floor (1), bytes, arithmetic, and *waves*: a GPU runs `slots` thread blocks at
once, so 189 blocks on 188 slots take as long as 376. `tile` is how many rows one block works on. Only +, -, *, /,
comparisons, ceil and floor are used, so the numbers are the same on every machine (see `grid.py`).

Sources: the blocks of FlashAttention-2 (`flash_fwd_kernel.h`: one per tile of queries, sequence and head; decodes pack
a key-value head's queries and split the context where the GPU would idle), list scheduling of blocks (Graham 1969) and
NVIDIA's "Matrix Multiplication Background User's Guide" (tile and wave quantisation). TPUs and CPUs have no waves:
there the fit picks slots = 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.sim.latency.work.columns import Columns, Terms, Work, ceil, column, context_of_each
from kvtwin.sim.latency.work.decode import decode_attention
from kvtwin.sim.latency.work.mixed import mixed_attention
from kvtwin.sim.latency.work.prefill import prefill_attention
from kvtwin.sim.latency.work.products import gemm, moe
from kvtwin.sim.latency.work.reuse import CACHES
from kvtwin.sim.latency.work.schedule import MANY_SLOTS, play
from kvtwin.sim.latency.work.uneven import uneven_decode, uneven_mixed, uneven_prefill
from kvtwin.traces.errors import InputError


def _tokens(columns: Columns, tile: float, slots: float) -> Terms:  # noqa: ARG001 - the contract's
    tokens = columns["num_tokens"]
    terms = {"call": np.ones(len(tokens)), "tokens": tokens, "tiles": ceil(tokens, tile)}
    return terms | {
        f"tokens over {int(knot)}": np.maximum(tokens - knot, 0.0) for knot in (64.0, 256.0, 1024.0, 4096.0)
    }


def _transfer(columns: Columns, tile: float, slots: float) -> Terms:  # noqa: ARG001 - the contract's
    size, devices = columns["num_bytes"], column(columns, "num_gpus", 2.0)
    terms = {"call": np.ones(len(size)), "devices": devices, "bytes": size, "ring": size * (devices - 1) / devices}
    return terms | {
        f"bytes over {int(knot)}": np.maximum(size - knot, 0.0) for knot in (65536.0, 524288.0, 4194304.0, 33554432.0)
    }


_PATHS: Final = (1024.0, 2048.0, 4096.0, 8192.0, 16384.0)  # tokens of a prompt step


def _prompt_step(columns: Columns, tile: float, slots: float) -> Terms:  # noqa: ARG001 - the contract's
    seqs, prompt = columns["num_seqs"], columns["prompt_tokens"]
    tokens = seqs * prompt
    terms = {"call": np.ones(len(tokens)), "tokens": tokens, "pairs": tokens * prompt, "seqs": seqs}
    terms |= {f"tokens over {int(knot)}": np.maximum(tokens - knot, 0.0) for knot in (256.0, 1024.0, 2048.0, 4096.0)}
    # Beyond what some buffer holds a step takes another path, once and for all: Splitwise's 16 prompts of 512 tokens cost
    # 19 to 35 % more a token on four and eight GPUs than 8 do, and 12 to 23 % more than 32.
    return terms | {f"beyond {int(size)}": (tokens > size).astype(np.float64) for size in _PATHS}


def _token_step(columns: Columns, tile: float, slots: float) -> Terms:  # noqa: ARG001 - the contract's
    seqs, context = columns["num_decode"], context_of_each(columns)
    terms = {
        "call": np.ones(len(seqs)),
        "seqs": seqs,
        "context": seqs * context,
        "batch": (seqs > 1).astype(np.float64),
    }
    # Up to tens of sequences every step waits for the weights; no GPU has so little arithmetic that a bend comes sooner.
    return terms | {f"seqs over {int(knot)}": np.maximum(seqs - knot, 0.0) for knot in (32.0, 64.0, 128.0)}


WORKS: Final[Mapping[str, Work]] = {
    "prefill_attention": prefill_attention,
    "decode_attention": decode_attention,
    "mixed_attention": mixed_attention,
    "uneven_decode": uneven_decode,
    "uneven_mixed": uneven_mixed,
    "uneven_prefill": uneven_prefill,
    "gemm": gemm,
    "moe": moe,
    "tokens": _tokens,
    "transfer": _transfer,
    "prompt_step": _prompt_step,
    "token_step": _token_step,
}

_LAST_END: Final = "last end"
# Share of the slots that memory keeps busy with keys: beyond it, blocks wait for memory.
_FED: Final = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0)
PLAYED: Final = ("mixed_attention", "uneven_mixed")  # block by block (`schedule.py`)
# Works whose time moves in waves of thread blocks, so that `slots` is worth a search; and tiles worth trying.
WAVES: Final = ("prefill_attention", "decode_attention", "mixed_attention", "uneven_decode", "uneven_mixed", "gemm")
TILES: Final[Mapping[str, tuple[float, ...]]] = {
    "prefill_attention": (64.0, 128.0, 256.0), "mixed_attention": (64.0, 128.0), "uneven_mixed": (64.0, 128.0),
    "decode_attention": (1.0, 16.0, 64.0), "uneven_decode": (16.0, 64.0), "gemm": (64.0, 128.0, 256.0),
    "moe": (16.0, 64.0, 128.0), "tokens": (16.0, 64.0, 128.0),
}  # fmt: skip


def terms(work: str, columns: Columns, tile: float, slots: float) -> Terms:
    """The terms of n batches, each of shape (n,). Raises KeyError for an unknown work or a missing column."""
    return WORKS[work]({name: np.asarray(values, np.float64) for name, values in columns.items()}, tile, slots)


def dear_terms(work: str, columns: Columns, tile: float, slots: float, wanted: Container[str] | None = None) -> Terms:
    """Terms that are worth pricing, but too dear to search every geometry with: none but for prefills with decodes.

    When the last block ends, and how much longer memory takes for the keys that no cache holds, where that is longer: at a
    share of the slots that memory can feed, and a size of the cache, of which a fit chooses.

    Args:
        wanted: names of the terms that are needed; None for all.
    """
    if work not in PLAYED:
        return {}
    end, missed = play({name: np.asarray(values, np.float64) for name, values in columns.items()}, tile, slots)
    found = {_LAST_END: end}
    for (size, keys), share in itertools.product(zip(CACHES, missed.T, strict=True), _FED):
        name = f"beyond the end, cache of {int(size)}, memory feeds {share:g}"
        if wanted is None or name in wanted:
            found[name] = np.maximum(keys / (share * (slots or MANY_SLOTS)) - end, 0.0)
    return found


def trend(
    work: str, columns: Columns, prices: Mapping[str, float], tile: float, slots: float
) -> npt.NDArray[np.float64]:
    """sum of price * term: float64 of shape (n,), added up term by term (see `regression.py`).

    Raises:
        InputError: a price of a term that is not known (a profile of another version).
    """
    found = terms(work, columns, tile, slots)
    if prices.keys() - found.keys():
        found |= dear_terms(work, columns, tile, slots, prices)
    if unknown := prices.keys() - found.keys():
        raise InputError(f"the profile prices {min(unknown)!r}, which this version does not know: calibrate it anew")
    total = np.zeros(len(next(iter(found.values()))))
    for name, price in prices.items():
        total = total + price * found[name]
    return total
