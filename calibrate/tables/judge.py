"""A fitted profile against a table that it has not seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from kvtwin.calibrate.accuracy import summarize
from kvtwin.calibrate.tables.checks import prepare_test
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.profile import Profile
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.optable import OpTable


def judge_table(profile: Profile, table: OpTable) -> Profile:
    """The profile with one more accuracy entry per operator: its errors on `table`, inside its domain and outside.

    Raises:
        InputError: the table has no operator of the profile under the same key, or is unfit (`checks`).
    """
    operators = profile.operators()
    parts: dict[str, list[tuple[FloatArray, FloatArray, FloatArray]]] = {}
    for sample in prepare_test(table).samples:
        model = next((found for found in operators.models if found.op == sample.op and found.key == sample.key), None)
        if model is None:
            continue
        kept = sample.where(~sample.suspect)
        inside = model.bank.knows(kept.columns) if model.bank is not None else np.ones(len(kept), np.bool_)
        entry = (kept.time_us, model.time_us(kept.columns), inside.astype(np.float64))
        parts.setdefault(sample.op, []).append(entry)
    if not parts:
        raise InputError(
            "has no operator of the profile under the same key (engine version, data types ...)", path=table.path
        )
    accuracy = dict(profile.accuracy)
    for op, found in parts.items():
        measured, predicted, inside = (np.concatenate(values) for values in zip(*found, strict=True))
        accuracy[f"{op}, on {table.path.name}"] = _summary(measured, predicted, inside > 0)
    tests = [*profile.provenance.get("tests", ()), dict(table.source)]
    return replace(profile, accuracy=accuracy, provenance={**profile.provenance, "tests": tests})


def _summary(measured: FloatArray, predicted: FloatArray, inside: np.ndarray[Any, Any]) -> dict[str, Any]:
    def part(here: np.ndarray[Any, Any]) -> dict[str, Any]:
        groups = np.arange(np.count_nonzero(here))
        return summarize(measured[here], predicted[here], groups=groups)

    return {**part(inside), "outside": part(~inside)}
