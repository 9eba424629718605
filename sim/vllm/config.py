"""Engine settings under their upstream names, so that a server's flags can be pasted."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from kvtwin.sim.links import DEFAULT_PAGE_TOKENS, LinkTimes
from kvtwin.traces.errors import InputError


@dataclass(frozen=True, slots=True)
class VllmRules:
    """What differs between versions of the vLLM scheduler, one switch per difference.

    Attributes:
        reuse_uncached_first: freed blocks without content go to the front of the free queue
            (`BlockPool.free_blocks`, 0.32), else all freed blocks go to the back (0.19).
        lone_request_ignores_long_prefill_threshold: the long-prefill threshold does not apply while at
            most one request waits or runs (`Scheduler.schedule`, 0.32).
        victim_place_moves_index: after a priority preemption the loop over running requests steps back
            when the victim stood before it (0.32), else when the victim was scheduled in this step (0.19).
        hold_back_stale_output: a request preempted with a token in flight is not resumed before that
            token has arrived (0.32).
        has_watermark: the `watermark` option exists (0.32).
        has_skipped_queue: waiting requests that are passed over have a queue of their own, which goes first (0.19
            `skipped_waiting`), else only those that hold blocks have (0.32 `kv_holding_waiting`).
        offloads_by_job: every copy to the host counts by itself (0.32 `OffloadingConnectorScheduler`), else those of a
            request together (0.19); see `offload/`.
        queues_empty_batches: an empty batch takes a place in the queue of batches in flight as any other does
            (`EngineCore.step_with_batch_queue`, 0.32), else it is taken in at once.
        holds_back_written_blocks: with two batches in flight and blocks that are loaded, those of a request that is gone
            are free only when no step can write them any more (`Scheduler.defer_block_free`, 0.32).
        reserves_for_loads: blocks are loaded only beside what the prefills under way still need
            (`Scheduler._inflight_prefill_reserved_blocks`, 0.32).
    """

    reuse_uncached_first: bool
    lone_request_ignores_long_prefill_threshold: bool
    victim_place_moves_index: bool
    hold_back_stale_output: bool
    has_watermark: bool
    has_skipped_queue: bool
    offloads_by_job: bool
    queues_empty_batches: bool
    holds_back_written_blocks: bool
    reserves_for_loads: bool


VLLM_RULES: Mapping[str, VllmRules] = MappingProxyType(
    {
        "0.19": VllmRules(False, False, False, False, False, True, False, False, False, False),
        "0.32": VllmRules(True, True, True, True, True, False, True, True, True, True),
    }
)


# Server options that change nothing here, so that a server's flags can be pasted whole.
_WITHOUT_EFFECT = {
    "model", "dtype", "kv_cache_dtype", "seed", "load_format", "gpu_memory_utilization", "skip_tokenizer_init",
    "disable_log_stats", "enforce_eager", "data_parallel_size", "enable_expert_parallel", "hash_id_tokens",
    "latency_ns", "comment",
}  # fmt: skip
# ... unless they are set to something that would change the decisions.
_ONLY = {"data_parallel_size": 1, "enable_expert_parallel": False}
_RENAMED = {"scheduling_policy": "policy"}


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """Settings of a vLLM V1 engine; names, meanings and defaults are vLLM's (a server on a GPU with >= 70 GiB).

    Attributes:
        num_gpu_blocks: KV blocks, the null block included (vLLM logs it at start-up).
        version: vLLM version whose rules are followed; `VLLM_RULES` names those reproduced exactly, any
            other follows the nearest older one.
        block_size: tokens per KV block.
        max_num_seqs: most requests in a step.
        max_num_batched_tokens: most new tokens in a step.
        max_model_len: longest prompt plus output, in tokens; 0 for whatever the KV cache holds.
        enable_chunked_prefill: a prompt may be split over steps.
        enable_prefix_caching: full blocks are shared between equal prefixes.
        long_prefill_token_threshold: most new tokens per request and step; 0 for no such limit.
        policy: order of the waiting queue, "fcfs" or "priority" (`--scheduling-policy`).
        watermark: share of the blocks that an admission leaves free (0.32).
        scheduler_reserve_full_isl: admit a request only if all its known tokens fit.
        async_scheduling: schedule the next step before the previous one's tokens are known.
        tensor_parallel_size: GPUs that share each layer.
        kv_offloading_size: host memory for KV blocks below the GPU's, in GiB; 0 for none.
        kv_offloading_backend: "native", vLLM's `OffloadingConnector`.
        offload_prompt_only: blocks that hold output tokens are not offloaded (0.32, in `kv_connector_extra_config`; 0.19
            offloads them all).
        kv_offloading_disk_size: disk below that host memory, in GiB; 0 for none (not a vLLM option: the size of what is
            its `fs` tier).
        preemption_mode: what becomes of a preempted request's KV, "recompute" or "swap" (an option of V0, as is
            swap_space; V1 recomputes).
        swap_space: host memory for swapped requests, in GiB.
        kv_bytes_per_token: KV of one token over all layers and GPUs; says how many blocks these sizes are (not a vLLM
            option; the default is Llama-3.1-8B in 16 bits).
        kv_links: what transfers take, in ns; names of `LinkTimes`, where a page is a block (not a vLLM option).
    """

    num_gpu_blocks: int
    version: str = "0.32"
    block_size: int = 16
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 8192
    max_model_len: int = 0
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    long_prefill_token_threshold: int = 0
    policy: Literal["fcfs", "priority"] = "fcfs"
    watermark: float = 0.0
    scheduler_reserve_full_isl: bool = True
    async_scheduling: bool = True
    tensor_parallel_size: int = 1
    kv_offloading_size: float = 0.0
    kv_offloading_backend: str = "native"
    offload_prompt_only: bool = True
    kv_offloading_disk_size: float = 0.0
    preemption_mode: Literal["recompute", "swap"] = "recompute"
    swap_space: float = 4.0
    kv_bytes_per_token: int = 131_072
    kv_links: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Resolve `max_model_len` = 0 and refuse what vLLM refuses at start-up.

        Raises:
            InputError: names the setting, its value and what would be right.
        """
        rules_version(self.version)
        for name in ("num_gpu_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1 expected")
        _require(self.num_gpu_blocks >= 2, "num_gpu_blocks", self.num_gpu_blocks, "block 0 is never usable: 2 or more")
        for name in ("max_model_len", "long_prefill_token_threshold"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more expected")
        _require(self.policy in ("fcfs", "priority"), "policy", self.policy, '"fcfs" or "priority" expected')
        _require(0 <= self.watermark < 1, "watermark", self.watermark, "0 <= watermark < 1 expected")
        known = self.watermark == 0 or self.rules.has_watermark
        _require(known, "watermark", self.watermark, f"vLLM {self.version} has no such option")
        self._check_tiers()
        if self.max_model_len == 0:
            object.__setattr__(self, "max_model_len", self.capacity_tokens)
        _require(
            self.max_model_len <= self.capacity_tokens,
            "max_model_len",
            self.max_model_len,
            f"the KV cache holds {self.capacity_tokens} tokens (num_gpu_blocks - 1 blocks of {self.block_size})",
        )
        if not self.enable_chunked_prefill:
            _require(
                self.max_num_batched_tokens >= self.max_model_len,
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"without chunked prefill at least max_model_len ({self.max_model_len}) expected",
            )

    def _check_tiers(self) -> None:
        for name in ("kv_offloading_size", "kv_offloading_disk_size", "swap_space"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "GiB >= 0 expected")
        _require(self.kv_bytes_per_token >= 1, "kv_bytes_per_token", self.kv_bytes_per_token, "at least 1 expected")
        _require(
            self.kv_offloading_backend == "native", "kv_offloading_backend", self.kv_offloading_backend, "'native'"
        )
        modes = ("recompute", "swap")
        _require(
            self.preemption_mode in modes, "preemption_mode", self.preemption_mode, '"recompute" or "swap" expected'
        )
        if self.kv_offloading_size:
            _require(self.enable_prefix_caching, "kv_offloading_size", self.kv_offloading_size, "needs prefix caching")
            _require(self.num_host_blocks >= 1, "kv_offloading_size", self.kv_offloading_size, "holds no KV block")
        if self.kv_offloading_disk_size:
            on_host = self.kv_offloading_size > 0
            _require(on_host, "kv_offloading_disk_size", self.kv_offloading_disk_size, "needs kv_offloading_size")
        self.links()

    def _num_blocks(self, size_gib: float) -> int:
        return int(size_gib * 2**30 // (self.kv_bytes_per_token * self.block_size))

    @property
    def num_host_blocks(self) -> int:
        """Blocks that `kv_offloading_size` holds."""
        return self._num_blocks(self.kv_offloading_size)

    @property
    def num_disk_blocks(self) -> int:
        """Blocks that `kv_offloading_disk_size` holds."""
        return self._num_blocks(self.kv_offloading_disk_size)

    @property
    def num_swap_blocks(self) -> int:
        """Blocks that `swap_space` holds."""
        return self._num_blocks(self.swap_space)

    @property
    def swaps(self) -> bool:
        """Whether preempted requests are swapped out."""
        return self.preemption_mode == "swap"

    def links(self) -> LinkTimes:
        """What transfers take; the default disk is `LinkTimes`', for blocks of this size.

        Raises:
            InputError: an unknown name, or a time that is no finite number >= 0.
        """
        default = LinkTimes()
        scale = self.block_size / DEFAULT_PAGE_TOKENS
        pages = {name: getattr(default, name) * scale for name in ("read_per_page", "write_per_page")}
        return LinkTimes.of({**pages, **self.kv_links})

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return (self.num_gpu_blocks - 1) * self.block_size

    @property
    def rules(self) -> VllmRules:
        """The decision rules of the nearest version that is not newer than `version`.

        Raises:
            InputError: not a version number.
        """
        return VLLM_RULES[rules_version(self.version)]


def rules_version(version: str) -> str:
    """Which entry of `VLLM_RULES` a version follows: its own, else the nearest older, else the oldest.

    Raises:
        InputError: not a version number.

    >>> rules_version("0.19.0"), rules_version("0.24.1"), rules_version("0.11")
    ('0.19', '0.19', '0.19')
    """
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        raise InputError(f"version is {version!r}: a vLLM version such as '0.19.0' expected") from None
    known = {tuple(int(part) for part in name.split(".")): name for name in VLLM_RULES}
    older = [key for key in known if key <= (major, minor)]
    return known[max(older) if older else min(known)]


def _require(condition: bool, name: str, value: object, right: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value!r}: {right}")


def vllm_config(settings: Mapping[str, Any], where: str | PathLike[str]) -> VllmConfig:
    """Check settings given under vLLM's names and build the config.

    Args:
        settings: such as a TOML table; `engine` may name "vllm"; null values mean the default.
        where: the file, for messages.

    Raises:
        InputError: an unknown key (with the closest known one), a wrong type, a value out of range, or
            `num_gpu_blocks` missing.
    """
    engine = settings.get("engine", "vllm")
    if engine != "vllm":
        raise InputError(f"engine is {engine!r}: 'vllm' or 'sglang' expected", path=where)
    fields = {field.name: field for field in dataclasses.fields(VllmConfig)}
    values: dict[str, Any] = {}
    for given, value in settings.items():
        name = _RENAMED.get(given, given)
        if name == "engine" or value is None:
            continue
        if name in _ONLY and value != _ONLY[name]:
            raise InputError(f"{name} is {value!r}: only {_ONLY[name]!r} is simulated", path=where)
        if name in fields:
            values[name] = _typed(name, value, str(fields[name].type), where)
        elif name not in _WITHOUT_EFFECT:
            close = difflib.get_close_matches(name, [*fields, *_WITHOUT_EFFECT, *_RENAMED], n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(fields)}"
            raise InputError(f"unknown setting {name!r}; {hint}", path=where)
    if "num_gpu_blocks" not in values:
        raise InputError("num_gpu_blocks is missing: vLLM logs it at start-up ('# GPU blocks')", path=where)
    try:
        return VllmConfig(**values)
    except InputError as error:
        raise InputError(error.problem, path=where) from None


def _typed(name: str, value: Any, kind: str, where: str | PathLike[str]) -> Any:
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind.startswith("Mapping") and isinstance(value, dict):
        return value
    if not kind.startswith(("int", "float", "bool", "Mapping")) and isinstance(value, str):
        return value
    raise InputError(f"{name} is {value!r}: {kind} expected", path=where)


def read_settings(path: str | PathLike[str]) -> dict[str, Any]:
    """Read an engine file: TOML, or JSON (such as a recording's config.json; a `meta.json` of
    LLMServingSim keeps the settings under `engine_kwargs` and the version beside them).

    Raises:
        InputError: not there, not readable, not a table.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        settings = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=file) from error
    except ValueError as error:  # JSONDecodeError, TOMLDecodeError, UnicodeDecodeError
        raise InputError(f"not readable as {file.suffix.lstrip('.') or 'TOML'} ({error})", path=file) from error
    if not isinstance(settings, dict):
        raise InputError("a table of settings expected", path=file)
    if isinstance(settings.get("engine_kwargs"), dict):
        return {**recorded_settings(settings["engine_kwargs"]), "version": settings.get("vllm_version")}
    return settings


def recorded_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a recording says of its engine, without the settings that kvtwin does not know.

    A user's own file must not hold unknown keys, but a recording lists whatever its engine was started with.
    """
    known = {field.name for field in dataclasses.fields(VllmConfig)} | set(_ONLY) | set(_RENAMED) | {"enforce_eager"}
    return {name: value for name, value in settings.items() if name in known and value is not None}
