"""`kvtwin check` on small targets made here: gates, exit codes, files, and bad target.toml files."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtwin.reports.cli import main
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.profile import Profile
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.simulate import simulate
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.validate.target import read_target

TRUTH = LinearLatency(6_000_000, 25_000, 20, 10_000)
CONFIG = VllmConfig(num_gpu_blocks=200, max_num_seqs=8)
TARGET = """
name = "<b>small</b>"
profile = "profile.json"
run = "recorded"
[gates]
ttft = 0.05
tpot = 0.05
step_mape = 0.05
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A target whose recording was made by the twin itself, so that the truth is known."""
    columns = {
        "request_id": [f"r{row}" for row in range(40)],
        "arrival_ns": [row * 7_000_000 for row in range(40)],
        "input_tokens": [50 + 13 * row % 90 for row in range(40)],
        "output_tokens": [5 + row % 11 for row in range(40)],
    }
    workload = Run(RunInfo("workload"), {"requests": from_columns("requests", columns, "made here")})
    run = simulate(workload, CONFIG, TRUTH)
    recorded = RunInfo("recorded", engine="vllm 0.32.0", engine_config=run.info.engine_config)
    folder = tmp_path / "target"
    folder.mkdir()
    Run(recorded, {"requests": run.requests, "steps": run.steps}).write(folder / "recorded")
    Profile(kind="linear", latency=TRUTH.to_json(), hardware="a GPU").write(folder / "profile.json")
    (folder / "target.toml").write_text(TARGET)
    return folder


def check(target: Path, *more: str) -> int:
    return main(["check", str(target), "-o", str(target.parent / "out"), *more])


def test_the_truth_passes_every_gate(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(target, "--json") == 0
    document = json.loads(capsys.readouterr().out)["targets"][0]
    out = target.parent / "out"
    assert json.loads((out / "checks.json").read_text()) == document
    assert {row["error"] for row in document["checks"]} == {0.0}
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "checks.json",
        "checks.md",
        "figures.json",
        "junit.xml",
        "profile.json",
        "report.html",
        "simulated",
    ]
    assert Run.open(out / "simulated" / "recorded").requests.num_rows == 40
    assert ET.parse(out / "junit.xml").getroot().get("failures") == "0"
    page = (out / "report.html").read_text()
    assert "<b>small</b>" not in page
    assert "&lt;b&gt;small&lt;/b&gt;" in page


def test_a_planted_fault_fails_its_gates(target: Path) -> None:
    slower = LinearLatency(*(11 * price // 10 for price in (6_000_000, 25_000, 20, 10_000)))
    (target / "profile.json").unlink()
    Profile(kind="linear", latency=slower.to_json()).write(target / "profile.json")
    junit = target.parent / "junit.xml"
    assert check(target, "--junit", str(junit)) == 1
    document = json.loads((target.parent / "out" / "checks.json").read_text())
    failed = {row["metric"] for row in document["checks"] if row["verdict"] == "fail"}
    assert {"tpot_mean", "step_mape"} <= failed
    steps = next(row for row in document["checks"] if row["metric"] == "step_mape")
    assert steps["error"] == pytest.approx(0.1, abs=1e-6)
    assert int(ET.parse(junit).getroot().get("failures", "0")) == len(failed)


def test_peers_stand_beside_ours_and_fail_no_gate(target: Path) -> None:
    aggregates = {"completed": 40, "mean_ttft_ms": 1000.0, "mean_e2el_ms": 2000.0}
    (target / "peer.json").write_text(json.dumps(aggregates))
    peers = 'peers = { "<i>twice</i>" = "recorded", Aggregates = "peer.json" }\n[gates]'
    (target / "target.toml").write_text(TARGET.replace("[gates]", peers))
    assert check(target) == 0
    document = json.loads((target.parent / "out" / "checks.json").read_text())
    same, known = document["peers"]
    assert (same["run"], same["name"], known["name"]) == ("recorded", "<i>twice</i>", "Aggregates")
    assert {row["error"] for row in same["checks"]} == {0.0}
    assert [row["metric"] for row in known["checks"]] == ["ttft_mean", "latency_mean"]
    (sources,) = document["provenance"]["peers"].values()
    assert set(sources["Aggregates"]["sha256"]) == {"peer.json"}
    page = (target.parent / "out" / "report.html").read_text()
    assert "&lt;i&gt;twice" in page and "<i>twice" not in page


def test_the_age_of_the_data_is_the_oldest_recordings_or_what_the_target_says(target: Path) -> None:
    def recorded() -> str | None:
        shutil.rmtree(target.parent / "out", ignore_errors=True)
        assert check(target) == 0
        day: str | None = json.loads((target.parent / "out" / "checks.json").read_text())["target"].get("recorded")
        return day

    assert recorded() is None
    info = json.loads((target / "recorded" / "run.json").read_text())
    info["source"] = {"started_at": "2026-04-25T18:47:18.273385Z"}
    (target / "recorded" / "run.json").write_text(json.dumps(info))
    assert recorded() == "2026-04-25"
    for text in ("2026-04-20", '"2026-04-20T23:00:00+02:00"'):
        (target / "target.toml").write_text(f"recorded = {text}\n{TARGET}")
        assert recorded() == "2026-04-20"


def test_several_targets_get_a_folder_each(target: Path) -> None:
    other = target.parent / "other"
    target.rename(other)
    other.mkdir(exist_ok=True)
    copy = target.parent / "copy"
    copy.mkdir()
    (copy / "target.toml").write_text(
        TARGET.replace("profile.json", "../other/profile.json").replace('"recorded"', '"../other/recorded"')
    )
    assert main(["check", str(other), str(copy), "-o", str(target.parent / "out")]) == 0
    assert sorted(path.name for path in (target.parent / "out").iterdir()) == ["copy", "junit.xml", "other"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("run =", "runs =", "unknown key"),
        ('"recorded"', '"missing"', "no such file or folder"),
        ("ttft = 0.05", "tfft = 0.05", "did you mean"),
        ("ttft = 0.05", "ttft = -1", "negative"),
        ('profile = "profile.json"', "", "give either profile = PATH or calibrate"),
        ('run = "recorded"', "", "nothing to judge"),
        ('name = "<b>small</b>"', "name = 3", "text expected"),
        ("[gates]", "tensor_parallel_size = 0\n[gates]", "at least 1"),
        ("[gates]", 'clock = "wall"\n[gates]', "'queued'"),
        ("[gates]", "[engine]\nmax_seqs = 3\n[gates]", "unknown setting 'max_seqs'"),
        ("[gates]", "[gates", "not readable as TOML"),
        ("[gates]", 'recorded = "soon"\n[gates]', "a date such as"),
        ("[gates]", "peers = 'x.csv'\n[gates]", "a table of names and paths expected"),
        ("[gates]", "peers = { Vidur = 'x.csv' }\n[gates]", "no such file or folder"),
    ],
)
def test_a_bad_target_is_one_line_and_nothing_is_written(
    target: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    file = target / "target.toml"
    file.write_text(file.read_text().replace(old, new))
    assert check(target) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert str(file) in error
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_an_output_that_exists_is_refused(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (target.parent / "out").mkdir()
    assert check(target) == 2
    assert "exists already" in capsys.readouterr().err


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(
    st.dictionaries(
        st.sampled_from(["name", "run", "profile", "engine", "gates", "workloads", "model", "clock", "calibrate", "x"]),
        st.recursive(
            st.one_of(st.booleans(), st.integers(-3, 3), st.text("ab./", max_size=6)),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["runs", "name", "ttft"]), inner, max_size=2)
            ),
            max_leaves=4,
        ),
    )
)
def test_no_target_is_a_traceback(tmp_path: Path, table: dict[str, object]) -> None:
    lines = "".join(f"{key} = {toml(value)}\n" for key, value in table.items())
    file = tmp_path / "target.toml"
    file.write_text(lines)
    with pytest.raises(InputError) as caught:
        read_target(file)
    assert "\n" not in str(caught.value)


def toml(value: object) -> str:
    """A TOML literal."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    return json.dumps(value)
