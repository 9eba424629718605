"""Which reader reads a table of operator or step times: by its content, never by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers import aiconfigurator, llmservingsim_tables, llmservingsim_v0, splitwise, vidur
from kvtwin.traces.readers.columns import csv_header, is_parquet
from kvtwin.traces.readers.optable import OpTable, Reader

READERS: Final[Mapping[str, Reader]] = {
    "aiconfigurator": aiconfigurator.read,
    "vidur": vidur.read,
    "llmservingsim_v0": llmservingsim_v0.read,
    "llmservingsim_tables": llmservingsim_tables.read,
    "splitwise": splitwise.read,
}
# Columns that only one CSV format has; all of a set must be there.
_HEADERS: Final = (
    ("aiconfigurator", {"framework", "op_name", "kernel_source", "latency"}),
    ("splitwise", {"prompt_time", "token_time", "tensor_parallel"}),
    ("llmservingsim_v0", {"layer_name", llmservingsim_v0.TIME_COLUMN}),
    ("llmservingsim_tables", {"prefill_chunk", "n_decode", "time_us"}),
    ("llmservingsim_tables", {"layer", "tokens", "time_us"}),
    ("llmservingsim_tables", {"layer", "sequences", "time_us"}),
    ("llmservingsim_tables", {"activated_experts", "time_us"}),
    ("llmservingsim_tables", {"t_skew_us", "kv_big"}),
)


def read_op_table(path: Path) -> OpTable:
    """Read a table of operator or step times.

    Raises:
        InputError: no known format, or whatever its reader finds wrong.
    """
    return READERS[detect(path)](path)


def detect(path: Path) -> str:
    """Name a table's format by its first bytes and its header.

    Raises:
        InputError: nothing there, a folder, or no known format; fitted coefficients are told what they are.
    """
    if not path.is_file():
        raise InputError("no such file", path=path)
    if is_parquet(path):
        return "aiconfigurator"
    names = csv_header(path)
    header = set(names)
    if any(name.startswith("time_stats.") for name in header):
        return "vidur"
    for name, needed in _HEADERS:
        if needed <= header:
            return name
    if names[0].startswith("{"):
        raise InputError("JSON: holds no table of measured times (fitted coefficients cannot be calibrated)", path=path)
    raise InputError(_why_unknown(names), path=path)


def _why_unknown(names: Sequence[str]) -> str:
    """What a first line lacks to be one of a table that is known."""
    if not any(names):
        return "the first line is empty: column names expected"
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(names) == 1 and separator in names[0]:
            return f"columns are separated by {name}: write it with commas (and numbers with points)"
    name, needed = max(_HEADERS, key=lambda known: len(known[1] & set(names)) / len(known[1]))
    lacking = sorted(needed - set(names))
    if 2 * len(lacking) <= len(needed):
        return f"looks like a table of {name}, but has no column {' and no '.join(lacking)}"
    return f"not a table of times that kvtwin reads; known: {', '.join(READERS)}"
