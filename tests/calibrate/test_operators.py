"""Tables of operators to the price of a step: planted times add up, choices are the user's, gaps are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvtwin.calibrate.models import ModelSpec, model_spec, read_model
from kvtwin.calibrate.operators.compose import compose_tables
from kvtwin.calibrate.operators.memory import Memory
from kvtwin.sim.latency.profile import Profile, read_profile
from kvtwin.sim.latency.stats import BatchStats, batch_row
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.simulate import simulate
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.optable import OpSamples, OpTable
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

MODEL = ModelSpec("tiny", 4, 64, 8, 4, 8, 4096, 1e6, 0, 0, 128, 1000)
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
HARDWARE = "NVIDIA H100"


def samples(op: str, work: str, load: dict[str, Any], time_us: npt.NDArray[Any], **fields: Any) -> OpSamples:
    n = len(time_us)
    load = {name: np.asarray(values) for name, values in load.items()}
    defaults: dict[str, Any] = {"key": {"version": "1"}, "shape": {}}
    return OpSamples(
        op, work, load=load, time_us=time_us, rows=np.arange(n), spread=np.full(n, np.nan), suspect=np.zeros(n, bool),
        **(defaults | fields),
    )  # fmt: skip


def grid(**axes: list[int]) -> dict[str, npt.NDArray[np.int64]]:
    return {name: values.ravel() for name, values in zip(axes, np.meshgrid(*axes.values(), indexing="ij"), strict=True)}


def attention(prefix: bool = True, names: tuple[str, str] = ("attn_prefill", "attn_decode")) -> list[OpSamples]:
    """Prompts: 5 us and 1 ns per pair of query and key; decodes: 4 us and 2 ns per key."""
    prompts = grid(num_seqs=[1, 2], chunk=SIZES[5:], **({"prefix": [0, 256, 1024]} if prefix else {}))
    pairs = prompts["chunk"] * (prompts.get("prefix", 0) + prompts["chunk"] / 2)
    decodes = grid(num_decode=SIZES[:8:2], context=SIZES[5:])
    keys = decodes["num_decode"] * decodes["context"]
    fixed = {"key": {"version": "1", **({"num_tensor_parallel_workers": "1"} if prefix else {})}}
    return [
        samples(names[0], "prefill_attention", prompts, 5 + prompts["num_seqs"] * pairs * 1e-3, **fixed),
        samples(names[1], "decode_attention", decodes, 4 + keys * 2e-3, **fixed),
    ]


def layers(*, all_reduces: bool = False) -> list[OpSamples]:
    """Vidur's names: each operator takes 2 us, and 10 ns per token; projections twice that."""
    names = ["input_layernorm", "attn_rope", "attn_kv_cache_save", "post_attention_layernorm", "mlp_act", "add", "emb"]
    twice = ["attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj"]
    tokens, fixed = np.array(SIZES), {"key": {"version": "1", "num_tensor_parallel_workers": "1"}}
    found = [samples(name, "tokens", {"num_tokens": tokens}, 2 + tokens * 1e-2, **fixed) for name in names]
    found += [samples(name, "tokens", {"num_tokens": tokens}, 4 + tokens * 2e-2, **fixed) for name in twice]
    return found


def table(*parts: OpSamples, hardware: str = HARDWARE) -> OpTable:
    return OpTable(Path("table.csv"), "planted", parts, {"reader": "planted"}, {"hardware": hardware, "engine": "vllm"})


def step_us(profile: Profile, cache_lens: list[int], input_lens: list[int]) -> float:
    batch = BatchStats(np.array([batch_row(cache_lens, input_lens)]))
    return float(profile.latency_model().step_ns(batch, 0)[0]) / 1e3


@pytest.fixture(scope="module")
def vidur() -> Profile:
    return compose_tables([table(*layers()), table(*attention())], model=MODEL)


@pytest.mark.parametrize("num_decode", [1, 6, 100])
def test_a_decode_step_is_the_sum_of_its_operators(vidur: Profile, num_decode: int) -> None:
    per_layer = (6 + 2 * 4) * (2 + num_decode * 1e-2)
    expected = MODEL.num_hidden_layers * (per_layer + 4 + num_decode * 500 * 2e-3) + 2 + num_decode * 1e-2
    assert step_us(vidur, [500] * num_decode, [1] * num_decode) == pytest.approx(expected, rel=0.02)


def test_prompts_and_decodes_are_two_kernels(vidur: Profile) -> None:
    tokens = 300 + 20
    dense = MODEL.num_hidden_layers * 14 * (2 + tokens * 1e-2) + 2 + tokens * 1e-2
    attending = 5 + 300 * (200 + 150) * 1e-3 + 4 + 20 * 500 * 2e-3
    expected = dense + MODEL.num_hidden_layers * attending
    assert step_us(vidur, [200] + [500] * 20, [300] + [1] * 20) == pytest.approx(expected, rel=0.03)


def test_what_vidur_leaves_out_is_said(vidur: Profile) -> None:
    assert vidur.provenance["left_out"] == ["lm_head"]
    assert vidur.kind == "composed"
    assert vidur.model == "tiny"


def test_the_profile_can_be_written_read_and_simulated(vidur: Profile, tmp_path: Path) -> None:
    vidur.write(tmp_path / "p.json")
    latency = read_profile(tmp_path / "p.json").latency_model()
    columns = {"request_id": [str(row) for row in range(20)], "arrival_ns": [row * 100_000 for row in range(20)]}
    lengths = {"input_tokens": [50 + 40 * row for row in range(20)], "output_tokens": [30] * 20}
    workload = Run(RunInfo("workload"), {"requests": from_columns("requests", {**columns, **lengths}, "test")})
    config = VllmConfig(num_gpu_blocks=2000, max_model_len=2048)
    jumped, plain = (simulate(workload, config, latency, plain=plain) for plain in (False, True))
    assert jumped.requests.equals(plain.requests)
    assert jumped.steps.equals(plain.steps)


def by_shape(tp: int = 1) -> list[OpTable]:
    """aiconfigurator's: a product of matrices takes 2 us and a nanosecond for 1,000 multiply-adds."""
    shapes = {(128 // tp, 64), (64, 64 // tp), (256 // tp, 64), (64, 128 // tp), (1000 // tp, 64)}
    columns: dict[str, list[int]] = {"m": [], "n": [], "k": []}
    for n, k in sorted(shapes):
        columns["m"] += SIZES
        columns["n"] += [n] * len(SIZES)
        columns["k"] += [k] * len(SIZES)
    rows, shape = np.array(columns["m"]), {name: np.array(columns[name]) for name in "nk"}
    work_us = rows * shape["n"] * shape["k"] * 1e-6
    gemm = samples("gemm", "gemm", {"m": rows}, 2 + work_us, shape=shape)
    wide = samples("gemm", "gemm", {"m": rows}, 1 + work_us, shape=shape)
    kinds = [
        OpSamples(**{**vars(one), "key": {"version": "1", "gemm_dtype": dtype}})
        for one, dtype in ((gemm, "bfloat16"), (wide, "fp8"))
    ]
    gpus, sizes = grid(num_gpus=[2, 4], num_bytes=[1024 * 2**power for power in range(10)]).values()
    reduce = samples("all_reduce", "transfer", {"num_bytes": sizes}, 10 + sizes * 1e-4, shape={"num_gpus": gpus})
    return [table(*kinds), table(*attention(False, ("context_attention", "generation_attention"))), table(reduce)]


@pytest.fixture(scope="module")
def shaped() -> Profile:
    return compose_tables(by_shape(), model=MODEL)


def test_products_of_matrices_are_found_by_the_models_shape(shaped: Profile) -> None:
    products = 4 * 2 + 8 * 64 * (128 + 64 + 256 + 128) * 1e-6
    dense = MODEL.num_hidden_layers * (products + 4 + 8 * 500 * 2e-3) + 2 + 8 * 64 * 1000 * 1e-6
    moved = 3 * (4 * MODEL.num_hidden_layers + 2)  # and next to nothing for the bytes
    assert step_us(shaped, [500] * 8, [1] * 8) == pytest.approx(dense + moved, rel=0.02)
    assert shaped.provenance["operators"]["gemm"].endswith("gemm_dtype=bfloat16")
    assert len(shaped.provenance["assumed"]) == 5


def test_a_prompt_with_a_cached_prefix_costs_its_new_pairs(shaped: Profile) -> None:
    rest = step_us(shaped, [0], [256]) - MODEL.num_hidden_layers * (5 + 256 * 128 * 1e-3)
    whole_us, share = 5 + 768 * 384 * 1e-3, 1 - (512 / 768) ** 2
    assert step_us(shaped, [512], [256]) == pytest.approx(rest + MODEL.num_hidden_layers * whole_us * share, rel=0.03)


def test_several_gpus_reduce_twice_a_layer(shaped: Profile) -> None:
    two = compose_tables(by_shape(2), model=MODEL, tensor_parallel_size=2)
    parts = two.latency_model().parts_us(BatchStats(np.array([batch_row([500] * 8, [1] * 8)])))  # type: ignore[attr-defined]
    assert parts["collectives"][0] == pytest.approx(9 * (10 + 8 * 64 * 2 * 1e-4), rel=0.05)
    assert "collectives" not in shaped.latency["tokens"]


@pytest.mark.parametrize(
    ("tables", "settings", "message"),
    [
        ([table(*attention())], {}, "no table of matrix products among these"),
        ([table(*layers())], {}, "needs the times of attn_prefill, attn_decode: give their tables too"),
        ([table(*layers()), table(*attention())], {"tensor_parallel_size": 2}, "needs the times of all_reduce"),
        ([table(*layers(), *attention(), *by_shape()[2].samples)], {"tensor_parallel_size": 2}, "no times with num_ten"),
        (by_shape(), {"tensor_parallel_size": 8}, "no all_reduce times for 8 GPUs; found: 2, 4"),
        ([table(*part.samples, hardware="TPU v9") for part in by_shape()], {}, "memory bandwidth of TPU v9 is not known"),
        (
            [table(*by_shape()[0].samples, *(
                OpSamples(**{**vars(one), "key": {"version": "1", "kernel": name}})
                for one in by_shape()[1].samples for name in "ab"
            ))],
            {},
            "2 kinds of times, which are never averaged over; choose with --filter kernel=a or kernel=b",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_composed_is_one_line(tables: list[OpTable], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        compose_tables(tables, model=MODEL, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_models_config_says_its_shape(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "intermediate_size": 14336, "vocab_size": 128256,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    found, known = read_model(str(path)), model_spec("meta-llama/Llama-3.1-8B")
    assert found.head_dim == known.head_dim
    assert found.num_parameters == pytest.approx(known.num_parameters, rel=0.01)
    for text, message in (
        (json.dumps({**config, "hidden_size": "wide"}), "'wide': a positive integer expected"),
        (json.dumps({"hidden_size": 4096}), "None: a positive integer expected"),
        ("[]", "one JSON object"),
        ("{", "cannot be read as the config.json"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_model(str(path))


@pytest.mark.parametrize("spec", [model_spec(name) for name in ("Qwen/Qwen3-32B", "Qwen/Qwen3-30B-A3B")])
def test_shapes_and_parameters_of_known_models_agree(spec: ModelSpec) -> None:
    assert spec.counted_parameters() == pytest.approx(spec.num_parameters, rel=0.01)


def test_memory_is_as_fast_as_products_that_no_cache_holds_are_read() -> None:
    sizes = np.array([16384, 20480, 24576, 1024])
    num_bytes = sizes * 16384 * 2.0
    rows = {"m": np.array([1, 4, 16, 1])}
    shape = {"n": sizes, "k": np.full(4, 16384)}
    time_us = np.where(num_bytes > 500e6, num_bytes / 1.2e6, num_bytes / 5e6)  # the small one stays in the cache
    products = samples("gemm", "gemm", rows, time_us, shape=shape)
    assert Memory.of(1.6e6, products).streamed == pytest.approx(1.2e6)
    assert Memory.of(1.0e6, products).streamed == 1.0e6  # never more than the data sheet's
    few = products.where(np.array([True, True, False, True]))
    assert Memory.of(1.6e6, few).streamed == 1.6e6
