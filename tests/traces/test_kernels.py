"""Kernel profiles and all-reduce tables: units, the traps of their formats, and bad files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvtwin.traces import InputError
from kvtwin.traces.readers.allreduce import ALLREDUCE, read_allreduce
from kvtwin.traces.readers.llmservingsim_profile import read_kernel_profile


def test_profile_values(kernel_profile: Path) -> None:
    profile = read_kernel_profile(kernel_profile, 1)
    assert profile.attention.to_pylist()[1] == {
        "prefill_chunk": 16, "kv_prefill": 0, "n_decode": 1, "kv_decode": 16, "time_us": 9.5,
    }  # fmt: skip
    assert profile.dense.column("time_us").to_pylist() == [2.5, 2.75]
    assert profile.per_sequence.to_pylist() == [{"layer": "lm_head", "sequences": 1, "time_us": 700.0}]
    assert profile.moe is not None
    assert profile.moe.to_pylist() == [{"tokens": 1, "activated_experts": 8, "time_us": 50.25}]
    assert profile.skew is not None
    assert profile.skew.column("t_mean_us").to_pylist() == [46.5 / 3, 30 / 3]  # the file holds sums of 3 iterations
    assert profile.skew.column("alpha").to_pylist() == [0.25, None]
    assert profile.meta["vllm_version"] == "0.19.0"
    assert set(profile.source["sha256"]) >= {"meta.yaml", "attention.csv", "skew.csv"}
    assert profile.digest == read_kernel_profile(kernel_profile, 1).digest
    other = read_kernel_profile(kernel_profile, 2)
    assert (other.skew, other.moe) == (None, None)
    assert other.digest != profile.digest


NEWER = """layer,prefill_chunk,prefill_key,n_decode,kv_decode,decode_q_len,time_us,measurement_protocol
attention,0,0,1,16,1,8.5,v4
attention,0,0,1,16,4,9.0,v4
attention,16,40,1,16,1,9.5,v4
attention,64,16,0,0,1,12.5,v4
"""


def test_newer_profiles_give_prefills_by_the_keys_that_they_see(kernel_profile: Path) -> None:
    (kernel_profile / "tp1/attention.csv").write_text(NEWER)
    (kernel_profile / "tp1/skew.csv").write_text("layer,requests_json,t_skew_us\n")
    profile = read_kernel_profile(kernel_profile, 1)
    rows = [(row["prefill_chunk"], row["kv_prefill"]) for row in profile.attention.to_pylist()]
    assert rows == [(0, 0.0), (16, 32.0), (64, -16.0)]  # not the decode of four queries; two prefills of 32 tokens
    assert profile.skew is None
    assert profile.notes == ("skew.csv lists requests, which is not read: uneven contexts cost what their mean costs",)


def test_models_whose_steps_are_not_composed(kernel_profile: Path) -> None:
    (kernel_profile / "tp1/attention.csv").write_text(NEWER.replace("attention,64", "indexer,64"))
    with pytest.raises(InputError, match=r"attention.csv: 2 kernels \(attention, indexer\): such a model's steps"):
        read_kernel_profile(kernel_profile, 1)
    (kernel_profile / "tp1/linear_attention.csv").write_text("layer,prefill_tokens,n_decode,time_us\n")
    with pytest.raises(InputError, match=r"linear_attention.csv: steps of a model with linear attention"):
        read_kernel_profile(kernel_profile, 1)


def test_missing_degree_names_those_that_exist(kernel_profile: Path) -> None:
    with pytest.raises(InputError, match="no tp4 here; found: tp1, tp2"):
        read_kernel_profile(kernel_profile, 4)


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("tp1/attention.csv", "9.5", "nan", "attention.csv, row 3, time_us: 'nan' is not a finite number"),
        ("tp1/attention.csv", "9.5", "0", "attention.csv, row 3, time_us: 0.0 us: a positive time"),
        ("tp1/attention.csv", "9.5", "-1", "attention.csv, row 3, time_us: -1.0 us: a positive time"),
        ("tp1/attention.csv", "16,0,1,16,9.5", "-16,0,1,16,9.5", "row 3, prefill_chunk: -16 is negative"),
        ("tp1/attention.csv", "16,0,1,16,9.5", "0,0,1,16,9.5", "attention.csv, row 3: the shape .* occurs twice"),
        ("tp1/attention.csv", "kv_decode", "kv", "row 1, kv_decode: column is missing"),
        ("tp1/dense.csv", "2.75", "", "dense.csv, row 3, time_us: '' is not a finite number"),
        ("tp1/dense.csv", ",2,", ",2.5,", "dense.csv, row 3, tokens: '2.5' is not an integer"),
        ("tp1/dense.csv", "tokens", "layer", "row 1, tokens: column is missing"),
        ("tp1/dense.csv", "time_us", "time_us,time_us", "row 1, time_us: unknown or repeated"),
        ("tp1/dense.csv", "act_fn,2", '"act_fn,2', "dense.csv, row 3: not CSV"),
        ("tp1/moe.csv", "tokens", "tokens,colour", "row 1, colour: unknown or repeated column"),
        ("tp1/skew.csv", "50.1", "inf", "skew.csv, row 2, t_max_us: 'inf' is not a finite number"),
        ("meta.yaml", "iterations: 3", "iterations: 0", "measurement_iterations: 0: a positive integer"),
        ("meta.yaml", "0.19.0", "!!python/object:os.system x", "meta.yaml: not YAML of plain values"),
        ("meta.yaml", "vllm_version: 0.19.0\n", "[", "meta.yaml: not YAML of plain values"),
    ],
)  # fmt: skip
def test_bad_profile(file: str, old: str, new: str, words: str, kernel_profile: Path) -> None:
    path = kernel_profile / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=words) as caught:
        read_kernel_profile(kernel_profile, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B"])
@pytest.mark.parametrize("degree", [1, 2])
def test_real_skew_times_match_attention_of_the_same_shape(model: str, degree: int, shared: Path) -> None:
    """data/README.md, trap 1: undivided, the median ratio would be 3.00."""
    profile = read_kernel_profile(shared / "data/profiles/llmservingsim/RTXPRO6000" / model / "bf16", degree)
    assert profile.skew is not None
    shape = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    columns = [profile.attention.column(name).to_pylist() for name in (*shape, "time_us")]
    attention = {key: time for *key_list, time in zip(*columns, strict=True) for key in [tuple(key_list)]}
    rows = profile.skew.to_pylist()
    keys = [(row["pc"], row["kp"], row["n"], row["kv_big"]) for row in rows]
    ratios = [row["t_max_us"] / attention[key] for row, key in zip(rows, keys, strict=True) if key in attention]
    assert len(ratios) > 12_000
    assert abs(float(np.median(ratios)) - 1) < 0.005


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., Path]:
    """Write an aiconfigurator table of two rows (graph and eager), with some columns changed."""

    def write(**changes: list[object]) -> Path:
        columns: dict[str, list[object]] = {
            "num_gpus": [2, 2],
            "message_size": [128, 128],
            "latency": [0.005, 0.02],
            "allreduce_dtype": ["bfloat16", "bfloat16"],
            "backend": ["vllm_graph", "vllm_eager"],
            "device": ["x", "x"],
        }
        pq.write_table(pa.table({**columns, **changes}), tmp_path / "perf.parquet")
        return tmp_path / "perf.parquet"

    return write


def test_allreduce_of_aiconfigurator(parquet: Callable[..., Path]) -> None:
    """message_size counts elements: 128 of bfloat16 are 256 bytes; latency is in ms."""
    path = parquet()
    graph, eager = read_allreduce(path), read_allreduce(path, "eager")
    assert graph.schema.equals(ALLREDUCE)
    assert graph.to_pylist() == [{"num_gpus": 2, "message_bytes": 256, "time_ns": 5000.0}]
    assert eager.column("time_ns").to_pylist() == [20000.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latency": [0.1, float("nan")]}, "row 1, latency: nan is not a positive"),
        ({"latency": [0.0, 0.1]}, "row 0, latency: 0.0 is not a positive"),
        ({"latency": [None, 0.1]}, "row 0, latency: is missing"),
        ({"num_gpus": [2, -2]}, "row 1, num_gpus: -2 is not a positive"),
        ({"message_size": ["a", "b"]}, "not a readable table of all-reduce times"),
        ({"allreduce_dtype": ["bfloat16", "fp3"]}, "row 1, allreduce_dtype: fp3 unknown"),
        ({"backend": ["nccl", "nccl"]}, "backend: no row of a .*_graph backend; found: nccl"),
    ],
)  # fmt: skip
def test_bad_allreduce(changes: dict[str, list[object]], words: str, parquet: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=words):
        read_allreduce(parquet(**changes))


def test_truncated_allreduce(parquet: Callable[..., Path], tmp_path: Path) -> None:
    data = parquet().read_bytes()
    for cut in (0, 3, 4, 40, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:cut])
        with pytest.raises(InputError, match="cut"):
            read_allreduce(tmp_path / "cut")
    with pytest.raises(InputError, match="No such file"):
        read_allreduce(tmp_path / "nothing")


def test_allreduce_of_vidur(tmp_path: Path) -> None:
    """Bytes and ms; groups across nodes are left out; repeats of a key are averaged."""
    stats = [f"time_stats.all_reduce.{name}" for name in ("min", "max", "mean", "median", "std")]
    header = ["", *stats, "rank", "num_workers", "size", "collective", "devices_per_node", "max_devices_per_node"]
    rows = ["0,0.1,0.3,0.2,0.010,0,0,2,2048,all_reduce,2,8", "1,0.1,0.3,0.2,0.030,0,0,2,2048,all_reduce,2,8",
            "2,9,9,9,9,0,0,2,2048,all_reduce,1,8", "3,0.1,0.3,0.2,0.007,0,0,2,1024,all_reduce,2,8"]  # fmt: skip
    path = tmp_path / "all_reduce.csv"
    path.write_text("\n".join([",".join(header), *rows]))
    assert read_allreduce(path).to_pylist() == [
        {"num_gpus": 2, "message_bytes": 1024, "time_ns": 7000.0},
        {"num_gpus": 2, "message_bytes": 2048, "time_ns": 20000.0},
    ]


@pytest.mark.parametrize(
    ("pattern", "num_files", "low", "high"),
    [("ops/aiconfigurator/*/comm/vllm/*/custom_allreduce_perf.parquet", 4, 60, 70),
     ("profiles/vidur/network/*/all_reduce.csv.gz", 4, 1900, 4500)],
)  # fmt: skip
def test_real_allreduce(pattern: str, num_files: int, low: int, high: int, shared: Path) -> None:
    files = sorted((shared / "data").glob(pattern))
    assert len(files) == num_files
    for file in files:
        table = read_allreduce(file)
        assert low <= table.num_rows <= high
        largest = table.filter(pa.compute.equal(table["num_gpus"], 2)).slice(0).to_pylist()[-1]
        bytes_per_ns = largest["message_bytes"] / largest["time_ns"]  # GB/s between two GPUs, each way
        assert 30 < bytes_per_ns < 900  # PCIe 5 to NVLink 5: as bytes read as elements it would not be
