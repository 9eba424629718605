"""A simulated SGLang run, replayed from its own log: the replay's loop must turn when the engine's did."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.sglang.simulate import simulate_sglang
from kvtwin.traces.errors import KvtwinError
from kvtwin.validate.scheduler.compare import compare_schedulers
from kvtwin.validate.scheduler.replay import replay_schedule

sys.path.insert(0, str(Path(__file__).parent))
from sglang_workloads_random import configs, workloads  # type: ignore[import-not-found]  # beside this file

LATENCY = LinearLatency(1_000_000, 20_000, 50, 10_000)


@settings(
    max_examples=int(os.environ.get("KVTWIN_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(st.data())
def test_a_run_is_replayed_from_its_own_log(data: st.DataObject) -> None:
    # When a call that waits for write-backs began, and preemptions of requests that are then lost, are in no log.
    config = data.draw(
        configs().filter(lambda c: c.hicache_write_policy != "write_back" and not c.enable_priority_scheduling)
    )
    workload = data.draw(workloads(config))
    try:
        run = simulate_sglang(workload, config, LATENCY)
    except KvtwinError:
        assume(False)
    finding, _ = compare_schedulers(run, replay_schedule(run, config), name="own")
    assert finding.num_identical == finding.num_steps == run.steps.num_rows
