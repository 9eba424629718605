"""`kvtwin calibrate --plots`: one page that shows a fit on steps it has not seen; works from a file, offline."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvtwin.calibrate.logs.holdout import held_out_requests
from kvtwin.calibrate.logs.log import Log
from kvtwin.calibrate.stats import relative_errors
from kvtwin.calibrate.steps.holdout import HeldOutSteps, held_out_steps, learning_curve
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.latency.profile import Profile
from kvtwin.sim.latency.stats import REGIMES
from kvtwin.traces.files import write_text
from kvtwin.traces.run import Run

_MAX_POINTS: Final = 3000  # per figure; more are painted over one another
_MAX_CDF_POINTS: Final = 300
_CONFIG: Final = {"displayModeBar": False, "responsive": True}
_MAX_COLOUR: Final = 0.5  # error at which the colour scale of the residuals ends
# Colour and marker differ, so that neither is needed to tell the groups apart (Okabe & Ito's colours).
_LOOKS: Final = (("#D55E00", "circle"), ("#0072B2", "diamond"), ("#009E73", "square"))


def write_plots(runs: Sequence[Run], profile: Profile, path: Path, *, seed: int = 0) -> None:
    """Write the page: parity, residuals over the batch, error distribution, learning curve.

    Everything is of held-out steps, predicted with the profile's features from fits that have not seen them.

    Args:
        runs: the recordings that the profile was fitted on.
        profile: of `calibrate_steps`.
        path: HTML file; must not exist (the caller checks).
        seed: of the choice of points and of the learning curve's samples.

    Raises:
        InputError: the file cannot be written.
    """
    steps = held_out_steps(runs, profile)
    rows = _thinned(len(steps.measured_ns), seed)
    curve = learning_curve(runs, profile, seed=seed)
    shown, all_steps = _by_regime(steps, rows), _by_regime(steps, np.arange(len(steps.measured_ns)))
    panels = [
        ("Parity", "Predicted beside measured, held-out steps; the dashed line is equality.", _parity(shown)),
        ("Residuals over the batch", "Predicted / measured - 1 by context and new tokens of the batch.",
         _residuals(steps, rows)),
        ("Error distribution", "Share of held-out steps whose error is no larger.", _cdf(all_steps, "steps")),
        ("Learning curve", "Held-out error by the number of steps that were fitted on; the band spans the repeats.",
         _learning(curve)),
    ]  # fmt: skip
    write_text(path, _page(profile, panels))


def write_log_plots(logs: Sequence[Log], profile: Profile, path: Path) -> None:
    """Write the page of a profile from request logs: parity and error distribution of held-out requests.

    Args:
        logs: what the profile was fitted on.
        profile: of `calibrate_logs`.
        path: HTML file; must not exist (the caller checks).

    Raises:
        InputError: the file cannot be written.
    """
    times = {name: both for name, both in held_out_requests(logs, profile).items() if both.size}
    panels = [
        ("Parity", "Simulated beside measured, held-out requests; the dashed line is equality.", _parity(times)),
        ("Error distribution", "Share of held-out requests whose error is no larger.", _cdf(times, "requests")),
    ]
    write_text(path, _page(profile, panels))


def _thinned(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    if count <= _MAX_POINTS:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, _MAX_POINTS, replace=False))


def _by_regime(steps: HeldOutSteps, rows: np.ndarray[Any, np.dtype[np.intp]]) -> dict[str, FloatArray]:
    """Measured and predicted milliseconds, shape (2, n) by regime."""
    both = np.stack([steps.measured_ns[rows], steps.predicted_ns[rows]]) / 1e6
    regime = steps.batches.regime[rows]
    return {name: both[:, regime == name] for name in REGIMES if name in regime}


def _parity(groups: Mapping[str, FloatArray]) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    for (name, (measured, predicted)), (colour, symbol) in zip(groups.items(), _LOOKS, strict=False):
        figure.add_scatter(
            x=measured, y=predicted, mode="markers", name=name,
            marker={"color": colour, "symbol": symbol, "size": 5, "opacity": 0.5},
            hovertemplate="measured %{x:.3g} ms<br>predicted %{y:.3g} ms",
        )  # fmt: skip
    every = np.concatenate([both.ravel() for both in groups.values()])
    ends = [float(every.min()), float(every.max())]
    figure.add_scatter(
        x=ends, y=ends, mode="lines", name="equal", line={"color": "#555", "dash": "dash"}, hoverinfo="skip"
    )
    figure.update_xaxes(type="log", dtick="D2", title="measured, ms")
    figure.update_yaxes(type="log", dtick="D2", title="predicted, ms")
    return figure


def _residuals(steps: HeldOutSteps, rows: np.ndarray[Any, np.dtype[np.intp]]) -> Any:
    from plotly import graph_objects as go

    batches = steps.batches[rows]
    error = relative_errors(steps.measured_ns[rows], steps.predicted_ns[rows])
    context = batches.decode_context + batches.prefill_context
    figure = go.Figure()
    figure.add_scatter(
        x=context + 1, y=batches.num_tokens, mode="markers", showlegend=False, customdata=error,
        marker={
            "color": error, "colorscale": "RdBu_r", "cmin": -_MAX_COLOUR, "cmax": _MAX_COLOUR, "size": 6,
            "line": {"color": "#888", "width": 0.4}, "colorbar": {"title": {"text": "error"}, "tickformat": "+.0%"},
        },
        hovertemplate="context %{x:,} tokens<br>new %{y:,} tokens<br>error %{customdata:+.1%}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(type="log", dtick="D2", title="cache_len, summed over the batch, + 1")
    figure.update_yaxes(type="log", dtick="D2", title="input_len, summed over the batch")
    return figure


def _cdf(groups: Mapping[str, FloatArray], of: str) -> Any:
    from plotly import graph_objects as go

    sizes = {name: np.abs(relative_errors(*both)) for name, both in groups.items()}
    share = np.linspace(0, 1, _MAX_CDF_POINTS)
    figure = go.Figure()
    for (name, size), (colour, _) in zip(sizes.items(), _LOOKS, strict=False):
        figure.add_scatter(
            x=np.quantile(size, share), y=share, mode="lines", name=name, line={"color": colour, "width": 2},
            hovertemplate=f"%{{y:.0%}} of the {of} within %{{x:.1%}}",
        )  # fmt: skip
    widest = float(np.quantile(np.concatenate(list(sizes.values())), 0.99))
    figure.update_xaxes(title="size of the error", tickformat=".0%", range=[0, widest])
    figure.update_yaxes(title=f"share of the {of}", tickformat=".0%", range=[0, 1])
    return figure


def _learning(curve: Sequence[Mapping[str, Any]]) -> Any:
    from plotly import graph_objects as go

    number = [point["n"] for point in curve]
    low, middle, high = (np.array([np.quantile(point["mape"], q) for point in curve]) for q in (0.0, 0.5, 1.0))
    figure = go.Figure()
    edge: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    figure.add_scatter(x=number, y=high, **edge)
    figure.add_scatter(x=number, y=low, fill="tonexty", fillcolor="rgba(0,114,178,0.2)", **edge)
    figure.add_scatter(
        x=number, y=middle, mode="lines+markers", name="median", showlegend=False,
        line={"color": "#0072B2", "width": 2}, hovertemplate="%{x:,} steps: MAPE %{y:.1%}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(type="log", dtick="D2", title="steps fitted on")
    figure.update_yaxes(title="MAPE, held out", tickformat=".0%", rangemode="tozero")
    return figure


def _page(profile: Profile, panels: Sequence[tuple[str, str, Any]]) -> str:
    what = ", ".join(filter(None, (profile.engine, profile.model, profile.hardware))) or "an unnamed engine"
    parts = []
    for index, (title, text, figure) in enumerate(panels):
        figure.update_layout(
            template="plotly_white", height=430, margin={"l": 70, "r": 20, "t": 20, "b": 60}, legend={"orientation": "h", "y": 1.08},
        )  # fmt: skip
        drawing = figure.to_html(full_html=False, include_plotlyjs=index == 0, div_id=f"figure-{index}", config=_CONFIG)
        parts.append(f"<section><h2>{title}</h2><p>{text}</p>{drawing}</section>")
    facts = f"{profile.kind}, features: {profile.provenance.get('features')}, held out: {profile.provenance.get('held_out')}"
    return _TEMPLATE.format(what=html.escape(what), facts=html.escape(facts), sections="\n".join(parts))


_TEMPLATE: Final = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Calibration of {what}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1rem; color: #222; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 1rem; }}
section {{ min-width: 0; }} h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-bottom: 0; }} p {{ margin: 0; }}
</style></head><body>
<h1>Calibration of {what}</h1><p>{facts}</p>
<main>
{sections}
</main></body></html>
"""
