"""SGLang's server arguments under their own names, so that a server's command line can be pasted."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from types import MappingProxyType
from typing import Any, Final

from kvtwin.sim.links import LinkTimes
from kvtwin.traces.errors import InputError


@dataclass(frozen=True, slots=True)
class SglangRules:
    """What differs between versions of SGLang, one switch per difference.

    Attributes:
        caches_outputs: a finished request's outputs join the tree (`RadixCache.cache_finished_req`, 0.5.9), else
            only what was prefilled does (0.5.6).
        starved_chunk_goes_on: a pending chunk takes its whole chunk budget where memory leaves it nothing
            (`PrefillAdder.add_chunked_req`, 0.5.9).
        counts_pages_by_kv: the pages of the next decode step are counted from allocated KV
            (`new_tokens_required_next_decode`, 0.5.9), else from known tokens (`new_page_count_next_decode`, 0.5.6).
        tries_without_free_places: a prefill is tried although `max_running_requests` run
            (`_get_new_batch_prefill_raw`, 0.5.9).
        preemption_skips_finished: a request that has just finished is no victim of a preemption
            (`preempt_to_schedule`, 0.5.9); 0.5.6 picks it and dies of an assertion.
        chunk_cache_counts_protected: without radix cache, prefilled tokens are reported as protected
            (`ChunkCache`, 0.5.6).
        lone_request_must_fit: the last running request must find room for its next token (`retract_decode`, 0.5.9).
        lists_host_leaves: HiCache keeps a list of droppable host nodes, else it looks for them (0.5.9).
        stores_written_back: nodes that write_back copies to the host go on to storage (`writing_check`, 0.5.9).
    """

    caches_outputs: bool
    starved_chunk_goes_on: bool
    counts_pages_by_kv: bool
    tries_without_free_places: bool
    preemption_skips_finished: bool
    chunk_cache_counts_protected: bool
    lone_request_must_fit: bool
    lists_host_leaves: bool
    stores_written_back: bool


SGLANG_RULES: Final[Mapping[str, SglangRules]] = MappingProxyType(
    {
        "0.5.6": SglangRules(False, False, False, False, False, True, False, False, False),
        "0.5.9": SglangRules(True, True, True, True, True, False, True, True, True),
    }
)

SCHEDULE_POLICIES: Final = ("fcfs", "lpm", "dfs-weight", "lof", "random")
EVICTION_POLICIES: Final = ("lru", "lfu", "fifo", "mru", "filo", "priority", "slru")
WRITE_POLICIES: Final = ("write_through", "write_through_selective", "write_back")
PREFETCH_POLICIES: Final = ("best_effort", "wait_complete", "timeout")

# Arguments that change nothing here, so that a command line can be pasted whole.
_WITHOUT_EFFECT = {
    "model_path", "tokenizer_path", "host", "port", "dtype", "kv_cache_dtype", "quantization", "load_format",
    "trust_remote_code", "mem_fraction_static", "attention_backend", "sampling_backend", "log_level",
    "disable_cuda_graph", "cuda_graph_max_bs", "stream_interval", "enable_metrics", "served_model_name", "device",
    "skip_tokenizer_init", "enable_cache_report", "hicache_io_backend", "hicache_mem_layout",
}  # fmt: skip
# ... unless they are set to something that would change the decisions.
_ONLY: Final[Mapping[str, Any]] = MappingProxyType(
    {"dp_size": 1, "pp_size": 1, "speculative_algorithm": None, "disaggregation_mode": "null", "enable_lora": False}
)
_RENAMED = {"max_total_num_tokens": "max_total_tokens", "tensor_parallel_size": "tp_size"}


@dataclass(frozen=True, slots=True)
class SglangConfig:
    """Settings of one SGLang server; names, meanings and defaults are SGLang's (a GPU with 60 to 90 GB).

    Attributes:
        max_total_tokens: tokens that the KV pool holds (SGLang logs `max_total_num_tokens` at start-up).
        version: SGLang version whose rules are followed; `SGLANG_RULES` names those reproduced exactly, any other
            follows the nearest older one.
        context_length: longest prompt plus output, in tokens; 0 for whatever the pool holds.
        page_size: tokens per KV page.
        max_running_requests: most running requests; 0 for SGLang's own choice.
        max_prefill_tokens: most new tokens of a prefill batch (a lone longer request is let through).
        chunked_prefill_size: most new tokens of a chunk; 0 or less for no chunking.
        enable_mixed_chunk: prefill batches carry the running requests' decodes along.
        schedule_policy: order of the waiting queue, one of SCHEDULE_POLICIES.
        schedule_conservativeness: scales the share of outputs that an admission reserves.
        disable_overlap_schedule: form a batch only when the one before it has run.
        disable_radix_cache: no prefix sharing.
        radix_eviction_policy: one of EVICTION_POLICIES.
        enable_priority_scheduling: requests carry priorities and may preempt running ones.
        schedule_low_priority_values_first: low numbers go first.
        priority_scheduling_preemption_threshold: a preemption needs more than this difference.
        enable_hierarchical_cache: keep evicted KV in host memory (HiCache).
        hicache_ratio: host tokens per device token.
        hicache_size: host memory in GB; 0 to use the ratio. Not simulated: only 0 is accepted.
        hicache_write_policy: when KV is copied to the host, one of WRITE_POLICIES.
        hicache_storage_backend: name of a third level below the host; "" for none.
        hicache_storage_prefetch_policy: when a prefetch from storage ends, one of PREFETCH_POLICIES.
        hicache_storage_backend_extra_config: the backend's settings; read are `prefetch_threshold`,
            `prefetch_timeout_base`, `prefetch_timeout_per_ki_token`, and what storage may hold: `max_tokens` (not an
            SGLang setting) and `eviction_ratio` (`StorageLimit`).
        hicache_links: what HiCache's transfers take, in ns (not an SGLang argument; names and defaults: `LinkTimes`).
        tp_size: GPUs that share each layer.
        random_seed: start of the `random` policy's shuffles.
    """

    max_total_tokens: int
    version: str = "0.5.9"
    context_length: int = 0
    page_size: int = 1
    max_running_requests: int = 0
    max_prefill_tokens: int = 16384
    chunked_prefill_size: int = 8192
    enable_mixed_chunk: bool = False
    schedule_policy: str = "fcfs"
    schedule_conservativeness: float = 1.0
    disable_overlap_schedule: bool = False
    disable_radix_cache: bool = False
    radix_eviction_policy: str = "lru"
    enable_priority_scheduling: bool = False
    schedule_low_priority_values_first: bool = False
    priority_scheduling_preemption_threshold: int = 10
    enable_hierarchical_cache: bool = False
    hicache_ratio: float = 2.0
    hicache_size: int = 0
    hicache_write_policy: str = "write_through"
    hicache_storage_backend: str = ""
    hicache_storage_prefetch_policy: str = "best_effort"
    hicache_storage_backend_extra_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hicache_links: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tp_size: int = 1
    random_seed: int = 0

    def __post_init__(self) -> None:
        """Resolve the values that SGLang chooses itself and refuse what it refuses at start-up.

        Raises:
            InputError: names the setting, its value and what would be right.
        """
        rules_version(self.version)
        for name in ("max_total_tokens", "page_size", "max_prefill_tokens", "tp_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1 expected")
        for name in ("context_length", "max_running_requests"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more expected")
        whole = self.max_total_tokens % self.page_size == 0
        _require(
            whole, "max_total_tokens", self.max_total_tokens, f"a multiple of page_size ({self.page_size}) expected"
        )
        _require(self.schedule_conservativeness > 0, "schedule_conservativeness", self.schedule_conservativeness, "> 0")
        for name, known in (
            ("schedule_policy", SCHEDULE_POLICIES),
            ("radix_eviction_policy", EVICTION_POLICIES),
            ("hicache_write_policy", WRITE_POLICIES),
            ("hicache_storage_prefetch_policy", PREFETCH_POLICIES),
        ):
            _require(getattr(self, name) in known, name, getattr(self, name), f"one of {', '.join(known)} expected")
        if self.enable_priority_scheduling:
            plain = self.schedule_policy in ("fcfs", "lof")
            _require(plain, "schedule_policy", self.schedule_policy, "with priority scheduling: fcfs or lof")
        if self.enable_hierarchical_cache:
            _require(not self.disable_radix_cache, "disable_radix_cache", True, "the hierarchical cache needs it")
            _require(self.hicache_ratio > 1, "hicache_ratio", self.hicache_ratio, "the host must hold more: > 1")
            _require(self.hicache_size == 0, "hicache_size", self.hicache_size, "give hicache_ratio instead")
        if self.hicache_storage_backend:
            on = self.enable_hierarchical_cache
            _require(on, "hicache_storage_backend", self.hicache_storage_backend, "needs enable_hierarchical_cache")
        LinkTimes.of(self.hicache_links)
        if self.context_length == 0:
            object.__setattr__(self, "context_length", self.max_total_tokens)
        if self.max_running_requests == 0:
            # `ModelRunner.init_memory_pool`
            places = min(max(int(self.max_total_tokens / self.context_length * 512), 2048), 4096)
            object.__setattr__(self, "max_running_requests", places)

    @property
    def max_req_len(self) -> int:
        """Most tokens of one request, prompt and output."""
        return min(self.context_length - 1, self.max_total_tokens - 1)

    @property
    def chunk_tokens(self) -> int | None:
        """`chunked_prefill_size`, None where prompts are not cut."""
        return self.chunked_prefill_size if self.chunked_prefill_size > 0 else None

    @property
    def mixes_chunks(self) -> bool:
        """Whether prefill batches carry decodes along."""
        return self.enable_mixed_chunk and self.chunk_tokens is not None

    @property
    def rules(self) -> SglangRules:
        """The decision rules of the nearest version that is not newer than `version`."""
        return SGLANG_RULES[rules_version(self.version)]


def rules_version(version: str) -> str:
    """Which entry of `SGLANG_RULES` a version follows: its own, else the nearest older, else the oldest.

    Raises:
        InputError: not a version number.

    >>> rules_version("0.5.6.post2"), rules_version("0.5.8"), rules_version("0.5.23"), rules_version("0.4")
    ('0.5.6', '0.5.6', '0.5.9', '0.5.6')
    """
    try:
        wanted = tuple(int(part) for part in version.split(".")[:3])
    except ValueError:
        raise InputError(f"version is {version!r}: an SGLang version such as '0.5.9' expected") from None
    known = {tuple(int(part) for part in name.split(".")): name for name in SGLANG_RULES}
    older = [key for key in known if key <= wanted]
    return known[max(older) if older else min(known)]


def _require(condition: bool, name: str, value: object, right: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value!r}: {right}")


def sglang_config(settings: Mapping[str, Any], where: str | PathLike[str]) -> SglangConfig:
    """Check settings given under SGLang's names (dashes or underscores) and build the config.

    Args:
        settings: such as a TOML table; `engine` must name "sglang"; null values mean the default.
        where: the file, for messages.

    Raises:
        InputError: an unknown key (with the closest known one), a wrong type, a value out of range, or
            `max_total_tokens` missing.
    """
    if settings.get("engine") != "sglang":
        raise InputError(f"engine is {settings.get('engine')!r}: 'sglang' expected", path=where)
    fields = {field.name: field for field in dataclasses.fields(SglangConfig)}
    values: dict[str, Any] = {}
    for given, value in settings.items():
        name = given.removeprefix("--").replace("-", "_")
        name = _RENAMED.get(name, name)
        if name == "engine" or value is None:
            continue
        if name in _ONLY:
            if value != _ONLY[name]:
                raise InputError(f"{name} is {value!r}: only {_ONLY[name]!r} is simulated", path=where)
        elif name in fields:
            values[name] = _typed(name, value, str(fields[name].type), where)
        elif name not in _WITHOUT_EFFECT:
            close = difflib.get_close_matches(name, [*fields, *_WITHOUT_EFFECT, *_ONLY, *_RENAMED], n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(fields)}"
            raise InputError(f"unknown setting {given!r}; {hint}", path=where)
    if "max_total_tokens" not in values:
        raise InputError(
            "max_total_tokens is missing: SGLang logs it at start-up ('max_total_num_tokens=')", path=where
        )
    try:
        return SglangConfig(**values)
    except InputError as error:
        raise InputError(error.problem, path=where) from None


def _typed(name: str, value: Any, kind: str, where: str | PathLike[str]) -> Any:
    if kind.startswith("Mapping"):
        return _table(name, value, where)
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind in ("int", "bool", "str") and type(value).__name__ == kind:
        return value
    raise InputError(f"{name} is {value!r}: {kind} expected", path=where)


def _table(name: str, value: Any, where: str | PathLike[str]) -> Mapping[str, Any]:
    """A table, or the JSON text that SGLang takes on its command line."""
    try:
        table = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise InputError(f"{name} is not JSON ({error})", path=where) from error
    if not isinstance(table, Mapping):
        raise InputError(f"{name} is {value!r}: a table or JSON object expected", path=where)
    return dict(table)
