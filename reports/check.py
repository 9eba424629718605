"""`kvtwin check` and `kvtwin demo`: run the pipeline for targets and show what it found, in every form."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvtwin.reports.site import FIGURES_FILE
from kvtwin.traces.errors import InputError

if TYPE_CHECKING:
    from kvtwin.validate.checks_json import StoredReport
    from kvtwin.validate.result import TargetReport
    from kvtwin.validate.target import Target

DEMO_TARGET: Final = "vllm-cpu-tiny"
PAGE_FILE: Final = "report.html"


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `check` and `demo`."""
    check = subparsers.add_parser(
        "check",
        help="calibrate, simulate and judge hardware targets, with gates",
        description="The whole pipeline for each target. Exit code 1 if a gate fails, 2 on bad input.",
    )
    check.add_argument("targets", nargs="+", type=Path, metavar="TARGET", help="target.toml, or the folder it is in")
    _add_output(check, required=True)
    check.add_argument("--junit", type=Path, metavar="FILE", help="also write the JUnit XML of all targets here")
    check.add_argument(
        "--baseline",
        nargs="+",
        type=Path,
        default=[],
        metavar="OUT",
        help="earlier outputs: what drifted since the oldest of them, and since when; gates with max_drift judge it",
    )
    check.set_defaults(run=_check)
    demo = subparsers.add_parser(
        "demo",
        help="the bundled recordings of a real engine: calibrate, simulate, validate, report",
        description="Runs `check` on the bundled target: recordings of a real vLLM engine on a CPU.",
    )
    _add_output(demo, required=False)
    demo.set_defaults(run=_demo)


def _add_output(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, required=required, metavar="OUT", help="folder to write; must not exist"
    )
    parser.add_argument("--json", action="store_true", help="print the checks as one JSON document")


def _check(args: argparse.Namespace) -> int:
    from kvtwin.validate.check import output_name

    names = [output_name(path) for path in args.targets]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise InputError(f"two targets are called {repeated!r}: their outputs would be one folder")
    places = names if len(names) > 1 else [""]
    reports = run_targets(args.targets, places, args.output, junit=args.junit, baseline=args.baseline)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        _tell_github(reports, args.targets)
    return _show(reports, args)


def _tell_github(reports: Sequence[TargetReport], targets: Sequence[Path]) -> None:
    """Annotations on stderr, which the runner reads too, and the Markdown in the job's summary."""
    from kvtwin.reports.annotations import annotate
    from kvtwin.reports.markdown import render_markdown

    for report, path in zip(reports, targets, strict=True):
        for line in annotate(report, path):
            print(line, file=sys.stderr)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "a", encoding="utf-8") as file:
            file.writelines(f"{render_markdown(report)}\n" for report in reports)


def _demo(args: argparse.Namespace) -> int:
    import kvtwin.traces

    target = Path(kvtwin.traces.__path__[0]) / "targets" / DEMO_TARGET
    output = args.output or unused(Path("runs") / "demo")
    reports = run_targets([target], [""], output)
    code = _show(reports, args)
    print(f"page: {(output / PAGE_FILE).resolve()}", file=sys.stderr if args.json else sys.stdout)
    return code


def unused(path: Path) -> Path:
    """`path`, or `path`-2, -3 ... where it exists: the demo can be run again."""
    number = 1
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def run_targets(
    targets: Sequence[Path],
    places: Sequence[str],
    output: Path,
    *,
    junit: Path | None = None,
    baseline: Sequence[Path] = (),
) -> list[TargetReport]:
    """Check each target and write what was found below `output`: all of it or nothing.

    Args:
        targets: target.toml files or their folders.
        places: folder of each below `output`; "" for `output` itself.
        output: must not exist.
        junit: one more JUnit file, for all targets.
        baseline: earlier outputs to compare with.

    Raises:
        InputError: bad input anywhere, or `output` exists or cannot be written.
    """
    from kvtwin.traces.files import new_folder, refuse_existing, refuse_unwritable
    from kvtwin.validate import junit as junit_xml
    from kvtwin.validate.baseline import read_history
    from kvtwin.validate.target import read_target

    refuse_existing(output)
    if junit is not None:
        refuse_unwritable(junit)
    read = [read_target(path) for path in targets]  # a mistake in the last file must not cost the work on the first
    history = read_history(baseline) if baseline else None
    with new_folder(output) as folder:
        reports = [
            _run_target(target, path, folder / place, None if history is None else history.get(target.name, []))
            for target, path, place in zip(read, targets, places, strict=True)
        ]
        junit_xml.write(reports, folder / "junit.xml")
        if junit is not None:
            junit_xml.write(reports, junit)
    return reports


def _run_target(target: Target, path: Path, folder: Path, history: Sequence[StoredReport] | None) -> TargetReport:
    from kvtwin.reports.aggregate import document
    from kvtwin.reports.aggregate.build import aggregate
    from kvtwin.reports.markdown import render_markdown
    from kvtwin.reports.pages.target import render_target
    from kvtwin.reports.words import describe_no_drift
    from kvtwin.traces.files import write_text
    from kvtwin.validate import checks_json
    from kvtwin.validate.baseline import find_drifts
    from kvtwin.validate.check import check_target

    progress = _Progress(target.name)
    report, profile = check_target(target, progress=progress)
    command = shlex.join(["kvtwin", "check", str(path), "-o", "OUT"])
    report = replace(report, provenance={**report.provenance, "command": command}, created=checks_json.now())
    if history is not None:
        drifts = find_drifts(report.checks, history, target.gates) if history else ()
        remarks = [*report.provenance["remarks"], *([] if drifts else [describe_no_drift(history)])]
        report = replace(report, drifts=drifts, provenance={**report.provenance, "remarks": remarks})
    progress("writing the report")
    checks = checks_json.write(report, folder / checks_json.CHECKS_FILE)
    figures = document.write(aggregate(report), folder / FIGURES_FILE)
    profile.write(folder / "profile.json")
    for comparison in report.comparisons:
        comparison.simulated.write(folder / "simulated" / comparison.name)
    write_text(folder / "checks.md", render_markdown(report))
    # Read back: the page shows what the two documents say, here as in `kvtwin report`.
    write_text(folder / PAGE_FILE, render_target(checks_json.read(checks), document.read(figures)))
    return report


class _Progress:
    """One line per stage on stderr, with the seconds since the start; silent when not a terminal."""

    def __init__(self, name: str) -> None:
        self._name, self._started = name, time.monotonic()

    def __call__(self, stage: str) -> None:
        if sys.stderr.isatty():
            print(f"[{time.monotonic() - self._started:5.1f} s] {self._name}: {stage}", file=sys.stderr)


def _show(reports: Sequence[TargetReport], args: argparse.Namespace) -> int:
    from kvtwin.reports.terminal import print_report
    from kvtwin.validate.checks_json import to_json

    if args.json:
        print(json.dumps({"targets": [to_json(report) for report in reports]}, allow_nan=False))
    else:
        for report in reports:
            print_report(report, sys.stdout)
    return int(any(report.verdict == "fail" for report in reports))
