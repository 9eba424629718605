"""Held-out errors of every shared table of operator and step times: `make fidelity` prints the table, the gates decide.

Whole values of each load axis are left out in turn (calibrate/tables/holdout.py); only rows inside count for the gates.
A gate stands a tenth or more above what was measured when it was set; the targets of issue 4 that are not met are marked
in calibrate/README.md, not hidden by a wide gate.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from kvtwin.calibrate.tables.calibrate import calibrate_tables
from kvtwin.calibrate.tables.scale import roofline_learning, scale_profile
from kvtwin.sim.latency.profile import Profile
from kvtwin.traces.readers.op_tables import read_op_table

pytestmark = pytest.mark.fidelity

# Largest MAPE inside, in percent, by table (the file's folder and name decide) and axis; every axis alike under "".
GATES: Final[Mapping[tuple[str, str], Mapping[str, float]]] = {
    ("llmservingsim/", "dense"): {"": 1.5},
    ("llmservingsim/", "per_sequence"): {"": 2.0},
    ("llmservingsim/", "attention"): {"prefix": 1.7, "chunk": 2.7, "context": 2.5, "num_decode": 3.2},
    ("llmservingsim/", "skew"): {"chunk": 1.9, "prefix": 1.6, "long_share": 2.4, "context": 3.1, "num_decode": 3.7},
    ("llmservingsim_v0/", "layers"): {"": 0.8},
    ("llmservingsim_v0/", "attention"): {"prefix": 0.3, "chunk": 1.2, "total_context": 0.8, "num_decode": 1.0},
    ("vidur/compute/", "mlp"): {"": 2.0},
    ("splitwise/", "perf_model"): {"num_seqs": 6.0, "prompt_tokens": 3.3, "num_decode": 1.4, "output_tokens": 1.6},
    ("vidur/network/", "all_reduce"): {"": 4.5},
    ("vidur/network/", "send_recv"): {"": 7.5},
    ("aiconfigurator/", "gemm"): {"": 5.5},
    ("aiconfigurator/", "context_attention"): {"num_seqs": 3.7, "chunk": 6.3},
    ("aiconfigurator/", "generation_attention"): {"num_decode": 5.3, "context": 5.4},
    ("aiconfigurator/", "moe_perf"): {"": 4.8},
}  # fmt: skip


def files(shared: Path) -> Iterator[Path]:
    data = shared / "data"
    yield from sorted((data / "profiles").rglob("*.csv.gz"))
    yield from sorted((data / "ops").rglob("*.parquet"))


def calibrated(path: Path) -> Profile:
    table = read_op_table(path)
    versions = {sample.key.get("version", "") for sample in table.samples}
    if len(versions) > 1:  # b200 moe_perf: a development build beside the release; the command asks for --filter
        table = table.only({"version": max(versions, key=lambda text: text.count(".") == 2)})
    return calibrate_tables([table])


def test_every_table_by_whole_values_left_out(shared: Path) -> None:
    print(f"\n{'table':62} {'axis':14} {'n':>7} {'MAPE':>6} {'p50':>6} {'p90':>6} {'p99':>6} {'bias':>6} {'outside':>8} "
          f"{'linear':>7} {'nearest':>8} {'OLS':>8} {'floor':>6} {'s':>4}")  # fmt: skip
    failed = []
    for path in files(shared):
        if path.name.startswith("attention_true_mixed"):  # 4 rows: refused (tests/traces/test_op_tables.py)
            continue
        name = str(path.relative_to(shared / "data"))
        started = time.perf_counter()
        profile = calibrated(path)
        seconds = time.perf_counter() - started
        for axis, found in by_axis(profile).items():
            print(f"{name[-62:]:62} {axis:14} {line(found)} {seconds:4.0f}")
            limit = gate(name, axis)
            if limit is not None and found["mape"] is not None and 100 * found["mape"] > limit:
                failed.append(f"{name}, {axis}: {100 * found['mape']:.2f} % (gate {limit} %)")
    assert not failed, failed


def by_axis(profile: Profile) -> dict[str, Mapping[str, Any]]:
    """The entries over all operators, by axis; of a table with one operator, its own."""
    several = any(name.startswith("all operators") for name in profile.accuracy)
    return {
        name.removesuffix(" held out").rsplit(", ", 1)[1]: found
        for name, found in profile.accuracy.items()
        if name.startswith("all operators") or not several
    }


def gate(name: str, axis: str) -> float | None:
    for (folder, word), limits in GATES.items():
        if folder in name and word in name.rsplit("/", 1)[1]:
            return limits.get(axis, limits.get(""))
    return None


def line(found: Mapping[str, Any]) -> str:
    def percent(value: float | None, width: int) -> str:
        return f"{'-' if value is None else f'{100 * value:.2f}':>{width}}"

    own = " ".join(percent(found[key], 6) for key in ("mape", "p50", "p90", "p99", "bias"))
    naive = " ".join(
        percent(found["naive"].get(key), width) for key, width in (("linear", 7), ("nearest", 8), ("ols", 8))
    )
    return f"{found['n']:7} {own} {percent(found['outside']['mape'], 8)} {naive} {percent(found['noise_floor'], 6)}"


PAIRS: Final = {
    "A6000 -> RTX3090, 15 layers": (
        "profiles/llmservingsim_v0/A6000/meta-llama/Llama-3.1-8B/tp1/layers.csv.gz",
        "profiles/llmservingsim_v0/RTX3090/meta-llama/Llama-3.1-8B/tp1/layers.csv.gz", {}, (22.0, 13.0, 9.0),
    ),
    "A100 -> H100, bf16 GEMM": (
        "ops/aiconfigurator/a100_sxm/gemm/vllm/0.14.0/gemm_perf.parquet",
        "ops/aiconfigurator/h100_sxm/gemm/vllm/0.24.0/gemm_perf.parquet", {"gemm_dtype": "bfloat16"}, (20.0, 14.5, 12.5),
    ),
    "A100 -> H100, linear operators of Llama-2-70B": (
        "profiles/vidur/compute/a100/meta-llama/Llama-2-70b-hf/mlp.csv.gz",
        "profiles/vidur/compute/h100/meta-llama/Llama-2-70b-hf/mlp.csv.gz", {}, (19.0, 14.5, 11.5),
    ),
    "A100 -> B200, decode attention bf16, head_dim 128": (
        "ops/aiconfigurator/a100_sxm/attention/vllm/0.14.0/generation_attention_perf.parquet",
        "ops/aiconfigurator/b200_sxm/attention/vllm/0.24.0/generation_attention_perf.parquet",
        {"head_dim": "128", "kv_cache_dtype": "bfloat16", "window_size": "0"}, (18.0, 13.0, 11.0),
    ),
}  # fmt: skip


def test_unseen_hardware_from_few_samples(shared: Path) -> None:
    print(f"\n{'reference -> new, MAPE in % on rows not sampled':52} {'unscaled':>9} {'10':>6} {'30':>6} {'100':>6}   "
          "physics alone, 10 / 30 / 100 rows of each operator")  # fmt: skip
    failed = []
    for name, (old, new, wanted, limits) in PAIRS.items():
        table = read_op_table(shared / "data" / new).only(wanted)
        reference = calibrate_tables([read_op_table(shared / "data" / old)])
        profile = scale_profile(table, reference, num_samples=30, seed=0, hardware=None)
        errors = {entry["samples"]: 100 * entry["mape"] for entry in profile.provenance["learning"]}
        alone = [100 * entry["mape"] for entry in roofline_learning(table, (10, 30, 100), 0)]
        print(f"{name:52} {100 * profile.provenance['unscaled_mape']:9.1f} "
              + " ".join(f"{errors[size]:6.1f}" for size in (10, 30, 100))
              + "   " + " / ".join(f"{value:.1f}" for value in alone))  # fmt: skip
        failed += [name for size, limit in zip((10, 30, 100), limits, strict=True) if errors[size] > limit]
        assert np.all(np.diff([errors[size] for size in (10, 30, 100)]) < 2.0), name  # more samples, no worse
    assert not failed
