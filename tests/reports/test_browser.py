"""The pages in a real browser (headless Chromium): what a reader sees and can do.

Needs chromium and chromedriver (`apt-get install chromium chromium-driver`); KVTWIN_CHROMIUM may name the browser.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtwin.reports.aggregate.build import aggregate
from kvtwin.reports.pages.target import render_target
from kvtwin.reports.site import write_site
from kvtwin.traces.files import write_text
from kvtwin.validate.result import TargetReport

from .browser import choose, draw_all, out_of, plain, show, urls_asked_for, visible_rows, wait_for
from .conftest import stored


def test_loads_without_errors_and_without_the_network(driver: Any, page: Path) -> None:
    show(driver, page)
    draw_all(driver)
    assert driver.get_log("browser") == []
    urls = urls_asked_for(driver)
    assert urls
    assert all(url.startswith(("file:", "data:", "blob:")) for url in urls)


def test_figures_are_drawn(driver: Any, page: Path) -> None:
    show(driver, page)
    draw_all(driver)
    assert len(driver.find_elements("css selector", ".plot")) == 12
    points = driver.execute_script("return document.querySelectorAll('#figure-0-parity .scatterlayer .point').length")
    assert points == 70
    curves = driver.execute_script("return document.querySelectorAll('#figure-0-ttft .scatterlayer .js-line').length")
    assert curves == 2
    heights = "[...document.querySelectorAll('#figure-0-causes .bars path')].map(bar => bar.getBBox().height)"
    bars = [height for height in driver.execute_script(f"return {heights}") if height > 0]
    assert len(bars) == 4 + 1 + 1 + 1  # the parts and the error of two metrics; one part is unknown
    drawn = driver.execute_script("return document.querySelectorAll('#figure-0-error_map .heatmaplayer image').length")
    assert drawn == 1


def test_hovering_shows_values(driver: Any, page: Path) -> None:
    show(driver, page)
    draw_all(driver)
    texts = (
        "[...document.querySelectorAll('#figure-0-parity .hoverlayer text')].map(text => text.textContent).join(' ')"
    )
    driver.execute_script("document.getElementById('figure-0-parity').scrollIntoView()")
    driver.execute_script(
        "const plot = document.getElementById('figure-0-parity');"
        "const curve = plot.data.findIndex(trace => trace.name === 'decode' && trace.marker.symbol === 'diamond');"
        "Plotly.Fx.hover(plot, [{curveNumber: curve, pointNumber: 0}]);"
    )
    wait_for(driver, f"{texts} !== ''")
    shown = driver.execute_script(f"return {texts}")
    for part in ("1 steps, the first is step 1", "measured 11 ms", "predicted 12.1 ms", "decode"):
        assert part in shown


def test_the_mouse_hovers_too(driver: Any, page: Path) -> None:
    from selenium.webdriver import ActionChains

    show(driver, page)
    draw_all(driver)
    plot = driver.find_element("css selector", "#figure-0-ttft .nsewdrag")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    line = driver.find_element("css selector", "#figure-0-ttft .js-line")
    ActionChains(driver).move_to_element(line).perform()
    wait_for(driver, "document.querySelector('#figure-0-ttft .hoverlayer .hovertext') !== null")
    assert "within" in driver.find_element("css selector", "#figure-0-ttft .hoverlayer").text


def test_the_table_shows_the_numbers_of_the_checks(driver: Any, page: Path, report: TargetReport) -> None:
    show(driver, page)
    rows = visible_rows(driver)
    assert len(rows) == len(report.checks)
    assert [*rows[0][:7], *rows[0][8:12]] == [
        "alpha", "e2e", "ttft_p90", "✗ fail", "100 ms", "91.4 ms", "-8.60 %", "-10.0 to -7.00 %", "2.00 %", "5.00 %",
        "240",
    ]  # fmt: skip
    values_of = "row => [4, 5, 6, 9, 10].map(column => row.cells[column].dataset.value)"
    exact = driver.execute_script(f"return [...document.querySelectorAll('#checks-table tbody tr')].map({values_of})")
    for check, values in zip(report.checks, exact, strict=True):
        wanted = (check.measured, check.simulated, check.error, check.noise_floor, check.threshold)
        assert values == ["" if value is None or math.isnan(value) else repr(value) for value in wanted]


def test_the_pictures_stand_where_the_numbers_say(driver: Any, page: Path, report: TargetReport) -> None:
    show(driver, page)
    strip = driver.find_element("css selector", "#checks-table tbody tr svg")

    def at(selector: str, name: str) -> float:
        return float(strip.find_element("css selector", selector).get_attribute(name))

    zero, gate = at(".zero", "x1"), at(".gate:last-of-type, .gate", "x1")
    per_error = (zero - gate) / 0.05  # the left gate stands at -5 %
    check = report.checks[0]
    assert check.interval is not None
    assert at(".floor", "width") == pytest.approx(2 * 0.02 * per_error, abs=0.2)
    assert at(".interval", "x2") == pytest.approx(max(zero - 60, zero + check.interval[1] * per_error), abs=0.2)
    assert at(".point", "cx") == pytest.approx(max(zero - 60, zero + check.error * per_error), abs=0.2)


def test_filters_search_and_sorting(driver: Any, page: Path) -> None:
    show(driver, page)
    choose(driver, "level", "step")
    assert [row[2] for row in visible_rows(driver)] == ["step_mape"]
    choose(driver, "level", "all")
    choose(driver, "run", "beta")
    assert [row[2] for row in visible_rows(driver)] == ["throughput"]
    assert driver.find_element("css selector", "form.filters output").text == "1 of 4 shown"
    choose(driver, "run", "all")
    choose(driver, "verdict", "fail")
    assert [row[2] for row in visible_rows(driver)] == ["ttft_p90"]
    choose(driver, "verdict", "all")
    search = driver.find_element("name", "search")
    search.send_keys("TPOT alpha")
    assert [row[2] for row in visible_rows(driver)] == ["tpot_mean"]
    search.clear()
    search.send_keys(" ")
    error = driver.find_element("xpath", "//th/button[starts-with(., 'Error')]")
    error.click()
    assert [row[2] for row in visible_rows(driver)] == ["ttft_p90", "throughput", "tpot_mean", "step_mape"]
    error.click()
    assert visible_rows(driver)[0][2] == "step_mape"
    assert driver.find_element("css selector", "th[aria-sort=descending]").text.startswith("Error")
    driver.find_element("xpath", "//th/button[starts-with(., 'Gate')]").click()
    assert visible_rows(driver)[-1][2] == "throughput"  # it has no gate: unknown goes last


def test_one_run_is_shown_at_a_time(driver: Any, page: Path) -> None:
    def shown() -> list[str]:
        headings = driver.find_elements("css selector", "section.run h3")
        return [heading.text for heading in headings if heading.is_displayed()]

    show(driver, page)
    assert shown() == ["alpha"]
    driver.find_element("css selector", "#run-picker [data-move='1']").click()
    assert shown() == ["beta"]
    choose(driver, "picked", "all runs")
    assert shown() == ["alpha", "beta"]
    driver.get(f"{page.as_uri()}#run-1")
    assert shown() == ["beta"]


def test_the_keyboard_finds_its_way(driver: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    show(driver, page)
    driver.find_element("tag name", "body").send_keys(Keys.TAB)
    assert driver.switch_to.active_element.text == "Skip to the content"
    driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert driver.switch_to.active_element.get_attribute("id") == "main"
    summary = driver.find_element("css selector", "details.numbers summary")
    summary.send_keys(Keys.ENTER)
    assert driver.find_element("css selector", "details.numbers table").is_displayed()
    heading = driver.find_element("xpath", "//th/button[starts-with(., 'Metric')]")
    heading.send_keys(Keys.ENTER)
    assert visible_rows(driver)[0][2] == "step_mape"


def test_every_control_and_picture_has_a_name(driver: Any, site: Path) -> None:
    show(driver, site / "targets" / "tiny" / "index.html")
    draw_all(driver)
    driver.execute_cdp_cmd("Accessibility.enable", {})
    nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = (
        "button",
        "link",
        "combobox",
        "searchbox",
        "checkbox",
        "image",
        "img",
        "table",
        "region",
        "navigation",
        "form",
    )
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    assert {"button", "link", "combobox", "searchbox", "table", "navigation"} <= {role for role, _ in found}
    assert [(role, name) for role, name in found if role in named and not name.strip()] == []


@pytest.mark.parametrize("by_button", [False, True])
def test_figures_follow_light_and_dark(driver: Any, page: Path, by_button: bool) -> None:
    line = "document.querySelector('#figure-0-ttft .js-line').style.stroke"
    show(driver, page)
    try:
        colours: list[str] = []
        for scheme in ("light", "dark"):
            if by_button:
                driver.find_element("id", "theme").click()
            else:
                media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
                driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            draw_all(driver)
            if colours:
                wait_for(driver, f"{line} !== '{colours[0]}'")
            colours.append(driver.execute_script(f"return {line}"))
        assert colours == ["rgb(11, 92, 173)", "rgb(109, 176, 247)"]
        if by_button:
            assert driver.find_element("id", "theme").text == "Theme: dark"
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        driver.execute_script("localStorage.clear()")


def test_the_index_leads_to_every_target(driver: Any, site: Path, report: TargetReport) -> None:
    show(driver, site / "index.html")
    rows = visible_rows(driver, "targets")
    assert [row[0] for row in rows] == ["✗ fail", "✓ pass"]
    assert [row[1].splitlines()[0] for row in rows] == ["tiny", "other"]
    assert rows[0][4:8] == ["12.3 %", "-", "+1.00 %", "2 of 3"]
    assert rows[0][-1].startswith("2026-11-20")
    spark = driver.find_element("css selector", "svg.spark")
    assert spark.get_attribute("aria-label") == "Step MAPE: 24.6 %, 12.3 %"
    choose(driver, "engine", "sglang 0.5")
    assert [row[1].splitlines()[0] for row in visible_rows(driver, "targets")] == ["other"]
    choose(driver, "engine", "all")
    driver.find_element("link text", "tiny").click()
    draw_all(driver)
    assert driver.get_log("browser") == []
    assert driver.find_element("css selector", "b[data-metric=gates]").text == "2 of 3"
    points = "document.querySelectorAll('#figure-all-trend .scatterlayer .point').length"
    wait_for(driver, f"{points} === 8")  # two reports of four metrics
    assert all(url.startswith(("file:", "data:", "blob:")) for url in urls_asked_for(driver))
    driver.find_element("link text", "All targets").click()
    assert driver.title.startswith("Hardware targets")


def test_hostile_strings_do_nothing(driver: Any, hostile_report: TargetReport, tmp_path: Path) -> None:
    out_of(hostile_report, tmp_path / "out", "2026-11-20T10:00:00Z")
    pages = write_site([tmp_path / "out"], tmp_path / "site")
    whole = write_text(tmp_path / "report.html", render_target(stored(hostile_report), aggregate(hostile_report)))
    for path in (tmp_path / "site" / "index.html", Path(str(pages[0]["page"])), whole):
        show(driver, path)
        draw_all(driver)
        assert driver.execute_script("return window.hacked") is None
        assert driver.get_log("browser") == []
        assert driver.title.startswith(("</script><script>window.hacked=1", "Hardware targets"))
        assert "</script><script>window.hacked=1" in driver.find_element("tag name", "body").text
    assert len(visible_rows(driver)) == len(hostile_report.checks)
    labels = driver.find_element("id", "figure-0-causes").text
    assert "<b>bold</b>" in labels


def test_without_javascript_the_numbers_are_there(driver: Any, page: Path) -> None:
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(driver, page)
        text = plain(driver.find_element("tag name", "body").text)
        assert "-8.60 %" in text
        assert "Median 44.0 ms measured, 48.4 ms predicted" in text
        assert not driver.find_element("css selector", "form.filters").is_displayed()
        assert all(section.is_displayed() for section in driver.find_elements("css selector", "section.run"))
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_phone_needs_no_sideways_scrolling(driver: Any, site: Path) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        for path in (site / "index.html", site / "targets" / "tiny" / "index.html"):
            show(driver, path)
            draw_all(driver)
            assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_page_of_a_million_steps_opens_at_once(
    driver: Any, report: TargetReport, predictions: Callable[..., Any], tmp_path: Path
) -> None:
    first = replace(report.comparisons[0], predictions=predictions(1_000_000))
    many = replace(report, comparisons=(first,), checks=report.checks * 60)
    path = write_text(tmp_path / "report.html", render_target(stored(many), aggregate(many)))
    begin = time.monotonic()
    show(driver, path)
    wait_for(driver, "document.querySelector('.plot') !== null && typeof Plotly === 'object'")
    assert time.monotonic() - begin < 10  # about 0.5 s on a quiet machine; tests share theirs
