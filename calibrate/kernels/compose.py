"""Kernel tables -> composed step latency: fill the tables' grids, add collectives, fit the cost of uneven contexts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import pyarrow as pa

from kvtwin.calibrate.kernels.accuracy import kernel_accuracy
from kvtwin.calibrate.kernels.attention import fit_attention, with_tile_ends
from kvtwin.calibrate.kernels.table import Table
from kvtwin.calibrate.kernels.uneven import describe_unsplit, first_unsplit_of, unevenness, unsplit_decodes
from kvtwin.calibrate.models import ModelSpec
from kvtwin.calibrate.tables.calibrate import fit_samples
from kvtwin.calibrate.tables.checks import MIN_ROWS
from kvtwin.sim.latency.composed import ComposedLatency
from kvtwin.sim.latency.grid import FloatArray, Grid
from kvtwin.sim.latency.profile import Profile
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.llmservingsim_profile import KernelProfile
from kvtwin.traces.readers.optable import plain_samples

# Dense operators by how often a layer runs them; `layernorm` stands before attention and before the MLP.
_PER_LAYER: Final = {
    "layernorm": 2, "qkv_proj": 1, "qk_norm": 1, "rotary_emb": 1, "o_proj": 1,
    "gate_up_proj": 1, "act_fn": 1, "down_proj": 1,
}  # fmt: skip
_PER_STEP: Final = ("embedding", "final_layernorm")
_REQUIRED: Final = {"embedding", "final_layernorm", "layernorm", "qkv_proj", "rotary_emb", "o_proj"}
_MLP: Final = {"gate_up_proj", "act_fn", "down_proj"}

# Idle time of the device before each kernel, which kernel times leave out. It is a prior, not fitted: NVIDIA's
# "Getting Started with CUDA Graphs" measures 0.5 us between 2.9 us kernels of a graph and 0.9 us between
# overlapped launches; kernels that fill the GPU also drain and fill again. Its value was settled with the RTX PRO
# 6000 run's sensitivity in view (0.5 us less: TTFT mean -1.6 %), so measure it on a GPU before you trust a percent.
LAUNCH_GAP_US: Final = 1.2
# Small kernels and copies around the forward pass: input ids, positions, slots, block tables, sampled tokens.
_INPUT_KERNELS: Final = 30


def calibrate_kernels(
    kernels: KernelProfile,
    *,
    model: ModelSpec,
    max_model_len: int | None = None,
    enforce_eager: bool = False,
    collectives: pa.Table | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Compose a step-latency profile from a kernel profile.

    Args:
        kernels: tables of one model on one GPU at one tensor-parallel degree.
        model: the checkpoint's shape (layers, heads, experts).
        max_model_len: the engine's setting; None for the model's own.
        enforce_eager: the engine runs without CUDA graphs.
        collectives: all-reduce times (`readers.allreduce.ALLREDUCE`); required for tensor parallelism.
        progress: told which part of the attention is fitted next.

    Raises:
        InputError: an operator is missing, a grid is too thin, or collectives are missing.
    """
    split_below = first_unsplit_of(kernels, model)
    unsplit = None if enforce_eager else unsplit_decodes(kernels, model, split_below, max_model_len)
    attention = fit_attention(kernels, model, progress)
    latency = ComposedLatency(
        num_layers=model.num_hidden_layers,
        num_kernels=_num_kernels(kernels, model),
        launch_gap_us=LAUNCH_GAP_US,
        tokens=_token_parts(kernels, model, collectives),
        sequences=_by_size(kernels.per_sequence, "sequences", {"lm_head": 1.0, "sampler": 1.0}, kernels),
        decode=attention.decode,
        prefill=attention.prefill,
        several=attention.several,
        increment=attention.increment,
        **unevenness(kernels, split_below, unsplit),
    )
    return Profile(
        kind="composed",
        latency=latency.to_json(),
        hardware=str(kernels.meta.get("hardware") or kernels.meta.get("gpu")),
        model=model.name,
        engine=f"vllm {kernels.meta.get('vllm_version')}",
        tensor_parallel_size=kernels.tensor_parallel_size,
        domain=_domain(kernels),
        accuracy=kernel_accuracy(kernels, model, attention),
        provenance={
            "source": kernels.source,
            "digest": kernels.digest,
            "launch_gap": f"{LAUNCH_GAP_US} us before each of {latency.num_kernels} kernels: a prior, not fitted",
            "decode_attention": describe_unsplit(unsplit),
            **({"left_out": list(kernels.notes)} if kernels.notes else {}),
        },
    )


def _num_kernels(kernels: KernelProfile, model: ModelSpec) -> int:
    """Kernels launched per step: every operator, attention (one kernel, one to write the cache), all-reduces."""
    layers = set(kernels.dense.column("layer").to_pylist())
    per_layer = sum(times for name, times in _PER_LAYER.items() if name in layers) + 2
    per_layer += 2 * (kernels.tensor_parallel_size > 1) + (kernels.moe is not None)
    return model.num_hidden_layers * per_layer + len(_PER_STEP) + _INPUT_KERNELS


def _token_parts(kernels: KernelProfile, model: ModelSpec, collectives: pa.Table | None) -> dict[str, Grid]:
    present = set(kernels.dense.column("layer").to_pylist())
    required = _REQUIRED | (set() if kernels.moe is not None else _MLP)
    missing = sorted(required - present)
    if missing:
        raise InputError(
            f"dense.csv has no operator {missing[0]!r}; found: {', '.join(sorted(present))}", path=kernels.path
        )
    weights = {name: float(times * model.num_hidden_layers) for name, times in _PER_LAYER.items() if name in present}
    parts = {"dense": _by_size(kernels.dense, "tokens", weights | dict.fromkeys(_PER_STEP, 1.0), kernels)}
    if kernels.moe is not None:
        parts["moe"] = _moe(Table.of(kernels.moe), model, kernels)
    if kernels.tensor_parallel_size > 1:
        parts["collectives"] = _all_reduces(collectives, model, kernels.tensor_parallel_size, parts["dense"].axes[0])
    return parts


def _by_size(table: pa.Table, size: str, weights: Mapping[str, float], kernels: KernelProfile) -> Grid:
    """Sum of weighted operators by size, on the union of their sizes and of the ends of the tiles that they fill."""
    fitted = {name: _fitted_layer(table, size, name, kernels) for name in weights}
    axis = np.unique(np.concatenate([sizes for sizes, _ in fitted.values()]))
    total = sum((weight * fitted[name][1](axis) for name, weight in weights.items()), np.zeros(len(axis)))
    return Grid([axis.tolist()], total)


def _fitted_layer(
    table: pa.Table, size: str, name: str, kernels: KernelProfile
) -> tuple[FloatArray, Callable[[FloatArray], FloatArray]]:
    """One operator: sizes where its time bends, and its time by size.

    With enough rows, the candidate that predicts left-out sizes best (`tables/`): a matrix product's time goes up in
    steps, one per tile of rows, which a straight line between two measured sizes cuts. Else that straight line.
    """
    data = Table.of(table)
    rows = data.where(data.layer == name)
    if not len(rows):
        raise InputError(f"no operator {name!r} in the kernel tables", path=kernels.path)
    order = np.argsort(rows.columns[size])
    sizes, times = rows.columns[size][order].astype(np.float64), rows.time_us[order]
    if len(rows) < MIN_ROWS:
        return sizes, lambda axis: np.interp(axis, sizes, times)
    model = fit_samples(plain_samples(name, "tokens", {"num_tokens": sizes}, times), None).model
    tiles = model.bank.steps.get("num_tokens", ()) if model.bank is not None else ()
    return with_tile_ends(sizes, tiles), lambda axis: model.time_us({"num_tokens": axis})


def _moe(table: Table, model: ModelSpec, kernels: KernelProfile) -> Grid:
    """Mixture-of-experts block of all layers by tokens, at the expected number of activated experts."""
    if not model.num_experts:
        raise InputError(f"moe.csv, but {model.name} is known as a dense model", path=kernels.path)
    if "ep" in table.columns:
        table = table.where(table.ep == 1)
    tokens = np.unique(table.tokens)
    times = []
    for count in tokens.tolist():
        rows = table.where(table.tokens == count)
        order = np.argsort(rows.activated_experts)
        experts = model.activated_experts(count)
        times.append(np.interp(experts, rows.activated_experts[order], rows.time_us[order]))
    return Grid([tokens.tolist()], model.num_hidden_layers * np.array(times))


def _all_reduces(collectives: pa.Table | None, model: ModelSpec, num_gpus: int, tokens: FloatArray) -> Grid:
    """Two all-reduces per layer of tokens * hidden_size values of 2 bytes (after o_proj and after the MLP)."""
    if collectives is None:
        raise InputError(
            f"tensor_parallel_size is {num_gpus}: a table of all-reduce times is needed (collectives = PATH)"
        )
    table = Table.of(collectives)
    rows = table.where(table.num_gpus == num_gpus)
    if not len(rows):
        known = ", ".join(str(count) for count in np.unique(table.num_gpus))
        raise InputError(f"no all-reduce times for {num_gpus} GPUs; found: {known}")
    message_bytes = tokens * model.hidden_size * 2
    by_size = Grid([rows.message_bytes.tolist()], rows.time_ns / 1e3)
    return Grid([tokens.tolist()], 2 * model.num_hidden_layers * np.maximum(by_size(message_bytes), 0.0))


def _domain(kernels: KernelProfile) -> dict[str, tuple[float, float]]:
    attention = Table.of(kernels.attention)
    tokens = kernels.dense.column("tokens").to_numpy()
    longest = float(attention.kv_decode.max())
    return {
        "num_tokens": (float(tokens.min()), float(tokens.max())),
        "num_decode": (0.0, float(attention.n_decode.max())),
        "decode_context_max": (0.0, longest),
        "prefill_tokens": (0.0, float(attention.prefill_chunk.max())),
    }
