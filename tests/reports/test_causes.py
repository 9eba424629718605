"""The waterfall of causes: bars with their intervals."""

from __future__ import annotations

from kvtwin.reports.pages.causes import waterfall_figure
from kvtwin.reports.words import causes
from kvtwin.validate.result import Attribution, Part, TargetReport

PARTS = (Part("arrival", -0.01), Part("step times", 0.09, (0.05, 0.12)))
FOUND = Attribution("alpha", "ttft_mean", "ms", 100.0, 108.0, PARTS, "step times")


def test_a_bar_shows_its_interval_where_it_is_known() -> None:
    figure = waterfall_figure([FOUND])
    assert figure.table is not None
    _, arrival, steps, *_ = figure.table.rows[0]
    assert arrival == "-1.00 %" and "5.00 % to +12.0 %" in steps.replace("12.00", "12.0")
    assert figure.spec is not None
    assert "95 % interval" in figure.spec["data"][0]["customdata"][1]


def test_blame_that_is_no_bar_of_its_own_shows_the_whole_error() -> None:
    """Wrong units are in every bar."""
    units = Attribution("alpha", "ttft_mean", "ms", 100.0, 108.0, PARTS, "units")
    own = Attribution("alpha", "ttft_arrival", "ms", 100.0, 60.0, (Part("arrival", -0.4),), "arrival")
    report = TargetReport({"name": "t"}, (), (), attributions=(units, own))
    assert causes(report) == ["alpha: units (ttft_mean +8.00 %)", "alpha: arrival (ttft_arrival -40.0 %)"]
