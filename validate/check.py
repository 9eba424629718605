"""The whole pipeline for one target: calibrate, simulate every workload, compare with every recording of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from kvtwin.calibrate.gpus import gpu_spec
from kvtwin.calibrate.kernels.compose import calibrate_kernels
from kvtwin.calibrate.models import ModelSpec, model_spec
from kvtwin.calibrate.noise import step_floor
from kvtwin.calibrate.steps.calibrate import calibrate_steps
from kvtwin.sim.engines import EngineConfig, engine_config, simulate_engine
from kvtwin.sim.latency.profile import Profile, read_profile
from kvtwin.sim.latency.stats import BatchStats
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers import read_run
from kvtwin.traces.readers.allreduce import read_allreduce
from kvtwin.traces.readers.llmservingsim_profile import read_kernel_profile
from kvtwin.traces.readers.text import provenance
from kvtwin.traces.run import Run
from kvtwin.traces.time import iso_day
from kvtwin.traces.workload import with_prompts
from kvtwin.validate.arrivals import sent_check
from kvtwin.validate.attribution.attribute import attribute
from kvtwin.validate.attribution.hybrids import Twin
from kvtwin.validate.beginning import beginning
from kvtwin.validate.e2e import compare_e2e, in_order_of
from kvtwin.validate.gates import DEFAULT_GATES, Gates, judge
from kvtwin.validate.peers import compare_prediction
from kvtwin.validate.result import Attribution, Check, Comparison, Peer, ScheduleFinding, TargetReport
from kvtwin.validate.scheduler.compare import compare_schedulers
from kvtwin.validate.scheduler.predicted import replay_settings
from kvtwin.validate.scheduler.replay import replay_schedule
from kvtwin.validate.step import build_predictions, compare_steps
from kvtwin.validate.target import Target, Workload

Progress = Callable[[str], None]

_MAX_REPLAYED_STEPS = 100_000  # a scheduler log is replayed call by call, at some 80 us a step
_GPU_MEMORY_UTILIZATION = 0.9  # vLLM's default


@dataclass
class _Notes:
    """What the report must say about how it came about."""

    engines: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    schedules: list[ScheduleFinding] = field(default_factory=list)
    attributions: list[Attribution] = field(default_factory=list)
    peers: list[Peer] = field(default_factory=list)


def check_target(target: Target, *, progress: Progress = lambda _: None) -> tuple[TargetReport, Profile]:
    """Calibrate the target's profile, simulate its workloads and judge the result.

    Args:
        target: see `target.read_target`.
        progress: called with what is being done.

    Raises:
        InputError: something in the target's files cannot be used.
    """
    progress("reading recordings")
    groups = [(workload, [read_run(path) for path in workload.runs]) for workload in target.workloads]
    first = _settings(target, groups[0][0], groups[0][1][0])
    progress("calibrating")
    profile = _profile(target, first, groups[0][1][0])
    notes = _Notes()
    if target.gates is DEFAULT_GATES:
        notes.remarks.append("target.toml has no [gates] table: kvtwin's default gates judge it")
    checks: list[Check] = []
    comparisons: list[Comparison] = []
    for workload, runs in groups:
        for comparison, judged in _judge_workload(target, profile, workload, runs, notes, progress):
            comparisons.append(comparison)
            checks += judged
    report = TargetReport(
        target=_facts(target, profile, [run for _, runs in groups for run in runs]),
        checks=tuple(checks),
        comparisons=tuple(comparisons),
        profile={key: value for key, value in profile.to_json().items() if key not in ("latency", "schema_version")},
        provenance={
            "kvtwin": version("kvtwin"),
            "target": target.path.name,
            "engine settings": notes.engines,
            "remarks": notes.remarks,
            "recordings": {comparison.name: dict(comparison.measured.info.source) for comparison in comparisons},
            **({"peers": sources} if (sources := _peer_sources(target)) else {}),
        },
        schedules=tuple(notes.schedules),
        attributions=tuple(notes.attributions),
        peers=tuple(notes.peers),
    )
    return report, profile


def _peer_sources(target: Target) -> dict[str, Any]:
    """Where other simulators' predictions come from, by workload and simulator."""
    return {
        workload.name: {
            name: provenance(path, "peers", [path] if path.is_file() else []) for name, path in workload.peers.items()
        }
        for workload in target.workloads
        if workload.peers
    }


def _facts(target: Target, profile: Profile, runs: Sequence[Run]) -> dict[str, str]:
    """What the target is; where it does not say so, the day of its oldest recording."""
    first = runs[0].info
    days = (iso_day(str(run.info.source.get("started_at"))) for run in runs)
    facts = {
        "hardware": profile.hardware or first.hardware,
        "model": target.model.name if target.model else profile.model or first.model,
        "engine": first.engine or profile.engine,
        "recorded": min(filter(None, days), default=None),
        **target.facts,
        "name": target.name,
    }
    return {key: value for key, value in facts.items() if value}


def _settings(target: Target, workload: Workload, run: Run) -> dict[str, Any]:
    """Engine settings: what the recording says, then the target's, then the workload's."""
    settings = replay_settings(run, {**target.engine, **workload.engine}, target.path)
    if target.tensor_parallel_size is not None:
        settings["tensor_parallel_size"] = target.tensor_parallel_size
    return {key: value for key, value in settings.items() if value is not None}


def _model(target: Target, *names: str | None) -> ModelSpec:
    if target.model is not None:
        return target.model
    name = next((name for name in names if name), None)
    if name is None:
        raise InputError("which model? Name it: model = 'meta-llama/Llama-3.1-8B'", path=target.path, column="model")
    try:
        return model_spec(name)
    except InputError as error:
        raise InputError(error.problem, path=target.path, column="model") from None


def _profile(target: Target, settings: Mapping[str, Any], run: Run) -> Profile:
    if target.profile is None:
        return calibrate_steps([read_run(path) for path in target.calibrate])
    if target.profile.is_file():
        return read_profile(target.profile)
    kernels = read_kernel_profile(target.profile, int(settings.get("tensor_parallel_size", 1)))
    try:
        return calibrate_kernels(
            kernels,
            model=_model(target, kernels.meta.get("model"), run.info.model),
            max_model_len=settings.get("max_model_len"),
            enforce_eager=bool(settings.get("enforce_eager", False)),
            collectives=read_allreduce(target.collectives) if target.collectives else None,
        )
    except InputError as error:
        raise InputError(error.problem, path=error.path or target.path, row=error.row, column=error.column) from None


def _judge_workload(
    target: Target,
    profile: Profile,
    workload: Workload,
    runs: Sequence[Run],
    notes: _Notes,
    progress: Progress,
) -> list[tuple[Comparison, list[Check]]]:
    """Simulate one workload and compare it with each of its recordings."""
    sent = read_run(workload.workload) if workload.workload else None
    names = tuple(path.name for path in workload.runs)
    floor = step_floor(runs) if len(runs) > 1 and all(run.has("steps") for run in runs) else None
    twins = _Twins(profile)
    result = []
    for name, run in zip(names, runs, strict=True):
        progress(f"simulating {name}")
        config = _config(target, workload, run, profile, notes)
        notes.engines[name] = asdict(config)
        twin = twins.of(with_prompts(run, sent), config)
        predictions = _predictions(run, profile)
        comparison = Comparison(name, run, twin.run, workload.clock, predictions, names if len(names) > 1 else ())
        progress(f"judging {name}")
        schedule, judged = None, []
        if predictions is not None:
            judged = compare_steps(predictions, name=name, floor=floor.metrics if floor else None, gates=target.gates)
            schedule, decisions = _compare_schedule(run, twin, name, target.gates)
            judged += decisions
        judged += compare_e2e(run, twin.run, name=name, clock=workload.clock, repeats=runs, gates=target.gates)
        judged += _compare_sending(run, sent, name, target.gates)
        notes.schedules += [] if schedule is None else [schedule]
        progress(f"attributing {name}")
        notes.attributions += attribute(run, twin, name=name, clock=workload.clock, checks=judged, schedule=schedule)
        for peer, path in workload.peers.items():
            told = compare_prediction(run, path, name=name, clock=workload.clock, repeats=runs)
            notes.peers.append(Peer(name, peer, tuple(told)))
        result.append((comparison, judged))
    return result


def _compare_sending(run: Run, sent: Run | None, name: str, gates: Gates) -> list[Check]:
    """Whether requests were sent when the workload says so. Simulated is what the recording says."""
    if sent is None:
        return []
    planned = in_order_of(run, sent, "the workload", may_hold_more=True)
    found = sent_check(run, planned, "the workload", name=name)
    return [] if found is None else [judge(found, gates)]


def _compare_schedule(run: Run, twin: Twin, name: str, gates: Gates) -> tuple[ScheduleFinding | None, list[Check]]:
    """The recorded scheduler beside the simulated one under its clock: of a long run, its beginning.

    A log that the simulated scheduler cannot follow at all has no finding, and a check without a value: its gate fails.
    """
    first, _ = beginning(run, _MAX_REPLAYED_STEPS)
    prompts = twin.workload.requests.column("block_hashes").slice(0, first.requests.num_rows)
    requests = first.requests.set_column(first.requests.schema.get_field_index("block_hashes"), "block_hashes", prompts)
    asked = Run(twin.workload.info, {"requests": requests, "steps": first.steps}, name=name)
    try:
        finding, checks = compare_schedulers(first, replay_schedule(asked, twin.config), name=name, gates=gates)
    except InputError as error:
        nan, num_steps = float("nan"), first.steps.num_rows
        note = f"error: the recorded steps cannot be replayed: {error.problem}"
        check = Check(
            name, "scheduler", "identical_steps", "steps", float(num_steps), nan, nan, None, num_steps, note=note
        )
        return None, [judge(check, gates)]
    checks = [check for check in checks if _is_told(check, finding)]
    if first is run:
        return finding, checks
    note = f"the first {first.steps.num_rows:,} of {run.steps.num_rows:,} steps"
    checks = [replace(check, note="; ".join([note, *([check.note] if check.note else [])])) for check in checks]
    return replace(finding, not_judged=(f"steps after {note}", *finding.not_judged)), checks


def _is_told(check: Check, schedule: ScheduleFinding) -> bool:
    """Queues, orders and sizes follow from the decisions: where those are identical, so are they."""
    differs = schedule.num_identical < schedule.num_steps
    return differs or check.metric in ("identical_steps", "free_blocks") or check.threshold is not None


class _Twins:
    """Simulated runs by what went in: repeats with equal arrivals and settings share one simulation."""

    _INPUTS = ("request_id", "arrival_ns", "input_tokens", "output_tokens", "priority", "block_hashes")

    def __init__(self, profile: Profile) -> None:
        self._host = profile.host
        self._latency = profile.latency_model()
        self._known: list[tuple[pa.Table, EngineConfig, Run]] = []

    def of(self, workload: Run, config: EngineConfig) -> Twin:
        """The twin of a workload on an engine."""
        asked = workload.requests.select(list(self._INPUTS))
        for inputs, settings, run in self._known:
            if settings == config and inputs.equals(asked):
                return Twin(workload, config, self._latency, self._host, run)
        run = simulate_engine(workload, config, self._latency, self._host)
        self._known.append((asked, config, run))
        return Twin(workload, config, self._latency, self._host, run)


def _config(target: Target, workload: Workload, run: Run, profile: Profile, notes: _Notes) -> EngineConfig:
    """The engine's config; what a recording leaves open is filled in, and said."""
    settings = _settings(target, workload, run)
    if settings["engine"] == "sglang":
        return engine_config(settings, target.path)
    model = target.model
    if "num_gpu_blocks" not in settings:
        model = _model(target, profile.model, run.info.model)
        settings["num_gpu_blocks"] = _estimated_blocks(target, model, profile, settings, notes)
    if not settings.get("max_model_len") and model is not None:
        capacity = (settings["num_gpu_blocks"] - 1) * settings.get("block_size", 16)
        settings["max_model_len"] = min(model.max_position_embeddings, capacity)
    return engine_config(settings, target.path)


def _estimated_blocks(
    target: Target, model: ModelSpec, profile: Profile, settings: Mapping[str, Any], notes: _Notes
) -> int:
    name = target.facts.get("hardware") or profile.hardware or ""
    gpu = gpu_spec(name)
    if gpu is None:
        problem = f"num_gpu_blocks is not recorded, and the memory of {name!r} is not known: set it under [engine]"
        raise InputError(problem, path=target.path, column="engine")
    blocks = model.kv_blocks(
        gpu.memory_bytes,
        tensor_parallel_size=settings.get("tensor_parallel_size", 1),
        block_size=settings.get("block_size", 16),
        gpu_memory_utilization=settings.get("gpu_memory_utilization", _GPU_MEMORY_UTILIZATION),
    )
    remark = f"num_gpu_blocks is not recorded: {blocks} estimated from the GPU's memory and the model's size"
    if remark not in notes.remarks:
        notes.remarks.append(remark)
    return blocks


def _predictions(run: Run, profile: Profile) -> pa.Table | None:
    if not run.has("steps"):
        return None
    batches = BatchStats.of_steps(run.steps)
    predicted = profile.latency_model().step_ns(batches, 0)
    return build_predictions(run.steps, predicted, profile.extrapolates(batches), batches)


def output_name(path: Path) -> str:
    """Folder for a target's output where several are checked: the name of the target's folder or file."""
    return path.resolve().name if path.is_dir() else path.resolve().stem
