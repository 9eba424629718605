"""`kvtwin calibrate TABLE...` as a user calls it: what is printed, what is refused in one line, nothing half written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvtwin.reports.cli import main
from kvtwin.sim.latency.profile import read_profile

M, NK = [1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024], [1024, 4096]


def write_gemm(path: Path, *, factor: float = 1.0, **change: object) -> Path:
    """Milliseconds of a planted kernel: 64 x 128 tiles on 132 slots."""
    rows = []
    for m in M:
        for n in NK:
            for k in NK:
                waves = np.ceil(np.ceil(m / 64) * np.ceil(n / 128) / 132)
                row = {
                    "framework": "VLLM", "version": "0.24.0", "device": "NVIDIA H100 80GB HBM3", "op_name": "gemm",
                    "kernel_source": "torch", "gemm_dtype": "bfloat16", "m": m, "n": n, "k": k,
                    "latency": factor * float(3e-3 + 1e-5 * waves * k),
                }  # fmt: skip
                rows.append({**row, **change})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_a_table_becomes_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, output = write_gemm(tmp_path / "gemm.parquet"), tmp_path / "profile.json"
    assert main(["calibrate", str(table), "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "operators of vllm 0.24.0, NVIDIA H100 80GB HBM3" in printed
    assert "gemm, m held out" in printed
    assert "models taken:" in printed
    profile = read_profile(output)
    assert profile.provenance["sources"][0]["sha256"].keys() == {"gemm.parquet"}
    assert main(["calibrate", str(table), "-o", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_json_is_one_document_with_intervals_and_naive_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, test = write_gemm(tmp_path / "gemm.parquet"), write_gemm(tmp_path / "test.parquet", factor=1.1)
    words = ["calibrate", str(table), "-o", str(tmp_path / "p.json"), "--json", "--test", str(test)]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["accuracy"]
    assert {"mape", "interval", "bias", "p50", "p90", "p99", "outside", "naive", "noise_floor"} <= set(
        found["gemm, m held out"]
    )
    assert set(found["gemm, m held out"]["naive"]) == {"ols", "nearest", "linear"}
    assert found["gemm, on test.parquet"]["bias"] == pytest.approx(1 / 1.1 - 1, abs=0.01)


def test_a_new_gpu_from_a_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = write_gemm(tmp_path / "old.parquet"), write_gemm(tmp_path / "new.parquet", factor=0.4, device="GPU 2")
    assert main(["calibrate", str(old), "-o", str(tmp_path / "old.json")]) == 0
    words = ["--reference", str(tmp_path / "old.json"), "--samples", "10", "-o", str(tmp_path / "new.json")]
    assert main(["calibrate", str(new), *words]) == 0
    printed = capsys.readouterr().out
    assert "all operators, not sampled" in printed
    assert "unscaled MAPE 150.0%" in printed
    assert read_profile(tmp_path / "new.json").hardware == "GPU 2"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["{gemm}", "--filter", "gemm_dtype=fp8"], "--filter gemm_dtype=fp8: found only bfloat16"),
        (["{gemm}", "--filter", "gemm_dtype"], "--filter gemm_dtype: NAME=VALUE expected"),
        (["{gemm}", "--samples", "10"], "--samples goes with --reference"),
        (
            ["{gemm}", "--model", "meta-llama/Llama-3.1-8B"],
            "needs the times of context_attention, generation_attention",
        ),
        (["{gemm}", "--model", "Llama-9"], "unknown model 'Llama-9'"),
        (["{gemm}", "--model", "none.json"], "cannot be read as the config.json of a model"),
        (["{gemm}", "--tensor-parallel-size", "2"], "which needs --model too"),
        (["{gemm}", "--model", "Qwen/Qwen3-8B", "--tensor-parallel-size", "0"], "--tensor-parallel-size 0: at least 1"),
        (["{gemm}", "--model", "Qwen/Qwen3-8B", "--filter", "colour=red"], "--filter colour: no such key"),
        (["{gemm}", "--model", "Qwen/Qwen3-8B", "--test", "{gemm}"], "--test goes with single operators"),
        (["{gemm}", "--layers", "3"], "--layers is not for table files"),
        (["{gemm}", "--reference", "{gemm}"], "not readable as JSON"),
        (["{gemm}", "{slow}"], "hardware is 'slow', but 'NVIDIA H100 80GB HBM3' in gemm.parquet"),
        (["{gemm}", "{new}"], "engine version 'vllm 0.25.0', but 'vllm 0.24.0' in gemm.parquet"),
        (["{gemm}", "{gemm}"], "given twice"),
        (["{gemm}", "--hardware", "A100"], "--hardware A100: the table is of NVIDIA H100 80GB HBM3"),
        (["{unit}"], "the unit looks wrong"),
        (["{none}"], "no such file"),
        (["{text}"], "not a table of times that kvtwin reads"),
        (["{gemm}", "--test", "{new}"], "has no operator of the profile under the same key"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], problem: str
) -> None:
    (tmp_path / "text.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    places = {
        "gemm": write_gemm(tmp_path / "gemm.parquet"),
        "slow": write_gemm(tmp_path / "slow.parquet", device="slow"),
        "new": write_gemm(tmp_path / "new.parquet", version="0.25.0"),
        "unit": write_gemm(tmp_path / "unit.parquet", factor=1000.0),
        "none": tmp_path / "none.parquet",
        "text": tmp_path / "text.csv",
    }
    output = tmp_path / "profile.json"
    assert main(["calibrate", *(word.format(**places) for word in words), "-o", str(output)]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert not output.exists()


def test_where_whole_steps_are_needed_operators_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, profile = write_gemm(tmp_path / "gemm.parquet"), tmp_path / "profile.json"
    assert main(["calibrate", str(table), "-o", str(profile)]) == 0
    (tmp_path / "work.jsonl").write_text(
        '{"request_id": "a", "arrival_s": 0, "input_length": 8, "output_length": 2}\n', encoding="utf-8"
    )
    (tmp_path / "engine.toml").write_text("num_gpu_blocks = 100\n", encoding="utf-8")
    words = ["--engine", str(tmp_path / "engine.toml"), "--profile", str(profile), "-o", str(tmp_path / "run")]
    assert main(["simulate", str(tmp_path / "work.jsonl"), *words]) == 2
    error = capsys.readouterr().err
    assert "a simulation needs whole steps" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
