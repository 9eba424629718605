"""Kernel tables to composed latency: exact where the truth is known, honest where it is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from kvtwin.calibrate.gpus import gpu_spec
from kvtwin.calibrate.kernels.attention import time_of_unlike_lengths
from kvtwin.calibrate.kernels.compose import LAUNCH_GAP_US, calibrate_kernels
from kvtwin.calibrate.kernels.flash_attention import first_unsplit, num_splits, piece_tokens
from kvtwin.calibrate.models import ModelSpec, custom_model, model_spec
from kvtwin.sim.latency.composed import ComposedLatency
from kvtwin.sim.latency.stats import BatchStats
from kvtwin.sim.latency.work.columns import Columns
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.allreduce import ALLREDUCE, read_allreduce
from kvtwin.traces.readers.llmservingsim_profile import KernelProfile, read_kernel_profile

LAYERS = (
    "embedding",
    "final_layernorm",
    "layernorm",
    "qkv_proj",
    "rotary_emb",
    "o_proj",
    "gate_up_proj",
    "act_fn",
    "down_proj",
)
TINY = ModelSpec("tiny", 2, 64, 4, 4, 16, 131072, 1e6)
CONTEXTS = [16, 256, 4096]
CHUNKS = [16, 128, 2048]


def decode_us(decodes: float, context: float) -> float:
    return 5.0 + 0.001 * decodes * context


def prefill_us(chunk: float, prefix: float) -> float:
    return 8.0 + 0.02 * chunk + 0.0001 * chunk * prefix


def kernel_profile(tensor_parallel_size: int = 1, **tables: pa.Table | None) -> KernelProfile:
    """A profile whose times are multilinear, so that interpolation must be exact."""
    rows = [(0, 0, n, kv, decode_us(n, kv)) for n in (1, 64, 256) for kv in CONTEXTS]
    rows += [(c, p, 0, 0, prefill_us(c, p)) for c in CHUNKS for p in [0, *CONTEXTS]]
    rows += [
        (c, p, n, kv, prefill_us(c, p) + 0.002 * n * kv)
        for c in CHUNKS
        for p in [0, 256]
        for n in (1, 64)
        for kv in CONTEXTS
    ]
    names = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
    given = {
        "attention": pa.table(dict(zip(names, (pa.array(column) for column in zip(*rows, strict=True)), strict=True))),
        "dense": pa.table(
            {
                "layer": [layer for layer in LAYERS for _ in (1, 64, 2048)],
                "tokens": [1, 64, 2048] * len(LAYERS),
                "time_us": [10.0 + tokens / 10 for _ in LAYERS for tokens in (1, 64, 2048)],
            }
        ),
        "per_sequence": pa.table(
            {
                "layer": ["lm_head", "lm_head", "sampler", "sampler"],
                "sequences": [1, 256] * 2,
                "time_us": [20.0, 60.0] * 2,
            }
        ),
        "skew": None,
        "moe": None,
        **tables,
    }
    meta = {"hardware": "a GPU", "vllm_version": "0.19.0"}
    return KernelProfile(Path("profile"), tensor_parallel_size, meta, source={}, digest="0", **given)


def latency_of(kernels: KernelProfile, model: ModelSpec = TINY, **options: pa.Table) -> ComposedLatency:
    return ComposedLatency.from_json(calibrate_kernels(kernels, model=model, **options).latency)


def test_a_step_is_the_sum_of_its_kernels() -> None:
    latency = latency_of(kernel_profile())
    batch = BatchStats.of_batch([1000] * 10 + [0], [1] * 10 + [500])
    parts = {name: float(values[0]) for name, values in latency.parts_us(batch).items()}
    assert parts["dense"] == pytest.approx((2 + 2 * 8) * (10.0 + 510 / 10))  # 2 per step, 8 per layer
    assert parts["sequences"] == pytest.approx(2 * (20 + 40 * 10 / 255))
    assert parts["attention"] == pytest.approx(2 * (prefill_us(500, 0) + 0.002 * 10 * 1000))
    assert parts["launch gaps"] == pytest.approx(LAUNCH_GAP_US * (2 * 10 + 2 + 30))


@pytest.mark.parametrize(("name", "own"), [("context", 1), ("prefix", 0)])
def test_lengths_that_differ_fill_half_a_piece_on_average(name: str, own: int) -> None:
    """A kernel that takes 1 us for each piece of 128 keys: 256 keys and a decode's new one are three pieces, 383 too."""

    class Pieces:
        def time_us(self, columns: Columns) -> np.ndarray:
            return np.ceil((columns[name] + own) / 128)

    lengths = {"context": np.array([128.0, 256.0, 4096.0]), "prefix": np.array([128.0, 256.0, 4096.0])}
    around = np.mean([Pieces().time_us({name: lengths[name] + shift}) for shift in range(-64, 64)], axis=0)
    assert time_of_unlike_lengths(Pieces(), lengths) == pytest.approx(around, abs=0.02)
    assert np.all(np.abs(Pieces().time_us(lengths) - around) > 0.45)


def test_two_chunks_cost_as_much_as_one_with_as_many_pairs() -> None:
    latency = latency_of(kernel_profile())
    chunks = BatchStats.of_batch([1000, 3000], [200, 300])
    pairs = 200 * 1000 + 200 * 201 // 2 + 300 * 3000 + 300 * 301 // 2
    prefix = (pairs - 500 * 501 // 2) / 500
    assert float(latency.attention_us(chunks)[0]) == pytest.approx(prefill_us(500, prefix))


def pairs_us(tokens: float, prefix: float) -> float:
    """Attention by its (query, key) pairs; a prefix of -tokens / 4 stands for two prefills that share the tokens."""
    return 10.0 + 1e-4 * tokens * (prefix + tokens / 2)


def attention_of(prefills: Sequence[tuple[int, float]]) -> pa.Table:
    kept = kernel_profile().attention.filter(pc.field("n_decode") > 0)
    names = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
    rows = [(tokens, prefix, 0, 0, pairs_us(tokens, prefix)) for tokens, prefix in prefills]
    prefill = pa.table(dict(zip(names, map(pa.array, zip(*rows, strict=True)), strict=True)), schema=kept.schema)
    return pa.concat_tables([kept, prefill])


@pytest.mark.parametrize("measured_several", [False, True])
def test_prompts_that_share_a_step_cost_less_than_one_with_as_many_tokens(measured_several: bool) -> None:
    sizes = [64 * 2**power for power in range(6)]
    prefills = [(tokens, prefix) for tokens in sizes for prefix in (0, 256, 1024)]
    if measured_several:
        prefills += [
            (tokens, 64 * 2**power - tokens // 2) for tokens in sizes for power in range(6) if 128 * 2**power < tokens
        ]
    latency = latency_of(kernel_profile(attention=attention_of(prefills)))
    one, four = (latency.attention_us(BatchStats.of_batch([0] * n, [2048 // n] * n))[0] for n in (1, 4))
    assert one == pytest.approx(pairs_us(2048, 0), rel=0.03)
    # Where they were not measured, one prefill of as many tokens tells, by the share of its pairs.
    assert four == pytest.approx(pairs_us(2048, -1024 + 256), rel=0.03 if measured_several else 0.15)


def test_tensor_parallelism_needs_collectives_and_adds_two_per_layer() -> None:
    with pytest.raises(InputError, match="a table of all-reduce times is needed"):
        latency_of(kernel_profile(2))
    times = pa.table({"num_gpus": [2, 2], "message_bytes": [0, 1 << 20], "time_ns": [4e3, 104e3]}, schema=ALLREDUCE)
    latency = latency_of(kernel_profile(2), collectives=times)
    parts = latency.parts_us(BatchStats.of_batch([0], [1000]))
    assert float(parts["collectives"][0]) == pytest.approx(
        2 * 2 * (4 + 100 * 1000 * TINY.hidden_size * 2 / (1 << 20)), rel=1e-3
    )
    with pytest.raises(InputError, match="no all-reduce times for 4 GPUs; found: 2"):
        latency_of(kernel_profile(4), collectives=times)


def test_experts_are_priced_at_the_number_that_a_uniform_gate_reaches() -> None:
    moe = pa.table(
        {"tokens": [1, 1, 2048, 2048], "activated_experts": [1, 8, 1, 8], "time_us": [1.0, 8.0, 101.0, 108.0]}
    )
    dense = kernel_profile().dense.filter(
        pa.compute.invert(
            pa.compute.is_in(kernel_profile().dense["layer"], pa.array(["gate_up_proj", "act_fn", "down_proj"]))
        )
    )
    model = dataclasses.replace(TINY, num_experts=8, num_experts_per_tok=2)
    parts = latency_of(kernel_profile(dense=dense, moe=moe), model).parts_us(BatchStats.of_batch([0], [1]))
    assert float(parts["moe"][0]) == pytest.approx(2 * 2.0)
    assert model.activated_experts(2048) == pytest.approx(8.0)
    with pytest.raises(InputError, match="known as a dense model"):
        latency_of(kernel_profile(dense=dense, moe=moe))


def test_a_missing_operator_is_named() -> None:
    dense = kernel_profile().dense.slice(6)  # without embedding and final_layernorm
    with pytest.raises(InputError, match="no operator 'embedding'"):
        latency_of(kernel_profile(dense=dense))


def test_models_are_known_by_name_or_described() -> None:
    assert model_spec("Qwen/Qwen3-32B").num_hidden_layers == 64
    with pytest.raises(InputError, match=r"did you mean Qwen/Qwen3-32B\?"):
        model_spec("Qwen/Qwen3-32")
    table = dataclasses.asdict(TINY)
    assert custom_model(table, "target.toml") == TINY
    with pytest.raises(InputError, match=r"model.head_dim: 'big' is not usable"):
        custom_model({**table, "head_dim": "big"}, "target.toml")
    with pytest.raises(InputError, match="hidden_size is missing"):
        custom_model({"name": "x", "num_hidden_layers": 1}, "target.toml")


def test_an_unknown_gpu_is_not_guessed() -> None:
    assert gpu_spec("some accelerator") is None


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8, 32])
def test_split_counts_follow_the_heuristics_definition(kv_heads: int) -> None:
    slots = 2 * 188
    for decodes in range(1, 80):
        splits = num_splits(decodes * kv_heads, slots, 1024)
        if decodes >= first_unsplit(kv_heads, 188):
            assert splits == 1
        assert piece_tokens(decodes, kv_heads, 188, 131072) * splits >= 131072


@pytest.mark.parametrize(("tensor_parallel_size", "unsplit"), [(1, 38), (2, 76)])
@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B"])
def test_measured_slopes_vanish_exactly_where_contexts_are_split(
    shared: Path, model: str, tensor_parallel_size: int, unsplit: int
) -> None:
    """The theory behind `flash_attention.py`, against four independent tables: below the threshold of the
    heuristic uneven contexts cost nothing, above it 2 to 20 ns per token of excess."""
    folder = shared / "data" / "profiles" / "llmservingsim" / "RTXPRO6000" / model / "bf16"
    kernels = read_kernel_profile(folder, tensor_parallel_size)
    times = read_allreduce(
        shared / "data/ops/aiconfigurator/rtx_pro_6000_server/comm/vllm/0.24.0/custom_allreduce_perf.parquet"
    )
    spec = model_spec(model)
    assert first_unsplit(spec.num_key_value_heads // tensor_parallel_size, 188) == unsplit
    eager = calibrate_kernels(kernels, model=spec, collectives=times, enforce_eager=True)
    slopes = ComposedLatency.from_json(eager.latency).unevenness_decode
    split = slopes.axes[0] < unsplit
    assert np.all(np.abs(slopes.values[split]) < 0.004)
    assert np.all(slopes.values[~split] > 0.002)


def test_held_out_rows_of_real_tables_are_predicted(shared: Path) -> None:
    folder = shared / "data/profiles/llmservingsim/RTXPRO6000/meta-llama/Llama-3.1-8B/bf16"
    profile = calibrate_kernels(read_kernel_profile(folder, 1), model=model_spec("meta-llama/Llama-3.1-8B"))
    for name, limit in (
        ("decode attention, context held out", 0.02),
        ("prefill attention, prefix held out", 0.02),
        ("mixed attention, context held out", 0.02),
        ("mixed attention, chunk held out", 0.02),
        ("largest GEMM, num_tokens held out", 0.03),
        ("uneven decode attention, number of decodes held out", 0.025),
        ("uneven decode attention, context held out", 0.02),
    ):
        assert profile.accuracy[name]["mape"] < limit, name
