"""A pytest plugin: hardware targets as tests, for teams whose CI is pytest.

    def test_h100_is_still_true(kvtwin_target):
        report = kvtwin_target("targets/h100")      # the test fails, gate by gate, where one fails
        assert report.target["engine"] == "vllm 0.19.0"

It is installed with kvtwin (entry point `pytest11`). `pytest --kvtwin-output DIR` keeps each target's output folder,
`report.html` in it; without it the folders lie under pytest's temporary directory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kvtwin.validate.result import TargetReport

CheckTarget = Callable[..., "TargetReport"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--kvtwin-output`."""
    group = parser.getgroup("kvtwin")
    group.addoption("--kvtwin-output", type=Path, metavar="DIR", help="keep the output of checked targets here")


@pytest.fixture(scope="session")
def kvtwin_target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CheckTarget:
    """A function that checks one target as `kvtwin check` does, once per session, and fails the test if a gate fails.

    The function takes the path of a target.toml or its folder, and the keywords `baseline` (output folders of earlier
    checks), and `fail` (False returns the report whatever its verdict). Bad input fails the test in one line.
    """
    kept: Path | None = request.config.getoption("--kvtwin-output")
    folder = kept or tmp_path_factory.mktemp("kvtwin")
    done: dict[object, tuple[TargetReport, Path]] = {}

    def check(path: str | Path, *, baseline: Sequence[str | Path] = (), fail: bool = True) -> TargetReport:
        key = (Path(path).resolve(), tuple(baseline))
        if key not in done:
            done[key] = _check(Path(path), [Path(out) for out in baseline], folder)
        report, output = done[key]
        if fail and report.verdict == "fail":
            pytest.fail(_message(report, output), pytrace=False)
        return report

    return check


def _check(path: Path, baseline: Sequence[Path], folder: Path) -> tuple[TargetReport, Path]:
    from kvtwin.reports.check import run_targets, unused
    from kvtwin.traces.errors import KvtwinError
    from kvtwin.validate.check import output_name

    output = unused(folder / output_name(path))
    problem = ""
    try:
        (report,) = run_targets([path], [""], output, baseline=baseline)
    except KvtwinError as error:
        problem = f"kvtwin: {error}"
    if problem:  # not within `except`: pytest would show the chain of errors too
        pytest.fail(problem, pytrace=False)
    return report, output


def _message(report: TargetReport, output: Path) -> str:
    from kvtwin.reports.annotations import failures
    from kvtwin.reports.check import PAGE_FILE

    return "\n".join(
        [f"{report.target.get('name', 'target')}: gates failed", *failures(report), f"page: {output / PAGE_FILE}"]
    )
