"""`kvtwin validate attribution RECORDED SIMULATED`: two runs are enough, where one holds its profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from kvtwin.reports.cli import main
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.profile import PROFILE_FILE, Profile
from kvtwin.traces.run import Run

TRUTH = (6_000_000, 60_000, 60, 100_000)
ENGINES = {
    "vllm": "num_gpu_blocks = 700\nmax_num_seqs = 32\nmax_num_batched_tokens = {}\n",
    "sglang": 'engine = "sglang"\nversion = "0.5.9"\nmax_total_tokens = 12000\npage_size = 16\nchunked_prefill_size = {}\n',
}
TIMES = ("arrival_ns", "queued_ns", "scheduled_ns", "first_token_ns", "finish_ns")


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty conversations that fill the KV cache now and then."""
    place = tmp_path_factory.mktemp("attribution") / "workload"
    words = "--num-conversations 40 --conversation-rate 1.2 --num-turns uniform:2:4 --turn-interval uniform:1:3"
    words += " --prefix-len 600 --input-len lognormal:200:1 --output-len lognormal:40:1 --block-tokens 16"
    assert main(["trace", "generate", "multi-turn", *words.split(), "-o", str(place)]) == 0
    return place


def simulate(workload: Path, folder: Path, engine: str, *, slower: float = 1.0, budget: int = 512) -> Path:
    folder.mkdir()
    (folder / "engine.toml").write_text(ENGINES[engine].format(budget))
    Profile(kind="linear", latency=LinearLatency(*(round(slower * value) for value in TRUTH)).to_json()).write(
        folder / "given.json"
    )
    words = ["--engine", str(folder / "engine.toml"), "--profile", str(folder / "given.json"), "--record", "steps"]
    assert main(["simulate", str(workload), *words, "-o", str(folder / "run")]) == 0
    return folder / "run"


def attribute(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["validate", "attribution", *map(str, words), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["attributions"]
    for one in found:
        change = sum(part["change"] for part in one["parts"])
        assert change == pytest.approx(one["simulated"] / one["measured"] - 1, abs=1e-9)
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_two_runs_say_which_layer(
    engine: str, workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = simulate(workload, tmp_path / "truth", engine)
    same = attribute(capsys, truth, truth)
    assert {one["blamed"] for one in same} == {None}
    slow = attribute(capsys, truth, simulate(workload, tmp_path / "slow", engine, slower=1.1))
    assert {one["blamed"] for one in slow if one["metric"].endswith("_mean")} == {"step times"}
    short = attribute(capsys, truth, simulate(workload, tmp_path / "short", engine, budget=496))
    assert {one["blamed"] for one in short} - {None} == {"schedule" if engine == "vllm" else "cache and schedule"}


def change_times(run: Path, folder: Path, change: Any, columns: tuple[str, ...]) -> Path:
    """The run with some columns of its requests changed."""
    source = Run.open(run)
    table = source.requests
    for name in columns:
        table = table.set_column(
            table.schema.get_field_index(name), table.schema.field(name), change(table.column(name))
        )
    changed = Run(source.info, {"requests": table, "steps": source.steps})
    return changed.write(folder, beside={PROFILE_FILE: run / PROFILE_FILE})


def _50_ms_early(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.max_element_wise(pc.subtract(column, 50_000_000), pa.scalar(0))


def test_the_clocks_and_units_of_a_run(workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = simulate(workload, tmp_path / "truth", "vllm")
    shifted = change_times(truth, tmp_path / "shifted", _50_ms_early, TIMES[:1])
    found = {one["metric"]: one["blamed"] for one in attribute(capsys, truth, shifted, "--clock", "arrival")}
    assert (found["ttft_mean"], found["latency_mean"], found["tpot_mean"]) == ("arrival", "arrival", None)
    units = change_times(truth, tmp_path / "units", lambda column: pc.divide(column, 1000), TIMES)
    wrong = attribute(capsys, truth, units)
    assert {one["blamed"] for one in wrong} == {"units"}
    assert all("1/1000 of the measured" in one["note"] for one in wrong)


def test_a_layer_that_differs_without_an_error_is_in_the_note(
    workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = simulate(workload, tmp_path / "truth", "vllm")
    early = change_times(truth, tmp_path / "early", _50_ms_early, TIMES[:1])
    unseen = attribute(capsys, early, truth)  # the queue's clock does not see when the client sent
    steps = Run.open(truth).steps
    longer = pc.add(
        steps.column("end_ns"), pc.divide(pc.subtract(steps.column("end_ns"), steps.column("start_ns")), 10)
    )
    longer_steps = steps.set_column(steps.schema.get_field_index("end_ns"), steps.schema.field("end_ns"), longer)
    changed = Run(Run.open(truth).info, {"requests": Run.open(truth).requests, "steps": longer_steps})
    cancelled = attribute(capsys, changed.write(tmp_path / "longer"), truth)
    for found, layer in ((unseen, "arrival"), (cancelled, "step times")):
        assert {one["blamed"] for one in found} == {None}
        assert all(f"no error seen here is theirs: {layer}" in one["note"] for one in found)


def test_step_times_in_another_unit_are_blamed_and_noted(
    workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = simulate(workload, tmp_path / "truth", "vllm")
    found = attribute(capsys, truth, simulate(workload, tmp_path / "slow", "vllm", slower=1000))
    assert {one["blamed"] for one in found if one["metric"].endswith("_mean")} == {"step times"}
    assert all("step times: simulated is about 1000x the measured" in one["note"] for one in found)


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_of_two_runs_without_noise(
    engine: str, workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth, slow = (simulate(workload, tmp_path / f"{x}", engine, slower=x) for x in (1.0, 1.1))
    for runs in ((truth, slow), (slow, truth)):
        capsys.readouterr()
        assert main(["validate", "step", *map(str, runs), "--json"]) == 0
        bias = next(check for check in json.loads(capsys.readouterr().out)["checks"] if check["metric"] == "step_bias")
        assert bias["error"] == pytest.approx(0.1 if runs[1] is slow else 1 / 1.1 - 1, abs=1e-4)


def test_without_a_profile_one_line_says_what_to_do(
    workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = simulate(workload, tmp_path / "truth", "vllm")
    (truth / PROFILE_FILE).unlink()
    for words in ([str(truth)], [str(truth), str(truth)]):
        capsys.readouterr()
        assert main(["validate", "attribution", *words]) == 2
        error = capsys.readouterr().err
        assert "give --profile" in error and error.count("\n") == 1
