"""Every number that a page shows or draws is one of checks.json: index, cards, trend, waterfall."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from kvtwin.reports.numbers import percent
from kvtwin.reports.pages.headline import METRICS

from .browser import draw_all, plain, show

SHOWN = ("step_mape", "ttft_mean", "tpot_mean")


@pytest.fixture
def newest(site: Path) -> dict[str, Any]:
    return read(site.parent / "new" / "tiny")


def read(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / "checks.json").read_text())
    return document


def errors(document: dict[str, Any], metric: str) -> list[float]:
    """Of every recorded run."""
    return [check["error"] for check in document["checks"] if check["metric"] == metric]


def drawn(driver: Any, figure: str) -> list[dict[str, Any]]:
    """What plotly holds of a figure that is on the page."""
    fields = "trace => ({type: trace.type, name: trace.name, x: [...trace.x], y: [...trace.y], base: trace.base})"
    traces: list[dict[str, Any]] = driver.execute_script(
        f"return document.getElementById('{figure}').data.map({fields})"
    )
    return traces


def test_the_index(driver: Any, site: Path, newest: dict[str, Any]) -> None:
    show(driver, site / "index.html")
    row = "[...document.querySelectorAll('#targets tbody tr')].find(row => row.cells[1].innerText.startsWith('tiny'))"
    exact = driver.execute_script(f"return [...{row}.cells].map(cell => cell.dataset.value)")
    shown = [plain(cell) for cell in driver.execute_script(f"return [...{row}.cells].map(cell => cell.innerText)")]
    assert (exact[0], shown[3]) == (newest["verdict"], newest["target"]["engine"])
    for column, metric in enumerate(SHOWN, start=4):
        found = errors(newest, metric)
        assert exact[column] == (repr(max(map(abs, found))) if found else "")
        assert shown[column] == (percent(found[0], signed=metric != "step_mape") if found else "-")
    gated = [check for check in newest["checks"] if check["threshold"] is not None]
    held = sum(check["verdict"] != "fail" for check in gated)
    assert (exact[7], shown[7]) == (repr(held / len(gated)), f"{held} of {len(gated)}")
    assert (exact[9], shown[9].split(",")[0]) == (newest["target"]["recorded"], newest["target"]["recorded"])
    assert exact[10] == newest["created"]


def test_the_headline_cards(driver: Any, site: Path, newest: dict[str, Any]) -> None:
    show(driver, site / "targets" / "tiny" / "index.html")
    cards = driver.execute_script(
        "return [...document.querySelectorAll('.card b')].map(card => [card.dataset.metric, card.innerText])"
    )
    for metric, shown in cards[:-1]:
        assert plain(shown) == percent(errors(newest, metric)[0], signed=metric != "step_mape")
    assert [metric for metric, _ in cards[:-1]] == [metric for metric in METRICS if errors(newest, metric)]


def test_the_trend(driver: Any, site: Path, newest: dict[str, Any]) -> None:
    show(driver, site / "targets" / "tiny" / "index.html")
    draw_all(driver)
    history = [read(site.parent / "old"), newest]
    traces = {trace["name"]: trace for trace in drawn(driver, "figure-all-trend")}
    wanted = {name: metric for metric, name in METRICS.items() if errors(newest, metric)}
    assert set(traces) == set(wanted)
    for name, metric in wanted.items():
        sizes = [100 * fmean(map(abs, errors(document, metric))) for document in history]
        assert traces[name]["y"] == pytest.approx(sizes)
        assert traces[name]["x"] == [document["created"] for document in history]


def test_the_waterfall(driver: Any, site: Path, newest: dict[str, Any]) -> None:
    show(driver, site / "targets" / "tiny" / "index.html")
    draw_all(driver)
    bars = {trace["name"]: trace for trace in drawn(driver, "figure-0-causes") if trace["type"] == "bar"}
    found = [one for one in newest["attributions"] if one["run"] == "alpha"]
    assert {one["metric"] for one in found} == set(bars)
    for one in found:
        known = [part for part in one["parts"] if part["change"] is not None]
        error = one["simulated"] / one["measured"] - 1
        wanted = [*((part["layer"], 100 * part["change"]) for part in known), ("error", 100 * error)]
        bar = bars[one["metric"]]
        assert bar["y"] == [layer for layer, _ in wanted]
        assert bar["x"] == pytest.approx([change for _, change in wanted], abs=1e-3)
    rows = driver.execute_script(
        "return [...document.querySelectorAll('#figure-0-causes ~ details tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.textContent))"
    )
    changes = {part["layer"]: part["change"] for part in found[0]["parts"]}
    assert [plain(cell) for cell in rows[0][1:5]] == [
        percent(changes[layer]) for layer in ("cache", "schedule", "step times", "remainder")
    ]
    assert math.isclose(sum(changes.values()), found[0]["simulated"] / found[0]["measured"] - 1)
