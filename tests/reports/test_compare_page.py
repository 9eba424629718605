"""The page of `kvtwin compare`: its numbers, what others wrote stays text, and how it looks in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtwin.reports.cli import main
from kvtwin.reports.pages.compare import render_comparison
from kvtwin.traces.files import write_text
from kvtwin.traces.run import Run
from kvtwin.traces.time import NS_PER_MS
from kvtwin.validate.compare import SideBySide, compare_runs

from .browser import draw_all, plain, show, urls_asked_for, wait_for
from .conftest import HOSTILE

KEYS = ("ttft", "tpot", "latency", "throughput", "cache", "queues")
KNOWN: dict[str, Any] = {
    "cached_tokens": [0, 8, 8, 4],
    "cached_host_tokens": [0, 0, 4, 0],
    "cached_storage_tokens": [0, 0, 0, 4],
    "waiting_ns": [10 * NS_PER_MS] * 4,
    "prefetch_ns": [0, 0, 0, NS_PER_MS],
    "running_ns": [290 * NS_PER_MS] * 4,
    "swapped_ns": [0] * 4,
}


@pytest.fixture
def found(make_run: Callable[..., Run]) -> SideBySide:
    """The baseline, the same twice as slow, and one that knows nothing of caches and queues."""
    runs = [make_run(**KNOWN), make_run(slow=2.0, **KNOWN), make_run()]
    return compare_runs(runs, ["one", "two", "three"], "arrival_ns")


def specs_in(page: str) -> dict[str, Any]:
    match = re.search(r'id="figures"[^>]*>(.*?)</script>', page)
    assert match
    specs: dict[str, Any] = json.loads(match[1])
    return specs


def test_figures_hold_the_numbers(found: SideBySide) -> None:
    specs = specs_in(render_comparison(found))
    assert list(specs) == [f"figure-all-{key}" for key in KEYS]
    mean = specs["figure-all-ttft"]["data"][0]
    assert (mean["name"], mean["x"], mean["y"]) == ("mean", [100, 200, 100], [0, 1, 2])
    assert mean["customdata"] == [
        "one: 100 ms",
        "two: 200 ms<br>+100 % against one",
        "three: 100 ms<br>0.00 % against one",
    ]
    stacks = {part["name"]: (part["y"], part["x"]) for part in specs["figure-all-cache"]["data"]}
    assert stacks["HBM"] == ([0, 1], [12, 12])
    assert stacks["computed"] == ([0, 1], [12, 12])
    assert stacks["host DRAM"] == stacks["storage"] == ([0, 1], [4, 4])
    assert [part["name"] for part in specs["figure-all-queues"]["data"]] == ["waiting", "prefetch", "running"]


def test_hits_of_unknown_level_are_drawn_too(make_run: Callable[..., Run]) -> None:
    """Without them a run that has hits would stand there as one that computed less."""
    runs = [make_run(**KNOWN), make_run(cached_tokens=KNOWN["cached_tokens"])]
    specs = specs_in(render_comparison(compare_runs(runs, ["one", "two"], "arrival_ns")))
    stacks = {part["name"]: dict(zip(part["y"], part["x"], strict=True)) for part in specs["figure-all-cache"]["data"]}
    assert stacks["level unknown"] == {1: 20}
    assert sum(part.get(0, 0) for part in stacks.values()) == sum(part.get(1, 0) for part in stacks.values()) == 32


def test_runs_that_know_little_have_a_page_too(make_run: Callable[..., Run]) -> None:
    page = render_comparison(compare_runs([make_run(output_tokens=[1] * 4)], ["only"], "arrival_ns"))
    assert set(specs_in(page)) == {"figure-all-ttft", "figure-all-latency", "figure-all-throughput"}
    assert "No run knows it." in page
    assert "No request of these runs has one." in page
    assert "Settings that differ" not in page


def test_what_others_wrote_stays_text(make_run: Callable[..., Run]) -> None:
    run = make_run()
    hostile = Run(
        type(run.info)("recorded", engine=HOSTILE, model=HOSTILE, engine_config={HOSTILE: HOSTILE}),
        {"requests": run.requests},
    )
    page = render_comparison(
        compare_runs([hostile, make_run(names=["1", "2", "3", "4"])], [HOSTILE, "b"], "arrival_ns")
    )
    assert "<script>window" not in page
    assert "<img src=x" not in page
    for spec in specs_in(page).values():
        assert "<img" not in json.dumps(spec)


def test_the_command_writes_a_page_once(
    make_run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, slow in (("x", 1.0), ("y", 1.5)):
        make_run(slow=slow, **KNOWN).write(tmp_path / name)
    words = ["compare", str(tmp_path / "x"), str(tmp_path / "y"), "-o", str(tmp_path / "page.html")]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["x", "y", "change"]
    assert lines[1].split() == ["ttft_mean", "100", "ms", "150", "ms", "+50.0", "%"]
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "x"), str(tmp_path / "y"), "--names", "a", "--json"]) == 2
    assert "a name of its own for each" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "x"), str(tmp_path / "y"), "--names", "a, b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["names"] == ["a", "b"]


def test_runs_of_one_name_are_told_apart_by_their_paths(
    make_run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [str(make_run().write(tmp_path / folder / "run")) for folder in ("one", "two")]
    assert main(["compare", *places, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["names"] == places


def test_in_a_browser(driver: Any, found: SideBySide, tmp_path: Path) -> None:
    show(driver, write_text(tmp_path / "page.html", render_comparison(found)))
    draw_all(driver)
    assert driver.get_log("browser") == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in urls_asked_for(driver))
    bars = "[...document.querySelectorAll('#figure-all-throughput .bars path')].map(bar => bar.getBBox().width)"
    first, second, third = driver.execute_script(f"return {bars}")
    assert first == third > second > 0
    labels = "[...document.querySelectorAll('#figure-all-ttft .ytick text')].map(label => label.textContent)"
    assert driver.execute_script(f"return {labels}") == ["one", "two", "three"]
    cards = [plain(card.text) for card in driver.find_elements("css selector", ".card")]
    assert cards[1].splitlines()[:2] == ["two", "TTFT mean 200 ms +100 %"]
    shown = (
        "[...document.querySelectorAll('#figure-all-ttft .hoverlayer text')].map(text => text.textContent).join(' ')"
    )
    driver.execute_script(
        "Plotly.Fx.hover(document.getElementById('figure-all-ttft'), [{curveNumber: 0, pointNumber: 1}])"
    )
    wait_for(driver, f"{shown} !== ''")
    text = driver.execute_script(f"return {shown}")
    assert "two: 200 ms" in text
    assert "+100 % against one" in text
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
