"""The tables of a Run, as Arrow schemas: the one place where a column, its unit and its meaning are written down.

A recorded run and a simulated run use the same tables. Unknown is null, never 0. All times are integer
nanoseconds on the run's own clock (0 = the run's origin).
"""

from __future__ import annotations

from typing import Final

import pyarrow as pa

SCHEMA_VERSION: Final = 1


def _field(name: str, kind: pa.DataType, unit: str, meaning: str, *, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"unit": unit, "meaning": meaning})


def _required(name: str, kind: pa.DataType, unit: str, meaning: str) -> pa.Field:
    return _field(name, kind, unit, meaning, nullable=False)


def _schema(table: str, fields: list[pa.Field]) -> pa.Schema:
    return pa.schema(fields, metadata={"kvtwin_table": table, "kvtwin_schema_version": str(SCHEMA_VERSION)})


REQUESTS: Final = _schema(
    "requests",
    [
        _required("request_id", pa.string(), "", "unique name"),
        _field("instance", pa.int32(), "", "engine instance that served it"),
        _required("arrival_ns", pa.int64(), "ns", "when the client sent it; rows are sorted by it"),
        _required("input_tokens", pa.int64(), "tokens", "prompt length"),
        _required("output_tokens", pa.int64(), "tokens", "tokens generated"),
        _field("queued_ns", pa.int64(), "ns", "when the engine's loop took it from its input queue"),
        _field("scheduled_ns", pa.int64(), "ns", "the schedule() call that first admitted it"),
        _field("first_token_ns", pa.int64(), "ns", "the engine has the first output token"),
        _field("finish_ns", pa.int64(), "ns", "the engine has the last output token"),
        _field("client_first_token_ns", pa.int64(), "ns", "the client sees the first output token"),
        _field("client_finish_ns", pa.int64(), "ns", "the client sees the last output token"),
        _field("cached_tokens", pa.int64(), "tokens", "prefix-cache hit at first admission"),
        _field("cached_host_tokens", pa.int64(), "tokens", "of cached_tokens, those loaded from host DRAM (level 2)"),
        _field("cached_storage_tokens", pa.int64(), "tokens", "of cached_tokens, those prefetched from level 3"),
        _field("num_preemptions", pa.int64(), "", "how often it was preempted"),
        _field("waiting_ns", pa.int64(), "ns", "time in the Waiting queue; the four queues add up to finish - queued"),
        _field("prefetch_ns", pa.int64(), "ns", "time in the Prefetch queue: its KV comes from a lower level"),
        _field("running_ns", pa.int64(), "ns", "time in the Running queue"),
        _field("swapped_ns", pa.int64(), "ns", "time in the Swapped queue: preempted, its KV in a lower level"),
        _field("session_id", pa.string(), "", "conversation it belongs to"),
        _field("parent_id", pa.string(), "", "request whose answer it continues"),
        _field("priority", pa.int64(), "", "smaller runs first; null means 0"),
        _field("slo_class", pa.string(), "", "service class"),
        _field(
            "block_hashes",
            pa.list_(pa.uint64()),
            "",
            "one id per block of prompt tokens: two prompts share their first k + 1 blocks exactly where entries 0 to k "
            "are all equal (workload.prefix_blocks chains them); the block size is run.json's hash_block_tokens; "
            "the last block may be partial, or have no entry",
        ),
        _field(
            "output_block_hashes",
            pa.list_(pa.uint64()),
            "",
            "one id per further block of prompt and output together, from the first that is not whole in the prompt: they "
            "go on from the prompt's whole blocks as block_hashes does, so that a prompt which quotes the answer has them",
        ),
    ],
)

STEPS: Final = _schema(
    "steps",
    [
        _required("step", pa.int64(), "", "0, 1, 2, ... within the instance"),
        _field("instance", pa.int32(), "", "engine instance"),
        _field("sched_ns", pa.int64(), "ns", "when schedule() was called"),
        _required("start_ns", pa.int64(), "ns", "the model starts"),
        _required("end_ns", pa.int64(), "ns", "its tokens are back"),
        _field("update_ns", pa.int64(), "ns", "the scheduler has taken them in"),
        _required("request", pa.list_(pa.int32()), "row of requests", "the batch, in the scheduler's order"),
        _required("cache_len", pa.list_(pa.int32()), "tokens", "tokens computed before the step, per member"),
        _required("input_len", pa.list_(pa.int32()), "tokens", "new tokens in the step, per member"),
        _field("preempted", pa.list_(pa.int32()), "row of requests", "preempted while scheduling, in order"),
        _field("finished", pa.list_(pa.int32()), "row of requests", "finished with this step's output, in order"),
        _field("num_waiting", pa.int64(), "requests", "after schedule(), before the output is processed"),
        _field("num_running", pa.int64(), "requests", "after schedule(), before the output is processed"),
        _field("num_free_blocks", pa.int64(), "blocks", "after schedule(); cached but unused blocks count as free"),
        _field("num_evicted_blocks", pa.int64(), "blocks", "cached blocks that lost their content in this schedule()"),
    ],
)

CACHE: Final = _schema(
    "cache",
    [
        _required("time_ns", pa.int64(), "ns", "when"),
        _field("instance", pa.int32(), "", "engine instance"),
        _required("level", pa.int8(), "", "1 HBM, 2 host DRAM, 3 SSD or remote"),
        _required(
            "kind",
            pa.string(),
            "",
            "lookup, hit, store, evict, load_back, write_back, prefetch_start, prefetch_done, prefetch_drop",
        ),
        _field("request", pa.int32(), "row of requests", "whose, where known"),
        _field("tokens", pa.int64(), "tokens", "how much"),
        _field("bytes", pa.int64(), "bytes", "how much"),
        _field("block_hash", pa.uint64(), "", "which block, where known"),
    ],
)

TABLES: Final = {"requests": REQUESTS, "steps": STEPS, "cache": CACHE}
