"""The waterfall of causes: bars with their intervals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from kvtwin.reports.causes import causes
from kvtwin.reports.numbers import MISSING
from kvtwin.reports.pages.plots import Figure
from kvtwin.reports.pages.waterfall import waterfall_figure
from kvtwin.validate.result import Attribution, Check, Divergence, Part, ScheduleFinding, TargetReport

PARTS = (Part("arrival", -0.01), Part("step times", 0.09, (0.05, 0.12)))
FOUND = Attribution("alpha", "ttft_mean", "ms", 100.0, 108.0, PARTS, "step times")


def drawn(figure: Figure) -> tuple[dict[str, Any], dict[str, Any]]:
    """The bars of the first waterfall, and its whiskers."""
    assert figure.spec is not None
    _, bars, whiskers = figure.spec["data"][:3]
    return bars, whiskers


def test_bars_begin_where_the_last_one_ended_and_add_up_to_the_error() -> None:
    bars, _ = drawn(waterfall_figure([FOUND]))
    assert bars["y"] == ["arrival", "step times", "error"]
    assert list(zip(bars["base"], bars["x"], strict=True)) == [(0, -1), (-1, 9), (0, 8)]


def test_a_whisker_stands_at_the_end_of_its_bar_and_only_where_the_interval_is_known() -> None:
    error = Check("alpha", "e2e", "ttft_mean", "ms", 100.0, 108.0, 0.08, (0.04, 0.13), 240)
    figure = waterfall_figure([FOUND], [error])
    bars, whiskers = drawn(figure)
    assert (whiskers["y"], whiskers["x"]) == (["step times", "error"], [8, 8])
    assert whiskers["error_x"]["arrayminus"] == [4, 4]  # 9 - 5 below the end of the bar, 8 - 4 below the error
    assert whiskers["error_x"]["array"] == [3, 5]
    assert figure.table is not None
    assert figure.table.rows[0][1:4] == ("-1.00 %", "+9.00 % (+5.00 to +12.0 %)", "+8.00 % (+4.00 to +13.0 %)")
    assert bars["customdata"] == [
        "-1.00 %",
        "+9.00 %<br>95 % interval +5.00 to +12.0 %",
        "+8.00 %<br>95 % interval +4.00 to +13.0 %",
    ]


def test_whiskers_never_make_the_bars_too_small_to_see_and_the_page_says_that_they_are_longer() -> None:
    wide = replace(FOUND, parts=(PARTS[0], Part("step times", 0.09, (-5.0, 7.0))))
    figure = waterfall_figure([wide])
    assert figure.spec is not None
    low, high = figure.spec["layout"]["xaxis"]["range"]
    assert high - low < 2.2 * 9
    assert "longer" in figure.text and "longer" not in waterfall_figure([FOUND]).text


def test_a_change_that_is_unknown_is_no_bar() -> None:
    unknown = replace(FOUND, parts=(Part("cache", math.nan), Part("remainder", 0.08)))
    figure = waterfall_figure([unknown])
    assert drawn(figure)[0]["y"] == ["remainder", "error"]
    assert figure.table is not None and figure.table.rows[0][1] == MISSING
    endless = replace(FOUND, parts=(Part("cache", 0.08, (math.nan, math.inf)),))
    assert drawn(waterfall_figure([endless]))[1]["y"] == []
    nothing = replace(FOUND, measured=0.0, parts=(Part("cache", math.nan),))
    assert drawn(waterfall_figure([nothing]))[0]["y"] == []


def test_remarks_are_told_once_each_as_sentences_with_the_metrics_they_are_about() -> None:
    common = "cache hits are as recorded, or not recorded"
    rows = [
        replace(FOUND, note=f"{common}; arrival_ns lies early"),
        replace(FOUND, metric="tpot_mean", note=f"{common}; arrival_ns lies early; 3 steps"),
        replace(FOUND, metric="own", note="arrival_ns lies early."),
    ]
    assert list(waterfall_figure(rows).notes) == [
        f"All but own: {common}.",
        "arrival_ns lies early.",
        "tpot_mean: 3 steps.",
    ]
    assert waterfall_figure(rows[:1]).notes[0] == "Cache hits are as recorded, or not recorded."


def test_a_phone_gets_the_means_below_one_another() -> None:
    rows = [replace(FOUND, metric=f"{name}_{kind}") for kind in ("p50", "mean") for name in ("ttft", "tpot", "latency")]
    spec = waterfall_figure(rows).spec
    assert spec is not None
    assert [text["text"].split("</b>")[0] for text in spec["narrow"]["layout"]["annotations"]] == [
        "<b>ttft_mean",
        "<b>tpot_mean",
        "<b>latency_mean",
    ]
    assert {text["x"] for text in spec["narrow"]["layout"]["annotations"]} == {0.0}


def test_blame_that_is_no_bar_of_its_own_shows_the_whole_error() -> None:
    """Wrong units are in every bar."""
    units = Attribution("alpha", "ttft_mean", "ms", 100.0, 108.0, PARTS, "units")
    own = Attribution("alpha", "ttft_arrival", "ms", 100.0, 60.0, (Part("arrival", -0.4),), "arrival")
    report = TargetReport({"name": "t"}, (), (), attributions=(units, own))
    assert [text.partition("):")[0] for text in causes(report)] == [
        "alpha: units (ttft_mean +8.00 %",
        "alpha: arrival (ttft_arrival -40.0 %",
    ]


def test_causes_say_what_to_look_at() -> None:
    clock = "the way from arrival_ns to queued_ns takes 50.000 ms longer than simulated; 9 requests"
    arrival = Attribution("alpha", "ttft_arrival", "ms", 100.0, 60.0, (Part("arrival", -0.4),), "arrival", clock)
    decided = Attribution("alpha", "identical_steps", "steps", 9.0, 8.0, (Part("schedule", -0.1),), "schedule")
    steps = ({"batch": [["a", 0, 500], ["b", 9, 12]]}, {"batch": [["a", 0, 484], ["b", 9, 12]]})
    schedule = ScheduleFinding("alpha", 9, 8, Divergence(3, "input_len", *steps, resync_step=4))
    report = TargetReport({"name": "t"}, (), (), attributions=(arrival, decided), schedules=(schedule,))
    first, second = causes(report)
    assert "takes 50.000 ms longer than simulated" in first and "9 requests" not in first
    assert second.endswith("first at step 3: input_len, 512 tokens recorded, 496 simulated")
