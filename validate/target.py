"""A Target: one hardware + model + engine version, described by a `target.toml`: its samples, its runs, its gates.

`validate/README.md` documents every key. Paths are relative to the file that names them.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from kvtwin.calibrate.models import ModelSpec, custom_model, model_spec
from kvtwin.sim.vllm.config import read_settings
from kvtwin.traces.errors import InputError
from kvtwin.traces.time import iso_day
from kvtwin.validate.gates import DEFAULT_GATES, Gate, parse_gates

TARGET_FILE: Final = "target.toml"
_TEXTS: Final = ("name", "hardware", "description")
_CLOCKS: Final[Mapping[str, Literal["queued_ns", "arrival_ns"]]] = {"queued": "queued_ns", "arrival": "arrival_ns"}
_TOP: Final = (
    *_TEXTS, "recorded", "model", "profile", "calibrate", "collectives", "tensor_parallel_size", "engine", "clock", "run", "workload",
    "workloads", "gates", "peers",
)  # fmt: skip
_BESIDE_RUN: Final = ("workload", "peers")
_GROUP: Final = ("name", "runs", "workload", "engine", "clock", "peers")


@dataclass(frozen=True)
class Workload:
    """Recordings of one workload; more than one of them give the noise floor.

    Attributes:
        name: for the report.
        runs: recorded runs, each a path that `traces.readers` opens.
        workload: what was sent, where the recordings leave out token ids; None: the recordings say it all.
        engine: settings that differ from the target's.
        clock: what TTFT and latency count from.
        peers: what other simulators say of it, by their names: their runs or aggregates.
    """

    name: str
    runs: tuple[Path, ...]
    workload: Path | None
    engine: Mapping[str, Any]
    clock: Literal["queued_ns", "arrival_ns"]
    peers: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """What a `target.toml` says, checked; nothing is opened yet.

    Attributes:
        path: the file.
        facts: name, hardware, description, recorded (a day, such as 2026-04-25), as far as given.
        model: the model's shape, where it is named or described.
        profile: kernel-profile folder or Profile JSON; None where `calibrate` names recordings.
        calibrate: recorded runs with steps to fit the profile on.
        collectives: all-reduce times, for tensor parallelism.
        tensor_parallel_size: None: the engine's.
        engine: settings that hold for every workload; they win over what a recording says of itself.
        workloads: at least one.
        gates: by metric or family; `DEFAULT_GATES` where the file has no [gates] table.
    """

    path: Path
    facts: Mapping[str, str]
    model: ModelSpec | None
    profile: Path | None
    calibrate: tuple[Path, ...]
    collectives: Path | None
    tensor_parallel_size: int | None
    engine: Mapping[str, Any]
    workloads: tuple[Workload, ...]
    gates: Mapping[str, Gate] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The target's name: given, or its folder's."""
        return self.facts.get("name") or self.path.parent.name


def read_target(path: Path) -> Target:
    """Read `target.toml`, or the one in a folder.

    Raises:
        InputError: not there, not TOML, an unknown key (with the closest known one), a wrong type, a path that
            does not exist, or nothing to calibrate on or to judge.
    """
    file = path / TARGET_FILE if path.is_dir() else path
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=file) from error
    except ValueError as error:
        raise InputError(f"not readable as TOML ({error})", path=file) from error
    return _Reader(file).target(table)


class _Reader:
    """Turns the tables of one file into a Target; every message names the file and the key."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def target(self, table: Mapping[str, Any]) -> Target:
        self.only(table, _TOP, "")
        profile, calibrate = table.get("profile"), table.get("calibrate", [])
        if (profile is None) == (not calibrate):
            raise self.wrong("profile", "give either profile = PATH or calibrate = [PATH, ...]")
        return Target(
            path=self.file,
            facts=self.facts(table),
            model=self.model(table["model"]) if "model" in table else None,
            profile=None if profile is None else self.place(profile, "profile"),
            calibrate=self.places(calibrate, "calibrate"),
            collectives=self.place(table["collectives"], "collectives") if "collectives" in table else None,
            tensor_parallel_size=self.count(table, "tensor_parallel_size"),
            engine=self.engine(table.get("engine", {}), "engine"),
            workloads=self.workloads(table),
            gates=parse_gates(table["gates"], self.file) if "gates" in table else DEFAULT_GATES,
        )

    def facts(self, table: Mapping[str, Any]) -> Mapping[str, str]:
        """What is told to people; the date is TOML's own or a text."""
        facts = {key: self.text(table[key], key) for key in _TEXTS if key in table}
        if "recorded" in table:
            day = iso_day(str(table["recorded"]))
            if day is None:
                raise self.wrong("recorded", f"{table['recorded']!r}: a date such as 2026-04-25 expected")
            facts["recorded"] = day
        return facts

    def model(self, value: Any) -> ModelSpec:
        """The name of a known model, or a table of its numbers."""
        return custom_model(value, self.file) if isinstance(value, dict) else model_spec(self.text(value, "model"))

    def workloads(self, table: Mapping[str, Any]) -> tuple[Workload, ...]:
        clock = table.get("clock", "queued")
        groups = table.get("workloads", [])
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise self.wrong("workloads", "tables expected: [[workloads]]")
        if "run" in table:
            beside = {key: table[key] for key in _BESIDE_RUN if key in table}
            groups = [beside | {"runs": [table["run"]]}, *groups]
        elif alone := next((key for key in _BESIDE_RUN if key in table), None):
            raise self.wrong(alone, "needs run = PATH beside it, or put both into a [[workloads]] table")
        if not groups:
            raise self.wrong("run", "nothing to judge: give run = PATH, or [[workloads]] tables")
        found = tuple(self.workload(group, f"workloads[{index}]", clock) for index, group in enumerate(groups))
        names = [workload.name for workload in found]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise self.wrong("workloads", f"the name {repeated!r} occurs twice")
        return found

    def workload(self, group: Mapping[str, Any], key: str, clock: Any) -> Workload:
        self.only(group, _GROUP, f"{key}.")
        runs = self.places(group.get("runs", []), f"{key}.runs")
        if not runs:
            raise self.wrong(f"{key}.runs", "names no recorded run")
        clock = group.get("clock", clock)
        if clock not in _CLOCKS:
            raise self.wrong(f"{key}.clock", f"{clock!r}: 'queued' (the engine's) or 'arrival' (the client's) expected")
        return Workload(
            name=self.text(group["name"], f"{key}.name") if "name" in group else runs[0].name,
            runs=runs,
            workload=self.place(group["workload"], f"{key}.workload") if "workload" in group else None,
            engine=self.engine(group.get("engine", {}), f"{key}.engine"),
            clock=_CLOCKS[clock],
            peers=self.peers(group.get("peers", {}), f"{key}.peers"),
        )

    def peers(self, value: Any, key: str) -> Mapping[str, Path]:
        if not isinstance(value, dict):
            raise self.wrong(key, "a table of names and paths expected, such as { LLMServingSim = 'peer.csv' }")
        return {name: self.place(place, f"{key}.{name}") for name, place in value.items()}

    def engine(self, value: Any, key: str) -> Mapping[str, Any]:
        """A table of settings, or the path of a file that holds one."""
        if isinstance(value, str):
            return read_settings(self.place(value, key))
        if not isinstance(value, dict):
            raise self.wrong(key, "a table of engine settings, or the path of a file, expected")
        return value

    def only(self, table: Mapping[str, Any], known: tuple[str, ...], prefix: str) -> None:
        unknown = next((key for key in table if key not in known), None)
        if unknown is not None:
            close = difflib.get_close_matches(unknown, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise self.wrong(prefix + unknown, f"unknown key; {hint}")

    def places(self, values: Any, key: str) -> tuple[Path, ...]:
        if not isinstance(values, list):
            raise self.wrong(key, "a list of paths expected")
        return tuple(self.place(value, key) for value in values)

    def place(self, value: Any, key: str) -> Path:
        place = self.file.parent / self.text(value, key)
        if not place.exists():
            raise self.wrong(key, f"no such file or folder: {place}")
        return place

    def count(self, table: Mapping[str, Any], key: str) -> int | None:
        value = table.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise self.wrong(key, f"{value!r}: an integer of at least 1 expected")
        return value

    def text(self, value: Any, key: str) -> str:
        if not isinstance(value, str) or not value:
            raise self.wrong(key, f"{value!r}: text expected")
        return value

    def wrong(self, key: str, problem: str) -> InputError:
        return InputError(problem, path=self.file, column=key)
