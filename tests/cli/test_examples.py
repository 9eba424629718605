"""sim/examples: the commands of its README, as they stand there, and the physics of what comes out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvtwin.sim
from kvtwin.reports.cli import main
from kvtwin.sim.engines import engine_config, simulate_engine
from kvtwin.sim.latency.profile import read_profile
from kvtwin.sim.vllm.config import read_settings
from kvtwin.traces.generate.conversations import Conversations, generate
from kvtwin.traces.generate.distribution import Distribution
from kvtwin.traces.run import Run

EXAMPLES = Path(kvtwin.sim.__path__[0]) / "examples"
LEVELS = ("idle", "device", "host", "disk")


def script() -> str:
    found = re.search(
        r"^```sh\n(.*?)^```", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert found
    return found[1].replace("X=sim/examples", f"X='{EXAMPLES}'")


def run_script(folder: Path, text: str) -> Path:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["sh", "-e", "-c", text]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "levels"


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's commands write."""
    return run_script(tmp_path_factory.mktemp("examples"), script())


def metrics_of(levels: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, list[float]]:
    """Each metric of the four levels."""
    assert main(["compare", *(str(levels / level) for level in LEVELS), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["notes"] == []
    return {metric["name"]: metric["values"] for metric in document["metrics"]}


@pytest.fixture
def found(levels: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, list[float]]:
    """Each metric of the four levels, as the README's commands run them."""
    return metrics_of(levels, capsys)


def test_each_level_finds_more_and_waits_less(found: dict[str, list[float]]) -> None:
    idle, device, host, disk = found["cached_tokens"]
    assert 0 == idle < device < host < disk
    assert found["cached_host_tokens"][:2] == [0, 0]
    assert found["cached_storage_tokens"][:3] == [0, 0, 0]
    assert min(found["cached_host_tokens"][2:]) > 0
    assert found["cached_storage_tokens"][3] > 0
    for metric in ("ttft_mean", "ttft_p50", "ttft_p99", "tpot_mean", "latency_mean"):
        assert found[metric] == sorted(found[metric], reverse=True), metric
    assert found["ttft_mean"][3] < 0.01 * found["ttft_mean"][0]
    assert found["throughput"][0] < found["throughput"][1] <= found["throughput"][2] <= found["throughput"][3] * 1.001


def test_found_and_computed_tokens_are_the_prompts(found: dict[str, list[float]]) -> None:
    parts = ("cached_device_tokens", "cached_host_tokens", "cached_storage_tokens", "computed_tokens")
    totals = {sum(found[part][level] for part in parts) for level in range(4)}
    assert len(totals) == 1
    assert found["prefetch_mean"][:2] == [0, 0]
    assert found["prefetch_mean"][3] > 0


# Rows of the README's tables: the metric, and what its unit is in the table's.
ROWS = {
    "TTFT mean": ("ttft_mean", 1e-3),
    "TTFT p99": ("ttft_p99", 1e-3),
    "TPOT mean": ("tpot_mean", 1),
    "latency mean": ("latency_mean", 1e-3),
    "output throughput": ("throughput", 1),
    "prompt tokens found in HBM": ("cached_device_tokens", 1e-6),
    "loaded from host DRAM": ("cached_host_tokens", 1e-6),
    "fetched from SSD": ("cached_storage_tokens", 1e-6),
    "computed": ("computed_tokens", 1e-6),
    "hit rate": ("hit_rate", 100),
}


def shown_between(start: str, end: str) -> dict[str, list[float]]:
    """The numbers of the table between two texts of the README, by row; "(-31.7 %)" and "1,403" as one reads them."""
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8").split(start)[1].split(end)[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {
        label: [float(value.split()[0].replace(",", "")) for value in row] for label, *row in cells if label in ROWS
    }


def test_the_readme_shows_what_comes_out(found: dict[str, list[float]]) -> None:
    shown = shown_between("## What comes out", "How to read it:")
    assert shown.keys() == ROWS.keys()
    for label, (metric, scale) in ROWS.items():
        assert shown[label] == pytest.approx([scale * value for value in found[metric]], rel=0.005), label


def test_the_readme_shows_what_comes_out_where_all_keep_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its second table, in ms: the same commands at 0.2 conversations a second."""
    calmer = script().replace("--conversation-rate 0.55", "--conversation-rate 0.2")
    found = metrics_of(run_script(tmp_path, calmer.split("kvtwin compare")[0]), capsys)
    shown = shown_between("(`--conversation-rate 0.2`)", "Two things differ")
    assert len(shown) == 5
    for label, values in shown.items():
        metric, scale = ROWS[label]
        scale = 1 if label.startswith("TTFT") else scale
        assert values == pytest.approx([scale * value for value in found[metric]], rel=0.005), label


def test_the_page_is_written(levels: Path) -> None:
    page = (levels / "page.html").read_text(encoding="utf-8")
    assert "IDLE / DEVICE / HOST / DISK" in page
    assert "hicache_storage_backend" in page


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_the_levels_differ_in_nothing_but_the_cache(engine: str) -> None:
    files = {level: EXAMPLES / f"{engine}-{level}.toml" for level in LEVELS}
    settings = {level: read_settings(path) for level, path in files.items()}
    caching = {"disable_radix_cache", "enable_prefix_caching"}
    common = [
        {
            key: value
            for key, value in found.items()
            if key not in caching and not key.startswith(("hicache", "kv_", "enable_h"))
        }
        for found in settings.values()
    ]
    assert common.count(common[0]) == 4
    assert settings["device"].items() <= settings["host"].items()
    for level, path in files.items():
        engine_config(settings[level], path)


def simulate_vllm(level: str, times_smaller: int, turn_interval: str) -> Run:
    """A small workload on a vLLM file as it is but for the sizes of GPU and host."""
    spec = Conversations(
        num_conversations=20,
        rate_per_s=1.0,
        burstiness=1.0,
        num_turns=Distribution.parse("3"),
        turn_interval_s=Distribution.parse(turn_interval),
        common_prefix_tokens=512,
        prefix_tokens=Distribution.parse("4000"),
        input_tokens=Distribution.parse("300"),
        output_tokens=Distribution.parse("50"),
    )
    path = EXAMPLES / f"vllm-{level}.toml"
    settings = read_settings(path)
    settings["num_gpu_blocks"] //= times_smaller
    if "kv_offloading_size" in settings:
        settings["kv_offloading_size"] /= times_smaller
    latency = read_profile(EXAMPLES / "h100-llama-3.1-8b.json").latency_model()
    return simulate_engine(generate(spec), engine_config(settings, path), latency)


def test_vllm_s_levels_find_more_and_more() -> None:
    runs = [simulate_vllm(level, 15, "exponential:12") for level in LEVELS]
    idle, device, host, disk = (sum(run.requests.column("cached_tokens").to_pylist()) for run in runs)
    assert 0 == idle < device < host < disk


def test_time_goes_on_while_all_that_wait_wait_for_the_disk() -> None:
    """Asynchronous scheduling then has an empty plan in flight at every step, which is no work to wait for."""
    run = simulate_vllm("disk", 25, "15")
    assert run.requests.column("finish_ns").null_count == 0
    assert sum(run.requests.column("cached_storage_tokens").to_pylist()) > 0
