"""What `kvtwin validate scheduler MEASURED PREDICTED` compares with: another run, or an engine to replay the log on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvtwin.sim.sglang.config import sglang_config
from kvtwin.sim.vllm.config import read_settings, recorded_settings, vllm_config
from kvtwin.traces.readers import read_run
from kvtwin.traces.readers.sglang_log import engine_settings
from kvtwin.traces.run import Run
from kvtwin.validate.scheduler.replay import EngineConfig, replay_schedule
from kvtwin.validate.scheduler.slots import schedules_ahead

_ENGINE_FILES: Final = (".toml", ".json")
_ENGINES: Final = ("vllm", "sglang")


def predicted_run(measured: Run, path: Path | None) -> Run:
    """The run to compare a recording with.

    Args:
        measured: the recording.
        path: a run with steps, or a file of engine settings (.toml, .json) to replay the recording on; None to replay
            it on the engine that it says it was made with.

    Raises:
        InputError: neither of them, or something in it cannot be used.
    """
    if path is not None and not (path.is_file() and path.suffix in _ENGINE_FILES):
        return read_run(path)
    return replay_schedule(measured, engine_config(measured, {} if path is None else read_settings(path), path))


def engine_config(measured: Run, settings: Mapping[str, Any], path: Path | None) -> EngineConfig:
    """The engine to replay a recording on: the settings given, and the recording's own for what they leave out.

    Args:
        measured: the recording.
        settings: under their upstream names; `engine` says whose, where it is not the recording's.
        path: the file they stand in.

    Raises:
        InputError: something is missing or unknown.
    """
    where = path or measured.path or Path("the recording")
    recorded, _, version = (measured.info.engine or "").partition(" ")
    version = version.split(" ")[0]  # of "0.5.9 (rules of 0.5.9)"
    if {"config", "workload"} <= settings.keys():  # an SGLang case of the oracle
        settings = engine_settings(settings, version, where)
    engine = settings.get("engine") or (recorded if recorded in _ENGINES else "vllm")
    own: dict[str, Any] = {}
    if recorded in ("", engine):
        own = (
            dict(measured.info.engine_config) if engine == "sglang" else recorded_settings(measured.info.engine_config)
        )
        own |= {"version": version or None}
    if engine == "sglang":
        return sglang_config({**own, **settings, "engine": engine}, where)
    if engine == "vllm" and "async_scheduling" not in own:
        own["async_scheduling"] = schedules_ahead(measured)
    return vllm_config({**own, **settings, "engine": engine}, where)
