"""Times of single operators by name and key: what kernel tables give, before a model is composed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvtwin.sim.latency.bank import OperatorModel
from kvtwin.traces.errors import InputError


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
