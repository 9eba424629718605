"""Workloads of LLMServingSim (github.com/casys-kaist/LLMServingSim): one JSON object per line, `.gz` is unpacked.

    {"input_toks": 4, "output_toks": 2, "arrival_time_ns": 46926808, "input_tok_ids": [5971, 2927, 220, 1032]}

Its driver names the requests "bench-0", "bench-1", ... by line; `llmservingsim_run` reads what became of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtwin.traces.readers.text import MAX_TOKENS, Row, provenance, read_jsonl
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.traces.workload import intern_token_blocks


def read(path: Path, hash_block_tokens: int = 16) -> Run:
    """Read an LLMServingSim workload; prompts are hashed in blocks of `hash_block_tokens` (the engine's block size).

    Raises:
        InputError: with file, row and column; also where rows are not sorted by arrival.
    """
    names = ("request_id", "arrival_ns", "input_tokens", "output_tokens")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    prompts: list[list[int] | None] = []
    last = 0
    for index, row in enumerate(read_jsonl(path)):
        arrival_ns = row.nanoseconds("arrival_time_ns")
        if arrival_ns < last:
            row.fail("arrival_time_ns", f"{arrival_ns} is before the row above ({last}): sort the file by arrival")
        last = arrival_ns
        values = (f"bench-{index}", arrival_ns, row.tokens("input_toks"), row.tokens("output_toks"))
        for name, value in zip(names, values, strict=True):
            columns[name].append(value)
        prompts.append(_prompt(row) if row.has("input_tok_ids") else None)
    known = any(prompt is not None for prompt in prompts)
    columns["block_hashes"] = list(intern_token_blocks(prompts, hash_block_tokens))
    info = RunInfo(
        "workload",
        hash_block_tokens=hash_block_tokens if known else None,
        source=provenance(path, "llmservingsim_workload", [path]),
    )
    return Run(info, {"requests": from_columns("requests", columns, path)}, name=str(path))


def _prompt(row: Row) -> list[int]:
    ids = row.integers("input_tok_ids", MAX_TOKENS)
    if len(ids) != row.tokens("input_toks"):
        row.fail("input_tok_ids", f"{len(ids)} ids, but input_toks is {row.tokens('input_toks')}")
    return ids
