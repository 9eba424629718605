"""Client stamps -> frontend time: what a request spends before the engine's queue, and a token after the engine.

    arrival_ns            queued_ns   ...   first_token_ns      client_first_token_ns
       |  frontend, then a wait  |              |       output       |
          for the running step

The engine takes its input queue up between steps, so a request that finds the engine at work also waits for the step.
Only requests that find it idle (every earlier one has finished, no other arrives before the queue has it) show the
frontend by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from kvtwin.calibrate.accuracy import summarize
from kvtwin.calibrate.robust import fit_nonnegative
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.host import HostTime
from kvtwin.traces.run import Run

_MIN_IDLE: Final = 10  # arrivals at an idle engine; fewer are an anecdote
_MIN_TOKENS: Final = 10
_SURE: Final = 3.0  # standard errors by which a price per prompt token must differ from 0 to be kept


def fit_frontend(runs: Sequence[Run], host: HostTime) -> tuple[HostTime, str]:
    """`host` with the frontend's times that these recordings show, and one line on what they rest on.

    Before the queue: a line in the prompt's tokens, towards the mean (`robust.fit_nonnegative`); its slope is dropped
    unless it is three standard errors away from 0 (the simpler of two equal models). After the engine: the mean over
    first and last tokens, in the same way. What recordings do not show stays 0.
    """
    before = [_before(run) for run in runs]
    tokens, waits = (np.concatenate(parts) for parts in zip(*before, strict=True))
    back = np.concatenate([_after(run) for run in runs])
    notes = []
    if len(waits) >= _MIN_IDLE:
        fixed, per_token = _line(tokens, waits)
        host = replace(host, frontend_ns=fixed, frontend_per_token_ns=per_token)
        notes.append(f"before the queue: {len(waits)} arrivals at an idle engine")
    if len(back) >= _MIN_TOKENS:
        host = replace(host, output_ns=round(float(fit_nonnegative(np.ones((len(back), 1)), back)[0])))
        notes.append(f"after the engine: {len(back)} first and last tokens")
    return host, "; ".join(notes) or "none: the recordings do not show it"


def frontend_accuracy(runs: Sequence[Run]) -> dict[str, Any]:
    """Hold-out errors of both times: each run predicted from the others. Empty for what fewer than two runs show."""
    measured: dict[str, list[FloatArray]] = {}
    predicted: dict[str, list[FloatArray]] = {}
    for index, run in enumerate(runs):
        others = [*runs[:index], *runs[index + 1 :]]
        host = fit_frontend(others, HostTime())[0] if others else HostTime()
        tokens, waits = _before(run)
        back = _after(run)
        for name, times, guess in (
            ("time before the queue", waits, host.frontend_ns + host.frontend_per_token_ns * tokens),
            ("time to the client", back, np.full(len(back), float(host.output_ns))),
        ):
            if len(times) and np.any(guess > 0):
                measured.setdefault(name, []).append(times)
                predicted.setdefault(name, []).append(guess)
    return {name: summarize(np.concatenate(times), np.concatenate(predicted[name])) for name, times in measured.items()}


def _before(run: Run) -> tuple[FloatArray, FloatArray]:
    """Prompt tokens and nanoseconds before the queue, of the requests that found the engine idle."""
    arrival, queued, finish, tokens = (
        _floats(run, name) for name in ("arrival_ns", "queued_ns", "finish_ns", "input_tokens")
    )
    wait = queued - arrival
    # A wait of exactly nothing: the two clocks were aligned by the smallest wait, so that the fixed part is unknown.
    if not np.isfinite(wait).all() or not np.isfinite(finish).all() or not len(wait) or wait.min() <= 0:
        return np.empty(0), np.empty(0)
    done = np.concatenate([[-np.inf], np.maximum.accumulate(finish)[:-1]])
    next_arrival = np.concatenate([arrival[1:], [np.inf]])
    idle = (done < arrival) & (next_arrival > queued)
    return tokens[idle], wait[idle]


def _after(run: Run) -> FloatArray:
    """Nanoseconds from the engine's token to the client, of first and last tokens."""
    pairs = (("first_token_ns", "client_first_token_ns"), ("finish_ns", "client_finish_ns"))
    times = np.concatenate([_floats(run, client) - _floats(run, engine) for engine, client in pairs])
    seen: FloatArray = times[np.isfinite(times) & (times > 0)]
    return seen


def _line(tokens: FloatArray, times: FloatArray) -> tuple[int, int]:
    """Fixed part and price per token, the latter 0 unless it is sure."""
    fixed, per_token = fit_nonnegative(np.column_stack([np.ones(len(tokens)), tokens]), times).tolist()
    spread = float(np.std(tokens)) * np.sqrt(len(tokens))
    error = float(np.std(times - fixed - per_token * tokens)) / spread if spread > 0 else np.inf
    if per_token < _SURE * error:
        return round(float(fit_nonnegative(np.ones((len(times), 1)), times)[0])), 0
    return round(fixed), round(per_token)


def _floats(run: Run, name: str) -> FloatArray:
    values: FloatArray = run.requests.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
    return values
