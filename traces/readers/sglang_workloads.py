"""The workloads that SGLang's oracle cases name, made anew from their parameters (`oracle_common.py`).

Token ids follow the oracle: token j of hash id h is h * 512 + j, output k of request i is 2**31 + i * 4096 + k, and a
prompt is a list of runs of consecutive ids.
"""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HASH_BLOCK_TOKENS = 512
OUTPUT_BASE = 1 << 31
OUTPUTS_PER_REQUEST = 4096
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class CaseRequest:
    """One request of a case: its line in the source, arrival, prompt runs and lengths."""

    src: int
    arrival_ns: int
    runs: Runs
    input_length: int
    output_length: int
    priority: int | None = None


def make_workload(workload: Mapping[str, Any]) -> list[CaseRequest]:
    """The requests of a case's `workload`.

    Raises:
        FileNotFoundError: it is cut from a Mooncake trace that is not in $ORACLE_TRACES.
    """
    arguments = dict(workload)
    kind = arguments.pop("kind")
    makers: dict[str, Callable[..., list[CaseRequest]]]
    makers = {"mooncake": _mooncake, "multiturn": _multiturn, "poisson": _poisson}
    return makers[kind](**arguments)


def merged(runs: list[tuple[int, int]]) -> Runs:
    """Runs that follow on one another joined, so that equal token sequences have equal runs."""
    result: list[tuple[int, int]] = []
    for first, length in runs:
        if result and sum(result[-1]) == first:
            result[-1] = (result[-1][0], result[-1][1] + length)
        elif length:
            result.append((first, length))
    return tuple(result)


def _hash_run(hash_id: int, length: int) -> tuple[int, int]:
    return hash_id * HASH_BLOCK_TOKENS, length


def open_trace(name: str) -> IO[str]:
    """A Mooncake trace below $ORACLE_TRACES: `conversation` or `synthetic`, plain or as published."""
    folder = Path(os.environ.get("ORACLE_TRACES", "."))
    for file in (folder / f"{name}.jsonl", folder / f"{name}_trace.jsonl"):
        if file.exists():
            return file.open()
    packed = folder / f"{name}_trace.jsonl.gz"
    if packed.exists():
        return gzip.open(packed, "rt")
    raise FileNotFoundError(f"{name}.jsonl is not in {folder} ($ORACLE_TRACES)")


def _mooncake(
    trace: str,
    start: int,
    count: int,
    block: int = HASH_BLOCK_TOKENS,
    time_scale: float = 1.0,
    max_input: int | None = None,
    out_scale: float = 1.0,
) -> list[CaseRequest]:
    """A slice of a Mooncake trace; `block` < 512 takes only the first tokens of each hash block."""
    requests: list[CaseRequest] = []
    first_ns = None
    with open_trace(trace) as lines:
        for src, line in enumerate(lines):
            if src < start:
                continue
            if len(requests) >= count:
                break
            record = json.loads(line)
            length = -(-record["input_length"] * block // HASH_BLOCK_TOKENS)
            length = max(1, min(length, len(record["hash_ids"]) * block))
            if max_input and length > max_input:
                continue
            arrival_ns = round(record["timestamp"] * 1_000_000 * time_scale)
            first_ns = arrival_ns if first_ns is None else first_ns
            requests.append(
                CaseRequest(
                    src,
                    arrival_ns - first_ns,
                    _hash_runs(record["hash_ids"], length, block),
                    length,
                    max(1, int(record["output_length"] * out_scale)),
                )
            )
    return requests


def _hash_runs(hash_ids: list[int], length: int, block: int) -> Runs:
    runs = []
    for hash_id in hash_ids:
        if length <= 0:
            break
        runs.append(_hash_run(hash_id, min(block, length)))
        length -= block
    return merged(runs)


def _multiturn(
    seed: int,
    n_sessions: int,
    turns: int,
    sys_len: int,
    user_len: int,
    out_len: int,
    rate: float,
    think_s: float,
) -> list[CaseRequest]:
    """Conversations whose prompts hold the history, outputs included, at fixed times."""
    rng = random.Random(seed)
    sessions, time_s = [], 0.0
    for session in range(n_sessions):
        time_s += rng.expovariate(rate)
        sessions.append((session, time_s))
    events = []
    for session, start_s in sessions:
        turn_s = start_s
        for turn in range(turns):
            events.append((turn_s, session, turn))
            turn_s += rng.uniform(0.5, 1.5) * think_s
    history: dict[int, list[tuple[int, int]]] = {}
    requests, next_hash = [], 100_000
    for row, (turn_s, session, _) in enumerate(sorted(events)):
        runs = list(history.setdefault(session, [_hash_run(session % 4, sys_len)]))
        left = max(1, int(rng.uniform(0.2, 1.8) * user_len))
        while left > 0:
            runs.append(_hash_run(next_hash, min(left, HASH_BLOCK_TOKENS)))
            next_hash += 1
            left -= HASH_BLOCK_TOKENS
        output = max(1, int(rng.uniform(0.2, 1.8) * out_len))
        length = sum(run[1] for run in runs)
        requests.append(CaseRequest(row, int(turn_s * 1e9), merged(runs), length, output))
        history[session] = [*runs, (OUTPUT_BASE + row * OUTPUTS_PER_REQUEST, output)]
    return requests


def _poisson(
    seed: int,
    n: int,
    rate: float,
    in_lo: int,
    in_hi: int,
    out_lo: int,
    out_hi: int,
    n_prefix: int,
    prefix_len: int,
    priorities: int | None = None,
) -> list[CaseRequest]:
    """Requests with one of `n_prefix` shared prefixes and a private tail."""
    rng = random.Random(seed)
    requests, time_s, next_hash = [], 0.0, 100_000
    for row in range(n):
        time_s += rng.expovariate(rate)
        runs = []
        if n_prefix:
            prefix, left, place = int(n_prefix * rng.random() ** 2), prefix_len, 0
            while left > 0:
                runs.append(_hash_run(prefix * 64 + place, min(left, HASH_BLOCK_TOKENS)))
                place += 1
                left -= HASH_BLOCK_TOKENS
        left = rng.randint(in_lo, in_hi)
        while left > 0:
            runs.append(_hash_run(next_hash, min(left, HASH_BLOCK_TOKENS)))
            next_hash += 1
            left -= HASH_BLOCK_TOKENS
        output = rng.randint(out_lo, out_hi)
        priority = rng.randrange(priorities) if priorities else None
        length = sum(run[1] for run in runs)
        requests.append(CaseRequest(row, int(time_s * 1e9), merged(runs), length, output, priority))
    return requests
