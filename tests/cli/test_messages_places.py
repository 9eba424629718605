"""One line for what a user gets wrong: places that cannot be written, files of another kind; and what times count from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvtwin.reports.cli import main
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.profile import Profile
from kvtwin.traces.errors import InputError
from kvtwin.traces.files import new_folder, write_text

BUNDLED = Path(__file__).parents[2] / "traces" / "targets" / "vllm-cpu-tiny"


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sent") / "workload"
    words = ["--num-prompts", "30", "--request-rate", "5", "--input-len", "50", "--output-len", "5"]
    assert main(["trace", "generate", "random", *words, "-o", str(place)]) == 0
    return place


@pytest.fixture(scope="module")
def run(workload: Path) -> Path:
    (workload.parent / "engine.toml").write_text("num_gpu_blocks = 700\n")
    Profile(kind="linear", latency=LinearLatency(6_000_000, 1, 1, 1).to_json()).write(workload.parent / "profile.json")
    assert main(simulate(workload, workload.parent / "run")) == 0
    return workload.parent / "run"


def simulate(workload: Path, output: Path) -> list[str]:
    beside = workload.parent
    words = ["simulate", str(workload), "--engine", str(beside / "engine.toml")]
    return [*words, "--profile", str(beside / "profile.json"), "-o", str(output)]


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    answer = capsys.readouterr()
    assert answer.out == ""
    assert answer.err.count("\n") == 1
    return answer.err


def test_a_file_where_a_folder_must_be_is_named_before_the_work(
    workload: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    says = f"{file / 'out'}: cannot be written: {file} is a file, not a folder"
    assert says in refused(capsys, *simulate(workload, file / "out"))
    assert says in refused(capsys, "check", BUNDLED, "-o", file / "out")
    assert says in refused(capsys, "check", BUNDLED, "-o", tmp_path / "new", "--junit", file / "out")
    assert says in refused(capsys, "calibrate", BUNDLED / "runs" / "sweep_1", "-o", file / "out")
    assert says in refused(capsys, "trace", "import", run, "-o", file / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with (
        pytest.raises(InputError, match=r"out: cannot be written: no permission to write in "),
        new_folder(tmp_path / "out"),
    ):
        raise AssertionError


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").mkdir()
    with pytest.raises(InputError, match=r"x\.parquet: cannot be written: it is a folder"):
        write_text(tmp_path / "x.parquet", "")


def test_aggregates_are_no_recording(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"completed": 4, "duration": 10.0, "mean_ttft_ms": 10, "output_throughput": 100}))
    for words in (("e2e", file, run), ("scheduler", file), ("attribution", file, run)):
        assert "holds aggregates (means, quantiles), where every request is needed" in refused(
            capsys, "validate", *words
        )


def test_a_workload_is_nothing_to_calibrate_on(
    workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says = f"{workload}: is a workload, without times to fit on"
    assert says in refused(capsys, "calibrate", workload, "-o", tmp_path / "profile.json")


def test_every_command_says_what_ttft_counts_from(
    workload: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    assert "ttft and latency count from queued_ns" in said(*simulate(workload, tmp_path / "one"))
    assert json.loads(said(*simulate(workload, tmp_path / "two"), "--json"))["clock"] == "queued_ns"
    assert "TTFT and latency count from the moment the client sent" in said("compare", run, tmp_path / "one")
    assert json.loads(said("compare", run, tmp_path / "one", "--json"))["clock"] == "arrival_ns"
    assert "TTFT and latency count from queued_ns" in said("validate", "e2e", run, run)
    assert json.loads(said("validate", "e2e", run, run, "--json"))["clock"] == "queued_ns"
