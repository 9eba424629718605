"""What a comparison says: one Check per claim, and the report of a target that holds them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from kvtwin.traces.run import Run

Verdict = Literal["pass", "fail", "not distinguishable", "no gate"]

Level = Literal["step", "scheduler", "cache", "e2e"]

CHECKS_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Check:
    """One claim compared.

    Attributes:
        run: name of the recorded run it was judged on.
        level: "step" (latency per batch), "scheduler" (decisions), "cache" (events of a KV cache) or "e2e" (per
            request).
        metric: such as "ttft_p90", "step_mape".
        unit: unit of `measured` and `simulated`: "ms", "tokens/s", "%" ...
        measured, simulated: the two values; NaN where the metric has only an error (a MAPE).
        error: signed, relative to the measurement: simulated / measured - 1. A MAPE is its own error.
        interval: 95 % interval of `error`.
        n: how many requests or steps it rests on.
        noise_floor: |error| that repeats of the same real run show among themselves; None without repeats.
        threshold: largest |error| the gate allows; None without a gate.
        verdict: "not distinguishable" when |error| is within the noise floor, else by the gate.
        note: what a reader must know to read it right.
    """

    run: str
    level: Level
    metric: str
    unit: str
    measured: float
    simulated: float
    error: float
    interval: tuple[float, float] | None
    n: int
    noise_floor: float | None = None
    threshold: float | None = None
    verdict: Verdict = "no gate"
    note: str = ""


# One row per step of a recorded run: what it took and what the profile says it takes.
PREDICTIONS = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("start_ns", pa.int64()),
        pa.field("measured_ns", pa.int64()),
        pa.field("predicted_ns", pa.int64()),
        pa.field("regime", pa.string()),  # "prefill", "decode" or "mixed"
        pa.field("num_reqs", pa.int64()),
        pa.field("num_tokens", pa.int64()),  # new tokens in the step
        pa.field("context_tokens", pa.int64()),  # tokens computed before the step, summed over the batch
        pa.field("extrapolated", pa.bool_()),  # outside the domain that the profile was fitted on
    ]
)


@dataclass(frozen=True)
class Comparison:
    """One recorded run beside the simulation of the same workload.

    Attributes:
        name: the recorded run's name.
        measured, simulated: the two runs; their requests tables have the same request ids.
        clock: column that TTFT and latency count from: "queued_ns" (the engine) or "arrival_ns" (the client).
        predictions: table of schema PREDICTIONS where the recording has steps, else None.
        repeats: names of the recordings of the same workload (they give the noise floor), this one included.
    """

    name: str
    measured: Run
    simulated: Run
    clock: Literal["queued_ns", "arrival_ns"]
    predictions: pa.Table | None = None
    repeats: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two schedulers part, side by side.

    Attributes:
        step: row of the measured run's `steps`.
        what: the first thing that differs: "members" (who is in the batch), "cache_len", "input_len", "order",
            "preempted", "finished", "step not simulated" or "step not recorded" (only one of the two has the step) or
            "free blocks".
        measured, simulated: the step as each decided it: step (its row), batch (request_id, cache_len, input_len per
            member), preempted, finished, num_waiting, num_running, num_free_blocks; plain values that JSON can hold,
            null where unknown; empty where that run has no such step.
        resync_step: the first later step from which both agree again; None if they never do.
    """

    step: int
    what: str
    measured: Mapping[str, Any]
    simulated: Mapping[str, Any]
    resync_step: int | None


@dataclass(frozen=True, slots=True)
class ScheduleFinding:
    """A recorded scheduler log beside the simulated scheduler, step by step.

    Attributes:
        run: name of the recorded run.
        num_steps, num_identical: steps compared, those that only one of the two took included; those with the same
            decision.
        first: the first divergence; None where there is none.
        not_judged: what the log does not hold, and so could not be compared, or had to be assumed, in words.
        num_episodes, longest_episode: how often the two part, and the longest time they stay apart, in steps.
        first_free_blocks: the first identical step that leaves another number of blocks free; None where there is none.
    """

    run: str
    num_steps: int
    num_identical: int
    first: Divergence | None
    not_judged: tuple[str, ...] = ()
    num_episodes: int = 0
    longest_episode: int = 0
    first_free_blocks: Divergence | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One bar of a waterfall: what one simulated layer adds to the error.

    Attributes:
        layer: "output", "arrival", "cache", "schedule", "step times", "host" ..., or "remainder".
        change: signed, as a fraction of the measured value; the parts add up to the error.
        interval: 95 % interval of `change`; None where it is not known.
    """

    layer: str
    change: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Attribution:
    """How much of one end-to-end error each simulated layer causes; or the error of one layer by its own measure.

    Attributes:
        run: name of the recorded run.
        metric: such as "ttft_mean"; a layer's own measure is "output_tokens", "ttft_arrival", "identical_arrivals",
            "step_bias", "identical_steps" or "cached_tokens", with that layer as its only part.
        unit: of `measured` and `simulated`.
        parts: in the order of the waterfall; their changes sum to simulated / measured - 1.
        blamed: the layer that causes most of it; None while the error is within its doubt.
        note: what a reader must know.
    """

    run: str
    metric: str
    unit: str
    measured: float
    simulated: float
    parts: tuple[Part, ...]
    blamed: str | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Drift:
    """How one error changed since the accepted report.

    Attributes:
        run, metric: which check.
        before, now: its signed error then and now; NaN where there was or is none.
        moved: "measured", "simulated" or both: which value of the comparison changed; "" if neither (a MAPE).
        since: date of the first report from which on all show it; None where only this check does.
        allowed: how much the gate lets the error grow, as a fraction of the measurement; None without such a gate.
        verdict: "fail" beyond the gate, "worse" or "better" without one, "new" or "gone" where one side has no check.
    """

    run: str
    metric: str
    before: float
    now: float
    moved: str
    since: str | None
    allowed: float | None
    verdict: Literal["fail", "worse", "better", "new", "gone"]


@dataclass(frozen=True, slots=True)
class Peer:
    """Another simulator's prediction of a recorded run, judged as ours is.

    Attributes:
        run: name of the recorded run.
        name: the simulator's.
        checks: the end-to-end level; no gate is asked of it.
    """

    run: str
    name: str
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class TargetReport:
    """Everything that one `kvtwin check` of one target found.

    Attributes:
        target: name, hardware, model, engine, description.
        checks: in the order to show them.
        comparisons: one per recorded run that was judged.
        profile: summary of the profile used (kind, accuracy, noise floor, domain, provenance).
        provenance: kvtwin version, command, date of the data, digests of the inputs.
        schedules: scheduler logs beside the simulated scheduler, one per recorded run with steps.
        attributions: the causes of the end-to-end errors, by run and metric.
        drifts: what changed since the accepted report; empty without `--baseline`.
        peers: other simulators on the same recordings, by run; empty where the target names none.
        created: when the check was made, UTC, as "2026-11-23T11:20:00Z"; None where nobody noted it.
    """

    target: Mapping[str, str]
    checks: tuple[Check, ...]
    comparisons: tuple[Comparison, ...]
    profile: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    schedules: tuple[ScheduleFinding, ...] = ()
    attributions: tuple[Attribution, ...] = ()
    drifts: tuple[Drift, ...] = ()
    peers: tuple[Peer, ...] = ()
    created: str | None = None

    @property
    def verdict(self) -> Literal["pass", "fail"]:
        """Fail if any gate failed."""
        verdicts = {*(check.verdict for check in self.checks), *(drift.verdict for drift in self.drifts)}
        return "fail" if "fail" in verdicts else "pass"
