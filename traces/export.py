"""`kvtwin trace export`: a run in a format of other tools."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `export` to the sub-commands of `kvtwin trace`."""
    export = commands.add_parser(
        "export",
        help="a run's timeline for Perfetto or chrome://tracing",
        description="Steps, requests with their phases, queue lengths and free KV blocks as Chrome trace JSON; open it "
        "at https://ui.perfetto.dev (the file stays on your machine) or in chrome://tracing.",
    )
    export.add_argument("path", type=Path, metavar="RUN", help="run folder, or any format that kvtwin trace info knows")
    export.add_argument(
        "--perfetto", type=Path, required=True, metavar="FILE", help="file to write; .gz in its name compresses it"
    )
    export.add_argument("--json", action="store_true", help="print the numbers of events as one JSON document")
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from kvtwin.traces.perfetto import write_perfetto
    from kvtwin.traces.readers import read_run

    counts = write_perfetto(read_run(args.path), args.perfetto)
    if args.json:
        print(json.dumps({"output": str(args.perfetto), "events": counts}))
    else:
        print(f"{args.perfetto}: {sum(counts.values()):,} events")
    return 0
