"""What uneven contexts cost: slopes of a batch's time in its longest context, and where contexts are not split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kvtwin.calibrate.kernels.flash_attention import first_unsplit, piece_tokens
from kvtwin.calibrate.kernels.table import Table, filled, gpu_of, kv_heads_of
from kvtwin.calibrate.models import ModelSpec
from kvtwin.sim.latency.grid import Grid
from kvtwin.traces.readers.llmservingsim_profile import KernelProfile

# Slopes of uneven contexts are read off where a few sequences are long (v below this): the last wave then
# belongs to them. Above it, the difference between two nearly equal times is mostly noise.
_MAX_SPREAD: Final = 0.7
_SPREAD_BINS: Final = (0.0, 0.2, 0.35, _MAX_SPREAD)
_MIN_SKEW_CONTEXT: Final = 512  # below it the difference is smaller than the timer's noise
_MAX_SKEW_PREFIX: Final = 1024  # a long prefix of the prefill hides the decodes' tail
# A piece of context (per thread block) longer than most requests' contexts: in effect nothing is split.
_LONG_PIECE: Final = 2048


def unevenness(kernels: KernelProfile, split_below: int | None, unsplit: Unsplit | None) -> dict[str, Grid]:
    """Slopes of uneven contexts, in us per token of (longest - mean), by (decodes, spread)."""
    none = Grid([[0.0], [0.0]], [[0.0]])
    if kernels.skew is None:
        return {"unevenness_decode": none, "unevenness_mixed": none}
    skew = Table.of(kernels.skew)
    pure = slopes_of(skew.where(skew.pc == 0), split_below) or none
    mixed = slopes_of(skew.where(skew.pc > 0), None) or none  # with a prefill, no context is ever split
    if unsplit is not None:
        pure = _without_splits(pure, unsplit)
    return {"unevenness_decode": pure, "unevenness_mixed": mixed}


def _without_splits(slopes: Grid, unsplit: Unsplit) -> Grid:
    """Slopes of an engine that splits no context: of each batch size that only the profile split, take the
    nearest one that it did not split either."""
    decodes, values = slopes.axes[0], slopes.values.copy()
    measured = decodes >= unsplit.profile_from
    if not measured.any():
        return slopes
    values[(decodes >= unsplit.engine_from) & ~measured] = values[measured][0]
    return Grid([axis.tolist() for axis in slopes.axes], values)


def slopes_of(skew: Table, split_below: int | None) -> Grid | None:
    """Median slopes by (decodes, spread); `split_below` says from how many decodes on contexts are whole."""
    excess = skew.kv_big - skew.kv_mean
    # Two groups of contexts, nb of n long: their standard deviation over (longest - mean).
    spread = np.sqrt(skew.nb / np.maximum(skew.n - skew.nb, 1))
    keep = (skew.kvs >= _MIN_SKEW_CONTEXT) & (skew.kp <= _MAX_SKEW_PREFIX) & (skew.nb < skew.n)
    keep &= (spread < _MAX_SPREAD) & (excess > 0)
    if not keep.any():
        return None
    slope = (skew.t_skew_us - skew.t_mean_us)[keep] / excess[keep]
    decodes, bins = skew.n[keep], np.digitize(spread[keep], _SPREAD_BINS[1:-1])
    counts = np.unique(decodes)
    middle = [float(np.mean(_SPREAD_BINS[i : i + 2])) for i in range(len(_SPREAD_BINS) - 1)]
    rows, cells = [], []
    for count in counts:
        for index in range(len(middle)):
            here = slope[(decodes == count) & (bins == index)]
            if len(here):
                rows.append((count, middle[index]))
                cells.append(float(np.median(here)))
    by_count, by_spread = (np.array(values) for values in zip(*rows, strict=True))
    found = filled([by_count, by_spread], np.array(cells))
    return found if split_below is None else _with_step(found, split_below)


def _with_step(slopes: Grid, first: int) -> Grid:
    """Slopes that jump at `first` decodes: where contexts are split, uneven ones cost next to nothing; where they are
    whole, a batch waits for its longest. Each side takes the nearest batch size measured on it."""
    decodes = slopes.axes[0]
    below = decodes < first
    if below.all() or not below.any():
        return slopes
    ends = {first - 1.0: slopes.values[below][-1], float(first): slopes.values[~below][0]}
    rows = dict(zip(decodes.tolist(), slopes.values, strict=True))
    rows = dict(sorted((ends | rows).items()))
    return Grid([list(rows), slopes.axes[1].tolist()], np.array(list(rows.values())))


@dataclass(frozen=True, slots=True)
class Unsplit:
    """From how many decodes on contexts are not split: in the engine's CUDA graphs, in the profile's launches."""

    engine_from: int
    profile_from: int


def first_unsplit_of(kernels: KernelProfile, model: ModelSpec) -> int | None:
    """From how many decodes on the profile's launches of FlashAttention-2 split no context (`flash_attention.py`).

    None where another kernel runs (FlashAttention-3 on Hopper, FlashAttention-4 or FlashInfer on B200), or where the
    GPU is unknown.
    """
    gpu = gpu_of(kernels)
    if gpu is None or gpu.compute_capability[0] in (9, 10):
        return None
    return first_unsplit(kv_heads_of(kernels, model), gpu.num_sms)


def unsplit_decodes(
    kernels: KernelProfile, model: ModelSpec, split_below: int | None, max_model_len: int | None
) -> Unsplit | None:
    """Where an engine with CUDA graphs does not split; None where the kernel is another one."""
    gpu = gpu_of(kernels)
    if gpu is None or split_below is None:
        return None
    heads, length = kv_heads_of(kernels, model), max_model_len or model.max_position_embeddings
    split = [count for count in range(1, split_below) if piece_tokens(count, heads, gpu.num_sms, length) < _LONG_PIECE]
    return Unsplit(engine_from=max(split, default=0) + 1, profile_from=split_below)


def describe_unsplit(unsplit: Unsplit | None) -> str:
    """What a profile says of it."""
    if unsplit is None:
        return "uneven contexts cost what the profile measured"
    return (
        f"FlashAttention-2 in CUDA graphs captured at max_model_len splits no context from {unsplit.engine_from} "
        f"decodes on, the profile's own launches from {unsplit.profile_from} on: between the two, uneven contexts "
        f"cost what they cost above"
    )
