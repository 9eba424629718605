"""Tables of operators -> a profile that prices whole steps.

A step runs its dense operators over all new tokens, attention of its prompts, attention of its decodes, and what is done
once per request; kernels follow one another without gaps, as in the tables' own loops. That prompts' and decodes'
attention are two kernels is aiconfigurator's rule for mixed steps (`backends/base_backend.py`, `_get_mix_step_latency`)
and Vidur's. Tables are measured with equal contexts: a batch is priced by the mean of its contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from kvtwin.calibrate.gpus import gpu_spec
from kvtwin.calibrate.models import ModelSpec
from kvtwin.calibrate.operators.fits import OperatorFits
from kvtwin.calibrate.operators.memory import VALUE_BYTES, Memory, bytes_of
from kvtwin.calibrate.operators.recipes import Dense, Moved, Recipe, recipe_for
from kvtwin.calibrate.prefills import several_prefills
from kvtwin.calibrate.tables.calibrate import Fitted, accuracy_of, hardware_of, only_engine
from kvtwin.sim.latency.composed import ComposedLatency
from kvtwin.sim.latency.grid import FloatArray, Grid
from kvtwin.sim.latency.profile import Profile
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.optable import OpTable

_BANDWIDTH_SHARE: Final = 0.8  # aiconfigurator's `mem_bw_empirical_scaling_factor`
_MOVED_US: Final = 3.0  # its `mem_empirical_constant_latency`
_NO_COST: Final = Grid([[0.0], [0.0]], [[0.0]])


def compose_tables(
    tables: Sequence[OpTable],
    *,
    model: ModelSpec,
    tensor_parallel_size: int = 1,
    hardware: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Compose a step-latency profile from tables of operators.

    Args:
        tables: matrix products (or layers), attention, and above one GPU all-reduces, of one engine version on one GPU.
        model: the checkpoint's shape.
        tensor_parallel_size: GPUs per layer.
        hardware: GPU, where the files do not say.
        progress: told which operator is fitted next.

    Raises:
        InputError: an operator is missing, a choice between kinds of times is open, or see `OperatorFits`.
    """
    device = hardware_of(tables, hardware)
    fits = OperatorFits(tables, model, tensor_parallel_size, device, progress)
    recipe = recipe_for(model, tensor_parallel_size, fits.ops)
    fits.fit(recipe.operators(tensor_parallel_size))
    products = fits.fitted["gemm"].samples if "gemm" in fits.fitted else None
    memory = Memory.of(_bandwidth(device), products) if recipe.moved else None
    latency = _latency(fits, recipe, model, tensor_parallel_size, memory)
    return Profile(
        kind="composed",
        latency=latency.to_json(),
        hardware=device,
        model=model.name,
        engine=only_engine(tables),
        tensor_parallel_size=tensor_parallel_size,
        domain=_domain(latency),
        accuracy=accuracy_of(list(fits.fitted.values())),
        provenance=_provenance(tables, fits, recipe, memory),
    )


def _latency(
    fits: OperatorFits, recipe: Recipe, model: ModelSpec, num_gpus: int, memory: Memory | None
) -> ComposedLatency:
    """What a step of the model is made of, from the fitted operators."""
    fitted = fits.fitted
    parts = {"dense": _summed([(dense, fitted[dense.op]) for dense in recipe.per_token], memory)}
    sequences = _summed([(dense, fitted[dense.op]) for dense in recipe.per_request], memory)
    if memory is not None:
        parts["moved"] = _moved(recipe.moved, memory, parts["dense"].axes[0])
        moved = _moved(recipe.moved_per_request, memory, sequences.axes[0])
        sequences = Grid([sequences.axes[0].tolist()], sequences.values + moved.values)
    if num_gpus > 1:
        parts["collectives"] = _all_reduces(fitted["all_reduce"], recipe, model, num_gpus, parts["dense"])
    heads = {
        "num_heads": model.num_attention_heads / num_gpus,
        "num_key_value_heads": max(1.0, model.num_key_value_heads / num_gpus),
    }
    key_values = 2 * heads["num_key_value_heads"] * model.head_dim
    decode = _decode_grid(fitted[recipe.decode], heads, key_values, memory)
    prefill = _prefill_grid(fitted[recipe.prefill], heads)
    return ComposedLatency(
        num_layers=model.num_hidden_layers,
        num_kernels=0,
        launch_gap_us=0.0,
        tokens=parts,
        sequences=sequences,
        decode=decode,
        prefill=prefill,
        several=several_prefills(fitted[recipe.prefill], prefill.axes[0], heads),
        increment=_beside_prompts(decode),
        unevenness_decode=_NO_COST,
        unevenness_mixed=_NO_COST,
    )


def _provenance(tables: Sequence[OpTable], fits: OperatorFits, recipe: Recipe, memory: Memory | None) -> dict[str, Any]:
    return {
        "sources": [dict(table.source) for table in tables],
        "operators": {op: found.samples.name for op, found in fits.fitted.items()},
        "assumed": [
            f"{moved.name}: {moved.bytes_per_row:.0f} bytes a {row} at {_BANDWIDTH_SHARE} of the bandwidth, and {_MOVED_US} us"
            for row, group in (("token", recipe.moved), ("request", recipe.moved_per_request))
            for moved in group
        ],
        "memory": None
        if memory is None
        else (
            "a matrix product takes no less than reading its weights, attention of decodes no less than reading keys "
            f"and values, at {memory.streamed / memory.peak:.2f} of the memory's bandwidth, which products of 512 MB and more reach"
        ),
        "left_out": list(recipe.missing),
        "uneven_contexts": "priced by their mean: the tables have equal ones only",
    }


def _summed(parts: Sequence[tuple[Dense, Fitted]], memory: Memory | None) -> Grid:
    """What the operators take together, by number of rows, none less than reading its weights; 0 if there are none."""
    if not parts:
        return Grid([[0.0]], [0.0])
    axis = np.unique(np.concatenate([_measured(found, dense.rows) for dense, found in parts]))
    total = np.zeros(len(axis))
    for dense, found in parts:
        fixed = {name: np.full(len(axis), value) for name, value in dense.shape.items()}
        least_us = dense.weights * bytes_of(found.samples) / memory.streamed if memory is not None else 0.0
        total += dense.times * np.maximum(found.model.time_us({**fixed, dense.rows: axis}), least_us)
    return Grid([axis.tolist()], total)


def _measured(found: Fitted, load: str) -> FloatArray:
    """A load's measured values, the ends of the tiles that it fills, and one value in each gap: times bend there."""
    values = np.unique(found.samples.load[load]).astype(np.float64)
    between = np.sqrt(values[1:] * np.maximum(values[:-1], 1.0)).round()
    steps = found.model.bank.steps.get(load, ()) if found.model.bank is not None else ()
    ends = [np.arange(tile, min(values[-1], _MOST_TILES * tile), tile) for tile in steps]
    nodes = np.unique(np.concatenate([values, between, *ends, *(end + 1 for end in ends)]))
    inside: FloatArray = nodes[(nodes >= values[0]) & (nodes <= values[-1])]
    return inside


_MOST_TILES: Final = 64  # beyond them a step is a percent


def _bandwidth(hardware: str | None) -> float:
    """Of the GPU's memory, in bytes per microsecond."""
    gpu = gpu_spec(hardware or "")
    if gpu is None:
        raise InputError(
            f"the memory bandwidth of {hardware or 'the GPU'} is not known, which operators without a table cost: name "
            "a GPU with --hardware (H100, H200, B200, A100, L40S, RTX PRO 6000 ...)"
        )
    return gpu.memory_bytes_per_s / 1e6


def _moved(parts: Sequence[Moved], memory: Memory, rows: FloatArray) -> Grid:
    total = np.zeros(len(rows))
    for moved in parts:
        total += moved.times * (rows * moved.bytes_per_row / (_BANDWIDTH_SHARE * memory.peak) + _MOVED_US)
    return Grid([rows.tolist()], total)


def _all_reduces(found: Fitted, recipe: Recipe, model: ModelSpec, num_gpus: int, dense: Grid) -> Grid:
    tokens = dense.axes[0]
    num_bytes = tokens * model.hidden_size * VALUE_BYTES
    time_us = found.model.time_us({"num_gpus": np.full(len(tokens), float(num_gpus)), "num_bytes": num_bytes})
    return Grid([tokens.tolist()], recipe.all_reduces * time_us)


def _attention_us(found: Fitted, heads: dict[str, float], loads: dict[str, FloatArray]) -> FloatArray:
    """One layer's attention; columns that the operator does not have are left out."""
    n = len(next(iter(loads.values())))
    shape = {name: np.full(n, value) for name, value in heads.items() if name in found.samples.shape}
    return found.model.time_us({**shape, **{name: loads[name] for name in found.samples.load}})


def _product(*axes: FloatArray) -> list[FloatArray]:
    return [values.ravel() for values in np.meshgrid(*axes, indexing="ij")]


def _decode_grid(found: Fitted, heads: dict[str, float], key_values: float, memory: Memory | None) -> Grid:
    """By number of decodes and context of each; `key_values`: of each token, in a layer."""
    decodes = _measured(found, "num_decode")
    in_all = "total_context" in found.samples.load  # LLMServingSim v0: of all decodes together
    contexts = _measured(found, "total_context" if in_all else "context")
    if in_all:
        contexts = np.unique(np.maximum(contexts // decodes[-1], 1.0).tolist() + contexts.tolist())
    each = dict(zip(("num_decode", "context"), _product(decodes, contexts), strict=True))
    each["total_context"] = each["num_decode"] * each["context"]
    time_us = _attention_us(found, heads, each)
    if memory is not None:
        time_us = np.maximum(time_us, each["total_context"] * key_values * bytes_of(found.samples) / memory.streamed)
    return Grid([decodes.tolist(), contexts.tolist()], time_us.reshape(len(decodes), len(contexts)))


def _prefill_grid(found: Fitted, heads: dict[str, float]) -> Grid:
    """By new tokens and cached tokens of one prompt.

    Where tables have no prefix, aiconfigurator's rule: the time of the whole prompt, times the share of its (query, key)
    pairs that is new (`operations/attention.py`, `prefix_correction`).
    """
    chunks = _measured(found, "chunk")
    has_prefix = "prefix" in found.samples.load
    prefixes = _measured(found, "prefix") if has_prefix else np.concatenate([[0.0], chunks])
    chunk, prefix = _product(chunks, prefixes)
    ones = np.ones(len(chunk))
    if has_prefix:
        time_us = _attention_us(found, heads, {"num_seqs": ones, "chunk": chunk, "prefix": prefix})
    else:
        whole = chunk + prefix
        time_us = _attention_us(found, heads, {"num_seqs": ones, "chunk": whole}) * (1.0 - (prefix / whole) ** 2)
    return Grid([chunks.tolist(), prefixes.tolist()], time_us.reshape(len(chunks), len(prefixes)))


def _beside_prompts(decode: Grid) -> Grid:
    """What decodes add to a step with prompts: their own kernel, whatever the prompts; none add nothing."""
    decodes, contexts = decode.axes
    values = np.concatenate([np.zeros((1, len(contexts))), decode.values])
    return Grid([[0.0], [0.0], [0.0, *decodes.tolist()], contexts.tolist()], values[None, None])


def _domain(latency: ComposedLatency) -> dict[str, tuple[float, float]]:
    tokens, chunks = latency.tokens["dense"].axes[0], latency.prefill.axes[0]
    decodes, contexts = latency.decode.axes
    return {
        "num_tokens": (float(tokens[0]), float(tokens[-1])),
        "num_decode": (0.0, float(decodes[-1])),
        "decode_context_max": (0.0, float(contexts[-1])),
        "prefill_tokens": (0.0, float(chunks[-1])),
    }
