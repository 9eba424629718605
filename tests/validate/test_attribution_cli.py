"""`kvtwin validate attribution RECORDED SIMULATED`: two runs are enough, where one holds its profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from kvtwin.reports.cli import main
from kvtwin.sim.latency.host import HostTime
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


def simulate(
    workload: Path, folder: Path, engine: str, *, slower: float = 1.0, budget: int = 512, frontend_ns: int = 0
) -> Path:
    folder.mkdir()
    (folder / "engine.toml").write_text(ENGINES[engine].format(budget))
    latency = LinearLatency(*(round(slower * value) for value in TRUTH))
    profile = Profile(kind="linear", latency=latency.to_json(), host=HostTime(frontend_ns=frontend_ns))
    profile.write(folder / "given.json")
    words = ["--engine", str(folder / "engine.toml"), "--profile", str(folder / "given.json"), "--record", "steps"]
    assert main(["simulate", str(workload), *words, "-o", str(folder / "run")]) == 0
    return folder / "run"


def attribute(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["validate", "attribution", *map(str, words), "--json"]) == code
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


def change_times(run: Path, folder: Path, change: Any, columns: tuple[str, ...], *, has_steps: bool = True) -> Path:
    """The run with some columns of its requests changed."""
    source = Run.open(run)
    table = source.requests
    for name in columns:
        table = table.set_column(
            table.schema.get_field_index(name), table.schema.field(name), change(table.column(name))
        )
    changed = Run(source.info, {"requests": table, **({"steps": source.steps} if has_steps else {})})
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
    wrong = [one for one in wrong if one["metric"].endswith(("_mean", "_p50", "_p90"))]
    assert {one["blamed"] for one in wrong} == {"units"}
    assert all("1/1000 of the measured" in one["note"] for one in wrong)


def _50_ms_late(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.add(column, 50_000_000)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", [_50_ms_early, _50_ms_late], ids=["early", "late"])
def test_an_arrival_clock_that_the_queue_does_not_see(
    engine: str, change: Any, workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under the queue's clock no TTFT changes; the way to the queue does."""
    truth = simulate(workload, tmp_path / "truth", engine, frontend_ns=60_000_000)
    shifted = change_times(truth, tmp_path / "shifted", change, TIMES[:1])
    gates = tmp_path / "gates.toml"
    gates.write_text("[gates]\nttft = 0.05\n")
    for runs in ((shifted, truth), (truth, shifted)):
        found = {one["metric"]: one["blamed"] for one in attribute(capsys, *runs)}
        assert {metric for metric, blamed in found.items() if blamed} == {"ttft_arrival"}
        assert found["ttft_arrival"] == "arrival"
        assert main(["validate", "e2e", *map(str, runs), "--gates", str(gates), "--json"]) == 1
        checks = json.loads(capsys.readouterr().out)["checks"]
        assert [check["metric"] for check in checks if check["verdict"] == "fail"] == ["ttft_arrival"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("has_steps", [True, False], ids=["steps", "no-steps"])
def test_a_queue_clock_that_no_dispatch_agrees_with(
    engine: str, has_steps: bool, workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`arrival_ns` and `queued_ns` both 50 ms early: every request seems to wait 50 ms for a step."""
    truth = simulate(workload, tmp_path / "truth", engine)
    shifted = change_times(truth, tmp_path / "shifted", _50_ms_early, TIMES[:2], has_steps=has_steps)
    found = {one["metric"]: one for one in attribute(capsys, shifted, truth)}
    assert found["ttft_mean"]["blamed"] == found["latency_mean"]["blamed"] == "arrival"
    assert {one["blamed"] for one in found.values()} <= {"arrival", None}
    assert "recorded queued_ns lies 50.0" in found["ttft_mean"]["note"]
    predicted = {one["metric"]: one for one in attribute(capsys, truth, shifted)}
    assert predicted["ttft_mean"]["blamed"] == "arrival"
    assert "predicted queued_ns lies 50.0" in predicted["ttft_mean"]["note"]


def longer_steps(run: Path, folder: Path, *, profile: bool = True) -> Path:
    """The run with each step a tenth longer, its requests as they were."""
    source = Run.open(run)
    steps = source.steps
    took = pc.subtract(steps.column("end_ns"), steps.column("start_ns"))
    end_ns = pc.add(steps.column("end_ns"), pc.divide(took, 10))
    steps = steps.set_column(steps.schema.get_field_index("end_ns"), steps.schema.field("end_ns"), end_ns)
    changed = Run(source.info, {"requests": source.requests, "steps": steps})
    return changed.write(folder, beside={PROFILE_FILE: run / PROFILE_FILE} if profile else None)


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_that_contradict_their_run(
    engine: str, workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = simulate(workload, tmp_path / "truth", engine)
    longer = longer_steps(truth, tmp_path / "longer")
    for runs, words in (
        ((longer, truth), "steps and requests of the recording contradict one another"),
        ((truth, longer), "steps take 1.100 x what its profile says"),
    ):
        found = attribute(capsys, *runs)
        assert {one["metric"]: one["blamed"] for one in found if one["blamed"]} == {"step_bias": "step times"}
        assert any(words in one["note"] for one in found)


@pytest.mark.parametrize("engine", ENGINES)
def test_output_lengths_that_differ(
    engine: str, workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Run.open(workload)
    table = source.requests
    index = table.schema.get_field_index("output_tokens")
    doubled = table.set_column(index, table.schema.field(index), pc.multiply(table.column("output_tokens"), 2))
    longer = Run(source.info, {"requests": doubled}).write(tmp_path / "longer")
    truth = simulate(workload, tmp_path / "truth", engine)
    twin = simulate(longer, tmp_path / "twin", engine)
    found = {one["metric"]: one for one in attribute(capsys, truth, twin, code=1)}  # lengths are exact or wrong
    assert {found[metric]["blamed"] for metric in ("output_tokens", "latency_mean", "throughput")} == {"output"}
    assert {one["blamed"] for one in found.values()} <= {"output", None}


@pytest.mark.parametrize("engine", ENGINES)
def test_two_runs_without_a_profile(
    engine: str, workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = simulate(workload, tmp_path / "truth", engine)
    for name, change, layers in (
        ("same", {}, set()),
        ("slow", {"slower": 1.1}, {"step times"}),
        ("short", {"budget": 496}, {"schedule" if engine == "vllm" else "cache and schedule"}),
    ):
        run = simulate(workload, tmp_path / name, engine, **change)
        (run / PROFILE_FILE).unlink()
        found = attribute(capsys, truth, run)
        assert {one["blamed"] for one in found} - {None} == layers
        assert all("no profile" in one["note"] for one in found if len(one["parts"]) > 1)


def test_a_prediction_of_requests_alone(workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, slow = (simulate(workload, tmp_path / f"{x}", "vllm", slower=x) for x in (1.0, 1.1))
    alone = Run(Run.open(slow).info, {"requests": Run.open(slow).requests}).write(tmp_path / "alone")
    found = {one["metric"]: one for one in attribute(capsys, truth, alone)}
    assert [part["layer"] for part in found["ttft_mean"]["parts"]] == ["arrival, step times, host, schedule"]
    assert "its step times are not judged" in found["ttft_mean"]["note"]


def test_bars_have_intervals(workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, slow = (simulate(workload, tmp_path / f"{x}", "vllm", slower=x) for x in (1.0, 1.1))
    for one in attribute(capsys, truth, slow):
        for part in one["parts"]:
            if part["interval"] is not None:
                low, high = part["interval"]
                assert low - 1e-9 <= part["change"] <= high + 1e-9
    assert main(["validate", "attribution", str(truth), str(slow)]) == 0
    assert "step times +" in (text := capsys.readouterr().out) and " .. " in text


def test_step_times_in_another_unit_are_blamed_and_noted(
    workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = simulate(workload, tmp_path / "truth", "vllm")
    found = attribute(capsys, truth, simulate(workload, tmp_path / "slow", "vllm", slower=1000))
    assert {one["blamed"] for one in found if one["metric"].endswith("_mean")} == {"step times"}
    words = "step times: simulated is about 1000x the measured"
    assert all(words in one["note"] for one in found if len(one["parts"]) > 1)


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
    capsys.readouterr()
    assert main(["validate", "attribution", str(truth)]) == 2
    error = capsys.readouterr().err
    assert "give --profile" in error and error.count("\n") == 1
