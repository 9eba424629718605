"""`kvtwin trace`: look at runs and traces of any known format, import, export and generate them."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtwin.traces.export import add_command as add_export
from kvtwin.traces.generate.cli import add_command as add_generate

if TYPE_CHECKING:  # the commands import what they need, so that `kvtwin --help` starts at once
    from kvtwin.traces.run import Run


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `trace` with its sub-commands to the command line."""
    trace = subparsers.add_parser(
        "trace", help="look at runs and traces, import and export public formats, generate workloads"
    )
    commands = trace.add_subparsers(dest="trace_command", required=True, metavar="COMMAND")
    formats = "; formats are told by content, or named: see traces/README.md"

    info = commands.add_parser("info", help="counts, rates, lengths and prefix sharing of a run or trace")
    info.add_argument("path", type=Path, metavar="PATH", help="run folder, recording folder or trace file" + formats)
    _add_format(info)
    info.add_argument("--json", action="store_true", help="print one JSON document")
    info.set_defaults(run=_info)

    load = commands.add_parser("import", help="read any known format and write it as a run folder")
    load.add_argument("path", type=Path, metavar="PATH", help="recording folder or trace file" + formats)
    load.add_argument("-o", "--output", type=Path, required=True, metavar="RUN", help="new folder to write")
    _add_format(load)
    load.add_argument("--hardware", metavar="TEXT", help="what it ran on, kept in run.json")
    load.add_argument("--model", metavar="TEXT", help="the model served, kept in run.json")
    load.add_argument("--json", action="store_true", help="print one JSON document")
    load.set_defaults(run=_import)
    add_export(commands)
    add_generate(commands)


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", metavar="NAME", help="the format's name (default: detected)")
    parser.add_argument(
        "--hash-block-tokens",
        type=int,
        metavar="N",
        help="tokens per block hash, where the format leaves it open (default: 512 for hash_ids, 16 for token ids)",
    )


def _info(args: argparse.Namespace) -> int:
    from kvtwin.traces.describe import describe
    from kvtwin.traces.readers import detect, read_run
    from kvtwin.traces.readers.summary import is_summary, read_summary

    if args.format is None and is_summary(args.path):
        found = read_summary(args.path)
        summary = {"path": str(args.path), "format": "aggregates", "num_requests": found.num_requests, **found.metrics}
        print(json.dumps(summary, indent=1) if args.json else _as_text(summary))
        return 0
    name = args.format or detect(args.path)
    summary = {"path": str(args.path), "format": name, **describe(read_run(args.path, name, args.hash_block_tokens))}
    print(json.dumps(summary, indent=1, allow_nan=False) if args.json else _as_text(summary))
    return 0


def _import(args: argparse.Namespace) -> int:
    from kvtwin.traces.files import refuse_existing
    from kvtwin.traces.readers import detect, read_run

    refuse_existing(args.output)
    name = args.format or detect(args.path)
    run = read_run(args.path, name, args.hash_block_tokens)
    given = {key: getattr(args, key) for key in ("hardware", "model") if getattr(args, key) is not None}
    target = _with_info(run, given).write(args.output)
    rows = {key: getattr(run, key).num_rows for key in ("requests", "steps", "cache") if run.has(key)}
    summary = {"path": str(args.path), "format": name, "output": str(target), "rows": rows}
    counts = ", ".join(f"{count:,} {key}" for key, count in rows.items())
    print(json.dumps(summary, indent=1) if args.json else f"{target}: {counts} ({name})")
    return 0


def _with_info(run: Run, changes: dict[str, Any]) -> Run:
    tables = {key: getattr(run, key) for key in ("requests", "steps", "cache") if run.has(key)}
    return type(run)(replace(run.info, **changes), tables)


def _as_text(summary: dict[str, Any], indent: str = "") -> str:
    """Nested dicts as aligned lines: numbers with at most four significant decimals, unknown as "-"."""
    width = max((len(key) for key in summary), default=0)
    lines = []
    for key, value in summary.items():
        label = f"{indent}{key:<{width}}"
        if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
            lines += [label.rstrip(), _as_text(value, indent + "  ")]
        elif isinstance(value, dict):
            lines.append(f"{label}  " + "  ".join(f"{name} {_plain(item)}" for name, item in value.items()))
        else:
            lines.append(f"{label}  {_plain(value)}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
