"""Check a table against its schema and the rules that every Run obeys; build one from plain columns."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.traces.errors import InputError
from kvtwin.traces.schema import TABLES

Where = str | PathLike[str]

# Columns that count something or name a duration: a negative value is a mistake in the source.
_NOT_NEGATIVE = {
    "arrival_ns", "input_tokens", "output_tokens", "cached_tokens", "num_preemptions",
    "cached_host_tokens", "cached_storage_tokens", "waiting_ns", "prefetch_ns", "running_ns", "swapped_ns",
    "num_waiting", "num_running", "num_free_blocks", "num_evicted_blocks", "step",
}  # fmt: skip


def from_columns(key: str, columns: Mapping[str, Any], where: Where) -> pa.Table:
    """Build the table `key` ("requests", "steps", "cache") from columns; absent ones become null.

    Raises:
        InputError: a column is unknown, of a wrong type or breaks a rule of `check_table`.
    """
    schema = TABLES[key]
    unknown = sorted(set(columns) - set(schema.names))
    if unknown:
        raise InputError(f"unknown column; {key} has {', '.join(schema.names)}", path=where, column=unknown[0])
    rows = len(next(iter(columns.values())))
    arrays = []
    for field in schema:
        values = columns.get(field.name)
        try:
            if values is None:
                arrays.append(pa.nulls(rows, field.type))
            elif isinstance(values, pa.Array | pa.ChunkedArray):
                arrays.append(values.cast(field.type))
            else:
                arrays.append(pa.array(values, field.type))
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            raise InputError(f"not {field.type} ({error})", path=where, column=field.name) from error
    return check_table(pa.Table.from_arrays(arrays, schema=schema), key, where)


def check_table(table: pa.Table, key: str, where: Where) -> pa.Table:
    """Return `table` in the schema's column order, or say what is wrong with it.

    Rules: the columns and types of `schema.TABLES[key]` (one that may be null may be absent); no null where the schema forbids it; counts
    and times not negative; requests sorted by arrival with unique ids; a step's lists of equal length.

    Raises:
        InputError: with file, row and column.
    """
    schema = TABLES[key]
    table = _cast(table, key, where)
    for field in schema:
        column = table.column(field.name)
        if not field.nullable and column.null_count:
            row = pc.index(column.is_null(), True).as_py()
            raise InputError("is missing", path=where, row=row, column=field.name)
        if field.name in _NOT_NEGATIVE and len(column):
            _refuse(pc.less(column, 0), column, "is negative", where, field.name)
    if key == "requests":
        _check_requests(table, where)
    if key == "steps":
        _check_steps(table, where)
    return table


def _cast(table: pa.Table, key: str, where: Where) -> pa.Table:
    schema = TABLES[key]
    # A column that may be unknown may also be absent: a run written before the schema had it.
    missing = [field.name for field in schema if not field.nullable and field.name not in table.column_names]
    if missing:
        raise InputError(f"column is missing; {key} has {', '.join(schema.names)}", path=where, column=missing[0])
    unknown = [name for name in table.column_names if name not in schema.names]
    if unknown:
        raise InputError(f"unknown column; {key} has {', '.join(schema.names)}", path=where, column=unknown[0])
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, field.type)]))
            continue
        try:
            columns.append(table.column(field.name).cast(field.type))
        except pa.ArrowException as error:
            raise InputError(f"not {field.type} ({error})", path=where, column=field.name) from error
    return pa.Table.from_arrays(columns, schema=schema)


def _refuse(bad: pa.ChunkedArray, values: pa.ChunkedArray, problem: str, where: Where, column: str) -> None:
    """Raise for the first row where `bad` is true."""
    row = pc.index(bad, True).as_py()
    if row >= 0:
        raise InputError(f"{values[row].as_py()!r} {problem}", path=where, row=row, column=column)


def _check_requests(table: pa.Table, where: Where) -> None:
    for name in ("input_tokens", "output_tokens"):
        column = table.column(name)
        _refuse(pc.less(column, 1), column, "tokens: at least 1 expected", where, name)
    arrival = table.column("arrival_ns").to_numpy()
    late = np.flatnonzero(np.diff(arrival) < 0)
    if late.size:
        row = int(late[0]) + 1
        problem = f"{arrival[row]} is before the row above ({arrival[row - 1]}): requests must be sorted by arrival"
        raise InputError(problem, path=where, row=row, column="arrival_ns")
    ids = table.column("request_id")
    if len(pc.unique(ids)) != len(ids):
        seen: set[str] = set()
        for row, name in enumerate(ids.to_pylist()):
            if name in seen:
                raise InputError(f"{name!r} occurs twice: ids must be unique", path=where, row=row, column="request_id")
            seen.add(name)


def _check_steps(table: pa.Table, where: Where) -> None:
    end, start = table.column("end_ns"), table.column("start_ns")
    _refuse(pc.less(end, start), end, "is before start_ns", where, "end_ns")
    lengths = pc.list_value_length(table.column("request"))
    for name in ("cache_len", "input_len"):
        column = table.column(name)
        bad = pc.not_equal(pc.list_value_length(column), lengths)
        _refuse(bad, column, "is not as long as request", where, name)
        values = pc.list_flatten(column)
        low = 0 if name == "cache_len" else 1
        if len(values) and pc.min(values).as_py() < low:
            row = pc.index(pc.less(values, low), True).as_py()
            owner = pc.list_parent_indices(column)[row].as_py()
            raise InputError(f"{values[row].as_py()} is below {low}", path=where, row=owner, column=name)
