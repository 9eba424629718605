"""KV-cache events as vLLM and SGLang publish them (`--kv-events-config`): the payloads of the ZMQ messages, in a file.

Either one JSON object a line, `{"ts": seconds, "events": [{"type": "BlockStored", "block_hashes": [...], ...}]}`, or the
msgpack payloads themselves, one after the other. A batch is `[ts, events, data_parallel_rank]`; an event is a map with
its name under "type" (vLLM 0.32.0) or an array that begins with it (vLLM 0.19.0, SGLang 0.5.9). Read from
vllm/distributed/kv_events.py and sglang/srt/disaggregation/kv_events.py (`EventBatch`, `KVCacheEvent`: msgspec structs).
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.text import Row, read_jsonl

# Fields of the array form, as far as they are read.
_FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "BlockStored": ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium"),
    "BlockRemoved": ("block_hashes", "medium"),
    "AllBlocksCleared": (),
}
_GZIP: Final = b"\x1f\x8b"
# How a msgpack array of up to 15, or of more, entries begins.
_ARRAYS: Final = (*range(0x90, 0xA0), 0xDC, 0xDD)


def is_msgpack(path: Path) -> bool:
    """Whether a file begins as msgpack payloads do: with an array."""
    try:
        with _open(path) as file:
            return file.read(1) in [bytes([first]) for first in _ARRAYS]
    except (OSError, EOFError) as error:
        raise InputError(f"not readable ({error})", path=path) from error


def read_batches(path: Path) -> Iterator[Row]:
    """One Row per batch, with `ts` and `events`, a list of objects with a `type`.

    Raises:
        InputError: with the row (the batch's number, from 1): not JSON or msgpack, or no batch; msgpack is not installed.
    """
    rows = _read_msgpack(path) if is_msgpack(path) else read_jsonl(path)
    for row in rows:
        events = row.get("events")
        if not isinstance(events, list) or not all(isinstance(event, dict | list) for event in events):
            row.fail("events", "a list of events expected")
        yield Row(path, row.number, {**row.values, "events": [_as_object(event, row) for event in events]})


def _open(path: Path) -> Any:
    with path.open("rb") as plain:
        packed = plain.read(2) == _GZIP
    return gzip.open(path, "rb") if packed else path.open("rb")


def _read_msgpack(path: Path) -> Iterator[Row]:
    try:
        import msgpack
    except ImportError as error:
        raise InputError("these are msgpack payloads: pip install 'kvtwin[events]' to read them", path=path) from error
    number = end = 0
    try:
        with _open(path) as file:
            payloads = msgpack.Unpacker(file, strict_map_key=False, raw=False)
            for number, batch in enumerate(payloads, 1):
                end = payloads.tell()
                if not isinstance(batch, list) or len(batch) < 2:
                    raise InputError("a batch [ts, events] expected", path=path, row=number)
                yield Row(path, number, {"ts": batch[0], "events": batch[1]})
            if end < file.tell():
                raise InputError("the last payload is cut off", path=path, row=number + 1)
    # A map whose key is a map or an array is a TypeError.
    except (ValueError, TypeError, OSError, EOFError, msgpack.UnpackException) as error:
        raise InputError(f"not a msgpack payload ({error})", path=path, row=number + 1) from error


def _as_object(event: Any, row: Row) -> dict[str, Any]:
    if isinstance(event, dict):
        return event
    name = event[0] if event else None
    if not isinstance(name, str) or name not in _FIELDS:
        row.fail("events", f"{name!r}: {', '.join(_FIELDS)} expected")
    return {"type": name, **dict(zip(_FIELDS[name], event[1:], strict=False))}
