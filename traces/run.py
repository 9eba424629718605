"""A Run: what happened, in a real engine or in the simulator. One folder, the same tables either way.

    RUN/run.json            what it is, where it came from, its counts
    RUN/requests.parquet    one row per request, by arrival
    RUN/steps.parquet       optional: one row per engine step
    RUN/cache.parquet       optional: one row per cache event

Every column is described in schema.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from kvtwin.traces.errors import InputError
from kvtwin.traces.files import new_folder
from kvtwin.traces.schema import SCHEMA_VERSION, TABLES
from kvtwin.traces.table import check_table

INFO_FILE = "run.json"
MAX_HASH_BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True)
class RunInfo:
    """The head of a Run (`run.json`). Every field but `kind` may be unknown.

    Attributes:
        kind: "recorded" by a real engine, "simulated", or "workload" (arrivals and lengths only).
        engine: engine name and version, such as "vllm 0.19.0".
        hardware, model: as the target names them.
        hash_block_tokens: tokens that one entry of `block_hashes` stands for.
        engine_config: the engine's settings under their upstream names.
        source: provenance: the files read, their digests, the reader or the command.
        metrics: numbers about the run itself (simulation cost, counts).
    """

    kind: Literal["recorded", "simulated", "workload"]
    engine: str | None = None
    hardware: str | None = None
    model: str | None = None
    hash_block_tokens: int | None = None
    engine_config: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)


class Run:
    """A Run in memory or on disk; tables of a run on disk are read on first use.

    >>> from kvtwin.traces.schema import REQUESTS
    >>> run = Run(RunInfo("workload"), {"requests": REQUESTS.empty_table()})
    >>> run.requests.num_rows, run.has("steps")
    (0, False)
    """

    def __init__(self, info: RunInfo, tables: Mapping[str, pa.Table], *, name: str = "run") -> None:
        """Take `tables` (a subset of "requests", "steps", "cache"; requests is required).

        Raises:
            InputError: a table differs from its schema; `name` stands for the file in the message.
        """
        self.info, self.path = info, None
        self._tables = {key: check_table(table, key, name) for key, table in tables.items()}
        self._paths: dict[str, Path] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """Open a run folder. Tables are read and checked when first used.

        Raises:
            InputError: no run.json there, not JSON, or another schema version.
        """
        folder = Path(path)
        run = cls(_read_info(folder), {}, name=str(folder))
        run.path = folder
        run._paths = {key: folder / f"{key}.parquet" for key in TABLES if (folder / f"{key}.parquet").exists()}
        if "requests" not in run._paths:
            raise InputError("requests.parquet is missing: a run has run.json and requests.parquet", path=folder)
        return run

    path: Path | None

    def has(self, table: str) -> bool:
        """Whether the run holds the table ("requests", "steps" or "cache")."""
        return table in self._tables or table in self._paths

    @cached_property
    def requests(self) -> pa.Table:
        """One row per request, sorted by arrival (schema.REQUESTS)."""
        return self._table("requests")

    @cached_property
    def steps(self) -> pa.Table:
        """One row per engine step (schema.STEPS). Raises InputError where the run has none."""
        return self._table("steps")

    @cached_property
    def cache(self) -> pa.Table:
        """One row per cache event (schema.CACHE). Raises InputError where the run has none."""
        return self._table("cache")

    def _table(self, key: str) -> pa.Table:
        if key in self._tables:
            return self._tables[key]
        if key not in self._paths:
            raise InputError(f"this run has no {key} table; record it (--record {key})", path=self.path)
        return read_table(self._paths[key], key)

    def write(self, path: str | os.PathLike[str], *, beside: Mapping[str, Path] | None = None) -> Path:
        """Write the run to a new folder: all of it or nothing (written beside, then renamed).

        Args:
            path: of the folder.
            beside: files to copy into it, by the names that they get there.

        Raises:
            InputError: `path` exists, or cannot be written.
        """
        target = Path(path)
        tables = {key: self._table(key) for key in TABLES if self.has(key)}
        with new_folder(target) as folder:
            for key, table in tables.items():
                pq.write_table(table, folder / f"{key}.parquet", compression="zstd")
            head = {"schema_version": SCHEMA_VERSION, **_as_dict(self.info)}
            head["rows"] = {key: table.num_rows for key, table in tables.items()}
            (folder / INFO_FILE).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
            for name, file in (beside or {}).items():
                shutil.copyfile(file, folder / name)
        return target


def read_table(path: Path, key: str) -> pa.Table:
    """Read one Parquet table and check it against its schema.

    Raises:
        InputError: unreadable, truncated, or not of the schema.
    """
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"not a readable Parquet file ({error})", path=path) from error
    return check_table(table, key, path)


def _as_dict(info: RunInfo) -> dict[str, Any]:
    return {key: value for key, value in vars(info).items() if value not in (None, {})}


def _read_info(folder: Path) -> RunInfo:
    path = folder / INFO_FILE
    if not path.is_file():
        raise InputError("no run.json here: expected a run folder", path=folder)
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"not readable as JSON ({error})", path=path) from error
    if not isinstance(head, dict):
        raise InputError("expected a JSON object", path=path)
    version = head.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise InputError(f"schema_version is {version!r}; this kvtwin reads {SCHEMA_VERSION}", path=path)
    head.pop("rows", None)
    unknown = sorted(set(head) - set(RunInfo.__dataclass_fields__))
    if unknown:
        raise InputError(f"unknown key {unknown[0]!r}; known: {', '.join(RunInfo.__dataclass_fields__)}", path=path)
    _check_info(head, path)
    return RunInfo(**head)


def _check_info(head: Mapping[str, Any], path: Path) -> None:
    """Refuse values of other kinds than RunInfo says: a run.json may come from anywhere."""
    if head.get("kind") not in ("recorded", "simulated", "workload"):
        raise InputError(f"kind is {head.get('kind')!r}; expected recorded, simulated or workload", path=path)
    for key, value in head.items():
        if key in ("engine", "hardware", "model") and not isinstance(value, str | None):
            raise InputError(f"{value!r} is not a string", path=path, column=key)
        if key in ("engine_config", "source", "metrics") and not isinstance(value, dict):
            raise InputError(f"{value!r} is not a JSON object", path=path, column=key)
        if key == "hash_block_tokens" and value is not None and not _is_block_size(value):
            raise InputError(f"{value!r}: 1 to {MAX_HASH_BLOCK_TOKENS} tokens expected", path=path, column=key)


def _is_block_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_HASH_BLOCK_TOKENS
