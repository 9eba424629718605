"""The table on the terminal and the Markdown for a CI summary."""

from __future__ import annotations

import io
import re

import pytest

from kvtwin.reports.markdown import escape, render_markdown
from kvtwin.reports.terminal import print_report, render_terminal
from kvtwin.validate.result import TargetReport


def test_the_terminal_table_is_aligned_and_complete(report: TargetReport) -> None:
    lines = render_terminal(report, width=200).splitlines()
    assert lines[0] == "tiny: fail"
    table, causes = lines[3:9], lines[9:]
    head, rule, *rows = table
    assert [len(part) for part in rule.split()] == [len(part) for part in rule.split("  ")]
    words = "run level metric measured simulated error 95 % interval noise floor gate verdict"
    assert " ".join(head.split()) == words
    assert causes[:2] == ["", "what the errors come from:"]
    assert "  -8.60 %  -10.0 to -7.00 %       2.00 %  5.00 %  fail" in rows[0]
    assert {row.index("ms") for row in rows[:2]} == {rows[0].index("ms")}


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_terminal_table_fits_and_names_what_it_left_out(report: TargetReport, width: int) -> None:
    text = render_terminal(report, width=width)
    table = text.splitlines()[3:8]
    assert max(map(len, table)) <= width
    assert all(word in table[0] for word in ("run", "metric", "error", "verdict"))
    assert ("left out to fit" in text) == (width < 140)


def test_colour_only_on_a_terminal_that_wants_it(report: TargetReport, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    file, terminal, without = io.StringIO(), Terminal(), Terminal()
    print_report(report, file)
    print_report(report, terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    print_report(report, without)
    assert "\x1b[31;1mfail\x1b[0m" in terminal.getvalue()
    assert file.getvalue() == without.getvalue() == re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())


def test_text_from_files_cannot_steer_the_terminal(hostile_report: TargetReport, harmless_report: TargetReport) -> None:
    text = render_terminal(hostile_report, width=10)
    assert "\x1b" not in text
    assert len(text.splitlines()) == len(render_terminal(harmless_report, width=10).splitlines())


def test_no_checks() -> None:
    empty = TargetReport({}, (), ())
    assert render_terminal(empty).splitlines()[-1] == "no checks"
    assert render_markdown(empty).startswith("## ⚪ not judged: unnamed target\n")


def test_markdown_has_verdict_summary_and_one_row_per_check(report: TargetReport) -> None:
    lines = render_markdown(report).splitlines()
    assert lines[0] == "## ❌ fail: tiny"
    assert lines[2].startswith("1 of 3 gates failed on 2 recorded runs.")
    row = r"| alpha | e2e | ttft\_p90 | 100 ms | 91.4 ms | -8.60 % | -10.0 to -7.00 % | 2.00 % | 5.00 % | ❌ fail |"
    assert row in lines
    assert sum(line.startswith("| ") for line in lines) == 1 + len(report.checks)
    assert any("recorded 2 times" in line for line in lines)
    assert r"- by step: step\_mape of alpha" in lines


def test_markdown_escapes_everything(hostile_report: TargetReport, harmless_report: TargetReport) -> None:
    lines = render_markdown(hostile_report).splitlines()
    text = "\n".join(lines)
    assert set(re.findall(r"<(/?\w+)", text)) == {"details", "summary", "/summary", "/details"}
    rows = [line for line in lines if line.startswith("|")]
    harmless = [line for line in render_markdown(harmless_report).splitlines() if line.startswith("|")]
    cells = [[len(re.findall(r"(?<!\\)\|", row)) for row in some] for some in (rows, harmless)]
    assert cells[0] == cells[1]  # no cell and no row was added
    assert "](b)" not in text.replace(r"\]", "")


def test_escape_leaves_plain_words_alone() -> None:
    assert escape("a plain sentence, 5 % of it.") == "a plain sentence, 5 % of it."
