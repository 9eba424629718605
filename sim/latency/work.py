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

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.sim.latency.grid import FloatArray
from kvtwin.traces.errors import InputError

Columns = Mapping[str, FloatArray]
Terms = dict[str, FloatArray]
Work = Callable[[Columns, float, float], Terms]

_ONE_PACKED: Final = ", single queries packed"
_ALL_PACKED: Final = ", all queries packed"
_UNCACHED_ROWS: Final = ("rows of ", "uncached queries ", "uncached keys ")
_PIECE: Final = 128.0  # keys that a thread block takes at a time
_SMALL_PIECE: Final = 32.0  # where no context is split
_MIXED_PIECE: Final = 64.0  # beside prefills
_SHORT: Final = (64.0, 128.0, 256.0)  # tokens of context up to which kernels may run a simpler path
_BLOCK_START: Final = 160.0  # keys that a thread block could read while it starts and ends
_EMPTY_BLOCK: Final = 16.0  # and one that finds nothing to do
# Keys of one head that caches may hold: between calls, and between the query heads of a group.
_CACHES: Final = tuple(2.0**power * part for power in range(14, 21) for part in (1.0, 1.5))
_SHARED_CACHES: Final = (32768.0, 65536.0, 131072.0, 196608.0, 262144.0, 393216.0)
_MANY_SLOTS: Final = 376.0  # thread blocks at once, where the trend saw no waves


def _ceil(top: FloatArray, bottom: float | FloatArray) -> FloatArray:
    value: FloatArray = np.ceil(top / bottom)
    return value


def _waves(blocks: FloatArray, slots: float) -> FloatArray:
    """Rounds that `blocks` need; slots = 0 stands for a device that is never partly full."""
    return _ceil(blocks, slots) if slots else blocks


def _get(columns: Columns, name: str, default: float) -> FloatArray:
    found = columns.get(name)
    return found if found is not None else np.full(len(next(iter(columns.values()))), default)


def attention_heads(columns: Columns) -> tuple[FloatArray, FloatArray]:
    """Query and key-value heads; a table without them has one model, whose heads are in the prices or in `slots`."""
    heads = _get(columns, "num_heads", 1.0)
    return heads, _get(columns, "num_key_value_heads", 0.0) if "num_key_value_heads" in columns else heads


def context_of_each(columns: Columns) -> FloatArray:
    """Tokens of context of each decode.

    Some tables hold what all of them have together (`total_context`), or means over the generation of `output_tokens`.
    """
    if "context" in columns:
        return columns["context"]
    if "output_tokens" in columns:
        return columns["prompt_tokens"] + np.floor(columns["output_tokens"] / 2.0)
    return np.maximum(np.floor(columns["total_context"] / columns["num_decode"]), 1.0)


def prefills(columns: Columns) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Prefills of a batch: how many, new tokens of each, cached tokens of each.

    Some tables say what all of them have together: `prefill_tokens`, and `prefill_key`, the keys that a query sees, averaged
    over the queries. That stands for as few equal prefills as can have so short a past (LLMServingSim, `_compose_prefill`).
    """
    if "prefill_key" not in columns:
        return _get(columns, "num_seqs", 1.0), columns["chunk"], _get(columns, "prefix", 0.0)
    tokens, key = columns["prefill_tokens"], columns["prefill_key"]
    seqs = np.maximum(_ceil(tokens, 2.0 * key), 1.0)
    chunk = tokens / seqs
    return seqs, chunk, np.maximum(key - chunk / 2, 0.0)


def pooled(columns: Columns) -> dict[str, FloatArray]:
    """Columns in which attention of models with different heads is alike: group, blocks and length, of shape (n,).

    A GPU sees thread blocks: 8 requests of a model with 4 key-value heads are 16 requests of one with 2 (decodes pack a
    group's queries into one block; prefills have a block for each query head).
    """
    heads, kv_heads = attention_heads(columns)
    if "num_decode" in columns:
        blocks, length = columns["num_decode"] * kv_heads, context_of_each(columns)
    else:
        seqs, length, _ = prefills(columns)
        blocks = seqs * heads
    return {"group": heads / kv_heads, "blocks": blocks, "length": length}


def _windowed(length: FloatArray, columns: Columns, extra: float) -> FloatArray:
    """Keys seen through a sliding window (window_size 0: no window)."""
    window = _get(columns, "window_size", 0.0)
    return np.where(window > 0, np.minimum(length, window + extra), length)


def _prefill_attention(columns: Columns, tile: float, slots: float) -> Terms:
    heads, kv_heads = attention_heads(columns)
    seqs, chunk, prefix = prefills(columns)
    longest = _windowed(prefix + chunk, columns, tile)
    kernels: Terms = {}
    for kernel, (blocks, rows) in _kernels(chunk, heads, kv_heads, tile).items():
        span = _windowed(prefix + (np.minimum(chunk, rows) + chunk) / 2, columns, tile)
        found = _prefill_blocks(seqs * blocks, span, longest, slots)
        kernels |= {f"{name}{kernel}": term for name, term in found.items()}
    return {
        "call": np.ones(len(chunk)),
        **kernels,
        "longest": longest,
        "queries": seqs * chunk * (heads + kv_heads),
        "prefix": seqs * prefix * kv_heads,
        **_uncached_rows(2.0 * seqs * chunk * heads, 2.0 * seqs * (prefix + chunk) * kv_heads),
    }


def _kernels(
    chunk: FloatArray, heads: FloatArray, kv_heads: FloatArray, tile: float
) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Thread blocks of a prompt, and tokens of each: one head's queries, or those of all heads that share keys.

    FlashAttention-2 packs heads for prompts of one token, which run as decodes do (`seqlenq_ngroups_swapped`),
    FlashAttention-3 (`PackGQA`) and FlashInfer for longer ones too.
    """
    group, every = heads / kv_heads, np.full(len(chunk), tile)
    plain, packed = heads * _ceil(chunk, tile), kv_heads * _ceil(chunk * group, tile)
    return {
        "": (plain, every),
        _ONE_PACKED: (np.where(chunk == 1, packed, plain), every),
        _ALL_PACKED: (packed, every / group),
    }


def _prefill_blocks(blocks: FloatArray, span: FloatArray, longest: FloatArray, slots: float) -> Terms:
    waves, share = _waves(blocks, slots), blocks * span / (slots or 1.0)
    return {
        "waves": waves,
        "wave keys": waves * span,
        "keys": share,
        "busy or longest": np.maximum(share, longest),
        "blocks": blocks,
    }


def _uncached_rows(queries: FloatArray, keys: FloatArray) -> Terms:
    """Rows of queries and outputs, and of keys and values (one head and token each), once both exceed a cache together.

    The same all-or-nothing as for decodes (`_uncached`): on the RTX PRO 6000 a call with 64 MB of rows takes 30 us, one
    with 128 MB 140 us.
    """
    terms = {"rows of queries": queries, "rows of keys": keys}
    for size in _CACHES:
        beyond = queries + keys >= size
        terms[f"uncached queries beyond {int(size)}"] = np.where(beyond, queries, 0.0)
        terms[f"uncached keys beyond {int(size)}"] = np.where(beyond, keys, 0.0)
    return terms


def alternatives(found: Terms, columns: Columns) -> dict[str, Terms]:
    """What each of several kernels would do, where it differs from the plain one on these batches: that one first.

    Whether rows leave a cache shows where batches of several sizes have as many; with one prompt at a time it is a step on
    the axes of the table itself, which is interpolated better without.
    """
    if len(np.unique(_get(columns, "num_seqs", 1.0))) == 1:
        found = {name: term for name, term in found.items() if not name.startswith(_UNCACHED_ROWS)}
    plain = {name: term for name, term in found.items() if not name.endswith((_ONE_PACKED, _ALL_PACKED))}
    kernels = {"": plain}
    for kernel in (_ONE_PACKED, _ALL_PACKED):
        own = {name: term for name, term in found.items() if name.endswith(kernel)}
        if any(not np.array_equal(term, plain[name.removesuffix(kernel)]) for name, term in own.items()):
            kernels[kernel] = own | {name: term for name, term in plain.items() if f"{name}{kernel}" not in own}
    return kernels


def _decode_attention(columns: Columns, tile: float, slots: float) -> Terms:
    heads, kv_heads = attention_heads(columns)
    seqs, context = columns["num_decode"], _windowed(context_of_each(columns), columns, 0.0)
    blocks = seqs * kv_heads * _ceil(heads / kv_heads, tile)
    pieces = np.maximum(_ceil(context, _PIECE), 1.0)
    splits = np.clip(np.floor((slots or 1.0) / blocks), 1.0, pieces)
    split = (splits > 1).astype(np.float64)
    longest = _ceil(pieces, splits) * _PIECE
    waves = _waves(blocks * splits, slots)
    whole_waves, whole = _waves(blocks, slots), _ceil(context, _SMALL_PIECE) * _SMALL_PIECE
    read = seqs * kv_heads * context
    packed = ((kv_heads > 1) & (heads > kv_heads)).astype(np.float64)
    terms = {
        "call": np.ones(len(seqs)),
        "waves": waves,
        "wave keys": waves * longest,
        "longest": longest,
        "unsplit waves": whole_waves,
        "unsplit wave keys": whole_waves * whole,
        "split": split,
        "splits": split * splits,
        "partial queries": split * splits * seqs * heads,  # what the pieces write and a second kernel adds up
        "keys": read,
        "query keys": seqs * heads * context,
        "queries": seqs * heads,
        "several": (seqs > 1).astype(np.float64),
        # With several key-value heads, FlashAttention-2 first copies the queries that it packs (`seqlenq_ngroups_swapped`).
        "packed": packed,
        "packed queries": packed * seqs * heads,
    }
    for limit in _SHORT:  # kernels for short contexts: one piece and no second kernel
        beyond = (context > limit).astype(np.float64)
        terms |= {f"beyond {int(limit)}": beyond, f"queries beyond {int(limit)}": beyond * seqs * heads}
    return terms | _spills(read) | _uncached(read)


def _uncached(read: FloatArray) -> Terms:
    """All keys, once they exceed what a cache of each size holds.

    A benchmark reads the same keys call after call: a cache that is large enough holds all of them, a smaller one none,
    since what is read next was evicted last.
    """
    return {f"uncached beyond {int(size)}": np.where(read >= size, read, 0.0) for size in _CACHES}


def _spills(read: FloatArray) -> Terms:
    """Keys beyond what a cache of each size holds: their price is that of memory, not of the cache."""
    return {f"keys over {int(size)}": np.maximum(read - size, 0.0) for size in (65536.0, 262144.0, 1048576.0)}


def _mixed_attention(columns: Columns, tile: float, slots: float) -> Terms:
    """Prefills with decodes in one launch: query heads are not packed and no context is split.

    Every decode gets as many blocks as a prefill, of which all but one find nothing to do.
    """
    heads, kv_heads = attention_heads(columns)
    seqs, context = columns["num_decode"], columns["context"]
    num_prefills, chunk, prefix = prefills(columns)
    span = prefix + (np.minimum(chunk, tile) + chunk) / 2
    tiles, whole = _ceil(chunk, tile), _ceil(context, _MIXED_PIECE) * _MIXED_PIECE
    of_prefills = num_prefills * tiles
    terms = _two_kinds((heads * of_prefills, span), (seqs * heads, whole), slots, prefix + chunk)
    empty = seqs * (tiles - 1.0)
    terms |= {"empty blocks": heads * empty, "keys": kv_heads * seqs * context}
    terms["head by head"] = _interleaved((of_prefills, span), (seqs, whole), empty, heads, slots)
    return terms | _misses(columns, context, slots)


def _misses(columns: Columns, context: FloatArray, slots: float) -> Terms:
    """Keys read from memory again by the query heads of a group, where a cache of each size does not hold them.

    Blocks go out head by head. Heads that run at once share what they read; where the blocks of a group take several
    rounds (group x decodes over slots, and one more, for they seldom start with a round), each round reads again what
    the cache no longer holds of the keys of all decodes under one head: everything, from twice its size on.
    """
    heads, kv_heads = attention_heads(columns)
    seqs, group = columns["num_decode"], heads / kv_heads
    again = np.minimum(group * seqs / (slots or _MANY_SLOTS), group - 1.0)
    keys = seqs * context
    return {
        f"keys again over {int(size)}": kv_heads * again * keys * np.clip(keys / size - 1.0, 0.0, 1.0)
        for size in _SHARED_CACHES
    }


def _interleaved(
    prefill: tuple[FloatArray, FloatArray],
    decode: tuple[FloatArray, FloatArray],
    empty: FloatArray,
    heads: FloatArray,
    slots: float,
) -> FloatArray:
    """When the last block ends, in keys: blocks of (how many for each head, how long), and `empty` ones, go out head by head.

    All at once where the slots suffice; else the last head's start when the work of the others is done.
    """
    slots = slots or _MANY_SLOTS
    (tiles, span), (seqs, context) = prefill, decode
    first, second = span + _BLOCK_START, context + _BLOCK_START
    work = (tiles * first + seqs * second + empty * _EMPTY_BLOCK) / slots
    longest = np.maximum(first, second)
    return np.where(heads * (tiles + seqs) <= slots, longest, (heads - 1.0) * work + np.maximum(work, longest))


def _uneven_decode(columns: Columns, tile: float, slots: float) -> Terms:
    """Decodes of two lengths; all are cut into pieces of the length that suits the longest."""
    heads, kv_heads = attention_heads(columns)
    seqs, context = columns["num_decode"], columns["context"]
    long_seqs = np.rint(seqs * columns["long_share"])
    longest = context * columns["skew"]
    blocks = seqs * kv_heads * _ceil(heads / kv_heads, tile)
    pieces = np.maximum(_ceil(longest, _PIECE), 1.0)
    piece = _ceil(pieces, np.clip(np.floor((slots or 1.0) / blocks), 1.0, pieces)) * _PIECE
    many = long_seqs * kv_heads * _ceil(longest, piece), np.minimum(piece, longest)
    few = (seqs - long_seqs) * kv_heads * _ceil(context, piece), np.minimum(piece, context)
    read = kv_heads * (long_seqs * longest + (seqs - long_seqs) * context)
    return _two_kinds(many, few, slots, piece) | {"keys": read} | _spills(read)


def _uneven_mixed(columns: Columns, tile: float, slots: float) -> Terms:
    heads, kv_heads = attention_heads(columns)
    chunk, prefix = columns["chunk"], columns["prefix"]
    seqs, context = columns["num_decode"], columns["context"]
    long_seqs = np.rint(seqs * columns["long_share"])
    longest = context * columns["skew"]
    span, tiles = prefix + (np.minimum(chunk, tile) + chunk) / 2, _ceil(chunk, tile)
    mean = (long_seqs * longest + (seqs - long_seqs) * context) / seqs
    terms = _two_kinds((heads * tiles, span), (seqs * heads, mean), slots, prefix + chunk)
    tail = _two_kinds((long_seqs * heads, longest), ((seqs - long_seqs) * heads, context), slots, mean)
    terms |= {f"decodes: {name}": tail[name] for name in ("first end", "second end")}
    terms["longest"] = np.maximum(prefix + chunk, longest)
    terms |= {"empty blocks": heads * seqs * (tiles - 1.0), "keys": kv_heads * seqs * mean}
    return terms | _misses(columns, mean, slots)


def _two_kinds(
    first: tuple[FloatArray, FloatArray], second: tuple[FloatArray, FloatArray], slots: float, longest: FloatArray
) -> Terms:
    """Terms of a launch with two kinds of thread blocks, (how many, how long)."""
    (many, long), (more, other) = first, second
    total = many * long + more * other
    return {
        "call": np.ones(len(total)),
        "first end": _list_end(many, long, more, other, slots),
        "second end": _list_end(more, other, many, long, slots),
        "keys of blocks": total / (slots or 1.0),
        "waves": _waves(many + more, slots),
        "longest": np.maximum(longest, np.maximum(long, other)),
        "blocks": many + more,
    }


def _list_end(many: FloatArray, long: FloatArray, more: FloatArray, other: FloatArray, slots: float) -> FloatArray:
    """When the last block ends: `many` blocks of length `long` are handed out first, then `more` of length `other`.

    Greedy list scheduling of two kinds, in closed form. After `rounds` full rounds of the first kind, `busy` slots run
    one more of it. In units of `other`, those come free at q, the rest at 0. By time x a slot that is free from f on has
    taken floor(x - f) blocks, so the count of finished blocks grows at whole x (by the free slots) and at q + whole x
    (by the busy ones): the end is the first of these times at which it reaches `more`.
    """
    if not slots:
        return many * long + more * other
    rounds = np.floor(many / slots)
    busy = many - rounds * slots
    free = slots - busy
    first_end = np.where(many > 0, _ceil(many, slots) * long, 0.0)
    step = np.where(other > 0, other, 1.0)
    late = np.where(busy > 0, long / step, 0.0)  # q
    whole = np.floor(late)
    early = _ceil(more, np.maximum(free, 1e-9))
    with_busy = late + np.maximum(_ceil(more - free * whole, slots), 0.0)
    with_free = whole + 1.0 + np.maximum(_ceil(more - free * (whole + 1.0), slots), 0.0)
    last = np.where(early <= whole, early, np.minimum(with_busy, with_free))
    return np.maximum(first_end, np.where(more > 0, rounds * long + last * step, 0.0))


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
        tiles = _ceil(m, rows) * _ceil(n, columns)
        for pieces in _PIECES_OF_K:
            found = _ceil(tiles * pieces, slots) * (rows * columns / share) * (k / pieces + _LEAST_K)
            best = np.where((pieces == 1.0) | (k >= _LEAST_K * pieces), np.minimum(best, found), best)
    return best


def _gemm(columns: Columns, tile: float, slots: float) -> Terms:
    m, n, k = columns["m"], columns["n"], columns["k"]
    tiles = _ceil(m, tile) * _ceil(n, 128.0)
    waves = _waves(tiles, slots)
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


def _moe(columns: Columns, tile: float, slots: float) -> Terms:  # noqa: ARG001 - the contract's
    tokens = columns["num_tokens"]
    size = _get(columns, "hidden_size", 1.0) * _get(columns, "inter_size", 1.0) / _get(columns, "moe_tp_size", 1.0)
    spread = _get(columns, "moe_ep_size", 1.0)
    experts = np.maximum(_get(columns, "num_experts", 1.0) / spread, 1.0)
    routed = tokens * _get(columns, "topk", 1.0) / spread
    active = columns["activated_experts"] if "activated_experts" in columns else np.minimum(experts, np.ceil(routed))
    return {
        "call": np.ones(len(tokens)),
        "tokens": tokens,
        "routed": routed,
        "weights": active * size,
        "products": routed * size,
        "tile products": active * _ceil(routed / np.maximum(active, 1.0), tile) * tile * size,
        "inputs": tokens * _get(columns, "hidden_size", 1.0),
        "experts": experts,
    }


def _tokens(columns: Columns, tile: float, slots: float) -> Terms:  # noqa: ARG001 - the contract's
    tokens = columns["num_tokens"]
    terms = {"call": np.ones(len(tokens)), "tokens": tokens, "tiles": _ceil(tokens, tile)}
    return terms | {
        f"tokens over {int(knot)}": np.maximum(tokens - knot, 0.0) for knot in (64.0, 256.0, 1024.0, 4096.0)
    }


def _transfer(columns: Columns, tile: float, slots: float) -> Terms:  # noqa: ARG001 - the contract's
    size, devices = columns["num_bytes"], _get(columns, "num_gpus", 2.0)
    terms = {"call": np.ones(len(size)), "devices": devices, "bytes": size, "ring": size * (devices - 1) / devices}
    return terms | {
        f"bytes over {int(knot)}": np.maximum(size - knot, 0.0) for knot in (65536.0, 524288.0, 4194304.0, 33554432.0)
    }


def _prompt_step(columns: Columns, tile: float, slots: float) -> Terms:  # noqa: ARG001 - the contract's
    seqs, prompt = columns["num_seqs"], columns["prompt_tokens"]
    tokens = seqs * prompt
    terms = {"call": np.ones(len(tokens)), "tokens": tokens, "pairs": tokens * prompt, "seqs": seqs}
    return terms | {
        f"tokens over {int(knot)}": np.maximum(tokens - knot, 0.0) for knot in (256.0, 1024.0, 2048.0, 4096.0)
    }


def _token_step(columns: Columns, tile: float, slots: float) -> Terms:  # noqa: ARG001 - the contract's
    seqs, context = columns["num_decode"], context_of_each(columns)
    terms = {
        "call": np.ones(len(seqs)),
        "seqs": seqs,
        "context": seqs * context,
        "batch": (seqs > 1).astype(np.float64),
    }
    return terms | {f"seqs over {int(knot)}": np.maximum(seqs - knot, 0.0) for knot in (8.0, 16.0, 32.0)}


def _uneven_prefill(columns: Columns, tile: float, slots: float) -> Terms:  # noqa: ARG001 - the contract's
    tokens = columns["prompt_tokens"]
    return {
        "call": np.ones(len(tokens)),
        "tokens": tokens,
        "pairs": columns["squares"] / 2 + tokens * columns["prefix"],
        "longest": columns["longest"],
        "longest pairs": columns["longest"] * columns["longest"],
        "seqs": columns["num_seqs"],
    }


# By `OpSamples.work`.
WORKS: Final[Mapping[str, Work]] = {
    "prefill_attention": _prefill_attention,
    "decode_attention": _decode_attention,
    "mixed_attention": _mixed_attention,
    "uneven_decode": _uneven_decode,
    "uneven_mixed": _uneven_mixed,
    "uneven_prefill": _uneven_prefill,
    "gemm": _gemm,
    "moe": _moe,
    "tokens": _tokens,
    "transfer": _transfer,
    "prompt_step": _prompt_step,
    "token_step": _token_step,
}

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


def trend(
    work: str, columns: Columns, prices: Mapping[str, float], tile: float, slots: float
) -> npt.NDArray[np.float64]:
    """sum of price * term: float64 of shape (n,), added up term by term (see `regression.py`).

    Raises:
        InputError: a price of a term that is not known (a profile of another version).
    """
    found = terms(work, columns, tile, slots)
    if unknown := prices.keys() - found.keys():
        raise InputError(f"the profile prices {min(unknown)!r}, which this version does not know: calibrate it anew")
    total = np.zeros(len(next(iter(found.values()))))
    for name, price in prices.items():
        total = total + price * found[name]
    return total
