"""`kvtwin simulate` as a user calls it: good runs, and every kind of bad input in one line and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvtwin.reports.cli import main
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.profile import Profile
from kvtwin.traces.run import Run

TRACE = [
    {"request_id": "a", "arrival_s": 0.0, "input_length": 40, "output_length": 5},
    {"request_id": "b", "arrival_s": 0.001, "input_length": 20, "output_length": 3},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TRACE))
    (tmp_path / "engine.toml").write_text('version = "0.32"\nnum_gpu_blocks = 100\nmax_num_seqs = 8\n')
    Profile(kind="linear", latency=LinearLatency(6_000_000, 25_000, 20, 10_000).to_json()).write(tmp_path / "p.json")
    return tmp_path


def simulate(folder: Path, *more: str, trace: str = "trace.jsonl", output: str = "run") -> int:
    places = [str(folder / trace), "--engine", str(folder / "engine.toml"), "--profile", str(folder / "p.json")]
    return main(["simulate", *places, "-o", str(folder / output), *more])


def test_the_result_is_a_run_and_its_costs_are_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(folder, "--record", "steps", "--json") == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert {"load_s", "core_s", "write_s", "num_steps", "peak_rss_bytes"} <= set(metrics)
    run = Run.open(folder / "run")
    assert run.steps.num_rows == metrics["num_steps"] > 0
    assert run.requests.column("request_id").to_pylist() == ["a", "b"]
    assert run.info.metrics["peak_rss_bytes"] > 0


SGLANG = 'engine = "sglang"\nmax_total_tokens = 1024\npage_size = 16\n'
HOST = "enable_hierarchical_cache = true\n"


@pytest.mark.parametrize("engine", ['version = "0.32"\nnum_gpu_blocks = 100\n', SGLANG, SGLANG + HOST])
def test_the_time_in_the_queues_is_shown_and_is_the_latency(
    folder: Path, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    (folder / "engine.toml").write_text(engine)
    assert simulate(folder, "--json") == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    queues = [metrics[f"{queue}_mean_ms"] for queue in ("waiting", "prefetch", "running", "swapped")]
    assert sum(queues) == pytest.approx(metrics["latency_mean_ms"], abs=0.003) and queues[2] > 0


def test_steps_outside_the_profile_s_domain_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latency = LinearLatency(6_000_000, 25_000, 20, 10_000).to_json()
    (folder / "p.json").unlink()
    Profile(kind="linear", latency=latency, domain={"prefill_tokens": (0.0, 30.0)}).write(folder / "p.json")
    assert simulate(folder, "--record", "steps", "--json") == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["num_extrapolated_steps"] == 1  # the prefill of "a"
    assert Run.open(folder / "run").info.metrics["num_extrapolated_steps"] == 1
    assert simulate(folder, "--json", output="without") == 0
    assert "num_extrapolated_steps" not in json.loads(capsys.readouterr().out)["metrics"]


def test_the_same_command_gives_the_same_tables(folder: Path) -> None:
    for output in ("one", "other"):
        assert simulate(folder, "--record", "steps", output=output) == 0
    for table in ("requests", "steps"):
        one, other = ((folder / name / f"{table}.parquet").read_bytes() for name in ("one", "other"))
        assert one == other


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("engine.toml", "num_gpu_blocks = 100\nmax_num_sequences = 8\n", "did you mean max_num_seqs?"),
        ("engine.toml", "num_gpu_blocks = \n", "not readable as toml"),
        ("engine.toml", "num_gpu_blocks = 3\n", "longer than max_model_len (32)"),
        ("p.json", '{"schema_version": 7}', "schema_version is 7"),
        ("trace.jsonl", '{"request_id": "a", "arrival_s": 0, "input_length": -3, "output_length": 5}\n', "row 1"),
        ("trace.jsonl", '{"request_id": "a", "arrival_s": NaN, "input_length": 3, "output_length": 5}\n', "row 1"),
        ("trace.jsonl", '{"request_id": "a", "input_length": 3, "output_length": 5}\n', "row 1"),
        ("trace.jsonl", json.dumps(TRACE[0]) + "\n" + json.dumps(TRACE[0]) + "\n", "row"),
        ("trace.jsonl", json.dumps(TRACE[1]) + "\n" + json.dumps(TRACE[0]) + "\n", "is before the row above"),
        ("trace.jsonl", "", "trace.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], file: str, text: str, message: str
) -> None:
    (folder / file).write_text(text)
    before = sorted(path.name for path in folder.iterdir())
    assert simulate(folder) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvtwin: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path.name for path in folder.iterdir()) == before


def test_an_output_that_exists_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "mine.txt").write_text("keep")
    assert simulate(folder) == 2
    assert "exists already" in capsys.readouterr().err
    assert (folder / "run" / "mine.txt").read_text() == "keep"


def test_an_unknown_table_to_record_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(folder, "--record", "steps,dreams") == 2
    assert "'dreams'" in capsys.readouterr().err


def test_an_engine_file_that_leaves_open_what_the_recording_says(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = shared / "data" / "vllm_cpu" / "poisson_1"
    (tmp_path / "engine.toml").write_text("num_gpu_blocks = 1000\nblock_size = 32\nmax_model_len = 2048\n")
    Profile(kind="linear", latency=LinearLatency(6_000_000, 25_000, 20, 10_000).to_json()).write(tmp_path / "p.json")
    words = ["--engine", str(tmp_path / "engine.toml"), "--profile", str(tmp_path / "p.json")]
    assert main(["simulate", str(recorded), *words, "-o", str(tmp_path / "run")]) == 0
    note = next(line for line in capsys.readouterr().err.splitlines() if "leaves open" in line)
    assert "max_num_batched_tokens = 512 (here 8192)" in note and "block_size" not in note
