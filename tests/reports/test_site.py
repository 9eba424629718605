"""`kvtwin report`: which reports become which pages, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvtwin.reports.aggregate import document
from kvtwin.reports.aggregate.build import aggregate
from kvtwin.reports.cli import main
from kvtwin.reports.site import write_site
from kvtwin.traces.errors import InputError
from kvtwin.traces.files import write_text
from kvtwin.validate import checks_json
from kvtwin.validate.result import TargetReport

from .conftest import HOSTILE


def out_of(report: TargetReport, folder: Path, created: str | None, name: str = "tiny") -> Path:
    """An output folder of `kvtwin check`."""
    report = replace(report, target={**report.target, "name": name})
    document.write(aggregate(report), folder / "figures.json")
    content = checks_json.to_json(report)
    content |= {"created": created} if created else {}
    if created is None:
        del content["created"]
    write_text(folder / "checks.json", json.dumps(content))
    return folder


def test_targets_and_their_histories(report: TargetReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = out_of(report, tmp_path / "new" / "one", "2026-11-20T10:00:00Z")
    other = replace(report, checks=report.checks[1:])
    out_of(other, tmp_path / "new" / "two", "2026-11-20T10:00:00Z", "Other, tp 2")
    old, unknown = out_of(report, tmp_path / "old", "2026-10-01T10:00:00Z"), out_of(report, tmp_path / "older", None)
    site = tmp_path / "made" / "site"
    assert main(["report", str(new.parent), str(unknown), str(old), "-o", str(site), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["targets"] == [
        {
            "name": "tiny", "page": str(site / "targets/tiny/index.html"), "num_reports": 3, "shown": str(new),
            "history": [str(unknown), str(old)],
        },
        {
            "name": "Other, tp 2", "page": str(site / "targets/other-tp-2/index.html"), "num_reports": 1,
            "shown": str(new.parent / "two"), "history": [],
        },
    ]  # fmt: skip
    assert sorted(str(path.relative_to(site)) for path in site.rglob("*.*")) == [
        "assets/plotly.min.js", "index.html", "targets/other-tp-2/index.html", "targets/tiny/index.html",
    ]  # fmt: skip
    page = (site / "targets/tiny/index.html").read_text()
    assert page.index("unknown date") < page.index("2026-10-01 10:00") < page.rindex("2026-11-20 10:00")
    assert [path.name for path in site.parent.iterdir()] == ["site"]


def test_no_report_disappears_silently(
    report: TargetReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (out_of(report, tmp_path / day, f"2026-11-{day}T10:00:00Z") for day in ("01", "02"))
    elsewhere = replace(report, target={**report.target, "hardware": "another GPU"})
    other = out_of(elsewhere, tmp_path / "other", "2026-11-03T10:00:00Z")
    assert main(["report", str(new), str(old), str(other), "-o", str(tmp_path / "site")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("2 targets")
    assert lines[1:] == [f"tiny: {new} is shown; its history, oldest first: {old}"]
    with pytest.raises(InputError, match="01: is given twice"):
        write_site([old, new, old], tmp_path / "again")


def test_the_same_outs_give_the_same_site_whatever_their_order(report: TargetReport, tmp_path: Path) -> None:
    outs = [out_of(report, tmp_path / date[:7], date) for date in ("2026-10-01T10:00:00Z", "2026-11-20T10:00:00Z")]
    sites = [tmp_path / "a", tmp_path / "b"]
    write_site(outs, sites[0])
    write_site(outs[::-1], sites[1])
    files = [{path.relative_to(site): path.read_bytes() for path in site.rglob("*.html")} for site in sites]
    assert len(files[0]) == 2
    assert files[0] == files[1]


def test_names_become_safe_folders_that_differ(report: TargetReport, tmp_path: Path) -> None:
    names = ["../../x", "x", "..", HOSTILE, "X" * 300]
    outs = [out_of(report, tmp_path / str(index), None, name) for index, name in enumerate(names)]
    pages = write_site(outs, tmp_path / "site")
    folders = sorted(path.name for path in (tmp_path / "site" / "targets").iterdir())
    assert len(folders) == len(pages) == len(names)
    assert all(len(name) <= 62 and name.replace("-", "").isalnum() for name in folders)
    assert {"x", "x-2", "target"} < set(folders)


def test_a_report_from_before_there_were_figures(report: TargetReport, tmp_path: Path) -> None:
    out = out_of(report, tmp_path / "out", None)
    (out / "figures.json").unlink()
    write_site([out], tmp_path / "site")
    assert "figures.json is missing" in (tmp_path / "site" / "targets/tiny/index.html").read_text()


def test_what_is_refused_leaves_nothing(
    report: TargetReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, broken = out_of(report, tmp_path / "good", None), out_of(report, tmp_path / "broken", None, "broken")
    (broken / "figures.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for out, message in (
        (broken, "not readable as JSON"),
        (tmp_path / "empty", "no checks.json"),
        (tmp_path / "none", "no such folder"),
        (tmp_path / "file", "no such folder"),
    ):
        assert main(["report", str(good), str(out), "-o", str(tmp_path / "site")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "empty", "file", "good"]
    with pytest.raises(InputError, match="exists already"):
        write_site([good], tmp_path / "empty")
