"""The figures of one comparison, as data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kvtwin.reports.figures import Figure, empirical_cdf, figures
from kvtwin.traces.run import Run
from kvtwin.validate.result import Comparison

KEYS = ["parity", "error_cdf", "ttft", "tpot", "queue"]


def by_key(comparison: Comparison, **options: int) -> dict[str, Figure]:
    return {figure.key: figure for figure in figures(comparison, **options)}


def traces(figure: Figure) -> dict[str, dict[str, Any]]:
    assert figure.spec is not None
    return {trace["name"]: trace for trace in figure.spec["data"]}


def test_every_figure_is_drawn_and_has_its_numbers_in_words(comparison: Comparison) -> None:
    drawn = by_key(comparison)
    assert list(drawn) == KEYS
    assert all(figure.spec for figure in drawn.values())
    assert "70 steps, all drawn" in drawn["parity"].text
    assert "mean absolute error 10.0 %" in drawn["parity"].text
    assert "10 steps (hollow) outside the domain" in drawn["parity"].text
    assert drawn["error_cdf"].text.startswith("Median +10.0 %; 90 % of the steps between +10.0 % and +10.0 %.")
    assert "4 requests: median 100 and 110 ms" in drawn["ttft"].text
    assert "median 20.0 and 22.0 ms" in drawn["tpot"].text
    assert "peak 3 and 4" in drawn["queue"].text


def test_the_figures_are_valid_plotly(comparison: Comparison) -> None:
    from plotly.graph_objects import Figure as PlotlyFigure

    for figure in figures(comparison):
        PlotlyFigure(json.loads(re.sub(r'"var\(--[\w-]+\)"', '"#123456"', json.dumps(figure.spec))))  # raises if not


def test_every_colour_is_defined_for_light_and_dark(comparison: Comparison) -> None:
    style = (files("kvtwin.reports") / "assets" / "page.css").read_text(encoding="utf-8")
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    used = set(re.findall(r"var\((--[\w-]+)\)", json.dumps([figure.spec for figure in figures(comparison)])))
    assert {"--measured", "--simulated", "--prefill", "--decode", "--mixed"} <= used
    assert all(f"{name}:" in light and f"{name}:" in dark for name in used)


def test_parity_points_are_measured_against_predicted_by_regime(comparison: Comparison) -> None:
    spec = by_key(comparison)["parity"].spec
    assert spec is not None
    decode = [trace for trace in spec["data"] if trace["name"] == "decode"]
    inside = next(trace for trace in decode if trace["marker"]["symbol"] == "diamond")
    assert inside["x"][:2] == [11.0, 14.0]
    assert inside["y"][:2] == [12.1, 15.4]
    assert inside["text"][:2] == [1, 4]
    assert any(trace["marker"]["symbol"] == "diamond-open" for trace in decode)


def test_sampling_is_bounded_deterministic_and_keeps_the_rare_regime(
    comparison: Comparison, predictions: Callable[..., pa.Table]
) -> None:
    many = replace(comparison, predictions=predictions(5000, ("decode",) * 99 + ("prefill",)))
    first, second = (by_key(many, max_parity_points=300)["parity"] for _ in range(2))
    assert first == second
    assert first.spec is not None
    points = [trace for trace in first.spec["data"] if trace["mode"] == "markers"]
    assert sum(len(trace["x"]) for trace in points) == 300
    assert sum(len(trace["x"]) for trace in points if trace["name"] == "prefill") == 50  # all there are
    assert "5,000 steps, 300 of them drawn" in first.text


def test_cdf_keeps_both_ends_when_thinned() -> None:
    x, y = empirical_cdf(np.arange(10_000.0), 50)
    assert (x[0], x[-1], y[-1], x.size) == (0.0, 9999.0, 1.0, 50)
    assert np.all(np.diff(y) > 0)


def test_steps_that_took_no_time_are_left_out(comparison: Comparison, predictions: Callable[..., pa.Table]) -> None:
    table = predictions(3)
    index = table.schema.get_field_index("predicted_ns")
    some = table.set_column(index, "predicted_ns", pa.array([0, None, 5], pa.int64()))
    assert "1 step, all drawn" in by_key(replace(comparison, predictions=some))["parity"].text
    none = table.set_column(index, "predicted_ns", pa.array([0, None, -5], pa.int64()))
    assert by_key(replace(comparison, predictions=none))["parity"].spec is None


def test_what_is_missing_is_said_not_drawn(make_run: Callable[..., Run]) -> None:
    bare = make_run(scheduled_ns=None, first_token_ns=None)
    drawn = by_key(Comparison("bare", bare, make_run(), "arrival_ns"))
    assert [figure.spec for figure in drawn.values()] == [None] * 5
    assert "no steps" in drawn["parity"].text
    assert drawn["ttft"].text == "The recording has no known TTFT."
    assert "neither queue lengths nor scheduling times" in drawn["queue"].text


def test_an_empty_run_has_no_figures(make_run: Callable[..., Run]) -> None:
    assert all(figure.spec is None for figure in figures(Comparison("empty", make_run(0), make_run(0), "arrival_ns")))


@pytest.mark.parametrize(("slowest", "kind"), [(130, None), (90_000, "log")])
def test_a_wide_distribution_gets_a_log_axis(make_run: Callable[..., Run], slowest: int, kind: str | None) -> None:
    first = [time * 1_000_000 for time in (100, 210, 320, 300 + slowest)]
    run = make_run(first_token_ns=first, finish_ns=[time + 1 for time in first])
    figure = by_key(Comparison("wide", run, run, "arrival_ns"))["ttft"]
    assert figure.spec is not None
    assert figure.spec["layout"]["xaxis"].get("type") == kind
    assert list(traces(figure)) == ["measured", "simulated"]
