"""The fidelity workflow's own commands, run with a stand-in for GitHub's `gh`: as near as one gets without GitHub."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.profile import Profile

from .test_ci import DEMO

WORKFLOW = Path(__file__).parents[2] / ".github" / "workflows" / "fidelity.yml"
GH = """#!/bin/bash
# gh run list ... | gh run download ID --name fidelity --dir DIR; artifacts lie in $STORE
if [ "$2" = list ]; then ls -r "$STORE"; else [ -e "$STORE/$3/checks.json" ] && mkdir -p "$7" && cp -r "$STORE/$3/." "$7"; fi
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one target, a `gh`, and no artifact yet."""
    if not WORKFLOW.exists():
        pytest.skip("not a checkout: the workflow is no part of the package")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "gh").write_text(GH)
    (tools / "gh").chmod(0o755)
    (tmp_path / "store").mkdir()
    (tmp_path / "work").mkdir()
    Profile(kind="linear", latency=LinearLatency(6_000_000, 25_000, 20, 10_000).to_json()).write(
        tmp_path / "work" / "profile.json"
    )
    target = f'name = "one"\nprofile = "profile.json"\nengine = "{DEMO}/engine.toml"\nrun = "{DEMO}/runs/saturated_1"\n'
    (tmp_path / "work" / "target.toml").write_text(f"{target}[gates]\nthroughput = 0.9\n")
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STORE", str(tmp_path / "store"))
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "output"))
    return tmp_path / "work"


def run_steps(work: Path) -> None:
    """Every `run:` of the job but the installation, in GitHub's shell."""
    output = Path(os.environ["GITHUB_OUTPUT"])
    output.unlink(missing_ok=True)
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["check"]
    environment = {**os.environ, **job["env"], "TARGETS": "target.toml"}
    steps = [step for step in job["steps"] if "run" in step and "pip install" not in step["run"]]
    assert [step["name"] for step in steps] == ["accepted reports", "check", "dashboards"]
    for step in steps:
        found = output.exists() and "found=true" in output.read_text()
        command = re.sub(
            r"\$\{\{ steps\.accepted\.outputs\.found && '([^']*)' \|\| '' \}\}",
            lambda match, found=found: match[1] if found else "",  # type: ignore[misc]
            step["run"],
        )
        assert "${{" not in command
        subprocess.run(["bash", "-e", "-c", command], cwd=work, env=environment, check=True, timeout=120)


def test_the_first_run_has_nothing_to_compare_with_and_the_next_ones_have(workplace: Path) -> None:
    def checks() -> dict[str, Any]:
        document: dict[str, Any] = json.loads((workplace / "out" / "checks.json").read_text())
        return document

    run_steps(workplace)
    assert not checks()["provenance"]["remarks"]
    store = workplace.parent / "store"
    for number, created in (("1", "2026-11-01T00:00:00Z"), ("2", "2026-11-02T00:00:00Z")):
        shutil.copytree(workplace / "out", store / number)
        old = {**checks(), "created": created}
        old["checks"] = [{**check, "error": check["error"] and check["error"] / 2} for check in old["checks"]]
        (store / number / "checks.json").write_text(json.dumps(old))
    (store / "3").mkdir()  # an artifact that has expired
    for made in ("out", "site"):
        shutil.rmtree(workplace / made)
    run_steps(workplace)
    assert checks()["drifts"]
    (page,) = (workplace / "site" / "targets").glob("*/index.html")
    assert "2026-11-01 00:00" in page.read_text() and "2026-11-02 00:00" in page.read_text()
