"""A batch as latency models see it: sufficient statistics of its (cache_len, input_len) pairs.

A model that needs no more than these sums can be evaluated for hundreds of decode steps in one call, because
each sum moves by a closed form while the batch stays the same (DESIGN.md section 4). A member is a *decode*
when it has one new token, whatever it is called in the engine: kernels see only shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

IntArray = npt.NDArray[np.int64]

# Columns of the table, in order.
COLUMNS = (
    "num_decode",  # members with one new token
    "decode_context",  # sum of their cache_len
    "decode_context_sq",  # sum of the squares of their cache_len
    "decode_context_max",  # largest of their cache_len
    "num_prefill",  # members with more than one new token
    "prefill_tokens",  # sum of their input_len
    "prefill_context",  # sum of their cache_len
    "prefill_pairs",  # (query, key) pairs of causal attention: sum of input*cache + input*(input+1)/2
    "prefill_tokens_sq",  # sum of the squares of their input_len
)

REGIMES: Final = ("prefill", "decode", "mixed")
_PART_STEPS: Final = 1 << 16


def batch_row(cache_lens: Sequence[int], input_lens: Sequence[int]) -> tuple[int, ...]:
    """Statistics of one batch, in the order of `COLUMNS`, from its members' cached and new tokens."""
    num_decode = decode = decode_sq = decode_max = 0
    num_prefill = tokens = context = pairs = tokens_sq = 0
    for cache_len, input_len in zip(cache_lens, input_lens, strict=True):
        if input_len == 1:
            num_decode += 1
            decode += cache_len
            decode_sq += cache_len * cache_len
            decode_max = max(decode_max, cache_len)
        else:
            num_prefill += 1
            tokens += input_len
            context += cache_len
            pairs += input_len * cache_len + input_len * (input_len + 1) // 2
            tokens_sq += input_len * input_len
    return num_decode, decode, decode_sq, decode_max, num_prefill, tokens, context, pairs, tokens_sq


class BatchRow(NamedTuple):
    """Statistics of one batch as plain integers, named as `COLUMNS`."""

    num_decode: int
    decode_context: int
    decode_context_sq: int
    decode_context_max: int
    num_prefill: int
    prefill_tokens: int
    prefill_context: int
    prefill_pairs: int
    prefill_tokens_sq: int

    @property
    def num_reqs(self) -> int:
        """Members."""
        return self.num_decode + self.num_prefill

    @property
    def num_tokens(self) -> int:
        """New tokens."""
        return self.num_decode + self.prefill_tokens


@dataclass(frozen=True, slots=True)
class BatchStats:
    """Statistics of n batches.

    Attributes:
        table: int64 array of shape (n, len(COLUMNS)); one batch per row.
    """

    table: IntArray

    @classmethod
    def of_batch(cls, cache_lens: Sequence[int], input_lens: Sequence[int]) -> BatchStats:
        """One batch, from its members' cached and new tokens."""
        return cls(np.array([batch_row(cache_lens, input_lens)], dtype=np.int64))

    @classmethod
    def of_steps(cls, steps: pa.Table) -> BatchStats:
        """All batches of a `steps` table (schema.STEPS), each with at least one member."""
        # A part at a time: the members of a million steps as 64-bit integers are gigabytes.
        parts = [cls._of_part(steps.slice(first, _PART_STEPS)) for first in range(0, steps.num_rows, _PART_STEPS)]
        return cls(np.concatenate([part.table for part in parts]) if parts else np.empty((0, len(COLUMNS)), np.int64))

    @classmethod
    def _of_part(cls, steps: pa.Table) -> BatchStats:
        lists = [steps.column(name).combine_chunks() for name in ("cache_len", "input_len")]
        bounds = [members.offsets.to_numpy() for members in lists]
        cache_len, input_len = (
            members.values.to_numpy()[offsets[0] : offsets[-1]].astype(np.int64)
            for members, offsets in zip(lists, bounds, strict=True)
        )
        return cls.of_members(bounds[0][:-1] - bounds[0][0], cache_len, input_len)

    @classmethod
    def of_members(cls, offsets: npt.NDArray[np.integer], cache_len: IntArray, input_len: IntArray) -> BatchStats:
        """Batches laid end to end; batch i starts at `offsets[i]` and none is empty."""
        decode = input_len == 1
        context = np.where(decode, cache_len, 0)
        tokens = np.where(decode, 0, input_len)
        prefix = np.where(decode, 0, cache_len)
        pairs = tokens * prefix + tokens * (tokens + 1) // 2

        def total(values: IntArray) -> IntArray:
            return np.add.reduceat(values, offsets) if len(offsets) else np.empty(0, np.int64)

        largest = np.maximum.reduceat(context, offsets) if len(offsets) else np.empty(0, np.int64)
        columns = [
            total(decode.astype(np.int64)), total(context), total(context * context), largest,
            total((~decode).astype(np.int64)), total(tokens), total(prefix), total(pairs), total(tokens * tokens),
        ]  # fmt: skip
        return cls(np.column_stack(columns))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, rows: slice | npt.NDArray[np.bool_] | IntArray) -> BatchStats:
        return BatchStats(self.table[rows])

    def __getattr__(self, name: str) -> IntArray:
        try:
            return self.table[:, COLUMNS.index(name)]
        except ValueError:
            raise AttributeError(name) from None

    @property
    def num_reqs(self) -> IntArray:
        """Members."""
        return self.num_decode + self.num_prefill

    @property
    def num_tokens(self) -> IntArray:
        """New tokens."""
        return self.num_decode + self.prefill_tokens

    @property
    def regime(self) -> npt.NDArray[np.str_]:
        """One of REGIMES per batch: only prefills, only decodes, or both."""
        prefill, decode = self.num_prefill > 0, self.num_decode > 0
        return np.select([prefill & decode, prefill], ["mixed", "prefill"], "decode")


def durations_ns(steps: pa.Table) -> IntArray:
    """How long the model ran in each row of a `steps` table (schema.STEPS): end_ns - start_ns."""
    durations: IntArray = steps.column("end_ns").to_numpy() - steps.column("start_ns").to_numpy()
    return durations
