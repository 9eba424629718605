"""All-reduce times by message size: NVIDIA aiconfigurator's custom_allreduce_perf.parquet, Vidur's all_reduce.csv(.gz).

aiconfigurator: `message_size` counts ELEMENTS of `allreduce_dtype` (its collector makes a tensor of that many; as
bytes, the largest messages would run at half the bandwidth that NVLink is known to reach), `latency` is milliseconds
per call. Each size was measured twice: replayed from a CUDA graph ("graph") and launched from Python ("eager", which
adds 15 to 40 us of launch overhead that a busy engine hides behind the GPU's work).

Vidur: `size` is bytes, the `time_stats.*` are milliseconds over 3 or more calls; only groups inside one node
(devices_per_node == num_workers) are taken, and the median (the mean has the first call's warm-up in it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.text import Columns, read_csv
from kvtwin.traces.time import NS_PER_MS

ALLREDUCE: Final = pa.schema(
    [pa.field("num_gpus", pa.int64()), pa.field("message_bytes", pa.int64()), pa.field("time_ns", pa.float64())]
)
ELEMENT_BYTES: Final = {"bfloat16": 2, "float16": 2, "half": 2, "float32": 4, "float": 4, "int8": 1}
_VIDUR: Final = {
    "time_stats.all_reduce.min": float,
    "time_stats.all_reduce.max": float,
    "time_stats.all_reduce.mean": float,
    "time_stats.all_reduce.median": float,
    "time_stats.all_reduce.std": float,
    "rank": int,
    "num_workers": int,
    "size": int,
    "collective": str,
    "devices_per_node": int,
    "max_devices_per_node": int,
}
_AICONFIGURATOR: Final = {
    "num_gpus": pa.int64(),
    "message_size": pa.int64(),
    "latency": pa.float64(),
    "allreduce_dtype": pa.string(),
    "backend": pa.string(),
}


def read_allreduce(path: Path, launch: Literal["graph", "eager"] = "graph") -> pa.Table:
    """Read either format, told by its content, as a table of schema ALLREDUCE, sorted, one row per key.

    `launch` chooses among aiconfigurator's two measurements (see above); repeats of one key are averaged.

    Raises:
        InputError: neither format; with file, row and column: a time that is not positive and finite, a size or group
            below 1, an unknown data type.
    """
    try:
        with path.open("rb") as stream:
            is_parquet = stream.read(4) == b"PAR1"
    except OSError as error:
        raise InputError(f"not readable ({error.strerror})", path=path) from error
    table = _read_aiconfigurator(path, launch) if is_parquet else _read_vidur(path)
    num_gpus, message_bytes, time_ns = table
    keys, index = np.unique(np.stack([num_gpus, message_bytes]), axis=1, return_inverse=True)
    mean = np.bincount(index.ravel(), weights=time_ns) / np.bincount(index.ravel())
    return pa.Table.from_arrays([pa.array(keys[0]), pa.array(keys[1]), pa.array(mean)], schema=ALLREDUCE)


def _read_aiconfigurator(path: Path, launch: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns = _parquet_columns(path)
    backends = columns["backend"]
    wanted = np.array([name.endswith(f"_{launch}") for name in backends], dtype=bool)
    if not wanted.any():
        known = ", ".join(sorted(set(backends)))
        raise InputError(f"no row of a *_{launch} backend; found: {known}", path=path, column="backend")
    dtypes = columns["allreduce_dtype"]
    columns.require(np.isin(dtypes, list(ELEMENT_BYTES)), "allreduce_dtype", f"unknown; known: {[*ELEMENT_BYTES]}")
    _require_positive(columns, "num_gpus", "message_size", "latency")
    element_bytes = np.array([ELEMENT_BYTES[name] for name in dtypes], dtype=np.int64)
    return (
        columns["num_gpus"][wanted],
        (columns["message_size"] * element_bytes)[wanted],
        columns["latency"][wanted] * NS_PER_MS,
    )


def _parquet_columns(path: Path) -> Columns:
    try:
        table = pq.read_table(path, partitioning=None)
        missing = [name for name in _AICONFIGURATOR if name not in table.column_names]
        if missing:
            raise InputError(f"column is missing; expected {', '.join(_AICONFIGURATOR)}", path=path, column=missing[0])
        table = table.select(list(_AICONFIGURATOR)).cast(pa.schema(_AICONFIGURATOR))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"not a readable table of all-reduce times ({error})", path=path) from error
    values: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise InputError("is missing", path=path, row=row, column=name)
        values[name] = column.to_numpy()
    return Columns(path, list(range(table.num_rows)), values)


def _read_vidur(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns = read_csv(path, _VIDUR)
    columns.require(columns["collective"] == "all_reduce", "collective", "is not all_reduce")
    _require_positive(columns, "num_workers", "size", "devices_per_node", "time_stats.all_reduce.median")
    inside = columns["devices_per_node"] == columns["num_workers"]
    if not inside.any():
        raise InputError("no group inside one node (devices_per_node == num_workers)", path=path)
    time_ns = columns["time_stats.all_reduce.median"][inside] * NS_PER_MS
    return columns["num_workers"][inside], columns["size"][inside], time_ns


def _require_positive(columns: Columns, *names: str) -> None:
    limit = float(1 << 50)  # a petabyte, a year: beyond it, products would leave 64 bits
    for name in names:
        columns.require((columns[name] > 0) & (columns[name] < limit), name, "is not a positive, finite number")
