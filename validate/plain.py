"""Dataclasses to and from plain JSON values, checked against their annotations: one reader for all our documents."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from kvtwin.traces.errors import InputError

T = TypeVar("T")
Where = str | PathLike[str]

_hints = cache(get_type_hints)


def to_plain(value: Any) -> Any:
    """Only what JSON has: tuples become lists, numpy scalars numbers, paths strings, NaN and infinities null.

    Raises:
        TypeError: something that JSON cannot say.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, PathLike):
        return str(value)
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"{type(value).__name__} {value!r} has no place in JSON")


def from_plain(kind: Any, value: Any, path: Where, column: str = "") -> Any:
    """The value as its annotation says: the inverse of `to_plain`.

    Args:
        kind: a dataclass (every key is a field; one with a default may be absent), `float` (null is NaN), `int`,
            `bool`, `str`, `Any`, a Literal of strings, `X | None`, and lists, tuples and mappings (by str) of these.
        value: what json.loads gave.
        path, column: where it stands, for the message.

    Raises:
        InputError: it is something else.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return (
            None
            if value is None
            else from_plain(next(arg for arg in arguments if arg is not type(None)), value, path, column)
        )
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{_cut(value)} is none of {', '.join(arguments)}", path=path, column=column)
        return value
    if origin is not None and issubclass(origin, Mapping):
        found = _expect(value, dict, path, column)
        return {key: from_plain(arguments[1], item, path, _member(column, key)) for key, item in found.items()}
    if origin in (list, tuple):
        return origin(_items(origin, arguments, value, path, column))
    if is_dataclass(kind):
        return _record(kind, value, path, column)
    if kind is float:
        return _number(value, path, column)
    return _expect(value, kind, path, column)


def load_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: not readable, larger than `max_bytes`, not JSON, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise InputError(f"{size} bytes: {path.name} has at most {max_bytes}", path=path)
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"not readable ({error.strerror})", path=path) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not readable as JSON ({error})", path=path) from error
    if not isinstance(document, dict):
        raise InputError("expected a JSON object", path=path)
    return document


def _items(origin: type, arguments: tuple[Any, ...], value: Any, path: Where, column: str) -> list[Any]:
    """The members of a list, of a tuple of any length, or of a tuple of just these."""
    found = _expect(value, list, path, column)
    kinds: Sequence[Any] = arguments
    if origin is list or arguments[1:] == (...,):
        kinds = arguments[:1] * len(found)
        if kinds and kinds[0] is float:  # long columns of numbers: no message is built for each
            return [item if type(item) is float else _number(item, path, column) for item in found]
    elif len(found) != len(arguments):
        raise InputError(f"{_cut(value)} is not a list of {len(arguments)}", path=path, column=column)
    return [
        from_plain(kind, item, path, f"{column}[{index}]")
        for index, (kind, item) in enumerate(zip(kinds, found, strict=True))
    ]


def _record(kind: Any, value: Any, path: Where, column: str) -> Any:
    row = _expect(value, dict, path, column)
    known = {field.name: field for field in fields(kind)}
    required = {name for name, field in known.items() if field.default is field.default_factory is MISSING}
    if not required <= set(row) <= set(known):
        problem = f"keys are {_cut(sorted(row))}; expected {', '.join(sorted(known))}"
        raise InputError(problem, path=path, column=column)
    hints = _hints(kind)
    return kind(**{key: from_plain(hints[key], item, path, _member(column, key)) for key, item in row.items()})


def _member(column: str, key: str) -> str:
    return f"{column}.{key}" if column else key


def _expect(value: Any, kind: type, path: Where, column: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{_cut(value)} is not a {kind.__name__}", path=path, column=column)
    return value


def _number(value: Any, path: Where, column: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise InputError(f"{_cut(value)} is not a number or null", path=path, column=column)
    return float(value)


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
