"""Times of single operators by name and key: what kernel tables give, before a model is composed from them.

    time = trend(columns)                                   "trend": physics alone
    time = (trend * surface * forest + pool) * bank         ratios of the table, in octaves of the loads
    time = (trend * surface * forest + pool) + bank         rests of the table, in the loads

Surface, forest, pool and bank may each be absent; without prices the bank holds the times themselves,
and shapes that it does not know have a model of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from kvtwin.sim.latency.bank import ShapeBank
from kvtwin.sim.latency.coordinates import COORDINATES
from kvtwin.sim.latency.forest import Forest
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.octaves import octave
from kvtwin.sim.latency.repeats import distinct
from kvtwin.sim.latency.surface import Surface
from kvtwin.sim.latency.work.columns import Columns, pooled
from kvtwin.sim.latency.work.terms import trend
from kvtwin.traces.errors import InputError

MIN_TIME_US: Final = 1e-3  # no prediction is shorter
_ROWS_AT_ONCE: Final = 8192


@dataclass(frozen=True, slots=True)
class Scale:
    """A reference's time r on other hardware.

    (offset + slope * r + bend * max(r - knot, 0)) * (factor + tilt * (octave(r) - centre)), the last at least 0.1
    """

    offset_us: float
    slope: float
    bend: float
    knot_us: float
    factor: float = 1.0
    tilt: float = 0.0
    centre: float = 0.0

    def apply(self, reference_us: FloatArray) -> FloatArray:
        """Microseconds on the other hardware."""
        common = self.offset_us + self.slope * reference_us + self.bend * np.maximum(reference_us - self.knot_us, 0.0)
        own = self.factor + self.tilt * (octave(reference_us) - self.centre)
        return common * np.maximum(own, 0.1)


@dataclass(frozen=True, slots=True)
class OperatorModel:
    """Time of one operator under one key, in microseconds.

    Attributes:
        op, work, key: which operator (`traces.readers.optable.OpSamples`).
        constants: columns that the key fixes (head_dim, window_size ...).
        prices: microseconds per unit of each term of `work/`; empty for a table alone.
        tile, slots: of the trend's thread blocks; slots 0: no waves.
        bank: table of ratios or rests (with prices) or of times (without); None for the trend alone.
        surface: what the trend misses, smooth in physical coordinates.
        forest: the same, learnt by trees.
        pool: rests by group of query heads, thread blocks and length (`work.columns.pooled`), shared by all shapes.
        elsewhere: without prices, the model of shapes that the bank does not know; its own `elsewhere` is None.
        scale: from the hardware that prices and bank were fitted on to another; None for the same.
    """

    op: str
    work: str
    key: Mapping[str, str]
    constants: Mapping[str, float]
    prices: Mapping[str, float]
    tile: float = 1.0
    slots: float = 0.0
    bank: ShapeBank | None = None
    surface: Surface | None = None
    forest: Forest | None = None
    pool: ShapeBank | None = None
    elsewhere: OperatorModel | None = None
    scale: Scale | None = None

    def time_us(self, columns: Columns) -> FloatArray:
        """Microseconds of n batches; columns are the loads (and shapes) that the samples had."""
        if len(next(iter(columns.values()))) <= _ROWS_AT_ONCE:
            return self._time_us(columns)
        repeated = distinct(columns)
        if repeated is None:
            return self._in_parts_us(columns)
        rows, places = repeated
        return self._in_parts_us(rows).take(places)

    def _in_parts_us(self, columns: Columns) -> FloatArray:
        """`_time_us` of so many rows at once as fit the processor's cache, which is several times faster."""
        n = len(next(iter(columns.values())))
        found = np.empty(n)
        for start in range(0, n, _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            found[part] = self._time_us({name: values[part] for name, values in columns.items()})
        return found

    def _time_us(self, columns: Columns) -> FloatArray:
        found = self._unscaled_us(columns)
        return found if self.scale is None else np.maximum(self.scale.apply(found), MIN_TIME_US)

    def _unscaled_us(self, columns: Columns) -> FloatArray:
        if not self.prices:
            return np.maximum(self._table_us(columns), MIN_TIME_US)
        found = self._base_us(columns)
        if self.bank is not None:
            found = found * self.bank(columns) if self.bank.octaves else found + self.bank(columns)
        return np.maximum(found, MIN_TIME_US)

    def _table_us(self, columns: Columns) -> FloatArray:
        """The table alone, where it knows the shapes."""
        if self.bank is None:
            raise ValueError("neither prices nor a table")
        found = self.bank(columns)
        if self.elsewhere is not None and (unknown := ~self.bank.knows_shapes(columns)).any():
            there = {name: np.asarray(values)[unknown] for name, values in columns.items()}
            found[unknown] = self.elsewhere.time_us(there)
        return found

    def _base_us(self, columns: Columns) -> FloatArray:
        """Trend, surface, forest and pool."""
        n = len(next(iter(columns.values())))
        known = {name: np.asarray(values, np.float64) for name, values in columns.items()}
        known |= {name: np.full(n, value) for name, value in self.constants.items()}
        found = trend(self.work, known, self.prices, self.tile, self.slots)
        for factor in (self.surface, self.forest):
            if factor is not None:
                coordinates = COORDINATES[self.work](known, self.slots)
                if unknown := set(factor.names) - coordinates.keys():
                    raise InputError(f"the profile's {min(unknown)!r} is not known to this version: calibrate it anew")
                found = found * factor(coordinates)
        if self.pool is not None:
            found = found + self.pool(pooled(known))
        return np.maximum(found, MIN_TIME_US)

    def scaled(self, scale: Scale) -> OperatorModel:
        """The same operator on other hardware."""
        return replace(self, scale=scale)

    def with_key(self, key: Mapping[str, str]) -> OperatorModel:
        """The same numbers under another key."""
        return replace(self, key=dict(key))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OperatorModel:
        """Read `to_json`'s output. Raises KeyError, TypeError or ValueError on anything else."""
        # Absent in profiles of earlier versions.
        surface, forest, pool, elsewhere = (data.get(name) for name in ("surface", "forest", "pool", "elsewhere"))
        return cls(
            op=str(data["op"]),
            work=str(data["work"]),
            key=dict(data["key"]),
            constants={name: float(value) for name, value in data["constants"].items()},
            prices={name: float(value) for name, value in data["prices"].items()},
            tile=float(data["tile"]),
            slots=float(data["slots"]),
            bank=ShapeBank.from_json(data["bank"]) if data["bank"] is not None else None,
            surface=Surface.from_json(surface) if surface is not None else None,
            forest=Forest.from_json(forest) if forest is not None else None,
            pool=ShapeBank.from_json(pool) if pool is not None else None,
            elsewhere=cls.from_json(elsewhere) if elsewhere is not None else None,
            scale=Scale(**{name: float(value) for name, value in data["scale"].items()}) if data["scale"] else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Numbers and names only."""
        return {
            "op": self.op,
            "work": self.work,
            "key": dict(self.key),
            "constants": dict(self.constants),
            "prices": dict(self.prices),
            "tile": self.tile,
            "slots": self.slots,
            "bank": self.bank.to_json() if self.bank is not None else None,
            "surface": self.surface.to_json() if self.surface is not None else None,
            "forest": self.forest.to_json() if self.forest is not None else None,
            "pool": self.pool.to_json() if self.pool is not None else None,
            "elsewhere": self.elsewhere.to_json() if self.elsewhere is not None else None,
            "scale": asdict(self.scale) if self.scale is not None else None,
        }


class OperatorTable:
    """Models of operators; looked up by operator and key, never averaged over keys.

    Args:
        models: one per operator and key.
    """

    def __init__(self, models: Sequence[OperatorModel]) -> None:
        self.models = list(models)

    def find(self, op: str, key: Mapping[str, str] | None = None) -> OperatorModel:
        """The model of an operator whose key agrees with `key` in every name that `key` has.

        Raises:
            InputError: no such model, or several.
        """
        wanted = dict(key or {})
        found = [
            model
            for model in self.models
            if model.op == op and all(model.key.get(name) == value for name, value in wanted.items())
        ]
        if len(found) != 1:
            known = ", ".join(dict.fromkeys(model.op for model in self.models))
            raise InputError(f"{len(found)} models of {op!r} with {wanted}: one expected; operators: {known}")
        return found[0]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OperatorTable:
        """Read `to_json`'s output. Raises KeyError, TypeError or ValueError on anything else."""
        return cls([OperatorModel.from_json(model) for model in data["models"]])

    def to_json(self) -> dict[str, Any]:
        """Numbers and names only."""
        return {"models": [model.to_json() for model in self.models]}
