"""Azure LLM inference traces 2023 (github.com/Azure/AzurePublicDataset): a CSV file, `.gz` is unpacked.

    TIMESTAMP,ContextTokens,GeneratedTokens
    2023-11-16 18:15:46.6805900,374,44

Stamps have seven decimals of a second; arrivals count from the first row, exactly. A request that generates no token
does not occur upstream and is refused. Rows have no names: they become "r0", "r1", ...
"""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import numpy as np

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.text import MAX_TOKENS, provenance, read_csv
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.traces.time import NS_PER_S

_STAMP = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?")
_EPOCH = datetime(1970, 1, 1)


def read(path: Path) -> Run:
    """Read an Azure 2023 trace as a workload.

    Raises:
        InputError: with file, row and column; also where rows are not sorted by TIMESTAMP.
    """
    table = read_csv(path, {"TIMESTAMP": str, "ContextTokens": int, "GeneratedTokens": int})
    stamps = [_stamp_ns(text, path, row) for text, row in zip(table["TIMESTAMP"], table.rows, strict=True)]
    arrival = np.array(stamps, dtype=np.int64)
    in_order = np.concatenate(([True], np.diff(arrival) >= 0))
    table.require(in_order, "TIMESTAMP", "is before the row above: sort the file by arrival")
    for column in ("ContextTokens", "GeneratedTokens"):
        good = (table[column] >= 1) & (table[column] <= MAX_TOKENS)
        table.require(good, column, f"tokens: 1 to {MAX_TOKENS} expected")
    columns = {
        "request_id": [f"r{index}" for index in range(len(arrival))],
        "arrival_ns": arrival - arrival[0],
        "input_tokens": table["ContextTokens"],
        "output_tokens": table["GeneratedTokens"],
    }
    info = RunInfo("workload", source=provenance(path, "azure2023", [path], origin=str(table["TIMESTAMP"][0])))
    return Run(info, {"requests": from_columns("requests", columns, path)}, name=str(path))


def _stamp_ns(text: str, path: Path, row: int) -> int:
    """Nanoseconds since 1970 of "2023-11-16 18:15:46.6805900", without a float on the way."""
    match = _STAMP.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        since = datetime.fromisoformat(match[1]) - _EPOCH
    except ValueError:
        problem = f"{text[:40]!r} is not a time like 2023-11-16 18:15:46.6805900"
        raise InputError(problem, path=path, row=row, column="TIMESTAMP") from None
    stamp = (since.days * 86_400 + since.seconds) * NS_PER_S + int((match[2] or "0").ljust(9, "0"))
    if not 0 <= stamp < 1 << 62:
        raise InputError(f"{text!r} is outside 1970 to 2116", path=path, row=row, column="TIMESTAMP")
    return stamp
