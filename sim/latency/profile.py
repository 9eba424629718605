"""The Profile: a step-latency model with its accuracy, doubt and provenance, in one JSON file.

Numbers and names only: never pickle, never code. `calibrate/` writes it, the simulator reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.composed import ComposedLatency
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.operators import OperatorTable
from kvtwin.sim.latency.regression import RegressionLatency
from kvtwin.sim.latency.stats import BatchStats
from kvtwin.traces.errors import InputError
from kvtwin.traces.files import refuse_existing, write_text

T = TypeVar("T")

PROFILE_SCHEMA_VERSION: Final = 1
PROFILE_FILE: Final = "profile.json"  # beside the tables of a run that was simulated with it

# Every latency model that a profile can hold. A new one is one line here and one in tests/contract.
LATENCY_MODELS: Final[Mapping[str, Callable[[Mapping[str, Any]], LatencyModel]]] = {
    "linear": LinearLatency.from_json,
    "regression": RegressionLatency.from_json,
    "composed": ComposedLatency.from_json,
}
# Kinds that hold times of single operators: they predict operators, not steps.
OPERATORS: Final = "operators"


@dataclass(frozen=True)
class Profile:
    """A fitted latency model and what is known of it.

    Attributes:
        kind: entry of `LATENCY_MODELS`.
        latency: the model's own numbers (its `to_json`).
        host: time between steps.
        hardware, model, engine: what it was measured on; never averaged over.
        tensor_parallel_size: GPUs per layer.
        domain: smallest and largest value of each batch statistic it was fitted on; outside it predictions
            are flagged as extrapolated.
        accuracy: hold-out errors with their intervals, by component or regime, and the noise floor.
        provenance: inputs with digests, kvtwin version, seed, choices made.
    """

    kind: str
    latency: Mapping[str, Any]
    host: HostTime = field(default_factory=HostTime)
    hardware: str | None = None
    model: str | None = None
    engine: str | None = None
    tensor_parallel_size: int = 1
    domain: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    accuracy: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def latency_model(self) -> LatencyModel:
        """The model, ready to predict.

        Raises:
            InputError: unknown kind, or numbers missing or of a wrong type.
        """
        if self.kind == OPERATORS:
            problem = "holds times of single operators, and a simulation needs whole steps: calibrate recordings with "
            raise InputError(problem + "steps, or a folder of kernel tables, which compose a model's steps")
        if self.kind not in LATENCY_MODELS:
            raise InputError(f"kind is {self.kind!r}; known: {', '.join([*LATENCY_MODELS, OPERATORS])}")
        return self._read(LATENCY_MODELS[self.kind])

    def operators(self) -> OperatorTable:
        """The operators, ready to predict.

        Raises:
            InputError: another kind, or numbers missing or of a wrong type.
        """
        if self.kind != OPERATORS:
            raise InputError(f"is a {self.kind} profile: it holds whole steps, not operators")
        return self._read(OperatorTable.from_json)

    def _read(self, reader: Callable[[Mapping[str, Any]], T]) -> T:
        try:
            return reader(self.latency)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"latency of kind {self.kind!r} is damaged ({error!r})") from error

    def extrapolates(self, batches: BatchStats) -> npt.NDArray[np.bool_]:
        """Which batches lie outside the domain the profile was fitted on: bool of shape (n,)."""
        outside = np.zeros(len(batches), dtype=np.bool_)
        for name, (low, high) in self.domain.items():
            values = getattr(batches, name)
            outside |= (values < low) | (values > high)
        return outside

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {"schema_version": PROFILE_SCHEMA_VERSION, **vars(self), "host": asdict(self.host)}

    def write(self, path: str | PathLike[str]) -> None:
        """Write the file, whole or not at all.

        Raises:
            InputError: it exists already.
        """
        refuse_existing(Path(path))
        write_text(path, json.dumps(self.to_json(), allow_nan=False) + "\n")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that a profile may hold")


def read_profile(path: str | PathLike[str]) -> Profile:
    """Read and check a profile file.

    Raises:
        InputError: not there, not JSON, another schema version, unknown keys, or a damaged model.
    """
    file = Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=file) from error
    except ValueError as error:
        raise InputError(f"not readable as JSON ({error})", path=file) from error
    if not isinstance(data, dict):
        raise InputError("a JSON object expected", path=file)
    version = data.pop("schema_version", None)
    if version != PROFILE_SCHEMA_VERSION:
        raise InputError(f"schema_version is {version!r}; this kvtwin reads {PROFILE_SCHEMA_VERSION}", path=file)
    unknown = sorted(set(data) - set(Profile.__dataclass_fields__))
    if unknown:
        known = ", ".join(Profile.__dataclass_fields__)
        raise InputError(f"unknown key {unknown[0]!r}; known: {known}", path=file)
    try:
        profile = Profile(**{**data, "host": HostTime(**data.get("host", {}))})
        if profile.kind == OPERATORS:
            profile.operators()
        else:
            profile.latency_model()
        profile.extrapolates(BatchStats.of_batch([1], [1]))
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"not a profile ({error})", path=file) from error
    except InputError as error:
        raise InputError(error.problem, path=file) from error
    return profile
