"""The noise floors of our own recordings of a real engine on a CPU, which lie in ../shared."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtwin.calibrate.noise import step_floor
from kvtwin.traces.readers import vllm_recording
from kvtwin.validate.e2e import compare_e2e


@pytest.mark.parametrize(
    ("workload", "repeats"), [("sweep", 2), ("poisson", 3), ("saturated", 4), ("shared_prefix", 3)]
)
def test_recordings_of_one_workload_differ_and_say_so(shared: Path, workload: str, repeats: int) -> None:
    runs = [
        vllm_recording.read(shared / "data" / "vllm_cpu" / f"{workload}_{number}") for number in range(1, repeats + 1)
    ]
    floor = step_floor(runs)
    assert floor is not None
    assert floor.matched > 0.7
    assert 0.15 < floor.metrics["step_mape"] < 0.5
    assert floor.drift > 1.1
    checks = {c.metric: c for c in compare_e2e(*runs[:2], name=workload, clock="queued_ns", repeats=runs)}
    for metric in ("ttft_mape", "tpot_mean", "latency_mean"):
        measured_floor = checks[metric].noise_floor
        assert measured_floor is not None
        assert measured_floor > 0.1
