"""Faults of each kind through `kvtwin check`: which gate catches them, and who is blamed for them.

A target as a user would write it (profile, recorded run, workload, engine settings, gates), its recording simulated
with noise on every step, so that the truth is known; then one fault in the recording, the settings, the profile or the
workload. Prints a table; validate/README.md has it.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvtwin.reports.cli import main
from kvtwin.sim.engines import simulate_engine
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.profile import Profile
from kvtwin.sim.latency.stats import IntArray
from kvtwin.traces.run import Run

sys.path.insert(0, str(Path(__file__).parent))
from planted import (  # type: ignore[import-not-found]  # beside this file
    ENGINES,
    HOST,
    TIMES,
    TRUTH,
    Noisy,
    SlowNoisy,
    config_of,
    early,
    edited,
    reversed_eviction,
    slower,
    told,
    with_longer_steps,
    workload,
)

pytestmark = pytest.mark.fidelity

# As wide as what 3 % of noise on each step does where requests queue.
GATES = """
ttft_mean = 0.1
ttft_arrival = 0.05
tpot_mean = 0.04
latency_mean = 0.05
step_bias = 0.02
identical_steps = 0.0
"""
SEEDS = range(3)


@dataclass(frozen=True)
class Case:
    """A target, and the layer that must be blamed ("" for nobody)."""

    fault: str
    recorded: Run
    sent: Run
    settings: dict[str, Any]
    latency: LinearLatency = TRUTH
    layer: str = ""
    clock: str = "queued"


def late(times: IntArray) -> IntArray:
    return times + 50_000_000


def part(change: Callable[[IntArray], IntArray]) -> Callable[[IntArray], IntArray]:
    """The change in the second half only."""

    def changed(times: IntArray) -> IntArray:
        half = len(times) // 2
        result = times.copy()
        result[half:] = change(times)[half:]
        return result

    return changed


def cases(settings: dict[str, Any], seed: int) -> Iterator[Case]:
    sent, config, noisy = workload(seed), config_of(settings), Noisy(seed, 0.03, 0.0)
    vllm = settings["engine"] == "vllm"
    schedule, cache = ("schedule", "cache") if vllm else ("cache and schedule",) * 2
    short = settings | {"max_num_batched_tokens" if vllm else "chunked_prefill_size": 496}
    run = partial(simulate_engine, sent)
    recorded = run(config, noisy, HOST)
    requests = Run(recorded.info, {"requests": recorded.requests})
    case = partial(Case, recorded=recorded, sent=sent, settings=settings)
    yield case("none")
    yield case("none", clock="arrival")
    yield case("none, no steps recorded", recorded=requests)
    yield case("step times, profile", latency=slower(1.1), layer="step times")
    yield case("step times, recording", recorded=run(config, SlowNoisy(seed, 0.03, 0.0), HOST), layer="step times")
    yield case("steps table, recording", recorded=with_longer_steps(recorded), layer="step times")
    yield case("budget, engine settings", settings=short, layer=schedule)
    yield case("budget, recording", recorded=told(run(config_of(short), noisy, HOST), recorded), layer=schedule)
    newest = reversed_eviction(settings, sent, noisy)
    yield case("eviction, recording", recorded=told(newest, recorded), layer=cache)
    if not vllm:
        yield case("eviction, engine settings", settings=settings | {"radix_eviction_policy": "mru"}, layer=cache)
    for factor, unit in ((1000, "us as ms"), (0.001, "ms as us")):
        yield case(f"units, profile: {unit}", latency=slower(factor), layer="step times")
    yield case("units, recording", recorded=edited(recorded, TIMES, lambda times: times // 1000), layer="units")
    for word, shift in (("early", early), ("late", late)):
        yield case(f"workload {word}", sent=edited(sent, TIMES[:1], shift, steps=False), layer="arrival")
        yield case(f"workload {word}, half", sent=edited(sent, TIMES[:1], part(shift), steps=False), layer="arrival")
        for clock in ("queued", "arrival"):
            moved = edited(recorded, TIMES[:1], shift)
            yield case(f"arrival {word}, recording", recorded=moved, layer="arrival", clock=clock)
            moved = edited(recorded, TIMES[:1], part(shift))
            yield case(f"arrival {word}, half, recording", recorded=moved, layer="arrival", clock=clock)
        moved = edited(recorded, TIMES[:2], shift)
        yield case(f"arrival and queue {word}, recording", recorded=moved, layer="arrival")
        bare = Run(moved.info, {"requests": moved.requests})
        yield case(f"arrival and queue {word}, no steps", recorded=bare, layer="arrival")


@dataclass(frozen=True)
class Verdict:
    """What one check said."""

    code: int
    failed: list[str]
    blamed: dict[str, list[str]]
    text: str


def check(case: Case, place: Path, capsys: pytest.CaptureFixture[str], gates: str | None = GATES) -> Verdict:
    place.mkdir()
    Profile(kind="linear", latency=case.latency.to_json(), host=HOST).write(place / "profile.json")
    tables = {name: getattr(case.recorded, name) for name in ("requests", "steps") if case.recorded.has(name)}
    Run(replace(case.recorded.info, kind="recorded"), tables).write(place / "run")
    case.sent.write(place / "sent")
    lines = [f"{key} = {json.dumps(value)}" for key, value in case.settings.items()]
    (place / "target.toml").write_text(
        f'name = "planted"\nprofile = "profile.json"\nrun = "run"\nworkload = "sent"\nclock = "{case.clock}"\n'
        + ("" if gates is None else f"[gates]\n{gates}\n")
        + "[engine]\n"
        + "\n".join(lines)
    )
    capsys.readouterr()
    code = main(["check", str(place), "-o", str(place / "out"), "--junit", str(place / "junit.xml")])
    answer = capsys.readouterr()
    if code == 2:
        return Verdict(code, [], {}, answer.err)
    report = json.loads((place / "out" / "checks.json").read_text())
    failed = [one["metric"] for one in report["checks"] if one["verdict"] == "fail"]
    assert code == bool(failed) == (report["verdict"] == "fail")
    assert len(ET.parse(place / "junit.xml").findall(".//failure")) == len(failed)
    blamed: dict[str, list[str]] = {}
    for one in report["attributions"]:
        if one["blamed"] is not None:
            blamed.setdefault(one["blamed"], []).append(one["metric"])
    return Verdict(code, failed, blamed, answer.out)


@pytest.mark.parametrize("engine", ENGINES)
def test_planted_faults(engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in SEEDS[:1]:
        for number, case in enumerate(cases(ENGINES[engine], seed)):
            found = check(case, tmp_path / f"{seed}_{number}", capsys)
            with capsys.disabled():
                fault = f"{case.fault} ({case.clock})"
                print(
                    f"{engine:14} {fault:45} {found.code} {','.join(found.failed):60} want {case.layer!r}: {found.blamed}"
                )
                if found.code == 2:
                    print(found.text)
