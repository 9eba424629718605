"""`kvtwin trace export`: a run in a format of other tools."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `export` to the sub-commands of `kvtwin trace`."""
    export = commands.add_parser(
        "export",
        help="a run's timeline for Perfetto or chrome://tracing, its workload as Mooncake trace, its requests as CSV",
        description="--perfetto: steps, requests with their phases, queue lengths and free KV blocks as Chrome trace "
        "JSON; open it at https://ui.perfetto.dev (the file stays on your machine) or in chrome://tracing.",
    )
    export.add_argument("path", type=Path, metavar="RUN", help="run folder, or any format that kvtwin trace info knows")
    formats = export.add_mutually_exclusive_group(required=True)
    packed = "file to write; .gz in its name compresses it"
    formats.add_argument("--perfetto", type=Path, metavar="FILE", help=packed)
    formats.add_argument("--mooncake", type=Path, metavar="FILE", help=packed + "; arrivals in whole milliseconds")
    formats.add_argument("--csv", type=Path, metavar="FILE", help="file to write; columns as in traces/schema.py")
    export.add_argument("--json", action="store_true", help="print the numbers of events as one JSON document")
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from kvtwin.traces.readers import read_run
    from kvtwin.traces.writers.mooncake import write_mooncake
    from kvtwin.traces.writers.perfetto import write_perfetto
    from kvtwin.traces.writers.requests_csv import write_csv

    run = read_run(args.path)
    if args.perfetto:
        counts = write_perfetto(run, args.perfetto)
    else:
        counts = {"requests": write_mooncake(run, args.mooncake) if args.mooncake else write_csv(run, args.csv)}
    output = args.perfetto or args.mooncake or args.csv
    if args.json:
        print(json.dumps({"output": str(output), "events": counts}))
    else:
        print(f"{output}: {sum(counts.values()):,} {'events' if args.perfetto else 'requests'}")
    return 0
