"""A recorded workload whose requests have times, ready to be simulated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from kvtwin.calibrate.agree import place_of
from kvtwin.calibrate.units import refuse_implausible
from kvtwin.sim.latency.grid import FloatArray
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run

Clock = Literal["queued_ns", "arrival_ns"]
Rows = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Log:
    """A recorded workload, ready to be simulated.

    Attributes:
        run: requests with their times; prompts' blocks where prefix caching is on.
        config: the engine's settings.
        clock: what first-token times count from; the client's clock where the engine's is not recorded.
        rows: which requests' times may be used, shape (n,). The others are simulated all the same: they are load.
    """

    run: Run
    config: VllmConfig
    clock: Clock
    rows: Rows

    @classmethod
    def of(cls, run: Run, config: VllmConfig) -> Log:
        """All requests of a run.

        Raises:
            InputError: a time is not positive or in another unit than it says, or two engine instances served the
                requests.
        """
        table = run.requests
        clock: Clock = "arrival_ns" if table.column("queued_ns").null_count == table.num_rows else "queued_ns"
        log = cls(run, config, clock, np.ones(table.num_rows, np.bool_))
        log.check()
        return log

    def check(self) -> None:
        """Refuse times that no engine can have taken."""
        instances = set(self.run.requests.column("instance").drop_null().to_pylist())
        if len(instances) > 1:
            problem = f"{len(instances)} engine instances served these requests: split the log, one run per instance"
            raise InputError(problem, path=place_of(self.run), column="instance")
        times = self.times(self.run)
        bad = np.argwhere(times <= 0)
        if len(bad):
            kind, row = bad[0].tolist()
            name = ("first_token_ns", "finish_ns")[kind]
            before = (self.clock, "first_token_ns")[kind]
            problem = f"{times[kind, row]:.0f} ns after {before}: a positive time expected (check clocks and units)"
            raise InputError(problem, path=place_of(self.run), row=row, column=name)
        per_token = times[1] / np.maximum(self.run.requests.column("output_tokens").to_numpy() - 1, 1)
        if np.isfinite(per_token).any():
            refuse_implausible(float(np.nanmedian(per_token)), "an output token", self.run, "finish_ns")

    def only(self, rows: Rows) -> Log:
        """The same log with fewer usable times."""
        return replace(self, rows=self.rows & rows)

    def halves(self) -> tuple[Log, Log]:
        """The earlier and the later half of the requests by arrival: one to fit, one to judge."""
        earlier = np.arange(len(self.rows)) < len(self.rows) // 2
        return self.only(earlier), self.only(~earlier)

    def times(self, run: Run) -> FloatArray:
        """Nanoseconds from `clock` to the first token, and from there to the last: shape (2, n); NaN where unknown."""
        start, first, finish = (floats(run, name) for name in (self.clock, "first_token_ns", "finish_ns"))
        several = run.requests.column("output_tokens").to_numpy() > 1
        return np.stack([first - start, np.where(several, finish - first, np.nan)])

    @property
    def num_known(self) -> int:
        """Usable requests whose first token has a time."""
        return int(np.isfinite(self.times(self.run)[0, self.rows]).sum())


def floats(run: Run, name: str) -> FloatArray:
    """A column of the requests, NaN where nothing is recorded: shape (n,)."""
    values: FloatArray = run.requests.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
    return values


def name_of(log: Log, index: int) -> str:
    """The recording's name; "log 1" and so on where it has none."""
    place = place_of(log.run)
    return Path(place).name if place else f"log {index + 1}"
