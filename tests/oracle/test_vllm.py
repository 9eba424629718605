"""Every recorded decision of the real vLLM scheduler, 0.32.0 and 0.19.0, against ours: all or nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kvtwin.traces.readers import vllm_recording

sys.path.insert(0, str(Path(__file__).parent))
import compare  # type: ignore[import-not-found]  # beside this file: the command that users run

SHARED = Path(os.environ.get("KVTWIN_SHARED", Path(__file__).resolve().parents[3] / "shared"))
CASES = compare.find_cases(SHARED / "oracle")


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "jumps"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_every_step_equals_the_real_schedulers(case: Path, plain: bool) -> None:
    assert compare.compare_case(case, plain=plain).difference == ""


def test_all_37_cases_are_there(shared: Path) -> None:
    assert len(compare.find_cases(shared / "oracle")) == 37


@pytest.mark.parametrize(
    ("case", "expected_step"),
    # The first steps in which the two versions differ, as ENGINES_VLLM.md lists them.
    [("j_long_prefill_alone", 0), ("j_async_priority", 726), ("b_tight_cached", 163), ("g_tree_evict", 54)],
)
def test_the_other_versions_rules_are_caught_at_the_step_where_they_differ(
    shared: Path, monkeypatch: pytest.MonkeyPatch, case: str, expected_step: int
) -> None:
    folder = shared / "oracle" / "vllm019" / case
    monkeypatch.setattr(compare, "version_of", lambda _: "0.32")
    recorded = vllm_recording.read(folder)
    difference = compare.first_difference(recorded, compare.simulate_case(folder, recorded))
    assert difference.startswith(f"step {expected_step} differs in ")


def test_a_folder_without_cases_is_an_error(tmp_path: Path) -> None:
    assert compare.main([str(tmp_path)]) == 2
