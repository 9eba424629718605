"""What a report costs at scale: 100 thousand requests, 1 million steps on both sides. `make bench`; extra_info has the figures.

The report part alone (figures, page, trace export), in a process of its own so that the peak memory is its own; runs
on disk are read whole for the figures and in batches for the trace. CPU seconds, since a shared machine stretches others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

MAKE = """
import sys
from pathlib import Path
import pyarrow.parquet as pq
from synthetic_pair import synthetic_report

folder = Path(sys.argv[1])
comparison = synthetic_report(int(sys.argv[2]), int(sys.argv[3])).comparisons[0]
for name in ("measured", "simulated"):
    getattr(comparison, name).write(folder / name)
pq.write_table(comparison.predictions, folder / "predictions.parquet")
"""

REPORT = """
import json, resource, sys, time
from dataclasses import replace
from pathlib import Path
import pyarrow.parquet as pq
from synthetic_pair import synthetic_report
from kvtwin.reports.aggregate import document
from kvtwin.reports.aggregate.build import aggregate
from kvtwin.reports.cli import use_malloc
from kvtwin.reports.pages.target import render_target
from kvtwin.traces.writers.perfetto import write_perfetto
from kvtwin.traces.run import Run
from kvtwin.validate import checks_json

use_malloc()  # as the command does
folder, seconds, peaks = Path(sys.argv[1]), {}, {}

def timed(name, work):
    begin = time.process_time()
    result = work()
    seconds[name] = round(time.process_time() - begin, 2)
    peaks[name] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return result

trace = timed("perfetto", lambda: write_perfetto(Run.open(folder / "measured"), folder / "trace.json.gz"))
runs = [Run.open(folder / name) for name in ("measured", "simulated")]
timed("load", lambda: [(run.requests, run.steps) for run in runs])
small = synthetic_report(10, 100)
predictions = pq.read_table(folder / "predictions.parquet")
comparison = replace(small.comparisons[0], measured=runs[0], simulated=runs[1], predictions=predictions)
report = replace(small, comparisons=(comparison,))
figures = timed("aggregate", lambda: document.write(aggregate(report), folder / "figures.json"))
checks = checks_json.write(report, folder / "checks.json")
page = timed("page", lambda: render_target(checks_json.read(checks), document.read(figures)))
sizes = {"figures": figures.stat().st_size, "page": len(page), "trace": (folder / "trace.json.gz").stat().st_size}
print(json.dumps({"cpu_seconds": seconds, "peak_mib": peaks, "bytes": sizes, "steps": trace["X"]}))
"""


@pytest.mark.parametrize(("num_requests", "num_steps"), [(100_000, 1_000_000)])
def test_report_of_a_million_steps(
    benchmark: BenchmarkFixture, root: Path, tmp_path: Path, num_requests: int, num_steps: int
) -> None:
    def run(script: str) -> str:
        command = [sys.executable, "-c", script, str(tmp_path), str(num_requests), str(num_steps)]
        environment = {**os.environ, "PYTHONPATH": str(root / "tests" / "bench")}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    run(MAKE)
    found = json.loads(benchmark.pedantic(run, (REPORT,), rounds=1))
    benchmark.extra_info |= found
    assert found["steps"] == num_steps
    assert found["peak_mib"]["page"] < 1500
    assert found["bytes"]["page"] < 6_000_000
