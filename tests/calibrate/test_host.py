"""Host time between steps: known engines, idle waits, stalls, asynchronous engines, and a real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvtwin.traces
from kvtwin.calibrate.host import fit_host_time, host_accuracy
from kvtwin.calibrate.steps.calibrate import calibrate_steps
from kvtwin.sim.latency.host import HostTime
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

MakeRun = Callable[..., Run]
RUNS = Path(kvtwin.traces.__path__[0]) / "targets" / "vllm-cpu-tiny" / "runs"

# Ten groups of four requests, 40 steps each: the first goes on throughout, the others join for some of the steps.
SIZES = np.tile(np.repeat([1, 4, 2, 3], 10), 10)
BATCHES = [[(step // 40 * 4 + member, 50, 1) for member in range(size)] for step, size in enumerate(SIZES.tolist())]
HOST = HostTime(schedule_ns=80_000, schedule_per_req_ns=10_000, update_ns=150_000, update_per_req_ns=20_000)


def recording(make_run: MakeRun, *, idle: bool = False, noise: float = 0.0, seed: int = 0, **changes: object) -> Run:
    """A synchronous engine of HOST; with `idle`, it waits 5 s for an arrival after every 40th step."""
    rng = np.random.default_rng(seed)
    factor = rng.gamma(1 / noise**2, noise**2, (2, len(SIZES))) if noise else np.ones((2, len(SIZES)))
    schedule = np.rint(factor[0] * [HOST.schedule(size) for size in SIZES.tolist()]).astype(int)
    update = np.rint(factor[1] * [HOST.update(size) for size in SIZES.tolist()]).astype(int)
    waits = [5_000_000_000 if idle and step % 40 == 39 else 0 for step in range(len(SIZES))]
    given = {"schedule_ns": schedule.tolist(), "update_ns": update.tolist(), "idle_ns": waits, **changes}
    return make_run(BATCHES, np.full(len(SIZES), 1_000_000), **given)


@pytest.mark.parametrize("idle", [False, True])
def test_exact_times_come_back_and_waits_do_not_count(make_run: MakeRun, idle: bool) -> None:
    host, note = fit_host_time([recording(make_run, idle=idle)])
    assert host == HOST
    assert note == "fitted on 390 pairs of steps without a wait between them"  # 400 steps in 10 groups


def test_noisy_times_come_back_on_average(make_run: MakeRun) -> None:
    host, _ = fit_host_time([recording(make_run, idle=True, noise=0.3, seed=seed) for seed in range(5)])
    assert host.schedule(2) == pytest.approx(HOST.schedule(2), rel=0.03)
    assert host.update(3) == pytest.approx(HOST.update(3), rel=0.03)
    assert host.update_per_req_ns == pytest.approx(HOST.update_per_req_ns, rel=0.15)


def test_a_stall_does_not_count_as_host_time(make_run: MakeRun) -> None:
    update = [HOST.update(size) for size in SIZES.tolist()]
    update[7] += 3_000_000_000
    host, _ = fit_host_time([recording(make_run, update_ns=update)])
    assert host.update(3) == pytest.approx(HOST.update(3), rel=0.01)


def test_recordings_without_schedule_times_have_a_free_host(make_run: MakeRun) -> None:
    silent = recording(make_run, schedule_ns=None)
    assert fit_host_time([silent]) == (HostTime(), "none: the recordings do not say when schedule() was called")
    profile = calibrate_steps([silent])
    assert profile.host == HostTime()
    assert str(profile.provenance["host_time"]).startswith("none: ")


def test_a_silent_recording_takes_nothing_from_one_that_speaks(make_run: MakeRun) -> None:
    both = [recording(make_run, schedule_ns=None), recording(make_run)]
    assert fit_host_time(both)[0] == HOST


def test_too_few_pairs_are_no_evidence(make_run: MakeRun) -> None:
    lonely = make_run([[(n, 5, 1)] for n in range(60)], [1000] * 60, schedule_ns=[10] * 60, update_ns=[10] * 60)
    host, note = fit_host_time([lonely])
    assert host == HostTime()
    assert note == "none: only 0 pairs of steps without a wait, 20 are needed"


def asynchronous(gaps_ns: list[int]) -> Run:
    """Each step is planned while the one ahead of it runs."""
    start = np.concatenate([[0], np.cumsum(1_000_000 + np.array(gaps_ns))])
    count = len(start)
    steps = {
        "step": range(count),
        "sched_ns": start - 500_000,
        "start_ns": start,
        "end_ns": start + 1_000_000,
        "update_ns": start + 1_200_000,
        "request": [[0]] * count,
        "cache_len": [[5]] * count,
        "input_len": [[1]] * count,
    }
    requests = {"request_id": ["r"], "arrival_ns": [0], "input_tokens": [5], "output_tokens": [count]}
    tables = {"requests": from_columns("requests", requests, "run"), "steps": from_columns("steps", steps, "run")}
    return Run(RunInfo("recorded"), tables)


def test_an_asynchronous_engine_shows_its_gap_only() -> None:
    host, note = fit_host_time([asynchronous([20_000, 0, 30_000, 25_000, 9_000_000])])
    assert host == HostTime(gap_ns=27_500)
    assert note == "median of 4 positive gaps between back-to-back steps of an asynchronous engine"
    assert host_accuracy([asynchronous([20_000] * 9)] * 2) == {}


def test_an_asynchronous_engine_without_gaps() -> None:
    assert fit_host_time([asynchronous([0, 0, 0])])[0] == HostTime()


def test_host_time_is_held_out_by_run(make_run: MakeRun) -> None:
    """Twice the host time in one run: the other cannot know."""
    double = [2 * HOST.update(size) for size in SIZES.tolist()]
    doubled = [2 * HOST.schedule(size) for size in SIZES.tolist()]
    runs = [recording(make_run), recording(make_run, update_ns=double, schedule_ns=doubled)]
    found = host_accuracy(runs)["time between steps"]
    assert found["n"] == 780
    assert found["mape"] == pytest.approx(0.75, abs=0.001)  # + 100 % on one, - 50 % on the other
    assert host_accuracy(runs[:1]) == {}


def test_going_on_agrees_with_the_engine_s_own_counts() -> None:
    """No step of the real recordings is taken for busy where nobody runs or waits, nor the other way round."""
    for name in ("sweep_1", "poisson_1", "saturated_1", "shared_prefix_1"):
        run = Run.open(RUNS / name)
        steps = run.steps
        finished = np.array([len(rows) for rows in steps.column("finished").to_pylist()])
        left = steps.column("num_waiting").to_numpy() + steps.column("num_running").to_numpy() - finished
        _, note = fit_host_time([run])
        assert note == f"fitted on {np.count_nonzero(left[:-1] > 0)} pairs of steps without a wait between them"


def test_a_real_engine_s_host_time_is_as_its_makers_saw_it() -> None:
    """The recordings' README: schedule 80 to 200 us, update and the rest of the loop 105 to 280 us (medians)."""
    host, _ = fit_host_time([Run.open(RUNS / name) for name in ("sweep_1", "sweep_2")])
    assert 80_000 < host.schedule(2) < 200_000
    assert 105_000 < host.update(2) < 280_000
    assert host.gap_ns == 0
