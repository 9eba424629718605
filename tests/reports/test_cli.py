"""The root of the command line: every folder's commands, one line per error, a quick start."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest

import kvtwin.calibrate.cli
import kvtwin.reports.check
import kvtwin.reports.site
import kvtwin.sim.cli
import kvtwin.traces.cli
import kvtwin.validate.cli
from kvtwin.reports import cli
from kvtwin.traces.errors import InputError

HEAVY = ("pandas", "scipy", "statsmodels", "plotly")


def commands(parser: argparse.ArgumentParser) -> set[str]:
    action = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return set(action.choices)


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        (kvtwin.traces.cli, "trace"),
        (kvtwin.sim.cli, "simulate"),
        (kvtwin.calibrate.cli, "calibrate"),
        (kvtwin.validate.cli, "validate"),
        (kvtwin.reports.check, "check"),
        (kvtwin.reports.site, "report"),
    ],
)
def test_every_folder_adds_its_commands(folder: ModuleType, command: str) -> None:
    alone = argparse.ArgumentParser()
    folder.add_commands(alone.add_subparsers())
    assert command in commands(alone)
    assert commands(alone) <= commands(cli.build_parser())


def test_every_command_has_help_and_something_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    for command in sorted(commands(cli.build_parser())):
        assert cli.main([command, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: kvtwin {command} ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kvtwin 0.")


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["simulate", "--nonsense"]])
def test_a_usage_error_is_one_line_and_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert ": error: " in printed.err
    assert printed.err.endswith("--help)\n")


Install = Callable[[Callable[[argparse.Namespace], int]], None]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make `kvtwin do` the only command, running a function of the test."""

    def install(run: Callable[[argparse.Namespace], int]) -> None:
        def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
            subparsers.add_parser("do").set_defaults(run=run)

        monkeypatch.setattr(cli, "_FOLDERS", (SimpleNamespace(add_commands=add_commands),))

    return install


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("-3 is negative", path="a.jsonl", row=4), 2, "kvtwin: error: a.jsonl, row 4: -3 is negative\n"),
        (FileNotFoundError(2, "No such file or directory", "x.toml"), 2, None),
        (OSError("disk\nfull"), 2, "kvtwin: error: disk full\n"),
        (KeyboardInterrupt(), 130, "kvtwin: interrupted\n"),
    ],
)
def test_an_error_is_one_line(
    command: Install, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str | None
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise error

    command(fail)
    assert cli.main(["do"]) == code
    assert capsys.readouterr().err == (line or "kvtwin: error: x.toml: No such file or directory\n")


@pytest.mark.parametrize("code", [0, 1])
def test_the_commands_exit_code_is_passed_on(command: Install, code: int) -> None:
    command(lambda args: code)
    assert cli.main(["do"]) == code


def test_our_own_mistakes_keep_their_traceback(command: Install) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise ZeroDivisionError

    command(fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["do"])


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    code = "import sys; from kvtwin.reports.cli import main; sys.exit(main(['--help']))"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=buffered
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_simulate_help_imports_nothing_heavy() -> None:
    code = "import sys; from kvtwin.reports.cli import main; main(['simulate', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "kvtwin" in loaded
    assert not loaded & set(HEAVY)
