"""Every recorded decision of vLLM's scheduler with its offloading connector, 0.32.0 and 0.19.0, against ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import compare  # type: ignore[import-not-found]  # beside this file
import compare_vllm_offload  # type: ignore[import-not-found]  # beside this file: the command that users run

CASES = compare.find_cases(Path(__file__).parent / "vllm_offload")


def test_the_cases_are_there() -> None:
    assert len(CASES) == 15


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_step_and_every_block_of_the_host_equals_the_real_ones(case: Path) -> None:
    assert compare_vllm_offload.compare_case(case).difference == ""


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "019_hang"], ids=lambda case: case.name)
def test_the_other_versions_rules_are_caught(monkeypatch: pytest.MonkeyPatch, case: Path) -> None:
    other = "0.19" if compare.version_of(case).startswith("0.32") else "0.32"
    monkeypatch.setattr(compare, "version_of", lambda _: other)
    assert compare_vllm_offload.judge(case).difference != ""
