"""`kvtwin calibrate`: recordings with steps, request logs, or kernel tables, to a Profile."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvtwin.calibrate.tables import cli as tables
from kvtwin.traces.errors import InputError

if TYPE_CHECKING:  # the command imports what it needs, so that `kvtwin --help` starts at once
    from kvtwin.calibrate.logs.log import Log
    from kvtwin.calibrate.models import ModelSpec
    from kvtwin.sim.latency.profile import Profile
    from kvtwin.traces.readers.llmservingsim_profile import KernelProfile
    from kvtwin.traces.run import Run

_EVIDENCE: Final = ("steps", "requests")
_KERNEL_OPTIONS: Final = ("model", "tensor_parallel_size", "collectives", "layers", "max_model_len", "enforce_eager")
_RUN_OPTIONS: Final = ("evidence", "plots", "engine", "workload")
_PROGRESS_AFTER_S: Final = 1.0


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `calibrate`."""
    parser = subparsers.add_parser(
        "calibrate",
        help="fit step latency to recorded steps, request logs or kernel tables",
        description="Fit a step-latency profile. SAMPLES are recordings with steps (one engine, one hardware), one "
        "folder of kernel tables (meta.yaml, tpN/*.csv), or table files of operator or step times.",
    )
    parser.add_argument("samples", type=Path, nargs="+", metavar="SAMPLES", help="recordings, or tables")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="PROFILE", help="JSON file to write; must not exist (not with --diff)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of what is drawn: the learning curve and its plots, the rows that --reference scales by (default: 0)",
    )
    parser.add_argument("--json", action="store_true", help="print accuracy, host time and provenance as one document")
    parser.add_argument("--diff", action="store_true", help="compare two profiles: what changed, and by how much")
    _add_run_options(parser.add_argument_group("recordings only"))
    _add_kernel_options(parser.add_argument_group("kernel tables only"))
    tables.add_options(parser.add_argument_group("table files only"))
    parser.set_defaults(run=_run)


def _add_run_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--from", dest="evidence", choices=_EVIDENCE, help="what to fit to (default: steps where every run has them)"
    )
    group.add_argument(
        "--test", type=Path, nargs="+", default=[], metavar="RUN", help="runs (or tables) that only judge the fit"
    )
    group.add_argument("--plots", type=Path, metavar="HTML", help="page of parity, residuals, errors, learning curve")
    group.add_argument(
        "--engine", type=Path, metavar="ENGINE", help="request logs: engine settings beyond what the log says (TOML)"
    )
    group.add_argument(
        "--workload", type=Path, metavar="FILE", help="request logs: what was sent, for the prompts' shared prefixes"
    )


def _add_kernel_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        metavar="NAME",
        help="the checkpoint, by name or by its config.json (default: what meta.yaml says); with table files: compose "
        "their operators into its steps",
    )
    group.add_argument("--tensor-parallel-size", type=int, metavar="N", help="GPUs per layer (default: 1)")
    group.add_argument(
        "--collectives", type=Path, metavar="FILE", help="all-reduce times, needed above one GPU (parquet or csv)"
    )
    group.add_argument("--layers", type=int, metavar="N", help="decoder layers (default: the model's)")
    group.add_argument("--max-model-len", type=int, metavar="TOKENS", help="of the engine (default: the model's)")
    group.add_argument("--enforce-eager", action="store_true", default=None, help="the engine runs no CUDA graphs")


def _run(args: argparse.Namespace) -> int:
    from kvtwin.traces.files import refuse_existing
    from kvtwin.traces.readers.text import find_optional

    if args.diff:
        return _diff(args)
    if args.output is None:
        raise InputError("-o PROFILE is missing: name the file to write")
    for path in filter(None, (args.output, args.plots)):
        refuse_existing(path)
    kernel_folders = [path for path in args.samples if path.is_dir() and find_optional(path, "meta.yaml") is not None]
    if kernel_folders and len(args.samples) > 1:
        raise InputError("kernel tables are calibrated alone: give this one folder only", path=kernel_folders[0])
    table_files = [path for path in args.samples if tables.is_table(path)]
    if table_files and len(table_files) < len(args.samples):
        raise InputError("a table, and other samples are none: calibrate them one by one", path=table_files[0])
    if table_files:
        profile = _from_tables(args)
    else:
        _refuse_options(args, tables.OPTIONS, "is for table files of operator or step times")
        profile = _from_kernels(args) if kernel_folders else _from_runs(args)
    profile.write(args.output)
    if args.json:
        found = {"accuracy": profile.accuracy, "host": asdict(profile.host), "provenance": profile.provenance}
        print(json.dumps({"profile": str(args.output), **found}, allow_nan=False))
    else:
        from kvtwin.calibrate.summary import as_text

        print(tables.as_text(profile) if profile.kind == tables.KIND else as_text(profile))
        print(f"written to {args.output}")
    return 0


def _from_tables(args: argparse.Namespace) -> Profile:
    composing = ("model", "tensor_parallel_size")
    others = [name for name in _KERNEL_OPTIONS if name not in composing]
    _refuse_options(args, (*others, *_RUN_OPTIONS), "is not for table files")
    if not args.model:
        _refuse_options(args, ("tensor_parallel_size",), "composes a step from tables, which needs --model too")
        return tables.from_tables(args)
    _refuse_options(args, ("test", "reference", "num_samples"), "goes with single operators, not with --model")
    return tables.composed(args)


def _diff(args: argparse.Namespace) -> int:
    from kvtwin.calibrate.diff import as_text, diff_profiles
    from kvtwin.sim.latency.profile import read_profile

    if len(args.samples) != 2:
        raise InputError(f"--diff compares two profiles: {len(args.samples)} given")
    found = diff_profiles(*(read_profile(path) for path in args.samples))
    print(json.dumps(found, allow_nan=False) if args.json else as_text(found))
    return 0


def _from_runs(args: argparse.Namespace) -> Profile:
    """Recordings: their steps, or where they have none (or it is asked for) their requests."""
    from kvtwin.calibrate.logs.calibrate import stages
    from kvtwin.calibrate.steps.calibrate import STAGES
    from kvtwin.sim.progress import stage_bar
    from kvtwin.traces.readers import read_run

    _refuse_options(args, _KERNEL_OPTIONS, "is for kernel tables (a folder with meta.yaml)")
    total = len(args.samples) + len(args.test) + max(len(STAGES), len(stages(len(args.samples))))
    with stage_bar(total, "stage") as tell:

        def read(path: Path) -> Run:
            tell(f"reading {path.name}")
            return read_run(path)

        runs, test = ([read(path) for path in paths] for paths in (args.samples, args.test))
        for path, run in zip((*args.samples, *args.test), (*runs, *test), strict=True):
            _refuse_workload(run, path)
        evidence = args.evidence or ("steps" if all(run.has("steps") for run in runs) else "requests")
        if evidence == "steps":
            return _from_steps(args, runs, test, tell)
        _refuse_options(args, ("test",), "needs steps; request logs are judged on their later half")
        return _from_requests(args, [_log(args, run) for run in runs], tell)


def _refuse_workload(run: Run, path: Path) -> None:
    """Refuse what says when requests were sent, and not what became of them.

    Raises:
        InputError: no step, no first token and no end of any request.
    """
    ends = ("first_token_ns", "finish_ns", "client_first_token_ns", "client_finish_ns")
    columns = [run.requests.column(name) for name in ends]
    if not run.has("steps") and all(column.null_count == len(column) for column in columns):
        problem = "is a workload, without times to fit on: give recordings with steps or TTFTs"
        raise InputError(f"{problem}, or kernel tables", path=path)


def _from_steps(args: argparse.Namespace, runs: list[Run], test: list[Run], tell: Callable[[str], None]) -> Profile:
    from kvtwin.calibrate.steps.calibrate import calibrate_steps

    _refuse_options(args, ("engine", "workload"), "is for request logs (--from requests)")
    profile = calibrate_steps(runs, test=test, progress=tell)
    if args.plots:
        from kvtwin.calibrate.plots import write_plots

        write_plots(runs, profile, args.plots, seed=args.seed)
    return profile


def _from_requests(args: argparse.Namespace, logs: list[Log], tell: Callable[[str], None]) -> Profile:
    from kvtwin.calibrate.logs.calibrate import calibrate_logs

    profile = calibrate_logs(logs, progress=tell)
    if args.plots:
        from kvtwin.calibrate.plots import write_log_plots

        write_log_plots(logs, profile, args.plots)
    return profile


def _refuse_options(args: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    given = [name for name in names if getattr(args, name) not in (None, [])]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} {reason}", path=args.samples[0])


def _log(args: argparse.Namespace, run: Run) -> Log:
    """A run as a request log: its engine as recorded, overruled by --engine; its prompts as sent."""
    from kvtwin.calibrate.logs.log import Log
    from kvtwin.sim.vllm.config import read_settings, recorded_settings, vllm_config
    from kvtwin.traces.readers import read_run
    from kvtwin.traces.workload import with_prompts

    settings = recorded_settings(run.info.engine_config)
    if run.info.engine and run.info.engine.startswith("vllm "):
        settings["version"] = run.info.engine.removeprefix("vllm ")
    given = read_settings(args.engine) if args.engine else {}
    settings |= {name: value for name, value in given.items() if value is not None}
    config = vllm_config(settings, args.engine or run.path or args.samples[0])
    return Log.of(with_prompts(run, read_run(args.workload) if args.workload else None), config)


def _from_kernels(args: argparse.Namespace) -> Profile:
    from kvtwin.calibrate.kernels.attention import PARTS
    from kvtwin.calibrate.kernels.compose import calibrate_kernels
    from kvtwin.sim.progress import stage_bar
    from kvtwin.traces.readers.allreduce import read_allreduce
    from kvtwin.traces.readers.llmservingsim_profile import read_kernel_profile

    _refuse_options(args, (*_RUN_OPTIONS, "test"), "is not for kernel tables")
    for name in ("tensor_parallel_size", "layers", "max_model_len"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: at least 1 expected")
    kernels = read_kernel_profile(args.samples[0], args.tensor_parallel_size or 1)
    with stage_bar(len(PARTS), "part") as tell:
        return calibrate_kernels(
            kernels,
            model=_model(args, kernels),
            max_model_len=args.max_model_len,
            enforce_eager=bool(args.enforce_eager),
            collectives=read_allreduce(args.collectives) if args.collectives else None,
            progress=tell,
        )


def _model(args: argparse.Namespace, kernels: KernelProfile) -> ModelSpec:
    from kvtwin.calibrate.models import read_model

    name = args.model or kernels.meta.get("model")
    if not isinstance(name, str):
        raise InputError("meta.yaml does not name the model: give it with --model", path=kernels.path)
    model = read_model(name)
    return replace(model, num_hidden_layers=args.layers) if args.layers else model
