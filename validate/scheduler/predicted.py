"""What `kvtwin validate scheduler MEASURED PREDICTED` compares with: another run, or an engine to replay the log on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

from kvtwin.sim.engines import EngineConfig, engine_config
from kvtwin.sim.vllm.config import read_settings, recorded_settings
from kvtwin.traces.readers import read_run
from kvtwin.traces.readers.sglang_log import engine_settings
from kvtwin.traces.run import Run
from kvtwin.validate.scheduler.replay import NOTES, replay_schedule
from kvtwin.validate.scheduler.slots import schedules_ahead

_ENGINE_FILES: Final = (".toml", ".json")
_ENGINES: Final = ("vllm", "sglang")
_OWN_TIMES: Final = (
    "the other run decided at times of its own, so other step times part the two as well: give engine settings "
    "(.toml, .json) instead, and the recording is replayed at its own times"
)


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
        run = read_run(path)
        info = replace(run.info, source={**run.info.source, NOTES: [*run.info.source.get(NOTES, ()), _OWN_TIMES]})
        noted = Run(info, {name: getattr(run, name) for name in ("requests", "steps") if run.has(name)}, name=str(path))
        noted.path = run.path
        return noted
    settings = replay_settings(measured, {} if path is None else read_settings(path), path)
    config = engine_config(settings, path or measured.path or "the recording")
    run = replay_schedule(measured, config)
    if left_open := _left_open(settings, config):
        run.info.source[NOTES].append(f"neither recording nor engine file says, so the default: {left_open}")
    return run


def replay_settings(measured: Run, settings: Mapping[str, Any], path: Path | None = None) -> dict[str, Any]:
    """Settings of the engine to replay a recording on: those given, and the recording's own for what they leave out.

    Args:
        measured: the recording.
        settings: under their upstream names; `engine` says whose, where it is not the recording's.
        path: the file they stand in, for messages.

    Raises:
        InputError: an oracle case without settings.
    """
    recorded, _, version = (measured.info.engine or "").partition(" ")
    version = version.split(" ")[0]  # of "0.5.9 (rules of 0.5.9)"
    if {"config", "workload"} <= settings.keys():  # an SGLang case of the oracle
        settings = engine_settings(settings, version, path or Path("the case"))
    engine = settings.get("engine") or (recorded if recorded in _ENGINES else "vllm")
    own: dict[str, Any] = {}
    if recorded in ("", engine):
        own = dict(measured.info.engine_config)
        own = (recorded_settings(own) if engine == "vllm" else own) | {"version": version or None}
    if engine == "vllm" and "async_scheduling" not in own and measured.has("steps"):
        own["async_scheduling"] = schedules_ahead(measured)
    return {**own, **settings, "engine": engine}


def _left_open(settings: Mapping[str, Any], config: EngineConfig) -> str:
    """What nobody said, as `name = value`."""
    given = {name.removeprefix("--").replace("-", "_") for name, value in settings.items() if value is not None}
    names = [field.name for field in fields(config) if field.name not in given]
    return ", ".join(f"{name} = {getattr(config, name)!r}" for name in names)
