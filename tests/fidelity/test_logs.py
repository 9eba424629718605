"""Prices from request logs, on a real GPU run and on synthetic truth; and the CPU recordings at their noise floor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvtwin.traces
from kvtwin.calibrate.kernels.compose import calibrate_kernels
from kvtwin.calibrate.logs.calibrate import calibrate_logs
from kvtwin.calibrate.logs.fit import GROWTH, fit_logs
from kvtwin.calibrate.logs.holdout import judge_log
from kvtwin.calibrate.logs.log import Log
from kvtwin.calibrate.models import model_spec
from kvtwin.calibrate.steps.calibrate import calibrate_steps
from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.regression import RegressionLatency
from kvtwin.sim.latency.stats import BatchStats, IntArray
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.simulate import simulate
from kvtwin.traces.readers import read_run
from kvtwin.traces.readers.llmservingsim_profile import read_kernel_profile
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.traces.workload import with_prompts

pytestmark = pytest.mark.fidelity

CPU_RUNS = Path(kvtwin.traces.__path__[0]) / "targets" / "vllm-cpu-tiny" / "runs"
# vLLM 0.19 on this GPU; num_gpu_blocks is not recorded and never runs out (300 requests hold 452,992 tokens in all).
GPU_CONFIG = VllmConfig(
    num_gpu_blocks=36_000, version="0.19", max_num_seqs=128, max_num_batched_tokens=2048, max_model_len=131_072
)


def gpu_log(shared: Path) -> Log:
    runs = shared / "data/runs/llmservingsim"
    workload = read_run(runs / "workloads/sharegpt-llama-3.1-8b-300-sps10.jsonl.gz")
    return Log.of(with_prompts(read_run(runs / "RTXPRO6000__Llama-3.1-8B"), workload), GPU_CONFIG)


def errors(name: str, log: Log, latency: LatencyModel) -> dict[str, float]:
    """Signed errors of mean and quantiles, and the per-request MAPE; printed as a row."""
    found: dict[str, float] = {}
    for time, (measured, simulated) in judge_log(log, latency).items():
        found |= {f"{time} mean": simulated.mean() / measured.mean() - 1}
        found |= {
            f"{time} p{q}": np.quantile(simulated, q / 100) / np.quantile(measured, q / 100) - 1 for q in (50, 90, 99)
        }
        found |= {f"{time} MAPE": float(np.mean(np.abs(simulated / measured - 1)))}
    print(f"\n{name}: " + ", ".join(f"{key} {value:+.1%}" for key, value in found.items()))
    return found


def test_the_first_half_of_a_gpu_log_predicts_the_second(shared: Path) -> None:
    """No kernel was measured, no step seen: beside the profile from kernel tables, on the same 150 requests."""
    log = gpu_log(shared)
    later = log.halves()[1]
    profile = calibrate_logs([log])
    print("\nfitted on all 300:", profile.latency, profile.provenance["doubt"])
    chosen = [name for names in _features(profile.provenance["features"]) for name in names]
    from_log = errors("from the first half of the log", later, fit_logs([log.halves()[0]], chosen).latency)
    tables = shared / "data/profiles/llmservingsim/RTXPRO6000/meta-llama/Llama-3.1-8B/bf16"
    model = model_spec("meta-llama/Llama-3.1-8B")
    errors("from kernel tables", later, calibrate_kernels(read_kernel_profile(tables, 1), model=model).latency_model())
    assert abs(from_log["ttft mean"]) < 0.02
    assert abs(from_log["tpot mean"]) < 0.03
    assert abs(from_log["latency mean"]) < 0.02
    assert from_log["latency MAPE"] < 0.02


def _features(chosen: str) -> list[tuple[str, ...]]:
    names = list(GROWTH)
    return [GROWTH[name] for name in names[: names.index(chosen) + 1]]


@pytest.mark.parametrize("workload", ["poisson", "saturated", "shared_prefix"])
def test_requests_alone_on_the_cpu_recordings(workload: str) -> None:
    """The machine's own drift between the halves is in these errors; they are shown, and gated where they are sane."""
    found = calibrate_logs([_cpu_log(workload)]).accuracy
    for time, one in found.items():
        shown = ", ".join(f"{key} {value:+.1%}" for key, value in one["distribution"].items())
        print(f"\n{workload} {time}: {shown}, MAPE {one['mape']:.1%}")
    assert found["latency"]["mape"] < 0.6


def _cpu_log(workload: str) -> Log:
    run = Run.open(CPU_RUNS / f"{workload}_1")
    blocks = int(run.info.engine_config["num_gpu_blocks"])
    config = VllmConfig(
        num_gpu_blocks=blocks, block_size=32, max_model_len=4096, max_num_seqs=64, max_num_batched_tokens=512,
        async_scheduling=False, enable_prefix_caching=workload == "shared_prefix",
    )  # fmt: skip
    return Log.of(run, config)


def test_steps_of_every_other_recording_lie_at_the_noise_floor() -> None:
    """Fitted on the two sweeps: at most 1.3 x the floor of each of ten recordings, against the floor that repeats show
    and against the strict one, which knows the mean of every single batch from the other recordings."""
    test = [path for path in sorted(CPU_RUNS.iterdir()) if not path.name.startswith("sweep")]
    profile = calibrate_steps(
        [Run.open(CPU_RUNS / name) for name in ("sweep_1", "sweep_2")], test=[Run.open(p) for p in test]
    )
    for path in test:
        found = profile.accuracy[f"test: {path.name}"]
        floors, ratios = found["floor"], found["ratio"]
        print(
            f"\n{path.name}: MAPE {found['mape']:.1%}, p90 {found['p90']:.1%}, bias {found['bias']:+.1%}; floors "
            f"{floors['repeat']:.1%} / {floors['known']:.1%} / {floors['within']:.1%}, ratios {ratios['repeat']:.2f} / "
            f"{ratios['known']:.2f} / {ratios['within']:.2f}"
        )
        assert ratios["repeat"] < 1.3
        assert ratios["known"] < 1.3


# ---- coverage of the intervals on synthetic logs -------------------------------------------------------------


PRICES = {"step": 8e6, "prefill_tokens": 4e4, "decode_context": 60.0, "num_reqs": 5e4}
SYNTHETIC = VllmConfig(
    num_gpu_blocks=20_000, max_num_batched_tokens=2048, max_num_seqs=128, async_scheduling=False,
    enable_prefix_caching=False,
)  # fmt: skip


class _Noisy:
    def __init__(self, noise: float, seed: int) -> None:
        self._latency = RegressionLatency(PRICES)
        self._factor = np.random.default_rng(seed).gamma(1 / noise**2, noise**2, 200_000)

    def step_ns(self, batches: BatchStats, first_step: int) -> IntArray:
        factor = self._factor[first_step : first_step + len(batches)]
        found: IntArray = np.maximum(np.rint(self._latency.step_ns(batches, first_step) * factor), 1).astype(np.int64)
        return found


def _synthetic(seed: int, noise: float, rate: float) -> Log:
    rng = np.random.default_rng([seed, 7])
    columns = {
        "request_id": [f"r{i}" for i in range(200)],
        "arrival_ns": np.cumsum(rng.exponential(1e9 / rate, 200)).astype(np.int64).tolist(),
        "input_tokens": rng.integers(20, 1500, 200).tolist(),
        "output_tokens": rng.integers(10, 400, 200).tolist(),
    }
    workload = Run(RunInfo("workload"), {"requests": from_columns("requests", columns, "run")})
    return Log.of(simulate(workload, SYNTHETIC, _Noisy(noise, seed)), SYNTHETIC)


@pytest.mark.parametrize(("noise", "rate"), [(0.1, 8.0), (0.3, 3.0)])
def test_intervals_of_logs_cover_the_truth(noise: float, rate: float) -> None:
    """20 logs each; nominal 95 %."""
    hits: dict[str, list[bool]] = {name: [] for name in PRICES}
    known: dict[str, list[bool]] = {name: [] for name in PRICES}
    for seed in range(20):
        found = fit_logs([_synthetic(seed, noise, rate)], (*PRICES, "prefill_pairs")).doubt.parameters
        for name, truth in PRICES.items():
            low, high = found[name].interval
            hits[name].append(low <= truth <= high)
            known[name].append(found[name].known)
    shares = {name: float(np.mean(values)) for name, values in hits.items()}
    print(
        f"\nnoise {noise}, {rate} requests/s: covered {shares}, known { ({k: float(np.mean(v)) for k, v in known.items()}) }"
    )
    assert np.mean(list(shares.values())) > 0.88
    assert min(shares.values()) > 0.75
    assert np.mean(known["step"]) == np.mean(known["prefill_tokens"]) == 1.0
    assert np.mean(known["decode_context"]) < 0.5  # a log of such a load hardly tells context from requests
