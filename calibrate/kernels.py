"""Kernel tables -> composed step latency: fill the tables' grids, add collectives, fit the cost of uneven contexts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvtwin.calibrate.accuracy import summarize
from kvtwin.calibrate.flash_attention import first_unsplit, piece_tokens
from kvtwin.calibrate.gpus import GpuSpec, gpu_spec
from kvtwin.calibrate.models import ModelSpec
from kvtwin.calibrate.tables.calibrate import Fitted, fit_samples
from kvtwin.calibrate.tables.checks import MIN_ROWS
from kvtwin.calibrate.tables.choice import report
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

# Slopes of uneven contexts are read off where a few sequences are long (v below this): the last wave then
# belongs to them. Above it, the difference between two nearly equal times is mostly noise.
_MAX_SPREAD: Final = 0.7
_SPREAD_BINS: Final = (0.0, 0.2, 0.35, _MAX_SPREAD)
_MIN_SKEW_CONTEXT: Final = 512  # below it the difference is smaller than the timer's noise
_MAX_SKEW_PREFIX: Final = 1024  # a long prefix of the prefill hides the decodes' tail
_QUERY_TILE: Final = 64.0  # rows of queries per thread block of FlashAttention-2's paged kernel
# A piece of context (per thread block) longer than most requests' contexts: in effect nothing is split.
_LONG_PIECE: Final = 2048


@dataclass(frozen=True)
class _Table:
    """Columns of a kernel table as arrays."""

    columns: Mapping[str, npt.NDArray[Any]]

    @classmethod
    def of(cls, table: pa.Table) -> _Table:
        return cls({name: table.column(name).to_numpy() for name in table.column_names})

    def where(self, keep: npt.NDArray[np.bool_]) -> _Table:
        return _Table({name: values[keep] for name, values in self.columns.items()})

    def __getattr__(self, name: str) -> npt.NDArray[Any]:
        try:
            return self.columns[name]
        except KeyError:
            raise AttributeError(name) from None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def calibrate_kernels(
    kernels: KernelProfile,
    *,
    model: ModelSpec,
    max_model_len: int | None = None,
    enforce_eager: bool = False,
    collectives: pa.Table | None = None,
) -> Profile:
    """Compose a step-latency profile from a kernel profile.

    Args:
        kernels: tables of one model on one GPU at one tensor-parallel degree.
        model: the checkpoint's shape (layers, heads, experts).
        max_model_len: the engine's setting; None for the model's own.
        enforce_eager: the engine runs without CUDA graphs.
        collectives: all-reduce times (`readers.allreduce.ALLREDUCE`); required for tensor parallelism.

    Raises:
        InputError: an operator is missing, a grid is too thin, or collectives are missing.
    """
    split_below = _split_below(kernels, model)
    unsplit = None if enforce_eager else _unsplit_decodes(kernels, model, split_below, max_model_len)
    attention = _Table.of(kernels.attention)
    latency = ComposedLatency(
        num_layers=model.num_hidden_layers,
        num_kernels=_num_kernels(kernels, model),
        launch_gap_us=LAUNCH_GAP_US,
        tokens=_token_parts(kernels, model, collectives),
        sequences=_by_size(kernels.per_sequence, "sequences", {"lm_head": 1.0, "sampler": 1.0}, kernels),
        **_attention_grids(attention, kernels, model),
        **_unevenness(kernels, split_below, unsplit),
    )
    return Profile(
        kind="composed",
        latency=latency.to_json(),
        hardware=str(kernels.meta.get("hardware") or kernels.meta.get("gpu")),
        model=model.name,
        engine=f"vllm {kernels.meta.get('vllm_version')}",
        tensor_parallel_size=kernels.tensor_parallel_size,
        domain=_domain(attention, kernels),
        accuracy=kernel_accuracy(kernels, model),
        provenance={
            "source": kernels.source,
            "digest": kernels.digest,
            "launch_gap": f"{LAUNCH_GAP_US} us before each of {latency.num_kernels} kernels: a prior, not fitted",
            "decode_attention": _describe_unsplit(unsplit),
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
        parts["moe"] = _moe(_Table.of(kernels.moe), model, kernels)
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
    data = _Table.of(table)
    rows = data.where(data.layer == name)
    if not len(rows):
        raise InputError(f"no operator {name!r} in the kernel tables", path=kernels.path)
    order = np.argsort(rows.columns[size])
    sizes, times = rows.columns[size][order].astype(np.float64), rows.time_us[order]
    if len(rows) < MIN_ROWS:
        return sizes, lambda axis: np.interp(axis, sizes, times)
    model = fit_samples(plain_samples(name, "tokens", {"num_tokens": sizes}, times), None).model
    tiles = model.bank.steps.get("num_tokens", ()) if model.bank is not None else ()
    return _with_tile_ends(sizes, tiles), lambda axis: model.time_us({"num_tokens": axis})


def _with_tile_ends(axis: FloatArray, tiles: Sequence[float]) -> FloatArray:
    """The axis, and the last row of each tile and the first of the next between its ends."""
    ends = [np.arange(tile, axis[-1], tile) for tile in tiles]
    nodes = np.unique(np.concatenate([axis, *ends, *(end + 1 for end in ends)]))
    inside: FloatArray = nodes[(nodes >= axis[0]) & (nodes <= axis[-1])]
    return inside


def _moe(table: _Table, model: ModelSpec, kernels: KernelProfile) -> Grid:
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
    table = _Table.of(collectives)
    rows = table.where(table.num_gpus == num_gpus)
    if not len(rows):
        known = ", ".join(str(count) for count in np.unique(table.num_gpus))
        raise InputError(f"no all-reduce times for {num_gpus} GPUs; found: {known}")
    message_bytes = tokens * model.hidden_size * 2
    by_size = Grid([rows.message_bytes.tolist()], rows.time_ns / 1e3)
    return Grid([tokens.tolist()], 2 * model.num_hidden_layers * np.maximum(by_size(message_bytes), 0.0))


def _attention_grids(table: _Table, kernels: KernelProfile, model: ModelSpec) -> dict[str, Grid]:
    """Decode, prefill and increment grids of one layer (see `sim/latency/composed.py`)."""
    decode = table.where(table.prefill_chunk == 0)
    prefill = table.where(table.n_decode == 0)
    mixed = table.where((table.prefill_chunk > 0) & (table.n_decode > 0))
    for name, part in (("decode", decode), ("prefill", prefill), ("mixed", mixed)):
        if len(part) < 4:
            raise InputError(f"attention.csv has {len(part)} {name} rows: too few to interpolate", path=kernels.path)
    prefill_grid = _prefill_grid(prefill, kernels, model)
    return {
        "decode": _filled([decode.n_decode, decode.kv_decode], decode.time_us),
        "prefill": prefill_grid,
        "increment": _increment(mixed, prefill_grid),
    }


def _prefill_grid(prefill: _Table, kernels: KernelProfile, model: ModelSpec) -> Grid:
    """Attention of one prefill by (chunk, prefix), with the steps of its thread blocks between measured chunks."""
    if len(prefill) < MIN_ROWS:
        return _filled([prefill.prefill_chunk, prefill.kv_prefill], prefill.time_us)
    found = _fitted_prefill(prefill, kernels, model).model
    chunks = _with_tile_ends(np.unique(prefill.prefill_chunk).astype(np.float64), (_QUERY_TILE,))
    prefixes = np.unique(prefill.kv_prefill).astype(np.float64)
    chunk, prefix = (values.ravel() for values in np.meshgrid(chunks, prefixes, indexing="ij"))
    times = found.time_us({"chunk": chunk, "prefix": prefix})
    return Grid([chunks.tolist(), prefixes.tolist()], times.reshape(len(chunks), len(prefixes)))


def _fitted_prefill(prefill: _Table, kernels: KernelProfile, model: ModelSpec) -> Fitted:
    degree = kernels.tensor_parallel_size
    heads = {
        "num_heads": float(max(model.num_attention_heads // degree, 1)),
        "num_key_value_heads": float(_kv_heads(kernels, model)),
    }
    load = {"chunk": prefill.prefill_chunk, "prefix": prefill.kv_prefill}
    samples = plain_samples("prefill attention", "prefill_attention", load, prefill.time_us, constants=heads)
    return fit_samples(samples, str(kernels.meta.get("gpu") or kernels.meta.get("hardware") or ""))


def _increment(mixed: _Table, prefill: Grid) -> Grid:
    """What decodes add to a prefill's attention, by (chunk, prefix, decodes, context); 0 decodes add nothing."""
    # A number of decodes measured at a few chunks only (the grid's corner) would have to be made up elsewhere.
    counts, index = np.unique(mixed.n_decode, return_inverse=True)
    num_chunks = np.array([len(np.unique(mixed.prefill_chunk[mixed.n_decode == count])) for count in counts])
    mixed = mixed.where(2 * num_chunks[index] >= num_chunks.max())
    added = mixed.time_us - prefill(mixed.prefill_chunk, mixed.kv_prefill)
    grid = _filled([mixed.prefill_chunk, mixed.kv_prefill, mixed.n_decode, mixed.kv_decode], added)
    chunks, prefixes, decodes, contexts = grid.axes
    nothing = np.zeros((len(chunks), len(prefixes), 1, len(contexts)))
    axes = [chunks.tolist(), prefixes.tolist(), [0.0, *decodes.tolist()], contexts.tolist()]
    return Grid(axes, np.concatenate([nothing, grid.values], axis=2))


def _filled(coordinates: Sequence[npt.NDArray[Any]], values: FloatArray) -> Grid:
    """A full grid over scattered samples on a union of rectangular grids.

    Samples of one point are averaged. Holes are interpolated linearly along the last axis, then along the
    others, the last but one first; what lies outside the samples on every axis (large batches of long contexts
    that did not fit the GPU) is continued in a straight line, in the same order.
    """
    axes, places = zip(*(np.unique(values_, return_inverse=True) for values_ in coordinates), strict=True)
    shape = tuple(len(axis) for axis in axes)
    total, count = np.zeros(shape), np.zeros(shape)
    np.add.at(total, places, values)
    np.add.at(count, places, 1)
    table = np.divide(total, count, out=np.full(shape, np.nan), where=count > 0)
    for fill in (_interpolated, _continued):
        for dimension in reversed(range(len(axes))):
            table = np.apply_along_axis(fill, dimension, table, axes[dimension].astype(np.float64))
    return Grid([axis.tolist() for axis in axes], table)


def _interpolated(line: FloatArray, axis: FloatArray) -> FloatArray:
    """Fill the holes of one line between its known points."""
    known = ~np.isnan(line)
    return np.interp(axis, axis[known], line[known], left=np.nan, right=np.nan) if known.any() else line


def _continued(line: FloatArray, axis: FloatArray) -> FloatArray:
    """Continue one line beyond its known points; a single known point is held, times stay positive."""
    known = np.flatnonzero(~np.isnan(line))
    if len(known) in (0, len(line)):
        return line
    if len(known) == 1:
        return np.full_like(line, line[known[0]])
    straight = Grid([axis[known].tolist()], line[known])(axis)
    return np.where(np.isnan(line), np.maximum(straight, np.nanmin(line)), line)


def _unevenness(kernels: KernelProfile, split_below: int | None, unsplit: _Unsplit | None) -> dict[str, Grid]:
    """Slopes of uneven contexts, in us per token of (longest - mean), by (decodes, spread)."""
    none = Grid([[0.0], [0.0]], [[0.0]])
    if kernels.skew is None:
        return {"unevenness_decode": none, "unevenness_mixed": none}
    skew = _Table.of(kernels.skew)
    pure = _slopes(skew.where(skew.pc == 0), split_below) or none
    mixed = _slopes(skew.where(skew.pc > 0), None) or none  # with a prefill, no context is ever split
    if unsplit is not None:
        pure = _without_splits(pure, unsplit)
    return {"unevenness_decode": pure, "unevenness_mixed": mixed}


def _without_splits(slopes: Grid, unsplit: _Unsplit) -> Grid:
    """Slopes of an engine that splits no context: of each batch size that only the profile split, take the
    nearest one that it did not split either."""
    decodes, values = slopes.axes[0], slopes.values.copy()
    measured = decodes >= unsplit.profile_from
    if not measured.any():
        return slopes
    values[(decodes >= unsplit.engine_from) & ~measured] = values[measured][0]
    return Grid([axis.tolist() for axis in slopes.axes], values)


def _slopes(skew: _Table, split_below: int | None) -> Grid | None:
    """Median slopes by (decodes, spread); `split_below` says from how many decodes on contexts are whole."""
    excess = skew.kv_big - skew.kv_mean
    # Two groups of contexts, nb of n long: their standard deviation over (longest - mean).
    spread = np.sqrt(skew.nb / np.maximum(skew.n - skew.nb, 1))
    keep = (skew.kvs >= _MIN_SKEW_CONTEXT) & (skew.kp <= _MAX_SKEW_PREFIX) & (skew.nb < skew.n)
    keep &= (spread < _MAX_SPREAD) & (excess > 0)
    if not keep.any():
        return None
    slope = (skew.t_skew_us - skew.t_mean_us)[keep] / excess[keep]
    decodes, bins = skew.n[keep], np.digitize(spread[keep], _SPREAD_BINS[1:-1])
    counts = np.unique(decodes)
    middle = [float(np.mean(_SPREAD_BINS[i : i + 2])) for i in range(len(_SPREAD_BINS) - 1)]
    rows, cells = [], []
    for count in counts:
        for index in range(len(middle)):
            here = slope[(decodes == count) & (bins == index)]
            if len(here):
                rows.append((count, middle[index]))
                cells.append(float(np.median(here)))
    by_count, by_spread = (np.array(values) for values in zip(*rows, strict=True))
    found = _filled([by_count, by_spread], np.array(cells))
    return found if split_below is None else _with_step(found, split_below)


def _with_step(slopes: Grid, first: int) -> Grid:
    """Slopes that jump at `first` decodes: where contexts are split, uneven ones cost next to nothing; where they are
    whole, a batch waits for its longest. Each side takes the nearest batch size measured on it."""
    decodes = slopes.axes[0]
    below = decodes < first
    if below.all() or not below.any():
        return slopes
    ends = {first - 1.0: slopes.values[below][-1], float(first): slopes.values[~below][0]}
    rows = dict(zip(decodes.tolist(), slopes.values, strict=True))
    rows = dict(sorted((ends | rows).items()))
    return Grid([list(rows), slopes.axes[1].tolist()], np.array(list(rows.values())))


@dataclass(frozen=True, slots=True)
class _Unsplit:
    """From how many decodes on contexts are not split: in the engine's CUDA graphs, in the profile's launches."""

    engine_from: int
    profile_from: int


def _split_below(kernels: KernelProfile, model: ModelSpec) -> int | None:
    """From how many decodes on the profile's launches of FlashAttention-2 split no context (`flash_attention.py`).

    None where another kernel runs (FlashAttention-3 on Hopper, FlashAttention-4 or FlashInfer on B200), or where the
    GPU is unknown.
    """
    gpu = _gpu(kernels)
    if gpu is None or gpu.compute_capability[0] in (9, 10):
        return None
    return first_unsplit(_kv_heads(kernels, model), gpu.num_sms)


def _unsplit_decodes(
    kernels: KernelProfile, model: ModelSpec, split_below: int | None, max_model_len: int | None
) -> _Unsplit | None:
    """Where an engine with CUDA graphs does not split; None where the kernel is another one."""
    gpu = _gpu(kernels)
    if gpu is None or split_below is None:
        return None
    heads, length = _kv_heads(kernels, model), max_model_len or model.max_position_embeddings
    split = [count for count in range(1, split_below) if piece_tokens(count, heads, gpu.num_sms, length) < _LONG_PIECE]
    return _Unsplit(engine_from=max(split, default=0) + 1, profile_from=split_below)


def _gpu(kernels: KernelProfile) -> GpuSpec | None:
    return gpu_spec(str(kernels.meta.get("gpu") or kernels.meta.get("hardware") or ""))


def _kv_heads(kernels: KernelProfile, model: ModelSpec) -> int:
    return max(1, model.num_key_value_heads // kernels.tensor_parallel_size)


def _describe_unsplit(unsplit: _Unsplit | None) -> str:
    if unsplit is None:
        return "uneven contexts cost what the profile measured"
    return (
        f"FlashAttention-2 in CUDA graphs captured at max_model_len splits no context from {unsplit.engine_from} "
        f"decodes on, the profile's own launches from {unsplit.profile_from} on: between the two, uneven contexts "
        f"cost what they cost above"
    )


def _domain(attention: _Table, kernels: KernelProfile) -> dict[str, tuple[float, float]]:
    tokens = kernels.dense.column("tokens").to_numpy()
    longest = float(attention.kv_decode.max())
    return {
        "num_tokens": (float(tokens.min()), float(tokens.max())),
        "num_decode": (0.0, float(attention.n_decode.max())),
        "decode_context_max": (0.0, longest),
        "prefill_tokens": (0.0, float(attention.prefill_chunk.max())),
    }


def kernel_accuracy(kernels: KernelProfile, model: ModelSpec) -> dict[str, Any]:
    """Hold-out error of each table: whole inner rows (context lengths, chunks, sizes) left out in turn.

    Grids: every second inner value is predicted from a grid without it; never a random cell, which its neighbours of
    the same row would give away. Prefills and the largest matrix product: as `tables/holdout.py` does it.
    """
    attention = _Table.of(kernels.attention)
    decode = attention.where(attention.prefill_chunk == 0)
    prefill = attention.where(attention.n_decode == 0)
    mixed = attention.where((attention.prefill_chunk > 0) & (attention.n_decode > 0))
    shape = [mixed.prefill_chunk, mixed.kv_prefill, mixed.n_decode, mixed.kv_decode]
    dense = _Table.of(kernels.dense)
    gemm = (
        dense.where(dense.layer == "gate_up_proj")
        if "gate_up_proj" in dense.layer
        else dense.where(dense.layer == "qkv_proj")
    )
    samples = {
        "decode attention, context held out": ([decode.n_decode, decode.kv_decode], decode.time_us, 1),
        "decode attention, number of decodes held out": ([decode.n_decode, decode.kv_decode], decode.time_us, 0),
        "mixed attention, context held out": (shape, mixed.time_us, 3),
        "mixed attention, chunk held out": (shape, mixed.time_us, 0),
    }
    found = {
        name: _held_out(coordinates, times, dimension) for name, (coordinates, times, dimension) in samples.items()
    }
    fitted: dict[str, tuple[Fitted, tuple[str, ...]]] = {
        "prefill attention": (_fitted_prefill(prefill, kernels, model), ("prefix", "chunk"))
    }
    product = plain_samples("largest GEMM", "tokens", {"num_tokens": gemm.tokens}, gemm.time_us)
    fitted["largest GEMM"] = (fit_samples(product, None), ("num_tokens",))
    for name, (one, axes) in fitted.items():
        for axis in axes:
            part = report([(one.samples, one.held, one.choice.name)], axis)
            found[f"{name}, {axis.removeprefix('num_')} held out"] = part or {"n": 0}
    return found | _uneven_accuracy(kernels, model, attention) | _repeats(kernels, attention)


def _held_out(coordinates: Sequence[npt.NDArray[Any]], times: FloatArray, dimension: int) -> dict[str, Any]:
    values = np.unique(coordinates[dimension])
    left_out = np.isin(coordinates[dimension], values[1:-1:2])
    if not left_out.any() or left_out.all():
        return {"n": 0}
    grid = _filled([axis[~left_out] for axis in coordinates], times[~left_out])
    predicted = grid(*(axis[left_out] for axis in coordinates))
    return summarize(times[left_out], predicted, groups=coordinates[dimension][left_out])


def _uneven_accuracy(kernels: KernelProfile, model: ModelSpec, attention: _Table) -> dict[str, Any]:
    """Decodes of unequal contexts: slopes fitted without whole batch sizes, or whole short contexts, in turn.

    What equal contexts cost comes from attention.csv, as in the composed step, so its interpolation errors count too.
    """
    if kernels.skew is None:
        return {}
    skew = _Table.of(kernels.skew)
    pure = skew.where((skew.pc == 0) & (skew.nb < skew.n))
    pure_decode = attention.where(attention.prefill_chunk == 0)
    decode = _filled([pure_decode.n_decode, pure_decode.kv_decode], pure_decode.time_us)
    return {
        f"uneven decode attention, {what} held out": _uneven_held_out(
            pure, pure.columns[name], decode, _split_below(kernels, model)
        )
        for name, what in (("n", "number of decodes"), ("kvs", "context"))
    }


def _uneven_held_out(pure: _Table, axis: npt.NDArray[Any], decode: Grid, split_below: int | None) -> dict[str, Any]:
    predicted = np.full(len(pure), np.nan)
    for value in np.unique(axis)[1:-1]:
        left_out = axis == value
        slopes = _slopes(pure.where(~left_out), split_below)
        if slopes is None:
            continue
        rows = pure.where(left_out)
        longest = np.maximum(rows.kv_big, rows.kvs).astype(np.float64)
        mean = rows.kvs + (longest - rows.kvs) * rows.nb / rows.n
        share = np.sqrt(rows.nb / np.maximum(rows.n - rows.nb, 1))
        slope = slopes(
            *(np.clip(values, ax[0], ax[-1]) for values, ax in zip((rows.n, share), slopes.axes, strict=True))
        )
        predicted[left_out] = decode(rows.n, mean) + np.maximum(slope, 0.0) * (longest - mean)
    known = ~np.isnan(predicted)
    return summarize(pure.t_skew_us[known], predicted[known], groups=axis[known])


def _repeats(kernels: KernelProfile, attention: _Table) -> dict[str, Any]:
    """Noise floor: shapes that skew.csv measured again (all decodes at its longest context) against attention.csv."""
    if kernels.skew is None:
        return {}
    skew = _Table.of(kernels.skew)
    known = {
        (int(c), int(p), int(n), int(k)): float(t)
        for c, p, n, k, t in zip(
            attention.prefill_chunk, attention.kv_prefill, attention.n_decode, attention.kv_decode, attention.time_us,
            strict=True,
        )
    }  # fmt: skip
    again = [
        (float(t), known[shape])
        for *place, t in zip(skew.pc, skew.kp, skew.n, skew.kv_big, skew.t_max_us, strict=True)
        if (shape := (int(place[0]), int(place[1]), int(place[2]), int(place[3]))) in known
    ]
    if not again:
        return {}
    first, second = np.array(again).T
    return {"attention measured twice (noise floor)": summarize(first, second)}
