"""The HTML page, read as text: complete, inert, and the same every time."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvtwin.reports import html as page
from kvtwin.reports.html import render_html, write_html
from kvtwin.traces.errors import InputError
from kvtwin.validate.result import TargetReport

MAX_BYTES = 6_000_000


class Document(HTMLParser):
    """Elements, ids and the cells of the table of checks; fails on a tag that is not closed in order."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1  # inside an SVG
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def figures_of(text: str) -> Any:
    found = re.search(r'id="figures">(.*?)</script>', text)
    assert found
    return json.loads(found[1])


def test_the_page_is_well_formed_and_complete(report: TargetReport) -> None:
    text = render_html(report)
    document = Document(text)
    assert document.open == []
    ids = [attributes["id"] for _, attributes in document.attributes if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = {attributes.get("href") or "" for tag, attributes in document.attributes if tag == "a"}
    assert {anchor[1:] for anchor in anchors} <= set(ids)
    assert document.tags["h1"] == 1
    assert document.tags["caption"] == document.tags["table"] == 1
    assert sorted(figures_of(text)) == sorted(
        [f"figure-0-{key}" for key in ("parity", "error_cdf", "ttft", "tpot", "queue")]
        + [f"figure-1-{key}" for key in ("ttft", "tpot", "queue")]
    )
    for phrase in (
        "1 of 3 gates failed",
        "recorded 2 times",
        "This recording has no steps",
        "by step",
        "hold out mape",
    ):
        assert phrase in document.text
    plots = [attributes for _, attributes in document.attributes if attributes.get("class") == "plot"]
    assert all(plot["role"] == "img" and re.search(r"\d", plot["aria-label"] or "") for plot in plots)


def test_the_same_report_gives_the_same_bytes(report: TargetReport) -> None:
    first = render_html(report)
    page._packed.cache_clear()  # compressed anew
    assert render_html(report) == first


def test_nothing_is_loaded_from_anywhere(report: TargetReport) -> None:
    text = render_html(report)
    for tag, attributes in Document(text).attributes:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,", (tag, name, value)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "default-src 'none'" in text


def test_the_page_stays_small_with_many_runs(report: TargetReport) -> None:
    many = replace(report, comparisons=report.comparisons[:1] * 40, checks=report.checks * 100)
    assert len(render_html(many).encode()) < MAX_BYTES


def test_hostile_strings_stay_text(hostile_report: TargetReport) -> None:
    text = render_html(hostile_report)
    document = Document(text)
    assert document.open == []
    assert document.tags["script"] == 3  # the figures, plotly, the page's own
    assert document.tags["img"] == 0
    assert not any(name.startswith("on") for _, attributes in document.attributes for name in attributes)
    assert "</script><script>window.hacked" in document.text  # shown as it is
    assert "hacked" not in json.dumps(figures_of(text))  # no text from outside enters a figure


def test_json_cannot_end_its_script_element() -> None:
    text = page._script_json({"</script>": "<!-- & -->"})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"</script>": "<!-- & -->"}


def test_a_report_of_nothing_is_still_a_page() -> None:
    text = render_html(TargetReport({}, (), ()))
    document = Document(text)
    assert document.open == []
    assert "No check was made." in document.text
    assert len(text) < 50_000  # nothing to draw, so no plotly either


def test_the_page_is_written_to_a_new_folder_and_replaces_an_older_one(report: TargetReport, tmp_path: Path) -> None:
    path = write_html(TargetReport({}, (), ()), tmp_path / "new" / "index.html")
    assert write_html(report, path).read_text(encoding="utf-8") == render_html(report)
    assert [entry.name for entry in path.parent.iterdir()] == ["index.html"]


def test_a_place_that_cannot_be_written_is_one_line(report: TargetReport, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_html(report, tmp_path / "file" / "index.html")
