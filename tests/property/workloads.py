"""Random workloads and engines: tight memory, tiny budgets, bursts, shared prefixes, priorities, both loops."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from hypothesis import strategies as st

from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns

HASH_BLOCK_TOKENS = 8


@st.composite
def configs(draw: st.DrawFn) -> VllmConfig:
    version = draw(st.sampled_from(["0.19", "0.32"]))
    block_size = draw(st.sampled_from([1, 4, 16]))
    max_model_len = draw(st.sampled_from([64, 128]))
    spare = draw(st.integers(0, 40))
    chunked = draw(st.booleans())
    return VllmConfig(
        num_gpu_blocks=1 + -(-max_model_len // block_size) + spare,
        version=version,
        block_size=block_size,
        max_num_seqs=draw(st.integers(1, 12)),
        max_num_batched_tokens=draw(st.integers(8, 96)) if chunked else max_model_len,
        max_model_len=max_model_len,
        enable_chunked_prefill=chunked,
        enable_prefix_caching=draw(st.booleans()),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 1, 5, 20])),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        watermark=draw(st.sampled_from([0.0, 0.0, 0.1])) if version == "0.32" else 0.0,
        scheduler_reserve_full_isl=draw(st.booleans()),
        async_scheduling=draw(st.booleans()),
    )


@st.composite
def workloads(draw: st.DrawFn, max_model_len: int) -> Run:
    """Up to 25 requests; prompts share prefixes by drawing block ids from a small tree, or from three documents."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 25))
    mean_gap_ns = draw(st.sampled_from([0, 1_000_000, 30_000_000]))
    inputs = rng.integers(1, max_model_len - 2, count)
    outputs = np.array([rng.integers(1, max_model_len - length + 1) for length in inputs])
    if draw(st.booleans()):  # short prompts: long decodes, and with them preemptions
        inputs = np.minimum(inputs, 20)
        outputs = np.array([rng.integers(1, max_model_len - length + 1) for length in inputs])
    columns: dict[str, Any] = {
        "request_id": [f"r{row}" for row in range(count)],
        "arrival_ns": np.cumsum(rng.integers(0, 2 * mean_gap_ns + 1, count)),
        "input_tokens": inputs,
        "output_tokens": outputs,
        "priority": rng.integers(0, 3, count),
        "block_hashes": [_tree_path(rng, length) for length in inputs.tolist()],
    }
    if draw(st.booleans()):
        columns["block_hashes"] = [_document(rng, length) for length in inputs.tolist()]
    shared = draw(st.booleans())
    if not shared:
        del columns["block_hashes"]
    table = from_columns("requests", columns, "a random workload")
    return Run(RunInfo("workload", hash_block_tokens=HASH_BLOCK_TOKENS if shared else None), {"requests": table})


def _tree_path(rng: np.random.Generator, length: int) -> list[int]:
    return [10 * depth + int(rng.integers(0, 2)) for depth in range(-(-length // HASH_BLOCK_TOKENS))]


def _document(rng: np.random.Generator, length: int) -> list[int]:
    start = 1000 * int(rng.integers(0, 3))
    return [start + depth for depth in range(-(-length // HASH_BLOCK_TOKENS))]


@st.composite
def tiered(draw: st.DrawFn, config: VllmConfig) -> VllmConfig:
    """The same engine with small levels below its pool, slow and quick links, or swapping; at least one of them."""
    offloads, swaps = draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    block_gib = config.block_size / 2**30  # with a byte per token
    links = {"h2d_per_token": draw(st.sampled_from([0, 10_000, 500_000])), "read_per_page": 2_000_000}
    settings: dict[str, Any] = {"kv_bytes_per_token": 1, "kv_links": links}
    if offloads:
        settings["kv_offloading_size"] = draw(st.sampled_from([1, 6, 12, 20, 40])) * block_gib
        settings["kv_offloading_disk_size"] = draw(st.sampled_from([0, 5, 100, 100])) * block_gib
        spare = draw(st.integers(0, 6))
        settings["num_gpu_blocks"] = 1 + -(-config.max_model_len // config.block_size) + spare
        settings["enable_prefix_caching"] = True
    if swaps:
        settings |= {"preemption_mode": "swap", "swap_space": draw(st.sampled_from([0, 4, 1000])) * block_gib}
    return dataclasses.replace(config, **settings)
