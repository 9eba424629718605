"""Lines, JSON rows and CSV columns, gzip'd or not, with file, row and column in every error.

What the readers of text formats share. Rows are 1-based lines of the (unpacked) file.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np

from kvtwin.traces.errors import InputError
from kvtwin.traces.time import from_decimal_seconds

MAX_LINE_BYTES = 1 << 26  # a prompt of a million token ids takes 8 MB
MAX_TOKENS = (1 << 31) - 1  # steps hold token counts as int32
MAX_TIME_NS = 1 << 62
MAX_HASH = (1 << 64) - 1  # block_hashes are uint64


def find_file(folder: Path, *names: str) -> Path:
    """Path of the first of `names` in `folder`, plain or with ".gz".

    Raises:
        InputError: none of them is there.
    """
    path = find_optional(folder, *names)
    if path is None:
        raise InputError(f"{' or '.join(names)} is missing here (plain or .gz)", path=folder)
    return path


def find_optional(folder: Path, *names: str) -> Path | None:
    """Like `find_file`, but None where there is none."""
    candidates = (folder / (name + suffix) for name in names for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Give (1-based row, line) of a UTF-8 text file, unpacking gzip (told by its content), skipping blank lines.

    Raises:
        InputError: unreadable, broken gzip, not UTF-8, or a line over MAX_LINE_BYTES.
    """
    row = 0
    try:
        with path.open("rb") as plain:
            packed = plain.peek(2)[:2] == b"\x1f\x8b"
            stream = gzip.GzipFile(fileobj=plain) if packed else plain
            while line := stream.readline(MAX_LINE_BYTES):
                row += 1
                if len(line) == MAX_LINE_BYTES:
                    raise InputError(f"line is longer than {MAX_LINE_BYTES} bytes", path=path, row=row)
                text = line.decode("utf-8-sig" if row == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield row, text
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text ({error.reason} at byte {error.start})", path=path, row=row) from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"not readable ({error})", path=path, row=row + 1) from error


def read_jsonl(path: Path, *, exact: bool = False) -> Iterator[Row]:
    """Give one Row per line of a JSON-lines file. With `exact`, numbers with a point stay text (their every digit).

    Raises:
        InputError: as `read_lines`; a line that is not a JSON object; NaN or Infinity; no line at all.
    """
    decoder = json.JSONDecoder(parse_float=ExactNumber if exact else float, parse_constant=_refuse_constant)
    row = 0
    for row, text in read_lines(path):
        yield Row(path, row, _decode(decoder, text, path, row))
    if row == 0:
        raise InputError("is empty: at least one row expected", path=path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        InputError: as `read_lines`, or not a JSON object, or NaN or Infinity.
    """
    text = "\n".join(line for _, line in read_lines(path))
    return _decode(json.JSONDecoder(parse_constant=_refuse_constant), text, path, None)


def _decode(decoder: json.JSONDecoder, text: str, path: Path, row: int | None) -> dict[str, Any]:
    try:
        values = decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})", path=path, row=row) from error
    if not isinstance(values, dict):
        raise InputError(f"a JSON object expected, not {type(values).__name__}", path=path, row=row)
    return values


class ExactNumber(str):
    """A number as its decimal text, from `read_jsonl(exact=True)`; tells 1.5 from "1.5"."""

    __slots__ = ()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that kvtwin accepts")


@dataclass(frozen=True, slots=True)
class Row:
    """One JSON object of a file, with checked access to its fields.

    Every getter raises InputError with file, row and column where the field is missing, of another type or out of
    range.
    """

    path: Path
    number: int
    values: Mapping[str, Any]

    def fail(self, column: str, problem: str) -> NoReturn:
        """Raise InputError for this row and `column`."""
        raise InputError(problem, path=self.path, row=self.number, column=column)

    def get(self, column: str) -> Any:
        """The field as JSON gave it."""
        if column not in self.values:
            self.fail(column, "is missing")
        return self.values[column]

    def has(self, column: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(column) is not None

    def text(self, column: str) -> str:
        """A string that is not empty."""
        value = self.get(column)
        if not isinstance(value, str) or isinstance(value, ExactNumber) or not value:
            self.fail(column, f"{_show(value)} is not a name: a string expected")
        return value

    def integer(self, column: str, low: int, high: int) -> int:
        """An integer in [low, high]."""
        value = self.get(column)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(column, f"{_show(value)} is not an integer")
        if not low <= value <= high:
            self.fail(column, f"{_show(value)} is out of range: {low} to {high} expected")
        return value

    def tokens(self, column: str) -> int:
        """A number of tokens, at least 1."""
        return self.integer(column, 1, MAX_TOKENS)

    def count(self, column: str) -> int:
        """A count, not negative."""
        return self.integer(column, 0, MAX_TOKENS)

    def nanoseconds(self, column: str) -> int:
        """A time stamp or duration that the file gives in integer nanoseconds, not negative."""
        return self.integer(column, 0, MAX_TIME_NS)

    def seconds(self, column: str, unit: str = "seconds") -> float:
        """A finite number of seconds, or of another `unit`, not negative."""
        value = self.get(column)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(column, f"{_show(value)} is not a number of {unit}")
        if not 0 <= value <= MAX_TIME_NS // 10**9:  # NaN fails too
            self.fail(column, f"{_show(value)} {unit} is out of range: 0 to {MAX_TIME_NS // 10**9} expected")
        return float(value)

    def exact_seconds(self, column: str) -> int:
        """A number of seconds, not negative, in nanoseconds by its decimal digits (of `read_jsonl(exact=True)`)."""
        value = self.get(column)
        if isinstance(value, bool) or not isinstance(value, int | ExactNumber):
            self.fail(column, f"{_show(value)} is not a number of seconds")
        if not 0 <= (float(value) if isinstance(value, str) else value) <= MAX_TIME_NS // 10**9:
            self.fail(column, f"{_show(value)} s is out of range: 0 to {MAX_TIME_NS // 10**9} expected")
        try:
            return from_decimal_seconds(str(value))
        except ArithmeticError:  # an exponent beyond what decimals allow
            self.fail(column, f"{_show(value)} is not a number of seconds")

    def seconds_list(self, column: str) -> list[float]:
        """A list of numbers of seconds, none negative, that add up to what a time can hold."""
        values = self.get(column)
        if not isinstance(values, list):
            self.fail(column, f"{_show(values)} is not a list of seconds")
        found = [Row(self.path, self.number, {column: value}).seconds(column) for value in values]
        if sum(found) > MAX_TIME_NS // 10**9:
            self.fail(column, "s add up to more than kvtwin can hold")
        return found

    def integers(self, column: str, high: int) -> list[int]:
        """A list of integers in [0, high]."""
        values = self.get(column)
        if not isinstance(values, list):
            self.fail(column, f"{_show(values)} is not a list of integers")
        for value in values:
            if type(value) is not int or not 0 <= value <= high:
                self.fail(column, f"{_show(value)} in the list is not an integer from 0 to {high}")
        return values


def _show(value: Any) -> str:
    """The value for a message, cut to one short line."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a very large integer"
    return text if len(text) <= 40 else text[:37] + "..."


@dataclass(frozen=True)
class Columns:
    """Columns of a CSV file as arrays, and the line that each row stood on."""

    path: Path
    rows: list[int]
    values: Mapping[str, np.ndarray]

    def __getitem__(self, column: str) -> np.ndarray:
        return self.values[column]

    def require(self, good: np.ndarray, column: str, problem: str) -> None:
        """Raise InputError for the first row where `good` is false, with its value."""
        if not good.all():
            at = int(np.argmin(good))
            raise InputError(f"{self[column][at]} {problem}", path=self.path, row=self.rows[at], column=column)


def read_csv(
    path: Path, kinds: Mapping[str, type], optional: Mapping[str, type] | None = None, blank: str | None = None
) -> Columns:
    """Read a CSV file with a header line: every column of `kinds` and no unknown one; cells as str, int or float.

    A column without a name (a data frame's index) is left out. In the float column `blank` an empty cell is NaN.

    Raises:
        InputError: as `read_lines`; a column missing or unknown; a row too short or too long; a cell of another type;
            no row at all.
    """
    known = {**kinds, **(optional or {})}
    table = csv_rows(path)
    _, header = next(table, (0, []))
    missing = [name for name in kinds if name not in header]
    if missing:
        raise InputError(f"column is missing; expected {','.join(kinds)}", path=path, row=1, column=missing[0])
    unknown = [name for name in header if name and name not in known]
    if unknown or len(set(header)) != len(header):
        odd = unknown[0] if unknown else next(name for name in header if header.count(name) > 1)
        raise InputError(f"unknown or repeated column; known: {','.join(known)}", path=path, row=1, column=odd)
    rows, cells = [], []
    for row, fields in table:
        if len(fields) != len(header):
            raise InputError(f"{len(fields)} fields, but the header has {len(header)}", path=path, row=row)
        rows.append(row)
        cells.append(fields)
    if not rows:
        raise InputError("holds no rows", path=path)
    columns: dict[str, Sequence[str | None]] = dict(zip(header, zip(*cells, strict=True), strict=True))
    if blank is not None and blank in columns:
        columns[blank] = tuple(cell or None for cell in columns[blank])
    values = {name: _convert(columns[name], known[name], path, rows, name) for name in header if name}
    return Columns(path, rows, values)


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows of cells. Quoted line breaks are refused, so that a row is a line and errors can name it."""
    for row, line in read_lines(path):
        try:
            yield row, next(csv.reader([line], strict=True))
        except csv.Error as error:
            raise InputError(f"not CSV ({error})", path=path, row=row) from error


def _convert(cells: Sequence[str | None], kind: type, path: Path, rows: list[int], column: str) -> np.ndarray:
    if kind is str:
        return np.array(cells, dtype=object)
    for row, cell in zip(rows, cells, strict=True):
        if cell is not None and not _is_number(cell, kind):
            raise InputError(f"{_show(cell)} is not {_NAMES[kind]}", path=path, row=row, column=column)
    return np.array([math.nan if cell is None else kind(cell) for cell in cells], _DTYPES[kind])


_NAMES: Final = {int: "an integer of 64 bits", float: "a finite number"}
_DTYPES: Final = {int: np.int64, float: np.float64}


def _is_number(cell: str, kind: type) -> bool:
    try:
        value = kind(cell)
    except ValueError:
        return False
    return math.isfinite(value) if kind is float else abs(value) < 1 << 63


def provenance(path: Path, reader: str, files: list[Path], **more: Any) -> dict[str, Any]:
    """`RunInfo.source`: reader, the last two parts of the path (never a machine's full path), digest of each file."""
    full = path.resolve()
    digests = {file.name: _sha256(file) for file in files}
    return {"path": f"{full.parent.name}/{full.name}", "reader": reader, "sha256": digests, **more}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
