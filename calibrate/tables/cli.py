"""`kvtwin calibrate TABLE...`: options of tables, what is done with them, and the result for people."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvtwin.sim.progress import stage_bar
from kvtwin.traces.errors import InputError

if TYPE_CHECKING:
    from kvtwin.sim.latency.profile import Profile
    from kvtwin.traces.readers.optable import OpTable

KIND: Final = "operators"
OPTIONS: Final = ("filter", "hardware", "reference", "num_samples")
_PROGRESS_AFTER_S: Final = 1.0
_LEGEND: Final = (
    "MAPE ... p99: of rows whose value on the axis was left out, with all their rows, between values that stayed;",
    "floor: what repeats of one batch, or the timer's step, show; outside: MAPE beyond the values that stayed;",
    "linear, nearest, OLS: MAPE of naive fits on the same rows",
)


def add_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that only tables have."""
    group.add_argument(
        "--filter", action="append", metavar="NAME=VALUE", help="only samples with this key (op=gemm, version=0.24.0)"
    )
    group.add_argument("--hardware", metavar="NAME", help="GPU of the table, where the file does not say")
    group.add_argument(
        "--reference", type=Path, metavar="PROFILE", help="scale this profile of other hardware with --samples rows"
    )
    group.add_argument("--samples", dest="num_samples", type=int, metavar="N", help="rows to scale with (default: 30)")


def is_table(path: Path) -> bool:
    """Whether a path is a file that the readers of tables know, and no run or workload."""
    from kvtwin.traces.readers import detect as detect_run
    from kvtwin.traces.readers.op_tables import detect

    if not path.is_file():
        return False
    try:
        detect(path)
    except InputError:
        try:
            detect_run(path)
        except InputError:
            return True  # its own reader will say what is wrong with it
        return False
    return True


def from_tables(args: argparse.Namespace) -> Profile:
    """Read, filter, calibrate, and judge on `--test`. Raises InputError as the readers and `calibrate_tables` do."""

    from kvtwin.calibrate.tables.calibrate import calibrate_tables
    from kvtwin.calibrate.tables.judge import judge_table
    from kvtwin.calibrate.tables.scale import scale_profile
    from kvtwin.sim.latency.profile import read_profile
    from kvtwin.traces.readers.op_tables import read_op_table

    _refuse_twice(args.samples)
    wanted = filters(args.filter or [])
    tables: list[OpTable] = [read_op_table(path).only(wanted) for path in args.samples]
    tests = [read_op_table(path).only(wanted) for path in args.test]
    if args.num_samples is not None and not args.reference:
        raise InputError("--samples goes with --reference: the profile that the samples scale")
    if args.reference:
        if len(tables) > 1:
            raise InputError("--reference scales one table at a time", path=tables[1].path)
        reference = read_profile(args.reference)
        number = args.num_samples if args.num_samples is not None else 30
        profile = scale_profile(tables[0], reference, num_samples=number, seed=args.seed, hardware=args.hardware)
    else:
        total = sum(len(table.samples) for table in tables)
        with stage_bar(total, "operator") as tell:
            profile = calibrate_tables(tables, hardware=args.hardware, progress=tell)
    for test in tests:
        profile = judge_table(profile, test)
    return profile


def composed(args: argparse.Namespace) -> Profile:
    """Read, filter, and compose into the steps of `--model`. Raises InputError as the readers and `compose_tables` do."""
    from kvtwin.calibrate.models import read_model
    from kvtwin.calibrate.operators.compose import compose_tables
    from kvtwin.traces.readers.op_tables import read_op_table

    degree = 1 if args.tensor_parallel_size is None else args.tensor_parallel_size
    if degree < 1:
        raise InputError(f"--tensor-parallel-size {degree}: at least 1 expected")
    _refuse_twice(args.samples)
    model, wanted = read_model(args.model), filters(args.filter or [])
    read = [read_op_table(path) for path in args.samples]
    with stage_bar(len(read), "operator") as tell:
        return compose_tables(
            _filtered(read, wanted),
            model=model,
            tensor_parallel_size=degree,
            hardware=args.hardware,
            progress=tell,
        )


def _refuse_twice(paths: Sequence[Path]) -> None:
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise InputError("given twice: its rows would count as repeats", path=path)


def _filtered(tables: Sequence[OpTable], wanted: Mapping[str, str]) -> list[OpTable]:
    """Each table by those of the filters that its operators know; a filter that none knows is refused."""
    known = [{name for sample in table.samples for name in sample.key} for table in tables]
    for name, value in wanted.items():
        if not any(name in names for names in known):
            tables[0].only({name: value})
    return [
        table.only({name: value for name, value in wanted.items() if name in names})
        for table, names in zip(tables, known, strict=True)
    ]


def filters(texts: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE pairs. Raises InputError for anything else."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise InputError(f"--filter {text}: NAME=VALUE expected, such as op=gemm")
        found[name] = value
    return found


# ---- for people ----------------------------------------------------------------------------------------------


def as_text(profile: Profile) -> str:
    """Held-out errors as an aligned table, and what else to know before using the profile."""
    from kvtwin.calibrate.gpus import gpu_spec

    what = ", ".join(filter(None, (profile.engine, profile.model, profile.hardware)))
    width = max(map(len, profile.accuracy), default=0)
    lines = [f"operators of {what or 'an unnamed engine'}", ""]
    lines.append(
        f"{'':{width}} {'n':>8} {'MAPE':>7} {'95 % interval':>16} {'bias':>7} {'p50':>7} {'p90':>7} {'p99':>7} "
        f"{'floor':>6} {'outside':>8} | {'linear':>7} {'nearest':>8} {'OLS':>8}"
    )
    lines += [f"{name:{width}} {_row(found)}" for name, found in profile.accuracy.items()]
    lines += ["", *_LEGEND] if profile.accuracy else []
    if profile.hardware and gpu_spec(profile.hardware) is None:
        lines.append(
            f"{profile.hardware}: no GPU that is known here; how many thread blocks it runs at once was searched"
        )
    provenance = profile.provenance
    models = [entry["model"] for entry in provenance.get("models", ())]
    if models:
        counts = {name: models.count(name) for name in dict.fromkeys(models)}
        lines.append("models taken: " + "; ".join(f"{name} ({count})" for name, count in counts.items()))
    lines += [
        f"suspect, not fitted: {entry['count']} rows of {name} (rows {_some(entry['rows'], entry['count'])})"
        for name, entry in provenance.get("suspect_rows", {}).items()
    ]
    small = provenance.get("too_few_rows", ())
    lines += [f"too few rows, left out: {', '.join(small[:3])}{' ...' if len(small) > 3 else ''}"] if small else []
    lines += _learning(provenance)
    return "\n".join(lines)


def _row(found: Mapping[str, Any]) -> str:
    if found["mape"] is None:
        numbers = f"{found['n']:8,} {'-':>7} {'':>16} {'-':>7} {'-':>7} {'-':>7} {'-':>7}"
    else:
        low, high = found["interval"] or (None, None)
        interval = "" if low is None else f"{low:.1%} .. {high:.1%}"
        sizes = " ".join(f"{found[name]:7.2%}" for name in ("p50", "p90", "p99"))
        numbers = f"{found['n']:8,} {found['mape']:7.2%} {interval:>16} {found['bias']:+7.2%} {sizes}"
    naive = found.get("naive", {})
    others = f"{_percent(naive.get('linear')):>7} {_percent(naive.get('nearest')):>8} {_percent(naive.get('ols')):>8}"
    outside = found.get("outside", {}).get("mape")
    return f"{numbers} {_percent(found.get('noise_floor')):>6} {_percent(outside):>8} | {others}"


def _percent(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if value < 10 else "> 999%"


def _some(rows: Sequence[int], count: int) -> str:
    return ", ".join(map(str, rows[:5])) + (" ..." if count > 5 else "")


def _learning(provenance: Mapping[str, Any]) -> list[str]:
    if "learning" not in provenance:
        return []
    reference = provenance["reference"]
    lines = [
        f"reference: {reference['hardware']}, {reference['engine']}; law: {provenance['law']}",
        f"unscaled MAPE {provenance['unscaled_mape']:.1%}",
        "samples   MAPE   10 .. 90 % of draws",
    ]
    lines += [
        f"{entry['samples']:7} {entry['mape']:6.1%}   {entry['low']:.1%} .. {entry['high']:.1%}"
        for entry in provenance["learning"]
    ]
    return lines
