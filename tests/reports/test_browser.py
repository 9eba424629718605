"""The HTML page in a real browser (headless Chromium): what a reader sees and can do.

Needs chromium and chromedriver (`apt-get install chromium chromium-driver`); KVTWIN_CHROMIUM may name the browser.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtwin.reports.html import write_html
from kvtwin.validate.result import TargetReport

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT_S = 20


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """One browser for this file; without one, the tests say what is missing."""
    browser = os.environ.get("KVTWIN_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    chromedriver = shutil.which("chromedriver")
    if not browser or not chromedriver:
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options=options, service=Service(chromedriver))
    yield chrome
    chrome.quit()


def show(driver: Any, report: TargetReport, folder: Path) -> None:
    path = write_html(report, folder / "page.html")
    driver.get_log("browser"), driver.get_log("performance")  # forget what other tests did
    driver.get(path.as_uri())


def wait_for(driver: Any, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, WAIT_S).until(lambda _: driver.execute_script(f"return {script}"))


def draw_all(driver: Any) -> None:
    """Scroll to every figure, as a reader would: a figure is drawn when it comes near."""
    for plot in driver.find_elements("css selector", ".plot"):
        driver.execute_script("arguments[0].scrollIntoView()", plot)
        wait_for(driver, f"document.getElementById('{plot.get_attribute('id')}').querySelector('.main-svg') !== null")


def visible_rows(driver: Any) -> list[list[str]]:
    script = "return [...document.querySelectorAll('#checks tbody tr')].filter(r => !r.hidden)"
    rows: list[list[str]] = driver.execute_script(f"{script}.map(r => [...r.cells].map(c => c.innerText.trim()))")
    return [[plain(cell) for cell in row] for row in rows]


def plain(text: str) -> str:
    """With the keyboard's minus and space, as a test writes them."""
    return text.replace("\N{MINUS SIGN}", "-").replace("\N{NO-BREAK SPACE}", " ")


def choose(driver: Any, name: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(driver.find_element("name", name)).select_by_visible_text(value)


def test_loads_without_errors_and_without_the_network(driver: Any, report: TargetReport, tmp_path: Path) -> None:
    show(driver, report, tmp_path)
    draw_all(driver)
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert urls
    assert all(url.startswith(("file:", "data:", "blob:")) for url in urls)


def test_figures_are_drawn(driver: Any, report: TargetReport, tmp_path: Path) -> None:
    show(driver, report, tmp_path)
    draw_all(driver)
    assert len(driver.find_elements("css selector", ".plot")) == 8
    points = driver.execute_script("return document.querySelectorAll('#figure-0-parity .scatterlayer .point').length")
    assert points == 70
    curves = driver.execute_script("return document.querySelectorAll('#figure-0-ttft .scatterlayer .js-line').length")
    assert curves == 2


def test_the_table_shows_the_numbers_of_the_checks(driver: Any, report: TargetReport, tmp_path: Path) -> None:
    show(driver, report, tmp_path)
    rows = visible_rows(driver)
    assert len(rows) == len(report.checks)
    assert rows[0][:10] == [
        "alpha", "e2e", "ttft_p90", "100 ms", "91.4 ms", "-8.60 %", "-10.0 to -7.00 %", "2.00 %", "5.00 %", "✗ fail",
    ]  # fmt: skip
    values_of = "row => [3, 4, 5, 7, 8].map(column => row.cells[column].dataset.value)"
    exact = driver.execute_script(f"return [...document.querySelectorAll('#checks tbody tr')].map({values_of})")
    for check, values in zip(report.checks, exact, strict=True):
        wanted = (check.measured, check.simulated, check.error, check.noise_floor, check.threshold)
        assert values == ["" if value is None or math.isnan(value) else repr(value) for value in wanted]


def test_filters_and_sorting(driver: Any, report: TargetReport, tmp_path: Path) -> None:
    show(driver, report, tmp_path)
    choose(driver, "level", "step")
    assert [row[2] for row in visible_rows(driver)] == ["step_mape"]
    choose(driver, "level", "all")
    choose(driver, "run", "beta")
    assert [row[2] for row in visible_rows(driver)] == ["throughput"]
    assert driver.find_element("id", "shown").text == "1 of 4 checks"
    choose(driver, "run", "all")
    choose(driver, "verdict", "fail")
    assert [row[2] for row in visible_rows(driver)] == ["ttft_p90"]
    choose(driver, "verdict", "all")
    error = driver.find_element("xpath", "//th[contains(., 'Error')]/button")
    error.click()
    assert [row[2] for row in visible_rows(driver)] == ["ttft_p90", "throughput", "tpot_mean", "step_mape"]
    error.click()
    assert visible_rows(driver)[0][2] == "step_mape"
    assert driver.find_element("css selector", "th[aria-sort=descending]").text.startswith("Error")
    driver.find_element("xpath", "//th[contains(., 'Gate')]/button").click()
    assert visible_rows(driver)[-1][2] == "throughput"  # it has no gate: unknown goes last


def test_the_keyboard_reaches_the_checks_first(driver: Any, report: TargetReport, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    show(driver, report, tmp_path)
    driver.find_element("tag name", "body").send_keys(Keys.TAB)
    assert driver.switch_to.active_element.text == "Skip to the checks"


def test_figures_follow_light_and_dark(driver: Any, report: TargetReport, tmp_path: Path) -> None:
    line = "document.querySelector('#figure-0-ttft .js-line').style.stroke"
    show(driver, report, tmp_path)
    colours: list[str] = []
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        draw_all(driver)
        if colours:
            wait_for(driver, f"{line} !== '{colours[0]}'")
        colours.append(driver.execute_script(f"return {line}"))
    assert colours == ["rgb(11, 92, 173)", "rgb(109, 176, 247)"]


def test_hostile_strings_do_nothing(driver: Any, hostile_report: TargetReport, tmp_path: Path) -> None:
    show(driver, hostile_report, tmp_path)
    draw_all(driver)
    assert driver.execute_script("return window.hacked") is None
    assert driver.get_log("browser") == []
    assert len(visible_rows(driver)) == len(hostile_report.checks)


def test_without_javascript_the_numbers_are_there(driver: Any, report: TargetReport, tmp_path: Path) -> None:
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(driver, report, tmp_path)
        text = plain(driver.find_element("tag name", "body").text)
        assert "-8.60 %" in text
        assert "mean absolute error 10.0 %" in text
        assert not driver.find_element("id", "filters").is_displayed()
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
