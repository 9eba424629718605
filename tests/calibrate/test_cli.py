"""kvtwin calibrate, as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import kvtwin.traces
from kvtwin.reports.cli import main
from kvtwin.sim.latency.profile import read_profile
from kvtwin.traces.run import Run

MakeRun = Callable[..., Run]
RUNS = Path(kvtwin.traces.__path__[0]) / "targets" / "vllm-cpu-tiny" / "runs"
SWEEPS = [str(RUNS / "sweep_1"), str(RUNS / "sweep_2")]


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr of a refused command; nothing on stdout."""
    assert main(["calibrate", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_two_recordings_become_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "profile.json"
    assert main(["calibrate", *SWEEPS, "-o", str(output)]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # not a terminal: no progress
    assert out.startswith("regression profile of vllm 0.32.0, ")
    for words in (
        "MAPE",
        "95 % interval",
        "decode steps",
        "steps of sweep_2",
        "noise floor of sweep_1, sweep_2: MAPE 25.6%",
    ):
        assert words in out
    assert out.endswith(f"written to {output}\n")
    assert read_profile(output).kind == "regression"


def test_json_is_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "profile.json"
    assert main(["calibrate", *SWEEPS, "-o", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    profile = read_profile(output)
    assert found["profile"] == str(output)
    assert found["accuracy"] == profile.accuracy
    assert found["host"]["schedule_ns"] == profile.host.schedule_ns > 0
    assert found["provenance"] == profile.provenance


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert main(["calibrate", *SWEEPS, "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "profile.json"
    output.write_text("mine")
    assert "exists already" in refusal(capsys, *SWEEPS, "-o", str(output))
    assert output.read_text() == "mine"


def test_what_cannot_be_calibrated_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], known_run: MakeRun
) -> None:
    output = tmp_path / "profile.json"
    known_run(20, 0).write(tmp_path / "short")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "meta.yaml").write_text("model: m\n")
    cases = {
        "no such file or folder": [str(tmp_path / "nowhere")],
        "20 steps in all: at least 50 are needed": [str(tmp_path / "short")],
        "--layers is for kernel tables": [*SWEEPS, "--layers", "2"],
        "--enforce-eager is for kernel tables": [*SWEEPS, "--enforce-eager"],
        "calibrated alone": [str(tmp_path / "tables"), *SWEEPS],
        "no tp1 here; found: none": [str(tmp_path / "tables")],
        "--plots is not for kernel tables": [str(tmp_path / "tables"), "--plots", str(tmp_path / "page.html")],
        "--tensor-parallel-size 0: at least 1 expected": [str(tmp_path / "tables"), "--tensor-parallel-size", "0"],
    }
    for words, samples in cases.items():
        assert words in refusal(capsys, *samples, "-o", str(output))
        assert not output.exists()


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_kernel_tables_become_a_profile(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tensor_parallel_size: int
) -> None:
    tables = shared / "data/profiles/llmservingsim/RTXPRO6000/meta-llama/Llama-3.1-8B/bf16"
    collectives = next((shared / "data/ops/aiconfigurator/rtx_pro_6000_server/comm").rglob("*.parquet"))
    words = ["--tensor-parallel-size", str(tensor_parallel_size), "--collectives", str(collectives), "--layers", "16"]
    output = tmp_path / "profile.json"
    assert main(["calibrate", str(tables), "-o", str(output), *words]) == 0
    assert "decode attention, context held out" in capsys.readouterr().out
    profile = read_profile(output)
    assert (profile.kind, profile.tensor_parallel_size) == ("composed", tensor_parallel_size)
    assert profile.latency["num_layers"] == 16


def test_help_waits_for_nothing_heavy() -> None:
    """The command's module alone must not pull in what only a fit needs."""
    heavy = "{'scipy', 'tqdm', 'pandas', 'statsmodels'} & set(sys.modules)"
    code = f"import sys, kvtwin.calibrate.cli; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- request logs, test runs, plots, diff --------------------------------------------------------------------


def test_steps_are_judged_on_runs_that_take_no_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = [str(RUNS / f"saturated_{number}") for number in (1, 2)]
    assert main(["calibrate", *SWEEPS, "--test", *test, "-o", str(tmp_path / "p.json")]) == 0
    out = capsys.readouterr().out
    assert "not used for fitting" in out
    found = read_profile(tmp_path / "p.json").accuracy["test: saturated_1"]
    assert found["ratio"]["repeat"] < 1.3
    for words in ("saturated_2", "price per unit, ns", "measure next (20 batches", "Breusch-Pagan"):
        assert words in out


def test_request_logs_become_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = str(RUNS.parent / "engine.toml")
    places = ["-o", str(tmp_path / "p.json"), "--plots", str(tmp_path / "page.html")]
    words = [str(RUNS / "saturated_1"), "--from", "requests", "--engine", engine, *places]
    assert main(["calibrate", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for part in ("ttft", "tpot", "latency", "error of the distribution's", "price per unit, ns", "host time: output "):
        assert part in out
    assert "<h2>Error distribution</h2>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    profile = read_profile(tmp_path / "p.json")
    assert profile.kind == "regression"
    assert profile.provenance["runs"][0]["requests"] == 220


def test_a_page_of_plots(tmp_path: Path, known_run: MakeRun) -> None:
    for seed in (0, 1):
        known_run(80, seed, noise=0.1, engine="<script>alert(1)</script>").write(tmp_path / f"run{seed}")
    page = tmp_path / "plots" / "page.html"
    samples = [str(tmp_path / f"run{seed}") for seed in (0, 1)]
    assert main(["calibrate", *samples, "-o", str(tmp_path / "p.json"), "--plots", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    for title in ("Parity", "Residuals over the batch", "Error distribution", "Learning curve"):
        assert f"<h2>{title}</h2>" in text
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_two_profiles_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str], known_run: MakeRun) -> None:
    for name, speed in (("old", 1.0), ("new", 0.5)):
        known_run(80, 0, speed=speed).write(tmp_path / name)
        assert main(["calibrate", str(tmp_path / name), "-o", str(tmp_path / f"{name}.json")]) == 0
    capsys.readouterr()
    both = [str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    assert main(["calibrate", "--diff", *both]) == 0
    assert "+100.0% on average" in capsys.readouterr().out
    assert main(["calibrate", "--diff", *both, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"]["mean"] == pytest.approx(1.0, abs=0.01)


def test_what_does_not_go_together_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], known_run: MakeRun
) -> None:
    run, output = tmp_path / "run", tmp_path / "p.json"
    known_run(60, 0).write(run)
    log = ["--from", "requests", "-o", str(output)]
    cases = {
        "-o PROFILE is missing": [str(run)],
        "--diff compares two profiles: 1 given": ["--diff", str(run)],
        "--engine is for request logs": [str(run), "--engine", str(run), "-o", str(output)],
        "--test needs steps": [str(run), "--test", str(run), *log],
        "num_gpu_blocks is missing": [str(run), *log],
    }
    for words, given in cases.items():
        assert words in refusal(capsys, *given)
        assert not output.exists()


def test_a_recording_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Left out once, it would be judged by a fit that has seen its copy."""
    output = tmp_path / "profile.json"
    assert "the same recording as" in refusal(capsys, SWEEPS[0], SWEEPS[0], "-o", str(output))
    assert "the same recording as" in refusal(capsys, *SWEEPS, "--test", SWEEPS[0], "-o", str(output))
    words = (SWEEPS[0], SWEEPS[0], "--from", "requests", "-o", str(output))
    assert "the same recording as" in refusal(capsys, *words)
    assert not output.exists()
