"""The engines under one roof: settings to a config, a config to a simulated run."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from kvtwin.sim.latency.base import LatencyModel
from kvtwin.sim.latency.host import HostTime
from kvtwin.sim.sglang.config import SglangConfig, sglang_config
from kvtwin.sim.vllm.config import VllmConfig, vllm_config
from kvtwin.traces.run import Run

EngineConfig = VllmConfig | SglangConfig


def engine_config(settings: Mapping[str, Any], where: str | PathLike[str]) -> EngineConfig:
    """The config of the engine that `settings["engine"]` names; vLLM's where it names none.

    Raises:
        InputError: see `vllm_config` and `sglang_config`.
    """
    if settings.get("engine") == "sglang":
        return sglang_config(settings, where)
    return vllm_config(settings, where)


def simulate_engine(
    workload: Run, config: EngineConfig, latency: LatencyModel, host: HostTime | None = None, **options: Any
) -> Run:
    """Serve a workload's requests with the engine that `config` belongs to.

    Args:
        workload, config, latency, host: see the engine's own function.
        options: its keywords: `record_steps`, `record_cache`, `plain`, `source`, `progress`.

    Raises:
        InputError: a request that the engine would refuse.
    """
    if isinstance(config, SglangConfig):
        from kvtwin.sim.sglang.simulate import simulate_sglang

        return simulate_sglang(workload, config, latency, host, **options)
    from kvtwin.sim.vllm.simulate import simulate

    return simulate(workload, config, latency, host, **options)
