"""Every recorded decision of SGLang's real caches against ours: radix_*, tree_* and hi_*, all versions."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import compare  # type: ignore[import-not-found]  # beside this file: the command that users run
import compare_sglang_cache as cache  # type: ignore[import-not-found]  # beside this file
import compare_sglang_sched as sched  # type: ignore[import-not-found]  # beside this file

SHARED = Path(os.environ.get("KVTWIN_SHARED", Path(__file__).resolve().parents[3] / "shared"))
ALL = compare.find_sglang_cases(SHARED / "oracle" / "sglang")
TREES = [case for case in ALL if case.name.startswith(("radix_", "tree_"))]
LEVELS = [case for case in ALL if case.name.startswith("hi_")]


@pytest.fixture(autouse=True)
def _traces(monkeypatch: pytest.MonkeyPatch, shared: Path) -> Iterator[None]:
    """Cases cut from a Mooncake trace find it where it was published."""
    monkeypatch.setenv("ORACLE_TRACES", str(shared / "data" / "traces" / "mooncake"))
    yield


def name_of(case: Path) -> str:
    """A case's name, with its version where that is not 0.5.6."""
    return case.stem if case.parent.name == "sglang" else f"{case.parent.name}-{case.stem}"


@pytest.mark.parametrize("case", TREES, ids=name_of)
def test_every_match_insert_and_eviction_equals_the_real_caches(case: Path) -> None:
    assert cache.difference_of(case)[1] == ""


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "stretches"])
@pytest.mark.parametrize("case", LEVELS, ids=name_of)
def test_every_level_load_and_prefetch_equals_the_real_hicaches(case: Path, plain: bool) -> None:
    assert sched.difference_of(case, plain=plain)[1] == ""


def test_all_cases_are_there(shared: Path) -> None:
    assert (len(TREES), len(LEVELS)) == (100, 44)


def test_a_changed_eviction_is_found(shared: Path, tmp_path: Path) -> None:
    source = shared / "oracle" / "sglang" / "radix_synth_p16_lru_small"
    lines = gzip.decompress(source.with_suffix(".jsonl.gz").read_bytes()).decode().splitlines()
    row = next(i for i, line in enumerate(lines) if i > 1 and json.loads(line)[5])
    changed = json.loads(lines[row])
    changed[5][0][1] += 16
    lines[row] = json.dumps(changed)
    (tmp_path / "case.json").write_text(source.with_suffix(".json").read_text())
    (tmp_path / "case.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    assert f"request {changed[0]} differs in evicted nodes" in cache.difference_of(tmp_path / "case.json")[1]


def test_hit_counts_of_newer_versions_matter(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "counts_hits", lambda _: False)
    assert cache.difference_of(shared / "oracle" / "sglang" / "v0523" / "tree_turn_p16_slru.json")[1]


def test_the_command_compares_them(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(shared / "oracle" / "sglang" / "radix_synth_p16_lru_small.json")]) == 0
    assert "identical, 300 steps" in capsys.readouterr().out
