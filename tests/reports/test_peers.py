"""Other simulators beside ours: the table, and where it is shown."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from kvtwin.reports.markdown import render_markdown
from kvtwin.reports.pages.target import render_target
from kvtwin.reports.peers import peer_tables
from kvtwin.reports.terminal import render_terminal
from kvtwin.validate import checks_json
from kvtwin.validate.result import Peer, TargetReport
from kvtwin.validate.summary import NO_PAIRS

from .conftest import CHECKS, HOSTILE, stored

E2E = [check for check in CHECKS if check.level == "e2e" and check.run == "alpha"]


@pytest.fixture
def compared(report: TargetReport) -> TargetReport:
    """Ours, one that predicts each request 10 % short, and one of which only one aggregate is known."""
    requests = tuple(replace(check, simulated=0.9 * check.measured, error=-0.1) for check in E2E)
    alone = replace(E2E[0], simulated=80.0, error=-0.2, note=NO_PAIRS)
    return replace(report, peers=(Peer("alpha", "Vidur", requests), Peer("alpha", "BLIS", (alone,))))


def test_a_row_per_metric_with_what_each_says(compared: TargetReport) -> None:
    (table,) = peer_tables(compared)
    assert table.run == "alpha"
    assert table.heads == ("metric", "measured", "kvtwin", "Vidur", "BLIS")
    assert table.rows == (
        ("ttft_p90", "100 ms", "91.4 ms (-8.60 %)", "90.0 ms (-10.0 %)", "80.0 ms (-20.0 %)"),
        ("tpot_mean", "4.00 ms", "4.04 ms (+1.00 %)", "3.60 ms (-10.0 %)", "-"),
    )
    assert table.notes == (f"BLIS: {NO_PAIRS}",)


def test_every_report_shows_it_and_checks_json_keeps_it(compared: TargetReport, tmp_path: Path) -> None:
    kept = checks_json.read(checks_json.write(compared, tmp_path / "checks.json"))
    assert kept.peers == compared.peers
    page = render_target(kept, None)
    for text in (render_terminal(compared), render_markdown(compared), page):
        assert "Vidur" in text and "BLIS: aggregates only" in text
        assert re.search(r"80\.0\W+ms \(\W20\.0\W+%\)", text.replace("&nbsp;", " "))
    assert "Other simulators" not in render_target(stored(replace(compared, peers=())), None)


def test_their_names_stay_text(compared: TargetReport) -> None:
    hostile = replace(compared, peers=(Peer("alpha", HOSTILE, compared.peers[0].checks),))
    assert "\x1b" not in render_terminal(hostile)
    rows = [line for line in render_markdown(hostile).splitlines() if line.startswith("| ttft")]  # no cell was added
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}
    assert "<script>window.hacked" not in render_target(stored(hostile), None)
