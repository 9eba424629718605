"""Every recorded decision of the real SGLang scheduler, 0.5.6.post2 and 0.5.9, against ours: all or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import compare  # type: ignore[import-not-found]  # beside this file: the command that users run
import compare_sglang_sched as sched  # type: ignore[import-not-found]  # beside this file

SHARED = Path(os.environ.get("KVTWIN_SHARED", Path(__file__).resolve().parents[3] / "shared"))
CASES = [case for case in compare.find_sglang_cases(SHARED / "oracle" / "sglang") if case.name.startswith("sched_")]


@pytest.fixture(autouse=True)
def _traces(monkeypatch: pytest.MonkeyPatch, shared: Path) -> Iterator[None]:
    """Cases cut from a Mooncake trace find it where it was published."""
    monkeypatch.setenv("ORACLE_TRACES", str(shared / "data" / "traces" / "mooncake"))
    yield


def name_of(case: Path) -> str:
    """A case's name, with its version where that is not 0.5.6."""
    return case.stem if case.parent.name == "sglang" else f"{case.parent.name}-{case.stem}"


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "stretches"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_step_equals_the_real_schedulers(case: Path, plain: bool) -> None:
    assert sched.difference_of(case, plain=plain)[1] == ""


def test_all_76_cases_are_there() -> None:
    assert len(CASES) == 76


def test_a_changed_step_is_found(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = sched.read_case(shared / "oracle" / "sglang" / "sched_maxrun8_p1.json")
    case.steps[500][10] += 16
    monkeypatch.setattr(sched, "read_case", lambda _: case)
    assert "step 501 differs in available" in sched.difference_of(tmp_path)[1]


def test_the_other_versions_rules_are_caught(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared / "oracle" / "sglang" / "v059" / "sched_loop_ov_sep_p16.json"
    case = sched.read_case(path)
    case.settings["version"] = "0.5.6"
    monkeypatch.setattr(sched, "read_case", lambda _: case)
    assert "step " in sched.difference_of(path)[1]


def test_the_command_compares_them(shared: Path, root: Path) -> None:
    path = shared / "oracle" / "sglang" / "sched_prio_low_p16.json"
    command = [sys.executable, str(root / "tests" / "oracle" / "compare.py"), str(path)]
    # As the Makefile runs it.
    run = subprocess.run(
        command, env={**os.environ, "PYTHONSAFEPATH": "1"}, capture_output=True, text=True, check=False
    )
    assert run.stdout.splitlines() == [f"{path}: identical, 310 steps", "1 of 1 cases identical"]
    assert run.returncode == 0


def test_a_missing_trace_is_said(shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ORACLE_TRACES", str(tmp_path))
    result = compare.compare_sglang_case(shared / "oracle" / "sglang" / "sched_fcfs_conv_p16.json")
    assert "conversation.jsonl is not in" in result.difference
