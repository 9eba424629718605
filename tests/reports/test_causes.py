"""The waterfall of causes: bars with their intervals."""

from __future__ import annotations

from kvtwin.reports.causes import causes
from kvtwin.reports.pages.causes import waterfall_figure
from kvtwin.validate.result import Attribution, Divergence, Part, ScheduleFinding, TargetReport

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
