"""Faults of each kind, in the prediction or in the recording: how many a gate catches, and who is blamed for them.

`kvtwin validate attribution RECORDED PREDICTED --gates` on runs that were simulated with noise on every step, so that
the truth is known. Prints a table; validate/README.md has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kvtwin.reports.cli import main
from kvtwin.sim.engines import EngineConfig, engine_config, simulate_engine
from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.profile import PROFILE_FILE, Profile
from kvtwin.sim.latency.stats import BatchStats, IntArray
from kvtwin.sim.vllm.block_pool import BlockPool
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

pytestmark = pytest.mark.fidelity

TRUTH = LinearLatency(base_ns=6_000_000, per_new_token_ns=40_000, per_context_token_ns=60, per_req_ns=20_000)
HOST = HostTime(schedule_ns=200_000, update_ns=150_000, frontend_ns=60_000_000)
VLLM: dict[str, Any] = {
    "engine": "vllm",
    "num_gpu_blocks": 420,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 512,
    "max_model_len": 2048,
}
SGLANG: dict[str, Any] = {
    "engine": "sglang",
    "version": "0.5.9",
    "max_total_tokens": 6144,
    "page_size": 16,
    "chunked_prefill_size": 512,
}
ENGINES = {
    "vllm": VLLM | {"async_scheduling": False},
    "vllm async": VLLM | {"async_scheduling": True},
    "sglang": SGLANG | {"disable_overlap_schedule": True},
    "sglang overlap": SGLANG,
}
# As wide as what 3 % of noise on each step does where requests queue.
GATES = "[gates]\nttft_mean = 0.1\nttft_arrival = 0.05\ntpot_mean = 0.04\nlatency_mean = 0.05\nstep_bias = 0.02\nidentical_steps = 0.0\n"
SEEDS = range(3)
TIMES = ("arrival_ns", "queued_ns", "scheduled_ns", "first_token_ns", "finish_ns")


class Noisy:
    """The truth with lognormal noise on every step: an AR(1) over steps."""

    def __init__(self, seed: int, size: float, rho: float) -> None:
        rng = np.random.default_rng(seed)
        noise = rng.normal(size=50_000)
        for step in range(1, len(noise)):
            noise[step] = rho * noise[step - 1] + np.sqrt(1 - rho**2) * noise[step]
        self._factor = np.exp(size * noise - size**2 / 2)

    def step_ns(self, batches: BatchStats, first_step: int) -> IntArray:
        factor = self._factor[first_step : first_step + len(batches)]
        times: IntArray = np.rint(TRUTH.step_ns(batches, first_step) * factor).astype(np.int64)
        return times


def workload(seed: int, num_requests: int = 250) -> Run:
    """Poisson arrivals; prompts of families that come and go share 320 tokens."""
    rng = np.random.default_rng(seed)
    family = np.maximum(np.arange(num_requests) // 10 - rng.geometric(0.4, num_requests) + 1, 0)
    num_blocks = rng.integers(21, 40, num_requests)
    hashes = [
        [1 + int(one) * 100 + block if block < 20 else 10_000 + row * 100 + block for block in range(total)]
        for row, (one, total) in enumerate(zip(family, num_blocks, strict=True))
    ]
    columns = {
        "request_id": [f"r{row}" for row in range(num_requests)],
        "arrival_ns": 1_000_000_000 + (np.cumsum(rng.exponential(0.08, num_requests)) * 1e9).astype(np.int64),
        "input_tokens": num_blocks * 16,
        "output_tokens": rng.integers(4, 60, num_requests),
        "block_hashes": hashes,
    }
    return Run(RunInfo("workload", hash_block_tokens=16), {"requests": from_columns("requests", columns, "made here")})


def config_of(settings: dict[str, Any]) -> EngineConfig:
    return engine_config(settings, "test")


def slower(factor: float) -> LinearLatency:
    return LinearLatency(**{name: round(factor * value) for name, value in TRUTH.to_json().items()})


class SlowNoisy(Noisy):
    def step_ns(self, batches: BatchStats, first_step: int) -> IntArray:
        times: IntArray = np.rint(1.1 * super().step_ns(batches, first_step)).astype(np.int64)
        return times


def edited(run: Run, columns: tuple[str, ...], change: Callable[[IntArray], IntArray]) -> Run:
    """The run with some times of its requests changed."""
    table = run.requests
    for name in columns:
        index = table.schema.get_field_index(name)
        table = table.set_column(index, table.schema.field(index), pa.array(change(table.column(name).to_numpy())))
    return Run(run.info, {"requests": table, "steps": run.steps})


def with_longer_steps(run: Run) -> Run:
    steps = run.steps
    start, end = (steps.column(name).to_numpy() for name in ("start_ns", "end_ns"))
    index = steps.schema.get_field_index("end_ns")
    longer = pa.array(start + np.rint(1.1 * (end - start)).astype(np.int64))
    return Run(
        run.info, {"requests": run.requests, "steps": steps.set_column(index, steps.schema.field(index), longer)}
    )


def reversed_eviction(settings: dict[str, Any], sent: Run, latency: LatencyModel) -> Run:
    """What the engine would do that evicts the newest first."""
    if settings["engine"] == "sglang":
        return simulate_engine(sent, config_of(settings | {"radix_eviction_policy": "mru"}), latency, HOST)
    allocate = BlockPool.allocate

    def newest_first(pool: BlockPool, count: int) -> IntArray:
        for block in reversed(pool.free_order()):
            pool._free.move_to_end(block)
        return allocate(pool, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockPool, "allocate", newest_first)
        return simulate_engine(sent, config_of(settings), latency, HOST, plain=True)


@dataclass(frozen=True)
class Case:
    """Two runs, the profile of the predicted one, and the layer that must be blamed ("" for nobody)."""

    fault: str
    recorded: Run
    predicted: Run
    profile: LinearLatency | None = TRUTH
    layer: str = ""
    clock: str = "queued"


def early(times: IntArray) -> IntArray:
    return times - 50_000_000


def cases(settings: dict[str, Any], seed: int) -> Iterator[Case]:
    sent, config, noisy = workload(seed), config_of(settings), Noisy(seed, 0.03, 0.0)
    vllm = settings["engine"] == "vllm"
    schedule, cache = ("schedule", "cache") if vllm else ("cache and schedule",) * 2
    short = settings | {"max_num_batched_tokens" if vllm else "chunked_prefill_size": 496}
    run = partial(simulate_engine, sent)
    recorded, predicted = run(config, noisy, HOST), run(config, TRUTH, HOST)
    requests = Run(recorded.info, {"requests": recorded.requests})
    slow = run(config, slower(1.1), HOST)
    case = partial(Case, recorded=recorded, predicted=predicted)
    yield case("none")
    yield case("none", clock="arrival")
    yield case("none, no steps recorded", recorded=requests)
    yield case("none, no profile", profile=None)
    yield case("step times, simulation", predicted=slow, profile=slower(1.1), layer="step times")
    yield case("step times, simulation, no profile", predicted=slow, profile=None, layer="step times")
    yield case("step times, recording", recorded=run(config, SlowNoisy(seed, 0.03, 0.0), HOST), layer="step times")
    yield case("steps table, simulation", predicted=with_longer_steps(predicted), layer="step times")
    yield case("steps table, recording", recorded=with_longer_steps(recorded), layer="step times")
    yield case("budget, simulation", predicted=run(config_of(short), TRUTH, HOST), layer=schedule)
    yield case("budget, recording", recorded=told(run(config_of(short), noisy, HOST), recorded), layer=schedule)
    newest = reversed_eviction(settings, sent, noisy)
    yield case("eviction, recording", recorded=told(newest, recorded), layer=cache)
    if not vllm:  # the simulated engine of an attribution cannot be patched from outside
        yield case("eviction, simulation", predicted=reversed_eviction(settings, sent, TRUTH), layer=cache)
    for where in ("recorded", "predicted"):
        source = recorded if where == "recorded" else predicted
        place = "recording" if where == "recorded" else "simulation"
        sent_early: dict[str, Any] = {where: edited(source, TIMES[:1], early)}
        yield case(f"arrival, {place}", **sent_early, layer="arrival")
        yield case(f"arrival by its clock, {place}", **sent_early, layer="arrival", clock="arrival")
        in_us: dict[str, Any] = {where: edited(source, TIMES, lambda times: times // 1000)}
        yield case(f"units, {place}", **in_us, layer="units")
    queued = edited(recorded, TIMES[:2], early)
    yield case("arrival and queue, recording", recorded=queued, layer="arrival")
    yield case("arrival and queue, simulation", predicted=edited(predicted, TIMES[:2], early), layer="arrival")
    bare = Run(queued.info, {"requests": queued.requests})
    yield case("arrival and queue, recording, no steps", recorded=bare, layer="arrival")


def told(run: Run, as_of: Run) -> Run:
    """The run, said to be of another engine's settings: those that the prediction goes by."""
    return Run(as_of.info, {"requests": run.requests, "steps": run.steps})


def judge(case: Case, place: Path, capsys: pytest.CaptureFixture[str], gates: str = GATES) -> tuple[bool, set[str]]:
    """Whether a gate fails, and who is blamed."""
    place.mkdir()
    (place / "gates.toml").write_text(gates)
    beside = {}
    if case.profile is not None:
        Profile(kind="linear", latency=case.profile.to_json(), host=HOST).write(place / "given.json")
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


@pytest.mark.parametrize("engine", ENGINES)
def test_planted_faults(engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table: dict[str, list[int]] = {}
    for seed in SEEDS:
        for number, case in enumerate(cases(ENGINES[engine], seed)):
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
    settings = ENGINES[engine]
    right = wrong = 0
    seeds = range(15)
    for seed in seeds:
        sent, config, noisy = workload(seed), config_of(settings), Noisy(seed, 0.25, 0.5)
        recorded = simulate_engine(sent, config, noisy, HOST)
        for factor in (1.0, 1.1):
            predicted = simulate_engine(sent, config, slower(factor), HOST)
            case = Case("noise", recorded, predicted, slower(factor), "step times")
            _, blamed = judge(case, tmp_path / f"{seed}_{factor}", capsys)
            if factor == 1.0:
                wrong += bool(blamed)
            else:
                right += blamed == {"step times"}
    with capsys.disabled():
        print(f"\n{engine}: x 1.1 blamed {right} of {len(seeds)}, somebody without a fault {wrong} of {len(seeds)}")
    assert right >= 0.8 * len(seeds)
    assert wrong <= 2
