"""Mooncake traces (github.com/kvcache-ai/Mooncake): one JSON object per line, `.gz` is unpacked.

    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2, 3]}

`timestamp` is in milliseconds from the start of the trace; `hash_ids` names each block of 512 prompt tokens, the last
one partial. Rows have no names: they become "r0", "r1", ...
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from kvtwin.traces.readers.text import MAX_HASH, MAX_TIME_NS, provenance, read_jsonl
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.traces.time import NS_PER_MS

HASH_BLOCK_TOKENS: Final = 512


def read(path: Path) -> Run:
    """Read a Mooncake trace as a workload.

    Raises:
        InputError: with file, row and column; also where rows are not sorted by timestamp.
    """
    names = ("request_id", "arrival_ns", "input_tokens", "output_tokens", "block_hashes")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    last = 0
    for index, row in enumerate(read_jsonl(path)):
        timestamp = row.integer("timestamp", 0, MAX_TIME_NS // NS_PER_MS)
        if timestamp < last:
            row.fail("timestamp", f"{timestamp} ms is before the row above ({last} ms): sort the file by arrival")
        last = timestamp
        input_tokens = row.tokens("input_length")
        hash_ids = row.integers("hash_ids", MAX_HASH)
        expected = -(-input_tokens // HASH_BLOCK_TOKENS)
        if len(hash_ids) != expected:
            row.fail("hash_ids", f"{len(hash_ids)} ids for {input_tokens} tokens: {expected} expected")
        values = (f"r{index}", timestamp * NS_PER_MS, input_tokens, row.tokens("output_length"), hash_ids)
        for name, value in zip(names, values, strict=True):
            columns[name].append(value)
    info = RunInfo("workload", hash_block_tokens=HASH_BLOCK_TOKENS, source=provenance(path, "mooncake", [path]))
    return Run(info, {"requests": from_columns("requests", columns, path)}, name=str(path))
