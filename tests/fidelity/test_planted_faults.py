"""Faults of each kind, in the prediction or in the recording: how many a gate catches, and who is blamed for them.

`kvtwin validate attribution RECORDED PREDICTED --gates` on runs that were simulated with noise on every step, so that
the truth is known. Prints a table; validate/README.md has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvtwin.reports.cli import main
from kvtwin.sim.engines import simulate_engine
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.profile import PROFILE_FILE, Profile
from kvtwin.traces.run import Run

from .. import planted

pytestmark = pytest.mark.fidelity

# As wide as what 3 % of noise on each step does where requests queue.
GATES = "[gates]\nttft_mean = 0.1\nttft_arrival = 0.05\ntpot_mean = 0.04\nlatency_mean = 0.05\nstep_bias = 0.02\nidentical_steps = 0.0\n"
SEEDS = range(3)


@dataclass(frozen=True)
class Case:
    """Two runs, the profile of the predicted one, and the layer that must be blamed ("" for nobody)."""

    fault: str
    recorded: Run
    predicted: Run
    profile: LinearLatency | None = planted.TRUTH
    layer: str = ""
    clock: str = "queued"


def cases(settings: dict[str, Any], seed: int) -> Iterator[Case]:
    sent, config, noisy = planted.workload(seed), planted.config_of(settings), planted.Noisy(seed, 0.03, 0.0)
    vllm = settings["engine"] == "vllm"
    schedule, cache = ("schedule", "cache") if vllm else ("cache and schedule",) * 2
    short = settings | {"max_num_batched_tokens" if vllm else "chunked_prefill_size": 496}
    run = partial(simulate_engine, sent)
    recorded, predicted = run(config, noisy, planted.HOST), run(config, planted.TRUTH, planted.HOST)
    requests = Run(recorded.info, {"requests": recorded.requests})
    slow = run(config, planted.slower(1.1), planted.HOST)
    case = partial(Case, recorded=recorded, predicted=predicted)
    yield case("none")
    yield case("none", clock="arrival")
    yield case("none, no steps recorded", recorded=requests)
    yield case("none, no profile", profile=None)
    yield case("step times, simulation", predicted=slow, profile=planted.slower(1.1), layer="step times")
    yield case("step times, simulation, no profile", predicted=slow, profile=None, layer="step times")
    yield case(
        "step times, recording",
        recorded=run(config, planted.SlowNoisy(seed, 0.03, 0.0), planted.HOST),
        layer="step times",
    )
    yield case("steps table, simulation", predicted=planted.with_longer_steps(predicted), layer="step times")
    yield case("steps table, recording", recorded=planted.with_longer_steps(recorded), layer="step times")
    yield case(
        "budget, simulation", predicted=run(planted.config_of(short), planted.TRUTH, planted.HOST), layer=schedule
    )
    yield case(
        "budget, recording",
        recorded=planted.told(run(planted.config_of(short), noisy, planted.HOST), recorded),
        layer=schedule,
    )
    newest = planted.reversed_eviction(settings, sent, noisy)
    yield case("eviction, recording", recorded=planted.told(newest, recorded), layer=cache)
    if not vllm:  # the simulated engine of an attribution cannot be patched from outside
        yield case(
            "eviction, simulation", predicted=planted.reversed_eviction(settings, sent, planted.TRUTH), layer=cache
        )
    for where in ("recorded", "predicted"):
        source = recorded if where == "recorded" else predicted
        place = "recording" if where == "recorded" else "simulation"
        sent_early: dict[str, Any] = {where: planted.edited(source, planted.TIMES[:1], planted.early)}
        yield case(f"arrival, {place}", **sent_early, layer="arrival")
        yield case(f"arrival by its clock, {place}", **sent_early, layer="arrival", clock="arrival")
        in_us: dict[str, Any] = {where: planted.edited(source, planted.TIMES, lambda times: times // 1000)}
        yield case(f"units, {place}", **in_us, layer="units")
    queued = planted.edited(recorded, planted.TIMES[:2], planted.early)
    yield case("arrival and queue, recording", recorded=queued, layer="arrival")
    yield case(
        "arrival and queue, simulation",
        predicted=planted.edited(predicted, planted.TIMES[:2], planted.early),
        layer="arrival",
    )
    bare = Run(queued.info, {"requests": queued.requests})
    yield case("arrival and queue, recording, no steps", recorded=bare, layer="arrival")


def judge(case: Case, place: Path, capsys: pytest.CaptureFixture[str], gates: str = GATES) -> tuple[bool, set[str]]:
    """Whether a gate fails, and who is blamed."""
    place.mkdir()
    (place / "gates.toml").write_text(gates)
    beside = {}
    if case.profile is not None:
        Profile(kind="linear", latency=case.profile.to_json(), host=planted.HOST).write(place / "given.json")
        beside = {PROFILE_FILE: place / "given.json"}
    recorded = replace(case.recorded.info, kind="recorded")
    tables = {"requests": case.recorded.requests}
    if case.recorded.has("steps"):
        tables["steps"] = case.recorded.steps
    Run(recorded, tables).write(place / "recorded")
    case.predicted.write(place / "predicted", beside=beside)
    capsys.readouterr()
    words = ["validate", "attribution", str(place / "recorded"), str(place / "predicted"), "--clock", case.clock]
    code = main([*words, "--gates", str(place / "gates.toml"), "--json"])
    answer = capsys.readouterr()
    assert code in (0, 1), f"{case.fault}: {answer.err}"
    found = json.loads(answer.out)["attributions"]
    return code == 1, {one["blamed"] for one in found if one["blamed"] is not None}


@pytest.mark.parametrize("engine", planted.ENGINES)
def test_planted_faults(engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table: dict[str, list[int]] = {}
    for seed in SEEDS:
        for number, case in enumerate(cases(planted.ENGINES[engine], seed)):
            caught, blamed = judge(case, tmp_path / f"{seed}_{number}", capsys)
            row = table.setdefault(case.fault, [0, 0, 0, 0])
            row[0] += 1
            row[1] += caught
            row[2] += case.layer in blamed
            row[3] += bool(blamed - {case.layer})
    with capsys.disabled():
        print(f"\n{engine:40} cases caught blamed others")
        for fault, row in table.items():
            print(f"{fault:40} {row[0]:5} {row[1]:6} {row[2]:6} {row[3]:6}")
    for fault, (total, failed, right, others) in table.items():
        assert others == 0, fault
        if not fault.startswith("none"):
            assert failed == right == total, fault


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_step_times_under_the_noise_of_a_shared_machine(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """25 % of noise that hangs together over some steps, as on our CPU recordings."""
    settings = planted.ENGINES[engine]
    right = wrong = 0
    seeds = range(15)
    for seed in seeds:
        sent, config, noisy = planted.workload(seed), planted.config_of(settings), planted.Noisy(seed, 0.25, 0.5)
        recorded = simulate_engine(sent, config, noisy, planted.HOST)
        for factor in (1.0, 1.1):
            predicted = simulate_engine(sent, config, planted.slower(factor), planted.HOST)
            case = Case("noise", recorded, predicted, planted.slower(factor), "step times")
            _, blamed = judge(case, tmp_path / f"{seed}_{factor}", capsys)
            if factor == 1.0:
                wrong += bool(blamed)
            else:
                right += blamed == {"step times"}
    with capsys.disabled():
        print(f"\n{engine}: x 1.1 blamed {right} of {len(seeds)}, somebody without a fault {wrong} of {len(seeds)}")
    assert right >= 0.8 * len(seeds)
    assert wrong <= 2
