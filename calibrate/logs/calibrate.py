"""Request logs -> Profile: which of the nested models, how true it is, and what it rests on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from kvtwin.calibrate import stats
from kvtwin.calibrate.agree import agreed_facts
from kvtwin.calibrate.frontend import fit_frontend
from kvtwin.calibrate.logs.fit import GROWTH, LogFit, fit_logs
from kvtwin.calibrate.logs.holdout import Progress, held_out
from kvtwin.calibrate.logs.log import Log, floats, name_of
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.profile import Profile
from kvtwin.sim.latency.stats import COLUMNS, BatchStats
from kvtwin.sim.vllm.simulate import simulate


def stages(num_logs: int) -> tuple[str, ...]:
    """What `calibrate_logs` tells its `progress`, in order."""
    held_out = [f"held out: {part}" for part in (range(1, num_logs + 1) if num_logs > 1 else ["later half"])]
    return (*(f"model: {name}" for name in GROWTH), *held_out, "all requests")


def calibrate_logs(logs: Sequence[Log], *, progress: Progress | None = None) -> Profile:
    """A step-latency profile from request logs alone.

    **Choice of the model.** The nested models of GROWTH are fitted to the part that is used for fitting, and the
    simplest wins whose mean loss is within one standard error of the best (Breiman et al. 1984, section 3.4.3), the
    error taken from blocks of neighbouring requests.

    **Judgement.** Of several logs each is left out in turn and simulated with the others' prices. Of a single log,
    prices are fitted to the times of the earlier half of the requests and judged on the later half: the later
    requests' arrivals and lengths are part of the load in both, their times are not looked at.

    Args:
        logs: of one engine on one hardware.
        progress: called with each of `stages(len(logs))` when it begins.

    Raises:
        InputError: too few requests with times, or logs of different engines, hardware or models.
    """
    tell = progress or (lambda _: None)
    facts = agreed_facts([log.run for log in logs])
    first = [logs[0].halves()[0]] if len(logs) == 1 else list(logs)
    fits = _grown(first, tell)
    chosen = _choose(fits)
    features, start = fits[chosen].features, dict(zip(fits[chosen].features, fits[chosen].prices_ns, strict=True))
    accuracy = held_out(logs, fits[chosen], tell)
    tell("all requests")
    host, frontend_note = fit_frontend([log.run for log in logs], HostTime())
    fit = fit_logs(logs, features, start)
    batches = BatchStats(
        np.concatenate([BatchStats.of_steps(simulate(log.run, log.config, fit.latency).steps).table for log in logs])
    )
    return Profile(
        kind="regression",
        latency=fit.latency.to_json(),
        host=host,
        **facts,
        domain={name: (float(getattr(batches, name).min()), float(getattr(batches, name).max())) for name in COLUMNS},
        accuracy=accuracy,
        provenance={
            "method": "request logs: prices for which simulated first-token and decode times are the measured ones",
            "runs": [_evidence(log, index) for index, log in enumerate(logs)],
            "held_out": "whole logs in turn" if len(logs) > 1 else "the later half of the requests, by arrival",
            "features": chosen,
            "features_tried": {name: {"loss": float(loss.mean())} for name, loss in _losses(fits).items()},
            "doubt": fit.doubt.to_json(),
            "host_time": "none: a log cannot tell it from the fixed cost of a step, which holds it",
            "frontend_time": frontend_note,
            "kvtwin": version("kvtwin"),
        },
    )


def _grown(logs: Sequence[Log], tell: Progress) -> dict[str, LogFit]:
    """A fit of each nested model, each starting from the one before."""
    fits: dict[str, LogFit] = {}
    features: tuple[str, ...] = ()
    start: dict[str, float] = {}
    for name, more in GROWTH.items():
        tell(f"model: {name}")
        features += more
        fits[name] = fit_logs(logs, features, start)
        start = dict(zip(features, fits[name].prices_ns.tolist(), strict=True))
    return fits


def _losses(fits: Mapping[str, LogFit]) -> dict[str, FloatArray]:
    """Loss of each used time under each model, on one scale: the smallest that any model reaches."""
    sd = np.min([fit.sd for fit in fits.values()], axis=0)
    return {name: 2 * (np.hypot(1, fit.errors / sd[fit.kind]) - 1) for name, fit in fits.items()}


def _choose(fits: Mapping[str, LogFit]) -> str:
    """The simplest model within one standard error of the best."""
    losses = _losses(fits)
    best = min(losses, key=lambda name: float(losses[name].mean()))
    order = np.argsort(fits[best].order, kind="stable")
    for name, loss in losses.items():
        excess = (loss - losses[best])[order]
        if name == best or excess.mean() <= stats.standard_error(excess):
            return name
    raise AssertionError("the best model is one of them")


def _evidence(log: Log, index: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name in ("arrival_ns", "input_tokens", "output_tokens", log.clock, "first_token_ns", "finish_ns"):
        digest.update(np.nan_to_num(floats(log.run, name), nan=-1.0).astype("<i8").tobytes())
    return {
        "name": name_of(log, index),
        "requests": log.num_known,
        "clock": log.clock.removesuffix("_ns"),
        "sha256": digest.hexdigest(),
    }
