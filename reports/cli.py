"""The command `kvtwin`: joins the commands of the five folders and turns errors into exit codes.

Exit codes: 0 good, 1 a gate failed, 2 bad input or usage, 130 interrupted, 141 the reader of stdout went away.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

import pyarrow as pa

import kvtwin.calibrate.cli
import kvtwin.reports.check
import kvtwin.reports.compare
import kvtwin.reports.site
import kvtwin.sim.cli
import kvtwin.traces.cli
import kvtwin.validate.cli
from kvtwin.traces.errors import KvtwinError

# In the order of the work; `kvtwin --help` lists the commands in this order.
_FOLDERS = (
    kvtwin.traces.cli,
    kvtwin.calibrate.cli,
    kvtwin.sim.cli,
    kvtwin.validate.cli,
    kvtwin.reports.compare,
    kvtwin.reports.check,
    kvtwin.reports.site,
)

_EXIT_BAD_INPUT = 2
_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class OneLineParser(argparse.ArgumentParser):
    """argparse that reports a usage error in one line, as every other error of kvtwin is reported."""

    def error(self, message: str) -> NoReturn:
        """Print one line that names the command and where its help is, and exit 2."""
        self.exit(_EXIT_BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Build the whole command line; every subcommand sets `run`, a function of the parsed arguments."""
    parser = OneLineParser(
        prog="kvtwin",
        description="A digital twin of LLM serving engines, and the instrument that proves how true the twin is.",
        epilog="Exit codes: 0 good, 1 a gate failed, 2 bad input. Results go to stdout, diagnostics to stderr.",
    )
    parser.add_argument("--version", action="version", version=f"kvtwin {version('kvtwin')}")
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for folder in _FOLDERS:
        folder.add_commands(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (default: `sys.argv`) and return its exit code; never a traceback for a user's mistake."""
    use_malloc()
    try:
        code = _run(argv)
        sys.stdout.flush()  # a reader that went away shows here, not while the interpreter shuts down
        return code
    except BrokenPipeError:
        _discard_stdout()
        return _EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        print("kvtwin: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except (KvtwinError, OSError) as error:
        print(f"kvtwin: error: {_one_line(error)}", file=sys.stderr)
        return _EXIT_BAD_INPUT


def use_malloc() -> None:
    """Let Arrow allocate with malloc: its own pools keep what was freed, 1.0 GB for a run of 330 MB of steps, not 0.5."""
    pa.set_memory_pool(pa.system_memory_pool())


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse: --help, --version, usage errors
        return stop.code if isinstance(stop.code, int) else 0
    code: int = args.run(args)
    return code


def _one_line(error: Exception) -> str:
    """Say what is wrong without Python's `[Errno 13]`."""
    if isinstance(error, OSError) and error.strerror:
        places = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*places, error.strerror])
    return " ".join(str(error).split())


def _discard_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's own last flush cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
