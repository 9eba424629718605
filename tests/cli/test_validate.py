"""`kvtwin validate`: every level on the bundled recordings, gates, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import kvtwin.traces
from kvtwin.reports.cli import main

TARGET = Path(kvtwin.traces.__path__[0]) / "targets" / "vllm-cpu-tiny"
RUNS = TARGET / "runs"
LINEAR = {"base_ns": 2_000_000, "per_new_token_ns": 60_000, "per_context_token_ns": 200, "per_req_ns": 50_000}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    path.write_text(json.dumps({"schema_version": 1, "kind": "linear", "latency": LINEAR}))
    return path


def document(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert main(["validate", *map(str, args), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_step_takes_a_profile_or_a_run(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_profile = document(capsys, "step", RUNS / "saturated_1", profile)
    by_run = document(capsys, "step", RUNS / "saturated_1", RUNS / "saturated_2")
    for found in (by_profile, by_run):
        assert found["checks"][0]["metric"] == "step_mape"
    assert "alike batch" in by_run["checks"][0]["note"]


def test_scheduler_replays_on_an_engine_file(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "scheduler", RUNS / "saturated_1", TARGET / "engine.toml")
    assert found["schedule"]["num_identical"] == found["schedule"]["num_steps"] > 800


def test_attribution_adds_up(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("attribution", RUNS / "saturated_1", "--engine", TARGET / "engine.toml", "--profile", profile)
    for found in document(capsys, *args)["attributions"]:
        error = found["simulated"] / found["measured"] - 1
        assert sum(part["change"] for part in found["parts"]) == pytest.approx(error, abs=1e-9)
    assert main(["validate", *map(str, args)]) == 0
    assert "blamed: " in capsys.readouterr().out


def test_gates_decide_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gates = tmp_path / "gates.toml"
    pair = [str(RUNS / "saturated_1"), str(RUNS / "saturated_2")]
    for limit, code in ((0.0001, 1), (1.0, 0)):
        gates.write_text(f"[gates]\nttft_mean = {limit}\n")
        assert main(["validate", "e2e", *pair, "--gates", str(gates)]) == code
    assert "pass" in capsys.readouterr().out
    gates.write_text("ttft_mean = 0.1\n")
    assert main(["validate", "e2e", *pair, "--gates", str(gates)]) == 2
    assert "no [gates] table" in capsys.readouterr().err


def test_unpaired_runs_may_hold_other_requests(capsys: pytest.CaptureFixture[str]) -> None:
    other = RUNS / "shared_prefix_1"
    assert main(["validate", "e2e", str(RUNS / "poisson_1"), str(other)]) == 2
    capsys.readouterr()
    found = document(capsys, "e2e", RUNS / "poisson_1", other, "--unpaired")
    assert {check["metric"] for check in found["checks"]} >= {"ttft_mean", "tpot_p99", "latency_p50"}
    assert main(["validate", "e2e", str(RUNS / "poisson_1"), str(other), "--unpaired", "--repeats", str(other)]) == 2
