"""A profile for people: hold-out errors, floors, prices with their doubt, diagnostics, what to measure next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from kvtwin.sim.latency.profile import Profile

_SHOWN_BATCHES: Final = 5
_NOTABLE_R2: Final = 0.02  # of the Breusch-Pagan regression: below, the noise is as good as a fixed share


def as_text(profile: Profile) -> str:
    """Everything to know before using the profile, as lines for a terminal."""
    what = ", ".join(filter(None, (profile.engine, profile.model, profile.hardware)))
    sections = [
        [f"{profile.kind} profile of {what or 'an unnamed engine'}"],
        _errors(profile.accuracy),
        _tests(profile.accuracy),
        _distributions(profile.accuracy),
        _prices(profile),
        [
            *(f"{name}: {_floor(found)}" for name, found in profile.accuracy.items() if "step_mape" in found),
            f"host time: {_host(profile)}",
            *_remarks(profile.provenance),
        ],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    return [
        " ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(row, widths, strict=True)) for row in (head, *rows))
    ]


def _errors(accuracy: Mapping[str, Any]) -> list[str]:
    found = {name: one for name, one in accuracy.items() if one.get("mape") is not None and "ratio" not in one}
    rows = [[name, f"{one['n']:,}", *_mape(one)] for name, one in found.items()]
    return table(["held out", "n", "MAPE", "95 % interval", "bias", "p50", "p90", "p99"], rows) if rows else []


def _mape(found: Mapping[str, Any]) -> list[str]:
    low, high = found["interval"] or (None, None)
    interval = "" if low is None else f"{low:.1%} .. {high:.1%}"
    return [
        f"{found['mape']:.1%}",
        interval,
        f"{found['bias']:+.1%}",
        *(f"{found[q]:.1%}" for q in ("p50", "p90", "p99")),
    ]


def _tests(accuracy: Mapping[str, Any]) -> list[str]:
    head = ["not used for fitting", "n", "MAPE", "p90", "bias", "repeat", "known", "within", "MAPE/repeat", "/known"]
    rows = []
    for name, one in accuracy.items():
        if "ratio" in one and one.get("mape") is not None:
            floors = [_share(one["floor"][kind]) for kind in ("repeat", "known", "within")]
            ratios = [_times(one["ratio"][kind]) for kind in ("repeat", "known")]
            sizes = [f"{one['mape']:.1%}", f"{one['p90']:.1%}", f"{one['bias']:+.1%}"]
            rows.append([name.removeprefix("test: "), f"{one['n']:,}", *sizes, *floors, *ratios])
    return table(head, rows) if rows else []


def _distributions(accuracy: Mapping[str, Any]) -> list[str]:
    names = ("mean", "p50", "p90", "p99")
    rows = [
        [name, *(f"{one['distribution'][key]:+.1%}" for key in names)]
        for name, one in accuracy.items()
        if one.get("distribution")
    ]
    return table(["error of the distribution's", *names], rows) if rows else []


def _prices(profile: Profile) -> list[str]:
    doubt = profile.provenance.get("doubt") or {}
    parameters = {
        name: found for name, found in (doubt.get("parameters") or {}).items() if found["value"] or found["interval"][1]
    }
    if not parameters:
        return []
    rows = [
        [name, f"{found['value']:,.1f}", _interval(found["interval"]), "" if found["known"] else "hardly known"]
        for name, found in parameters.items()
    ]
    lines = table(["price per unit, ns", "value", "95 % interval", ""], rows)
    for one in doubt.get("vague", ()):
        parts = " ".join(f"{weight:+.2f} {name}" for name, weight in one["direction"].items())
        sd = "no limit" if one["relative_sd"] is None else f"+- {one['relative_sd']:.0%}"
        lines.append(f"hardly told apart, along {parts}: {sd}")
    return lines


def _remarks(provenance: Mapping[str, Any]) -> list[str]:
    lines = []
    if provenance.get("features"):
        lines.append(f"features: {provenance['features']} (the simplest within one standard error of the best)")
    if provenance.get("slowness"):
        parts = ", ".join(f"{name} {value:.2f}" for name, value in provenance["slowness"].items())
        lines.append(f"time of each recording beside their mean: {parts}")
    noise = (provenance.get("diagnostics") or {}).get("heteroscedasticity")
    if noise and noise["r2"] is not None and noise["r2"] > _NOTABLE_R2:
        parts = ", ".join(f"{name} {value:.1%}" for name, value in noise["scatter"].items())
        lines.append(
            f"the scatter depends on the batch (Breusch-Pagan R2 {noise['r2']:.2f}, p {noise['p']:.1g}): {parts}"
        )
    plan = provenance.get("next_batches")
    if plan and plan["batches"]:
        before, after = (plan["relative_sd"][when]["mean"] for when in ("before", "after"))
        shown = "; ".join(batch_text(batch) for batch in plan["batches"][:_SHOWN_BATCHES])
        lines.append(
            f"measure next ({len(plan['batches'])} batches in the profile; mean doubt of a prediction "
            f"{before:.1%} -> {after:.1%}): {shown}; ..."
        )
    return lines


def batch_text(batch: Mapping[str, int]) -> str:
    """A batch of `design.next_batches` in words."""
    parts = []
    if batch["num_decode"]:
        parts.append(f"{batch['num_decode']} decodes at {batch['decode_cache_len']}")
    if batch["prefill_input_len"]:
        parts.append(f"a prefill of {batch['prefill_input_len']} after {batch['prefill_cache_len']}")
    return " + ".join(parts)


def _floor(found: Mapping[str, Any]) -> str:
    return f"MAPE {found['step_mape']:.1%} between alike steps; speed differs by up to {found['drift']:.2f} x"


def _host(profile: Profile) -> str:
    values = {name.removesuffix("_ns"): value for name, value in asdict(profile.host).items() if value}
    return ", ".join(f"{name} {value / 1e3:,.1f} us" for name, value in values.items()) or "none"


def _interval(ends: Sequence[float | None]) -> str:
    return " .. ".join("?" if end is None else f"{end:,.1f}" for end in ends)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
