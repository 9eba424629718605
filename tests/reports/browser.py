"""What tests in a browser share: pages to open, and ways to look at them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvtwin.reports.aggregate import document
from kvtwin.reports.aggregate.build import aggregate
from kvtwin.traces.files import write_text
from kvtwin.validate import checks_json
from kvtwin.validate.result import TargetReport

WAIT_S = 5


def show(driver: Any, path: Path) -> None:
    driver.get_log("browser"), driver.get_log("performance")  # forget what other tests did
    driver.get(path.as_uri())


def out_of(report: TargetReport, folder: Path, created: str) -> Path:
    """What kvtwin check writes and kvtwin report reads."""
    document.write(aggregate(report), folder / "figures.json")
    content = {**checks_json.to_json(report), "created": created}
    write_text(folder / "checks.json", json.dumps(content))
    return folder


def wait_for(driver: Any, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, WAIT_S).until(lambda _: driver.execute_script(f"return {script}"))


def draw_all(driver: Any) -> None:
    """Look at every run and scroll to every figure, as a reader would: a figure is drawn when it comes near."""
    if driver.find_elements("id", "run-picker"):
        choose(driver, "picked", "all runs")
    for plot in driver.find_elements("css selector", ".plot"):
        driver.execute_script("arguments[0].scrollIntoView()", plot)
        wait_for(driver, f"document.getElementById('{plot.get_attribute('id')}').querySelector('.main-svg') !== null")


def visible_rows(driver: Any, table: str = "checks-table") -> list[list[str]]:
    script = f"return [...document.querySelectorAll('#{table} tbody tr')].filter(r => !r.hidden)"
    rows: list[list[str]] = driver.execute_script(f"{script}.map(r => [...r.cells].map(c => c.innerText.trim()))")
    return [[plain(cell) for cell in row] for row in rows]


def plain(text: str) -> str:
    """With the keyboard's minus, dash and space, as a test writes them."""
    return text.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-").replace("\N{NO-BREAK SPACE}", " ")


def choose(driver: Any, name: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(driver.find_element("name", name)).select_by_visible_text(value)


def urls_asked_for(driver: Any) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
