"""The pages held to axe-core's rules: WCAG 2.2 A and AA, and its best practices."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from kvtwin.reports.pages.compare import render_comparison
from kvtwin.traces.files import write_text
from kvtwin.validate.compare import compare_runs
from kvtwin.validate.result import Comparison

from .browser import draw_all, show

_TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
_RUN = """
const done = arguments[arguments.length - 1];
document.querySelectorAll("details").forEach((one) => { one.open = true; });
axe.run(document, {runOnly: arguments[0]}).then((found) => done(found.violations.map(
    (one) => `${one.impact} ${one.id}: ${one.nodes[0].html}`)), (error) => done([String(error)]));
"""


def violations(driver: Any, path: Path) -> list[str]:
    """What axe finds on the page with every figure drawn and every table open."""
    axe = (files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")
    driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})  # the page itself lets no foreign script run
    try:
        show(driver, path)
        draw_all(driver)
        driver.execute_script(f"{axe}; window.axe = axe;")
        found: list[str] = driver.execute_async_script(_RUN, _TAGS)
        return found
    finally:
        driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": False})


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
def test_axe_finds_nothing(driver: Any, site: Path, comparison: Comparison, width: int, scheme: str) -> None:
    runs = compare_runs([comparison.measured, comparison.simulated], ["one", "two"], "arrival_ns")
    pages = [
        site / "index.html",
        site / "targets" / "tiny" / "index.html",
        write_text(site.parent / "compare.html", render_comparison(runs)),
    ]
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        assert {str(page): violations(driver, page) for page in pages} == {str(page): [] for page in pages}
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_axe_would_find_something(driver: Any, tmp_path: Path) -> None:
    bad = "<html><title>t</title><body><img src='data:,'><p style='color:#ddd'>pale</p></body></html>"
    found = violations(driver, write_text(tmp_path / "bad.html", bad))
    assert any("image-alt" in one for one in found) and any("color-contrast" in one for one in found)
