"""Tables of operator or step times -> Profile of kind "operators": one model per operator and key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from kvtwin.calibrate.gpus import gpu_spec
from kvtwin.calibrate.tables.candidates import fit_all
from kvtwin.calibrate.tables.checks import prepare, too_small
from kvtwin.calibrate.tables.choice import Choice, choose, floor_of, report
from kvtwin.calibrate.tables.holdout import HeldOut, hold_out
from kvtwin.sim.latency.operators import OperatorModel, OperatorTable
from kvtwin.sim.latency.profile import Profile
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.optable import OpSamples, OpTable

_BLOCKS_PER_SM: Final = (1.0, 2.0, 4.0, 8.0)
_MOST_NAMED: Final = 20  # suspect rows named one by one in the provenance


@dataclass(frozen=True)
class Fitted:
    """One operator under one key: its samples without suspect rows, hold-out, choice and final model.

    Attributes:
        elsewhere: the candidate that prices shapes which the choice, a table alone, does not know; None otherwise.
    """

    samples: OpSamples
    held: HeldOut
    choice: Choice
    model: OperatorModel
    elsewhere: str | None


def calibrate_tables(
    tables: Sequence[OpTable],
    *,
    hardware: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Fit every operator of every table under every key, judged on whole values left out of each load axis.

    Args:
        tables: of one engine version on one hardware.
        hardware: GPU, where the files do not say; it narrows down how many thread blocks run at once.
        progress: told what is fitted next.

    Raises:
        InputError: see `checks.prepare`; or two GPUs or engine versions among the tables.
    """
    checked = [prepare(table) for table in tables]
    device = hardware_of(tables, hardware)
    engine = only_engine(tables)
    fitted: list[Fitted] = []
    small: list[str] = []
    suspect: dict[str, Any] = {}
    for table, ready in zip(tables, checked, strict=True):
        small += too_small(table)
        for sample in ready.samples:
            progress(sample.name)
            fitted.append(fit_samples(sample.where(~sample.suspect), device))
            if sample.suspect.any():
                rows = sample.rows[sample.suspect].tolist()
                suspect[f"{table.path.name}: {sample.name}"] = {"count": len(rows), "rows": rows[:_MOST_NAMED]}
    accuracy = accuracy_of(fitted)
    return Profile(
        kind="operators",
        latency=OperatorTable([found.model for found in fitted]).to_json(),
        hardware=device,
        model=only_fact(tables, "model"),
        engine=engine,
        domain={},
        accuracy=accuracy,
        provenance={
            "sources": [dict(table.source) for table in tables],
            "models": [_described(found) for found in fitted],
            "suspect_rows": suspect,
            "too_few_rows": small,
            "rule": "simplest candidate within one standard error and a twentieth of the best held-out error",
        },
    )


def fit_samples(samples: OpSamples, hardware: str | None) -> Fitted:
    """Hold out, choose, and fit the choice to everything."""
    slots = slots_of(samples, hardware)
    held = hold_out(samples, slots)
    choice = choose(samples, held)
    models = {found.name: found.to_model() for found in fit_all(samples, slots)}
    model = models[choice.name]
    physics = [name for name in choice.scores if models[name].prices]
    if model.prices or not samples.shape or not physics:
        return Fitted(samples, held, choice, model, None)
    elsewhere = min(physics, key=choice.scores.__getitem__)  # a table's times say little about other sizes
    return Fitted(samples, held, choice, replace(model, elsewhere=models[elsewhere]), elsewhere)


def slots_of(samples: OpSamples, hardware: str | None) -> list[float] | None:
    """Thread blocks that the GPU may run at once; None where the GPU or the number of heads is unknown."""
    gpu = gpu_spec(hardware or "")
    known = "num_heads" in samples.columns or "num_heads" in samples.constants or samples.work == "gemm"
    return [gpu.num_sms * blocks for blocks in _BLOCKS_PER_SM] if gpu is not None and known else None


def accuracy_of(fitted: Sequence[Fitted]) -> dict[str, Any]:
    """Held-out errors by operator and axis, over all keys of the operator; and over all operators where there are more."""
    ops = list(dict.fromkeys(one.samples.op for one in fitted))
    groups = {op: [one for one in fitted if one.samples.op == op] for op in ops}
    if len(ops) > 1:
        groups["all operators"] = list(fitted)
    found: dict[str, Any] = {}
    for name, here in groups.items():
        for axis in dict.fromkeys(axis for one in here for axis in one.samples.load):
            parts = [(one.samples, one.held, one.choice.name) for one in here if axis in one.samples.load]
            summary = report(parts, axis)
            if summary is not None:
                found[f"{name}, {axis} held out"] = summary
    return found


def _described(found: Fitted) -> dict[str, Any]:
    samples = found.samples
    domain = {name: [float(np.min(values)), float(np.max(values))] for name, values in samples.columns.items()}
    return {
        "name": samples.name,
        "rows": len(samples),
        "model": found.choice.name,
        "elsewhere": found.elsewhere,
        "scores": dict(found.choice.scores),
        "noise_floor": floor_of(samples),
        "domain": domain,
    }


def hardware_of(tables: Sequence[OpTable], said: str | None) -> str | None:
    """The tables' GPU, as said or as the files have it. Raises InputError where they have another."""
    found = only_fact(tables, "hardware")
    if said and found and said != found and (gpu_spec(said) is None or gpu_spec(said) != gpu_spec(found)):
        raise InputError(f"--hardware {said}: the table is of {found}", path=tables[0].path)
    return said or found


def only_fact(tables: Sequence[OpTable], name: str) -> str | None:
    """A fact that all tables which state it agree on."""
    values = {table.facts[name]: table for table in tables if name in table.facts}
    if len(values) > 1:
        first, second = list(values)[:2]
        raise InputError(
            f"{name} is {second!r}, but {first!r} in {values[first].path.name}: calibrate them one by one",
            path=values[second].path,
        )
    return next(iter(values), None)


def only_engine(tables: Sequence[OpTable]) -> str | None:
    """Engine and version that all tables agree on; `checks.prepare` has seen to it that each has one version."""
    found: dict[str, OpTable] = {}
    for table in tables:
        version = next((sample.key["version"] for sample in table.samples if "version" in sample.key), "")
        name = " ".join(filter(None, [table.facts.get("engine", ""), version]))
        if name:
            found[name] = table
    if len(found) > 1:
        first, second = list(found)[:2]
        problem = (
            f"engine version {second!r}, but {first!r} in {found[first].path.name}: versions are never averaged over; "
        )
        raise InputError(problem + "calibrate the tables one by one", path=found[second].path)
    return next(iter(found), None)
