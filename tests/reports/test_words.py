"""What a report says in words and numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from kvtwin.reports.causes import causes
from kvtwin.reports.markdown import render_markdown
from kvtwin.reports.numbers import number, percent, percent_interval
from kvtwin.reports.terminal import render_terminal
from kvtwin.reports.words import cells, clock_sentence, noise_floor_sentence, summary, verdict_word
from kvtwin.validate.result import Attribution, Part, TargetReport


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.99951, "1.00"), (99.96, "100"), (999.6, "1,000"), (-12.345, "-12.3"), (1e-9, "1.00e-09"), (math.inf, "-")],
)
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_percentages_never_show_a_signed_zero_or_more_than_two_decimals() -> None:
    assert (percent(0.00004), percent(-0.00004), percent(0.00717)) == ("0.00 %", "0.00 %", "+0.72 %")
    assert percent(math.nan) == "-"
    assert percent_interval(math.nan, 1.0) == "-"
    assert percent_interval(0.1, 0.2, signed=False) == "10.0 to 20.0 %"


def test_a_check_that_is_only_an_error_has_no_sign_and_no_values(report: TargetReport) -> None:
    shown = cells(report.checks[2])
    assert (shown.measured, shown.simulated, shown.error, shown.interval) == ("-", "-", "12.3 %", "12.0 to 13.0 %")


def test_the_summary_names_the_worst_failure_and_counts_the_rest(report: TargetReport) -> None:
    assert summary(report) == (
        "1 of 3 gates failed on 2 recorded runs. Worst: ttft_p90 of alpha with an error of -8.60 % (gate 5.00 %). "
        "1 of 4 checks cannot be told from run-to-run noise."
    )


def test_the_summary_of_a_pass_names_the_check_closest_to_its_gate(report: TargetReport) -> None:
    passed = replace(report, checks=report.checks[1:3])
    assert summary(passed).startswith("All 2 gates hold on 1 recorded run. Closest to its gate: step_mape of alpha")


def test_an_error_that_is_not_a_number_is_the_worst_of_all(report: TargetReport) -> None:
    lost = replace(report.checks[1], error=math.nan, verdict="fail")
    assert "Worst: tpot_mean of alpha with no value" in summary(replace(report, checks=(*report.checks, lost)))


def test_without_gates_nothing_is_claimed(report: TargetReport) -> None:
    ungated = replace(report, checks=report.checks[3:])
    assert verdict_word(ungated) == "not judged"
    assert summary(ungated) == "No gate is set: 1 check on 1 recorded run reported, not judged."


def test_the_noise_floor_is_explained_only_where_recordings_repeat(report: TargetReport) -> None:
    assert "recorded 2 times (alpha, alpha_2)" in noise_floor_sentence(report.comparisons[0].repeats)
    assert noise_floor_sentence(report.comparisons[1].repeats) == ""
    assert "the engine's clock" in clock_sentence(report.comparisons[0].clock)


def test_causes_name_the_layer_and_what_it_does_to_the_means() -> None:
    def waterfall(metric: str, blamed: str | None) -> Attribution:
        parts = (Part("arrival", 0.01), Part("step times", 0.09), Part("remainder", 0.0))
        return Attribution("run", metric, "ms", 10.0, 11.0, parts, blamed)

    found = (waterfall("ttft_mean", "step times"), waterfall("ttft_p90", "step times"), waterfall("tpot_mean", None))
    report = TargetReport({"name": "t"}, (), (), attributions=found)
    assert [text.partition("):")[0] for text in causes(report)] == ["run: step times (ttft_mean +9.00 %"]
    assert "run: step times" in render_terminal(report) and "run: step times" in render_markdown(report)
