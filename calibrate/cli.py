"""`kvtwin calibrate`: recordings with steps, or kernel tables, to a Profile."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvtwin.traces.errors import InputError

if TYPE_CHECKING:  # the command imports what it needs, so that `kvtwin --help` starts at once
    from kvtwin.calibrate.models import ModelSpec
    from kvtwin.sim.latency.profile import Profile
    from kvtwin.traces.readers.llmservingsim_profile import KernelProfile

_KERNEL_OPTIONS: Final = ("model", "tensor_parallel_size", "collectives", "layers", "max_model_len", "enforce_eager")
_PROGRESS_AFTER_S: Final = 1.0


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `calibrate`."""
    parser = subparsers.add_parser(
        "calibrate",
        help="fit step latency to recorded steps or kernel tables",
        description="Fit a step-latency profile. SAMPLES are recordings with steps (one engine, one hardware), or one "
        "folder of kernel tables (meta.yaml, tpN/*.csv).",
    )
    parser.add_argument("samples", type=Path, nargs="+", metavar="SAMPLES", help="run or recording folders; or one")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PROFILE", help="JSON file to write; must not exist"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap intervals (default: 0)")
    parser.add_argument("--json", action="store_true", help="print accuracy, host time and provenance as one document")
    _add_kernel_options(parser.add_argument_group("kernel tables only"))
    parser.set_defaults(run=_run)


def _add_kernel_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", metavar="NAME", help="the checkpoint (default: what meta.yaml says)")
    group.add_argument("--tensor-parallel-size", type=int, metavar="N", help="GPUs per layer (default: 1)")
    group.add_argument(
        "--collectives", type=Path, metavar="FILE", help="all-reduce times, needed above one GPU (parquet or csv)"
    )
    group.add_argument("--layers", type=int, metavar="N", help="decoder layers (default: the model's)")
    group.add_argument("--max-model-len", type=int, metavar="TOKENS", help="of the engine (default: the model's)")
    group.add_argument("--enforce-eager", action="store_true", default=None, help="the engine runs no CUDA graphs")


def _run(args: argparse.Namespace) -> int:
    from kvtwin.traces.readers.text import find_optional
    from kvtwin.traces.run import refuse_existing

    refuse_existing(args.output)
    kernel_folders = [path for path in args.samples if path.is_dir() and find_optional(path, "meta.yaml") is not None]
    if kernel_folders and len(args.samples) > 1:
        raise InputError("kernel tables are calibrated alone: give this one folder only", path=kernel_folders[0])
    profile = _from_kernels(args) if kernel_folders else _from_steps(args)
    profile.write(args.output)
    if args.json:
        found = {"accuracy": profile.accuracy, "host": asdict(profile.host), "provenance": profile.provenance}
        print(json.dumps({"profile": str(args.output), **found}, allow_nan=False))
    else:
        print(_as_text(profile))
        print(f"written to {args.output}")
    return 0


def _from_steps(args: argparse.Namespace) -> Profile:
    from tqdm import tqdm

    from kvtwin.calibrate.steps import STAGES, calibrate_steps
    from kvtwin.traces.readers import read_run

    given = [name for name in _KERNEL_OPTIONS if getattr(args, name) is not None]
    if given:
        option = given[0].replace("_", "-")
        raise InputError(f"--{option} is for kernel tables (a folder with meta.yaml)", path=args.samples[0])
    total = len(args.samples) + len(STAGES)
    # disable=None: silent when stderr is not a terminal.
    with tqdm(total=total, delay=_PROGRESS_AFTER_S, disable=None, leave=False, unit="stage") as bar:

        def tell(stage: str) -> None:
            bar.set_description(stage, refresh=False)
            bar.update()

        runs = []
        for path in args.samples:
            tell(f"reading {path.name}")
            runs.append(read_run(path))
        return calibrate_steps(runs, seed=args.seed, progress=tell)


def _from_kernels(args: argparse.Namespace) -> Profile:
    from kvtwin.calibrate.kernels import calibrate_kernels
    from kvtwin.traces.readers.allreduce import read_allreduce
    from kvtwin.traces.readers.llmservingsim_profile import read_kernel_profile

    for name in ("tensor_parallel_size", "layers", "max_model_len"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: at least 1 expected")
    kernels = read_kernel_profile(args.samples[0], args.tensor_parallel_size or 1)
    return calibrate_kernels(
        kernels,
        model=_model(args, kernels),
        max_model_len=args.max_model_len,
        enforce_eager=bool(args.enforce_eager),
        collectives=read_allreduce(args.collectives) if args.collectives else None,
        seed=args.seed,
    )


def _model(args: argparse.Namespace, kernels: KernelProfile) -> ModelSpec:
    from kvtwin.calibrate.models import model_spec

    name = args.model or kernels.meta.get("model")
    if not isinstance(name, str):
        raise InputError("meta.yaml does not name the model: give it with --model", path=kernels.path)
    model = model_spec(name)
    return replace(model, num_hidden_layers=args.layers) if args.layers else model


# ---- for people ----------------------------------------------------------------------------------------------


def _as_text(profile: Profile) -> str:
    """The hold-out errors as an aligned table, and what else to know before using the profile."""
    what = ", ".join(filter(None, (profile.engine, profile.model, profile.hardware)))
    summaries = {name: found for name, found in profile.accuracy.items() if found.get("mape") is not None}
    floors = {name: found for name, found in profile.accuracy.items() if "step_mape" in found}
    width = max(map(len, summaries), default=0)
    lines = [f"{profile.kind} profile of {what or 'an unnamed engine'}", ""]
    lines.append(
        f"{'held out':{width}} {'n':>7} {'MAPE':>7} {'95 % interval':>16} {'bias':>7} {'p50':>7} {'p90':>7} {'p99':>7}"
    )
    lines += [f"{name:{width}} {_row(found)}" for name, found in summaries.items()]
    lines.append("")
    lines += [f"{name}: {_floor(found)}" for name, found in floors.items()]
    lines.append(f"host time: {_host(profile)}")
    features = profile.provenance.get("features")
    lines += [f"features: {features}"] if features else []
    return "\n".join(lines)


def _row(found: Mapping[str, Any]) -> str:
    low, high = found["interval"] or (None, None)
    interval = "" if low is None else f"{low:.1%} .. {high:.1%}"
    sizes = " ".join(f"{found[name]:7.1%}" for name in ("p50", "p90", "p99"))
    return f"{found['n']:7,} {found['mape']:7.1%} {interval:>16} {found['bias']:+7.1%} {sizes}"


def _floor(found: Mapping[str, Any]) -> str:
    return f"MAPE {found['step_mape']:.1%} between alike steps; speed differs by up to {found['drift']:.2f} x"


def _host(profile: Profile) -> str:
    values = {name.removesuffix("_ns"): value for name, value in asdict(profile.host).items() if value}
    return ", ".join(f"{name} {value / 1e3:,.1f} us" for name, value in values.items()) or "none"
