"""The installed command runs BLAS on one thread, unless the user says otherwise."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from kvtwin.reports import cli, entry


@pytest.mark.parametrize(("given", "seen"), [(None, "1"), ("3", "3")])
def test_one_thread_unless_the_user_says_otherwise(
    given: str | None, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", given)
    monkeypatch.setattr(cli, "main", lambda: int(os.environ["OPENBLAS_NUM_THREADS"]))
    monkeypatch.setenv("MKL_NUM_THREADS", "1")  # taken back after the test, as the one above
    assert entry.main() == int(seen)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")


def test_the_command_that_is_installed_is_this_one() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["kvtwin"] == "kvtwin.reports.entry:main"
