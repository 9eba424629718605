"""What a comparison says: one Check per claim, and the report of a target that holds them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from kvtwin.traces.run import Run

Verdict = Literal["pass", "fail", "not distinguishable", "no gate"]

CHECKS_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Check:
    """One claim compared.

    Attributes:
        run: name of the recorded run it was judged on.
        level: "step" (latency per batch), "e2e" (per request) or "cache" (events of a KV cache).
        metric: such as "ttft_p90", "step_mape".
        unit: unit of `measured` and `simulated`: "ms", "tokens/s", "%" ...
        measured, simulated: the two values; NaN where the metric has only an error (a MAPE).
        error: signed, relative to the measurement: simulated / measured - 1. A MAPE is its own error.
        interval: 95 % bootstrap interval of `error`.
        n: how many requests or steps it rests on.
        noise_floor: |error| that repeats of the same real run show among themselves; None without repeats.
        threshold: largest |error| the gate allows; None without a gate.
        verdict: "not distinguishable" when |error| is within the noise floor, else by the gate.
        note: what a reader must know to read it right.
    """

    run: str
    level: Literal["step", "e2e", "cache"]
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


@dataclass(frozen=True)
class TargetReport:
    """Everything that one `kvtwin check` of one target found.

    Attributes:
        target: name, hardware, model, engine, description.
        checks: in the order to show them.
        comparisons: one per recorded run that was judged.
        profile: summary of the profile used (kind, accuracy, noise floor, domain, provenance).
        provenance: kvtwin version, command, date of the data, digests of the inputs, seed.
    """

    target: Mapping[str, str]
    checks: tuple[Check, ...]
    comparisons: tuple[Comparison, ...]
    profile: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Literal["pass", "fail"]:
        """Fail if any gate failed."""
        return "fail" if any(check.verdict == "fail" for check in self.checks) else "pass"
