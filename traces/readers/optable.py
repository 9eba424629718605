"""Tables of operator and step times, whatever their format: `read_op_table(path) -> OpTable`.

One `OpSamples` holds the times of one operator under one key. A key is what must never be averaged over: engine and its
version, GPU, data types, tensor-parallel degree, kernel variant. A *shape* is a model's (heads, weights), a *load* is what
batches change (requests, tokens, context): interpolation goes along loads, inside one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.columns import WideTable
from kvtwin.traces.readers.text import provenance

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

# What an operator's time is made of; the formulas are in `sim/latency/work/`.
WORKS: Final = (
    "prefill_attention",  # num_seqs, chunk (new tokens of each), prefix (cached tokens of each)
    "decode_attention",  # num_decode, context (of each)
    "mixed_attention",  # chunk and prefix of one prefill, num_decode and context (of each)
    # (both also with prefill_tokens and prefill_key of all prefills together: `work.columns.prefills`)
    "uneven_decode",  # num_decode; a share long_share of them has `skew` times the others' `context`
    "uneven_mixed",  # the same, with chunk and prefix of one prefill
    "uneven_prefill",  # num_seqs, prompt_tokens and squares (sums over them), longest, prefix (of each)
    "gemm",  # m, by n and k
    "moe",  # num_tokens, by the shape of the experts
    "tokens",  # any operator by its number of rows: num_tokens (requests for lm_head and sampler)
    "transfer",  # num_bytes, by number of devices
    "prompt_step",  # a whole prefill step: num_seqs, prompt_tokens (of each)
    "token_step",  # a whole decode step: num_decode, and context, or the mean over prompt_tokens and output_tokens (of each)
)


@dataclass(frozen=True)
class OpSamples:
    """Measured times of one operator under one key; every array has shape (n,).

    Attributes:
        op: the operator's name in the file.
        work: entry of WORKS.
        key: what is never averaged over, as text.
        shape: columns that a model fixes.
        load: columns that a batch changes.
        time_us: microseconds per call, positive.
        rows: number of the row in the file.
        spread: standard deviation over mean of the repeats behind each time; NaN where the file does not say.
        resolution_us: the timer's step, half of which every time may be off; 0 where unknown.
        suspect: rows that the file's publisher or a check calls doubtful; never fitted, always named.
        constants: numbers that hold for every row and that a formula needs (heads per GPU, window_size).
    """

    op: str
    work: str
    key: Mapping[str, str]
    shape: Mapping[str, IntArray]
    load: Mapping[str, npt.NDArray[Any]]
    time_us: FloatArray
    rows: IntArray
    spread: FloatArray
    suspect: npt.NDArray[np.bool_]
    resolution_us: float = 0.0
    constants: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.time_us)

    @property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Shape, then load."""
        return {**self.shape, **self.load}

    @property
    def name(self) -> str:
        """Operator and key in one line."""
        return " ".join([self.op, *(f"{name}={value}" for name, value in self.key.items())])

    def where(self, keep: npt.NDArray[np.bool_] | IntArray) -> OpSamples:
        """Only some rows."""
        return replace(
            self,
            shape={name: values[keep] for name, values in self.shape.items()},
            load={name: values[keep] for name, values in self.load.items()},
            time_us=self.time_us[keep],
            rows=self.rows[keep],
            spread=self.spread[keep],
            suspect=self.suspect[keep],
        )


@dataclass(frozen=True)
class OpTable:
    """What one file holds.

    Attributes:
        path: the file.
        format_name: entry of `op_tables.READERS`.
        samples: one per operator and key.
        source: provenance: path, reader, digest.
        facts: what holds for the whole file: engine, hardware, model, where it says so.
    """

    path: Path
    format_name: str
    samples: Sequence[OpSamples]
    source: Mapping[str, Any]
    facts: Mapping[str, str] = field(default_factory=dict)

    def only(self, wanted: Mapping[str, str]) -> OpTable:
        """The samples whose key (or "op") has these values.

        Raises:
            InputError: a name that no key has, or a value that leaves nothing; both name what there is.
        """
        for name, value in wanted.items():
            found = sorted({sample.op if name == "op" else sample.key.get(name, "") for sample in self.samples} - {""})
            if not found:
                names = sorted({name for sample in self.samples for name in sample.key} | {"op"})
                raise InputError(f"--filter {name}: no such key; known: {', '.join(names)}", path=self.path)
            if value not in found:
                raise InputError(f"--filter {name}={value}: found only {', '.join(found)}", path=self.path)
        kept = [
            sample
            for sample in self.samples
            if all((sample.op if name == "op" else sample.key.get(name)) == value for name, value in wanted.items())
        ]
        if not kept:
            raise InputError("no samples pass all of the filters together", path=self.path)
        return replace(self, samples=kept)


def group_samples(
    table: WideTable,
    op: str,
    work: str,
    time_us: FloatArray,
    *,
    key: Mapping[str, npt.NDArray[Any]],
    shape: Mapping[str, IntArray],
    load: Mapping[str, npt.NDArray[Any]],
    keep: npt.NDArray[np.bool_] | None = None,
    spread: FloatArray | None = None,
    suspect: npt.NDArray[np.bool_] | None = None,
    resolution_us: float = 0.0,
) -> list[OpSamples]:
    """Split one operator's rows by key; every array has the table's length, `keep` says which rows count."""
    n = len(table)
    kept = np.arange(n) if keep is None else np.flatnonzero(keep)
    if not len(kept):
        return []
    whole = OpSamples(
        op=op,
        work=work,
        key={},
        shape={name: np.asarray(values[kept], np.int64) for name, values in shape.items()},
        load={name: values[kept] for name, values in load.items()},
        time_us=np.asarray(time_us[kept], np.float64),
        rows=table.rows()[kept],
        spread=np.full(len(kept), np.nan) if spread is None else np.asarray(spread[kept], np.float64),
        suspect=np.zeros(len(kept), np.bool_) if suspect is None else suspect[kept],
        resolution_us=resolution_us,
    )
    if not key:
        return [whole]
    texts = [np.asarray(values[kept]).astype(str) for values in key.values()]
    codes, label = np.zeros(len(kept), np.int64), []
    for values in texts:
        names, index = np.unique(values, return_inverse=True)
        codes = codes * len(names) + index.ravel()
        label.append(values)
    found = []
    for code in np.unique(codes):
        here = codes == code
        first = int(np.argmax(here))
        found.append(
            replace(whole.where(here), key={name: str(values[first]) for name, values in zip(key, label, strict=True)})
        )
    return found


def op_table(
    path: Path,
    format_name: str,
    samples: Sequence[OpSamples],
    facts: Mapping[str, str],
    files: list[Path] | None = None,
) -> OpTable:
    """Put a file's samples together. Raises InputError where there are none."""
    if not samples:
        raise InputError("holds no times", path=path)
    return OpTable(path, format_name, samples, provenance(path, format_name, files or [path]), facts)


def plain_samples(
    op: str,
    work: str,
    load: Mapping[str, npt.NDArray[Any]],
    time_us: FloatArray,
    key: Mapping[str, str] | None = None,
    constants: Mapping[str, float] | None = None,
) -> OpSamples:
    """Samples of one operator from arrays of shape (n,), without repeats, shapes or doubts."""
    n = len(time_us)
    return OpSamples(
        op, work, key or {}, {}, load, np.asarray(time_us, np.float64), np.arange(n), np.full(n, np.nan),
        np.zeros(n, np.bool_), constants=constants or {},
    )  # fmt: skip


Reader = Callable[[Path], OpTable]

__all__ = ["WORKS", "OpSamples", "OpTable", "Reader", "group_samples", "op_table", "plain_samples"]
