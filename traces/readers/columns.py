"""Columns of wide measurement files (CSV, gzip'd or not, and Parquet) as arrays, with file, row and column in errors.

`text.read_csv` checks every cell of a known header; these files have hundreds of columns, a hundred thousand rows and
headers that differ between versions, so Arrow parses them, and only the columns that are asked for are looked at.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from kvtwin.traces.errors import InputError

MAX_BYTES: Final = 1 << 30  # unpacked; the largest table seen has 15 MB
_ARROW_ROW: Final = re.compile(r"Row #(\d+)")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class WideTable:
    """A file's columns, and the place of each row in it.

    Attributes:
        path: the file.
        table: as Arrow parsed it.
        first_row: number of the first row: 2 below a CSV's header (lines count from 1), 0 in Parquet.
    """

    path: Path
    table: pa.Table
    first_row: int

    @property
    def names(self) -> list[str]:
        """Columns with a name (a data frame's index has none)."""
        return [name for name in self.table.column_names if name]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def rows(self) -> npt.NDArray[np.int64]:
        """Number of each row in the file."""
        return np.arange(len(self), dtype=np.int64) + self.first_row

    def text(self, name: str) -> Array:
        """A column as strings; empty cells are ""."""
        column = self._column(name)
        return np.array(["" if value is None else str(value) for value in column.to_pylist()], dtype=object)

    def numbers(self, name: str) -> npt.NDArray[np.float64]:
        """A column as float64; empty cells and NaN are NaN. Raises InputError for text."""
        column = self._column(name)
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
            cells = [(row, cell) for row, cell in enumerate(column.to_pylist()) if cell is not None]
            at, cell = next((found for found in cells if not _is_number(found[1])), cells[0])
            raise InputError(f"{cell!r} is not a number", path=self.path, row=at + self.first_row, column=name)
        return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)

    def sizes(self, name: str) -> npt.NDArray[np.int64]:
        """A column of counts: integers, 0 or more, no empty cell."""
        values = self.numbers(name)
        good = np.isfinite(values) & (values >= 0) & (values < 1 << 53)
        good[good] = values[good] == np.rint(values[good])
        self.require(good, name, "a count expected: an integer, 0 or more", values)
        return values.astype(np.int64)

    def times(self, name: str) -> npt.NDArray[np.float64]:
        """A column of durations: positive and finite throughout, in the file's unit."""
        values = self.numbers(name)
        self.require(np.isfinite(values) & (values > 0), name, "a positive, finite time expected", values)
        return values

    def require(self, good: npt.NDArray[np.bool_], name: str, problem: str, values: Array) -> None:
        """Raise InputError for the first row where `good` is false, with its value."""
        if not good.all():
            at = int(np.argmin(good))
            shown = "empty or nan" if values.dtype.kind == "f" and np.isnan(values[at]) else values[at]
            raise InputError(f"{shown}: {problem}", path=self.path, row=at + self.first_row, column=name)

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self.table.column_names:
            raise InputError("column is missing", path=self.path, row=1 if self.first_row else None, column=name)
        return self.table.column(name)


def _is_number(cell: object) -> bool:
    try:
        float(str(cell))
    except ValueError:
        return False
    return True


def is_parquet(path: Path) -> bool:
    """Whether a file begins as Parquet does. Raises InputError where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"PAR1"
    except OSError as error:
        raise InputError(f"not readable ({error.strerror})", path=path) from error


def csv_header(path: Path) -> list[str]:
    """Names in the first line of a CSV file, without reading the rest. Raises InputError where it is no text."""
    try:
        with path.open("rb") as plain:
            packed = plain.peek(2)[:2] == b"\x1f\x8b"
            line = (gzip.GzipFile(fileobj=plain) if packed else plain).readline(1 << 20)
        return [name.strip().strip('"') for name in line.decode("utf-8-sig").rstrip("\r\n").split(",")]
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text ({error.reason})", path=path, row=1) from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"not readable ({error})", path=path) from error


def read_wide_csv(path: Path) -> WideTable:
    """Read a CSV file, gzip'd or not (told by its content).

    Raises:
        InputError: not readable, broken gzip, too large, no rows, two columns of one name, rows of unequal length, a
            cell of another type than the rest of its column.
    """
    try:
        with path.open("rb") as plain:
            packed = plain.peek(2)[:2] == b"\x1f\x8b"
            data = (gzip.GzipFile(fileobj=plain) if packed else plain).read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"not readable ({error})", path=path) from error
    if len(data) > MAX_BYTES:
        raise InputError(f"is larger than {MAX_BYTES} bytes", path=path)
    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(data),
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=max(1 << 20, len(data))),
            convert_options=pyarrow.csv.ConvertOptions(strings_can_be_null=True),
        )
    except pa.ArrowException as error:
        found = _ARROW_ROW.search(str(error))
        raise InputError(f"not CSV ({error})", path=path, row=int(found[1]) if found else None) from error
    return _checked(path, table, 2)


def read_parquet(path: Path) -> WideTable:
    """Read a Parquet file. Raises InputError: not readable, no rows, two columns of one name."""
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"not readable as Parquet ({error})", path=path) from error
    return _checked(path, table, 0)


def _checked(path: Path, table: pa.Table, first_row: int) -> WideTable:
    repeated = [name for name in table.column_names if table.column_names.count(name) > 1]
    if repeated:
        raise InputError("column occurs twice", path=path, row=1 if first_row else None, column=repeated[0])
    if table.num_rows == 0:
        raise InputError("holds no rows", path=path)
    return WideTable(path, table, first_row)
