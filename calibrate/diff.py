"""Two profiles side by side: what they rest on, their models, their errors, and how far their predictions differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from kvtwin.calibrate.design import Limits, batches_of, candidates
from kvtwin.calibrate.summary import batch_text, table
from kvtwin.sim.latency.profile import Profile
from kvtwin.sim.latency.stats import REGIMES
from kvtwin.traces.errors import InputError

_FACTS: Final = ("kind", "hardware", "model", "engine", "tensor_parallel_size")
_GRID_LIMIT: Final = 1 << 20


def diff_profiles(old: Profile, new: Profile) -> dict[str, Any]:
    """What changed from one profile to another, as plain values for JSON.

    Returns:
        facts: those that differ, [old, new]. data: names of recordings in one only, and the number in both, by
        digest. features: [old, new]. prices: by name, old and new value and interval (None where a model has no such
        feature), their ratio, and whether the intervals overlap (both None where the models have different features:
        what one prices alone is part of other prices in the other). host: fields that differ. accuracy: MAPE and bias by part,
        [old, new]. domain: statistics whose range differs. predictions: new / old - 1 over a grid of batches inside
        both domains: n, mean, mean size, p90 and largest size, the batch of the largest, and the mean by regime; None
        where a profile predicts operators and no steps.

    Raises:
        InputError: the domains have no batch in common, or a profile's accuracy or provenance is damaged.
    """
    try:
        return _differences(old, new)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"accuracy or provenance of a profile is damaged ({error!r}): calibrate it again") from error


def _differences(old: Profile, new: Profile) -> dict[str, Any]:
    return {
        "facts": {
            name: [getattr(old, name), getattr(new, name)]
            for name in _FACTS
            if getattr(old, name) != getattr(new, name)
        },
        "data": _data(old, new),
        "features": [old.provenance.get("features"), new.provenance.get("features")],
        "prices": _prices(old, new),
        "host": _changed(asdict(old.host), asdict(new.host)),
        "accuracy": _accuracy(old, new),
        "domain": _changed({k: list(v) for k, v in old.domain.items()}, {k: list(v) for k, v in new.domain.items()}),
        "predictions": _predictions(old, new),
    }


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [old.get(name), new.get(name)] for name in {**old, **new} if old.get(name) != new.get(name)}


def _data(old: Profile, new: Profile) -> dict[str, Any]:
    before, after = ({run["sha256"]: run["name"] for run in one.provenance.get("runs", ())} for one in (old, new))
    return {
        "only_old": [name for digest, name in before.items() if digest not in after],
        "only_new": [name for digest, name in after.items() if digest not in before],
        "both": len(before.keys() & after.keys()),
    }


def _prices(old: Profile, new: Profile) -> dict[str, Any]:
    """Prices of regressions; other models are compared by their predictions alone.

    A price means something beside the other terms of its own model, so ratios are of models fitted with the same
    features. There a term that is missing costs nothing.
    """
    values = [one.latency.get("coefficients_ns") or {} for one in (old, new)]
    features = [one.provenance.get("features") for one in (old, new)]
    alike = features[0] == features[1]
    doubts = [(one.provenance.get("doubt") or {}).get("parameters") or {} for one in (old, new)]
    found: dict[str, Any] = {}
    for name in {**values[0], **values[1]}:
        prices = [one.get(name, 0.0 if alike else None) for one in values]
        intervals = [one[name]["interval"] if name in one else None for one in doubts]
        found[name] = {
            "value": prices,
            "interval": intervals,
            "ratio": prices[1] / prices[0] if alike and prices[0] else None,
            "overlap": _overlap(*intervals) if alike else None,
        }
    return found


def _overlap(one: list[float | None] | None, other: list[float | None] | None) -> bool | None:
    if one is None or other is None:
        return None
    highs = [np.inf if ends[1] is None else ends[1] for ends in (one, other)]
    return bool(max(one[0] or 0.0, other[0] or 0.0) <= min(highs))


def _accuracy(old: Profile, new: Profile) -> dict[str, Any]:
    return {
        name: {key: [old.accuracy[name][key], new.accuracy[name][key]] for key in ("mape", "bias")}
        for name in old.accuracy
        if name in new.accuracy and "mape" in old.accuracy[name] and "mape" in new.accuracy[name]
    }


def _predictions(old: Profile, new: Profile) -> dict[str, Any] | None:
    try:
        models = old.latency_model(), new.latency_model()
    except InputError:  # read_profile has checked the models: this one is of operators
        return None
    grid = candidates(_limits(old, new))
    batches = batches_of(grid)
    inside = ~(old.extrapolates(batches) | new.extrapolates(batches))
    if not inside.any():
        raise InputError("the two profiles' domains have no batch in common: nothing to compare predictions on")
    grid, batches = grid[inside], batches[inside]
    before, after = (model.step_ns(batches, 0).astype(np.float64) for model in models)
    change = after / before - 1
    worst = int(np.argmax(np.abs(change)))
    names = ("num_decode", "decode_cache_len", "prefill_input_len", "prefill_cache_len")
    return {
        "n": len(change),
        "mean": float(change.mean()),
        "mean_size": float(np.abs(change).mean()),
        "p90_size": float(np.quantile(np.abs(change), 0.9)),
        "largest": float(change[worst]),
        "largest_at": dict(zip(names, grid[worst].tolist(), strict=True)),
        "by_regime": {name: float(change[batches.regime == name].mean()) for name in REGIMES if name in batches.regime},
    }


def _limits(old: Profile, new: Profile) -> Limits:
    """The largest batches inside both domains."""

    def most(*names: str, otherwise: int) -> int:
        tops = [sum(one.domain[name][1] for name in names) for one in (old, new) if all(n in one.domain for n in names)]
        return int(min(tops, default=otherwise))

    return Limits(
        max_num_seqs=max(most("num_decode", "num_prefill", otherwise=256), 1),
        max_num_batched_tokens=max(most("num_decode", "prefill_tokens", otherwise=8192), 1),
        max_model_len=max(most("decode_context_max", otherwise=1 << 15), most("prefill_context", otherwise=0), 2),
        capacity_tokens=_GRID_LIMIT,
    )


# ---- for people ----------------------------------------------------------------------------------------------


def as_text(found: Mapping[str, Any]) -> str:
    """`diff_profiles`' result as lines for a terminal."""
    data = found["data"]
    lines = [f"{name}: {old!r} -> {new!r}" for name, (old, new) in found["facts"].items()]
    lines.append(f"data: {data['both']} recordings in both" + "".join(
        f"; {label}: {', '.join(data[key])}" for key, label in (("only_old", "only old"), ("only_new", "only new")) if data[key]
    ))  # fmt: skip
    if found["features"][0] != found["features"][1]:
        lines.append("features: {} -> {}; with others beside it a price means something else: compare predictions".format(
            *found["features"]
        ))  # fmt: skip
    lines += _price_lines(found["prices"])
    lines += [f"host {name}: {old} -> {new}" for name, (old, new) in found["host"].items()]
    rows = [
        [name, *(_percent(value) for key in ("mape", "bias") for value in one[key])]
        for name, one in found["accuracy"].items()
    ]
    lines += ["", *table(["held out", "MAPE old", "new", "bias old", "new"], rows)] if rows else []
    lines += [f"domain of {name}: {old} -> {new}" for name, (old, new) in found["domain"].items()]
    return "\n".join([*lines, "", *_prediction_lines(found["predictions"])])


def _prediction_lines(changes: Mapping[str, Any] | None) -> list[str]:
    if changes is None:
        return ["predictions: not compared, a profile of operators has no steps"]
    regimes = ", ".join(f"{name} {value:+.1%}" for name, value in changes["by_regime"].items())
    sizes = f"size {changes['mean_size']:.1%} on average, {changes['p90_size']:.1%} at the 90th percentile"
    return [
        f"predictions over {changes['n']:,} batches inside both domains: {changes['mean']:+.1%} on average ({regimes}); {sizes}",
        f"largest: {changes['largest']:+.1%} for {batch_text(changes['largest_at'])}",
    ]


def _price_lines(prices: Mapping[str, Any]) -> list[str]:
    if not prices:
        return []
    rows = []
    for name, one in prices.items():
        change = "" if one["ratio"] is None else f"{one['ratio'] - 1:+.1%}"
        remark = {True: "intervals overlap", False: "intervals apart", None: ""}[one["overlap"]]
        rows.append([name, *("-" if value is None else f"{value:,.1f}" for value in one["value"]), change, remark])
    return ["", *table(["price per unit, ns", "old", "new", "change", ""], rows), ""]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
