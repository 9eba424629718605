"""What recordings must have in common before one profile may rest on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run


def agreed_facts(runs: Sequence[Run]) -> dict[str, Any]:
    """Hardware, model, engine and tensor-parallel degree that all the runs share, as fields of a Profile.

    Runs that say nothing are taken to agree.

    Raises:
        InputError: no run, or two that differ: an engine version, a model or a hardware is never averaged over; or one
            given twice, which would judge a fit on what it has seen.
    """
    if not runs:
        raise InputError("no recording to calibrate on: at least one run is needed")
    _refuse_copies(runs)
    facts = {name: _agreed(runs, [getattr(run.info, name) for run in runs], name) for name in _HEAD}
    name = "tensor_parallel_size"
    sizes = [run.info.engine_config.get(name) for run in runs]
    return {**facts, name: int(_agreed(runs, sizes, name) or 1)}


def _refuse_copies(runs: Sequence[Run]) -> None:
    for row, run in enumerate(runs):
        for other in runs[:row]:
            if run.requests.equals(other.requests) and (not run.has("steps") or run.steps.equals(other.steps)):
                problem = f"the same recording as {place_of(other) or 'another one'}: errors would be of steps it was fitted on"
                raise InputError(problem, path=place_of(run))


_HEAD = ("hardware", "model", "engine")


def _agreed(runs: Sequence[Run], values: Sequence[Any], name: str) -> Any:
    known = [(run, value) for run, value in zip(runs, values, strict=True) if value is not None]
    if not known:
        return None
    for run, value in known[1:]:
        if value != known[0][1]:
            problem = f"{value!r} here, {known[0][1]!r} in the first recording: calibrate each on its own"
            raise InputError(problem, path=place_of(run), column=name)
    return known[0][1]


def place_of(run: Run) -> str | None:
    """Where the run lies, or what it was read from."""
    place = run.path or run.info.source.get("path")
    return str(place) if place else None
