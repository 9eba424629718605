"""The HTML pages, read as text: complete, inert, and the same every time."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest

from kvtwin.reports.aggregate.build import aggregate
from kvtwin.reports.pages import shell
from kvtwin.reports.pages.figures.run import figures_of_run
from kvtwin.reports.pages.headline import headlines
from kvtwin.reports.pages.index import Entry, render_index
from kvtwin.reports.pages.markup import script_json
from kvtwin.reports.pages.plots import plotly_text
from kvtwin.reports.pages.target import render_target
from kvtwin.reports.pages.trend import sparkline, trend_figure
from kvtwin.traces.run import Run
from kvtwin.validate.result import Check, Comparison, Drift, TargetReport

from .conftest import HOSTILE, stored, with_steps

MAX_BYTES = 6_000_000
RUN_FIGURES = ["parity", "error_map", "error_cdf", "ttft", "tpot", "itl", "latency", "timeline", "causes", "cache"]


class Document(HTMLParser):
    """Elements, ids and text; fails on a tag that is not closed in order."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1  # inside an SVG
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def page_of(report: TargetReport, **options: Any) -> str:
    return render_target(stored(report), aggregate(report), **options)


def specs_of(text: str) -> Any:
    found = re.search(r'id="figures"[^>]*>(.*?)</script>', text)
    assert found
    return json.loads(found[1])


@pytest.fixture
def full_report(report: TargetReport, make_run: Callable[..., Run]) -> TargetReport:
    """The first run with recorded steps and known cache hits on both sides: every figure is drawn."""
    hits = {"cached_tokens": [4, 4, 0], "cached_host_tokens": [1, 1, 0]}
    runs = [with_steps(make_run(3, slow=slow, **hits)) for slow in (1.0, 1.1)]
    first = replace(report.comparisons[0], measured=runs[0], simulated=runs[1])
    drift = Drift("alpha", "ttft_p90", -0.02, -0.086, "simulated", "2026-11-01T00:00:00Z", 0.01, "fail")
    return replace(report, comparisons=(first, *report.comparisons[1:]), drifts=(drift,))


def test_the_page_is_well_formed_and_complete(full_report: TargetReport) -> None:
    text = page_of(full_report)
    document = Document(text)
    assert document.open == []
    ids = [attributes["id"] for _, attributes in document.attributes if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = {attributes.get("href") or "" for tag, attributes in document.attributes if tag == "a"}
    assert {anchor[1:] for anchor in anchors} <= set(ids)
    assert document.tags["h1"] == document.tags["main"] == 1
    assert document.tags["caption"] == document.tags["table"]
    assert sorted(specs_of(text)) == sorted(
        [f"figure-0-{key}" for key in RUN_FIGURES]
        + [f"figure-1-{key}" for key in ("ttft", "tpot", "latency", "timeline")]
    )
    for phrase in (
        "1 of 3 gates failed", "recorded 2 times", "no steps with a measured", "by step", "hold out mape",
        "kvtwin check tiny", "68 of 70 steps identical (97.1\N{NO-BREAK SPACE}%)", "Not judged: evicted blocks",
        "first part at step 3 (order) and agree from step 9", "r0: 1 new on 8 cached",
        "Most of it comes from: ttft_mean: step times", "ttft_mean: one seed.", "ttft_p90 of alpha",
        "What the errors come from", "alpha: step times (ttft_mean +8.50\N{NO-BREAK SPACE}%): the profile's step latencies are off",
    ):  # fmt: skip
        assert phrase in document.text, phrase
    plots = [attributes for _, attributes in document.attributes if attributes.get("class") == "plot"]
    assert all(plot["role"] == "img" and re.search(r"\d", plot["aria-label"] or "") for plot in plots)


def test_the_figures_are_valid_plotly(full_report: TargetReport) -> None:
    from plotly.graph_objects import Figure as PlotlyFigure

    specs = specs_of(page_of(full_report, history=[stored(full_report)] * 2))
    assert len(specs) == len(RUN_FIGURES) + 4 + 1
    for spec in specs.values():
        PlotlyFigure(json.loads(re.sub(r'"var\(--[\w-]+\)"', '"#123456"', json.dumps(spec))))  # raises if not


def test_every_colour_is_defined_for_light_and_dark(full_report: TargetReport) -> None:
    style = (files("kvtwin.reports") / "assets" / "page.css").read_text(encoding="utf-8")
    defined = set(re.findall(r"^  (--[\w-]+): light-dark\(", style, re.MULTILINE))
    specs = json.dumps(specs_of(page_of(full_report, history=[stored(full_report)] * 2)))
    used = set(re.findall(r"var\((--[\w-]+)\)", specs + style))
    assert {"--measured", "--simulated", "--prefill", "--decode", "--mixed", "--too-slow"} <= used
    assert used <= defined


def test_text_contrast_is_at_least_four_and_a_half() -> None:
    style = (files("kvtwin.reports") / "assets" / "page.css").read_text(encoding="utf-8")
    colours = re.findall(r"(--[\w-]+): light-dark\((#\w{6}), (#\w{6})\)", style)
    for theme in (1, 2):
        of = {row[0]: row[theme] for row in colours}
        pairs = [
            (ink, back) for ink in ("--ink", "--ink-soft", "--muted", "--accent") for back in ("--page", "--panel")
        ]
        pairs += [(f"--{word}", f"--{word}-back") for word in ("pass", "fail", "same", "open")]
        pairs += [(f"--{word}", "--panel") for word in ("pass", "fail", "same", "open")]
        for ink, back in pairs:
            assert contrast(of[ink], of[back]) >= 4.5, (ink, back, theme)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, "contrast ratio" and "relative luminance"."""
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_figure_has_its_numbers_in_words(full_report: TargetReport) -> None:
    run, bare = (figures_of_run(figures) for figures in aggregate(full_report).runs)
    text = {figure.key: figure.text for figure in run}
    assert text["parity"].startswith("70 steps; each is a mark. Median 44.0 ms measured, 48.4 ms predicted. Hollow: 10")
    assert text["error_cdf"] == "Median +10.0 %; 90 % of the steps between +10.0 % and +10.0 %."
    assert "3 requests: median 100 and 110 ms" in text["ttft"]
    assert "running 0.755 and 0.755" in text["timeline"]
    assert text["cache"] == "Share of prompt tokens found in a cache: measured 33.3 % and simulated 33.3 %."
    assert {figure.key: figure.text for figure in bare}["itl"].startswith("The recording has no known ITL.")
    cache = next(figure for figure in run if figure.key == "cache")
    assert cache.table is not None
    assert cache.table.rows == [("HBM", "6", "6"), ("host DRAM", "2", "2")]


def test_what_is_missing_is_said_not_drawn(make_run: Callable[..., Run]) -> None:
    bare = make_run(scheduled_ns=None, first_token_ns=None)
    report = TargetReport({}, (), (Comparison("bare", bare, make_run(), "arrival_ns"),))
    text = page_of(report)
    assert list(specs_of(text)) == ["figure-0-latency"]
    shown = Document(text).text
    for phrase in ("no known TTFT", "neither queue lengths nor scheduling times", "no scheduler log", "Not attributed",
                   "Neither run knows its prefix-cache hits", "The command was not kept"):  # fmt: skip
        assert phrase in shown, phrase


def test_the_age_of_the_data_is_told_or_that_it_is_unknown(report: TargetReport) -> None:
    def told(recorded: str | None) -> str:
        facts = {key: value for key, value in {**report.target, "recorded": recorded}.items() if value is not None}
        return Document(page_of(replace(report, target=facts))).text

    assert "Oldest recording2026-04-25Checked" in told("2026-04-25")
    assert "Oldest recordingunknown dateChecked" in told(None)
    assert "Oldest recordingunknown dateChecked" in told("<b>soon</b>")


def test_the_same_report_gives_the_same_bytes(report: TargetReport) -> None:
    first = page_of(report)
    shell._packed.cache_clear()  # compressed anew
    assert page_of(report) == first


@pytest.mark.parametrize("plotly_url", [None, "../../assets/plotly.min.js"])
def test_nothing_is_loaded_from_anywhere_else(report: TargetReport, plotly_url: str | None) -> None:
    text = page_of(report, plotly_url=plotly_url, index_url="../../index.html")
    for tag, attributes in Document(text).attributes:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value in ("data:,", "../../index.html"), (tag, name, value)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "default-src 'none'" in text


def test_the_page_stays_small_with_many_runs_of_many_steps(
    full_report: TargetReport, predictions: Callable[..., Any]
) -> None:
    first = replace(full_report.comparisons[0], predictions=predictions(20_000))
    names = [f"run {index}" for index in range(40)]
    many = replace(
        full_report, comparisons=tuple(replace(first, name=name) for name in names), checks=full_report.checks * 100
    )
    assert len(page_of(many).encode()) < MAX_BYTES
    assert len(page_of(many, plotly_url="x").encode()) < MAX_BYTES


def test_hostile_strings_stay_text(hostile_report: TargetReport) -> None:
    gone = Drift(HOSTILE, HOSTILE, 0.1, math.nan, HOSTILE, HOSTILE, None, "gone")
    hostile_report = replace(hostile_report, drifts=(gone,))
    report = stored(hostile_report)
    for text in (
        page_of(hostile_report, history=[report, report], index_url="../index.html"),
        render_index([Entry("targets/x/index.html", (report, report))]),
    ):
        document = Document(text)
        assert document.open == []
        assert document.tags["script"] <= 3  # the figures, plotly, the page's own
        assert document.tags["img"] == document.tags["b"] - text.count("<b>") - text.count("<b ") == 0
        assert not any(name.startswith("on") for _, attributes in document.attributes for name in attributes)
        assert "</script><script>window.hacked" in document.text  # shown as it is
    labels = json.dumps(specs_of(page_of(hostile_report)))
    assert "<script" not in labels
    assert "&lt;b&gt;bold" in labels  # a layer's name reaches a label, escaped for plotly


def test_labels_are_cut_and_escaped() -> None:
    assert plotly_text("<b>a & b</b>") == "&lt;b&gt;a &amp; b&lt;/b&gt;"
    assert plotly_text("x" * 50, 10) == "x" * 9 + "…"


def test_json_cannot_end_its_script_element() -> None:
    text = script_json({"</script>": "<!-- & -->"})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"</script>": "<!-- & -->"}


def test_a_report_of_nothing_is_still_a_page() -> None:
    text = page_of(TargetReport({}, (), ()))
    document = Document(text)
    assert document.open == []
    assert "No check was made." in document.text
    assert len(text) < 60_000  # nothing to draw, so no plotly either


def test_without_figures_the_checks_are_there(report: TargetReport) -> None:
    document = Document(render_target(stored(report), None))
    assert "figures.json is missing" in document.text
    assert "ttft_p90" in document.text


def test_headlines_are_ranges_over_the_runs() -> None:
    def check(run: str, error: float, verdict: Any) -> Check:
        return Check(run, "e2e", "ttft_mean", "ms", 1.0, 1 + error, error, None, 9, 0.01, 0.1, verdict)

    found = headlines([check("a", -0.02, "pass"), check("b", 0.12, "fail"), check("c", float("nan"), "pass")])
    one = found["ttft_mean"]
    assert list(found) == ["ttft_mean"]
    assert (one.shown, one.verdict, one.worst.run) == ("-2.00 to +12.0 %", "fail", "b")
    assert one.size == pytest.approx(0.07)


def test_the_trend_follows_the_reports(report: TargetReport) -> None:
    old = replace(stored(report), created="2026-11-01T00:00:00Z")
    worse = replace(old, checks=tuple(replace(check, error=2 * check.error) for check in old.checks))
    figure = trend_figure([worse, stored(report)])
    assert figure.spec is not None
    sizes = {trace["name"]: trace["y"] for trace in figure.spec["data"]}
    assert sizes["Step MAPE"] == pytest.approx([24.6, 12.3])
    assert "Step MAPE 24.6 % in the oldest, 12.3 % in the newest" in figure.text
    assert 'aria-label="Step MAPE: 24.6 %, 12.3 %"' in sparkline([worse, stored(report)])
    assert trend_figure([old]).spec is None
