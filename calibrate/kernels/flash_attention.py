"""When FlashAttention-2 splits a decode's context over thread blocks, and when a CUDA graph keeps it from it.

A kernel profile launches each batch by itself, so the split count fits the batch's own context. A vLLM engine
replays decode steps from CUDA graphs that were captured with max_seq_len = max_model_len
(`GPUModelRunner._build_attention_metadata`, 0.19: "make sure the backend see a max_seq_len that is larger"),
and the kernel cuts the context into pieces of that length over the split count. With a long max_model_len a
piece is longer than any real context: nothing is split, and a batch too small to fill the GPU waits for its
longest context, which the profile does not show.
"""

from __future__ import annotations

import math
from typing import Final

_BLOCK_N: Final = 128  # keys per inner step for head_dim <= 128 (`set_params_splitkv`)
_MAX_SPLITS: Final = 128
_FULL: Final = 0.8  # of the GPU's slots busy: enough, nothing is split


def num_splits(num_blocks: int, num_slots: int, num_n_blocks: int) -> int:
    """Split count of FlashAttention-2 (`num_splits_heuristic`, csrc/flash_attn/flash_api.cpp).

    Args:
        num_blocks: thread blocks without splitting: batch * key-value heads.
        num_slots: thread blocks that the GPU runs at once: 2 * streaming multiprocessors.
        num_n_blocks: inner steps over the longest context.
    """
    if num_blocks >= _FULL * num_slots:
        return 1
    efficiency = {1: num_blocks / num_slots}
    for splits in range(2, min(_MAX_SPLITS, num_slots, num_n_blocks) + 1):
        if math.ceil(num_n_blocks / splits) != math.ceil(num_n_blocks / (splits - 1)):
            waves = num_blocks * splits / num_slots
            efficiency[splits] = waves / math.ceil(waves)
    best = max(efficiency.values())
    return next(splits for splits, value in efficiency.items() if value >= 0.85 * best)


def first_unsplit(num_kv_heads: int, num_sms: int) -> int:
    """Smallest number of decodes that fills the GPU, so that no context is split however long it is.

    >>> first_unsplit(8, 188), first_unsplit(4, 188)
    (38, 76)
    """
    return math.ceil(_FULL * 2 * num_sms / num_kv_heads)


def piece_tokens(num_decodes: int, num_kv_heads: int, num_sms: int, max_seq_len: int) -> int:
    """Tokens of context that one thread block works through, for a batch launched with `max_seq_len`.

    >>> piece_tokens(32, 8, 188, max_seq_len=2048), piece_tokens(32, 8, 188, max_seq_len=131072)
    (512, 32768)
    """
    num_n_blocks = math.ceil(max_seq_len / _BLOCK_N)
    splits = num_splits(num_decodes * num_kv_heads, 2 * num_sms, num_n_blocks)
    return math.ceil(num_n_blocks / splits) * _BLOCK_N
