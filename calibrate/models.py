"""Shapes of known models: what composing a step and sizing a KV cache need to know of a checkpoint."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final

from kvtwin.calibrate.gpus import GIB
from kvtwin.traces.errors import InputError


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Numbers of a checkpoint's `config.json`, under their Hugging Face names.

    Attributes:
        name: Hugging Face id.
        num_hidden_layers: decoder layers.
        hidden_size: width of the residual stream.
        num_attention_heads, num_key_value_heads, head_dim: attention.
        max_position_embeddings: vLLM's max_model_len where none is set.
        num_parameters: weights, for sizing the KV cache.
        num_experts, num_experts_per_tok: of a mixture of experts; 0 for dense models.
        intermediate_size: width of the MLP, or of an expert (`moe_intermediate_size`); 0 where it is not known.
        vocab_size: of lm_head; 0 where it is not known.
    """

    name: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    num_parameters: float
    num_experts: int = 0
    num_experts_per_tok: int = 0
    intermediate_size: int = 0
    vocab_size: int = 0

    def kv_bytes_per_token(self, tensor_parallel_size: int, element_bytes: int = 2) -> int:
        """KV-cache bytes that one token takes on each GPU."""
        heads = max(1, self.num_key_value_heads // tensor_parallel_size)
        return 2 * self.num_hidden_layers * heads * self.head_dim * element_bytes

    def counted_parameters(self) -> float:
        """Weights of such a decoder with gated MLPs and an untied lm_head."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        mlps = max(1, self.num_experts) * 3 * self.hidden_size * self.intermediate_size
        layer = heads * self.head_dim * self.hidden_size + mlps
        return float(self.num_hidden_layers * layer + 2 * self.vocab_size * self.hidden_size)

    def kv_blocks(
        self, gpu_memory_bytes: int, *, tensor_parallel_size: int, block_size: int, gpu_memory_utilization: float
    ) -> int:
        """Estimate of vLLM's num_gpu_blocks for a recording that does not state it.

        vLLM gives the cache what is left of gpu_memory_utilization * memory after the weights and the peak of a
        profiling run (`Worker.determine_available_memory`). The weights are counted at 2 bytes. 1 % of the memory
        is the driver's, and 1 GiB is taken off for activations and the CUDA context: about what the profiling run
        of such models needs at 2,048 tokens per step (CUDA graphs are not counted in 0.19).
        """
        budget = gpu_memory_bytes * 0.99 * gpu_memory_utilization - GIB
        budget -= 2 * self.num_parameters / tensor_parallel_size
        return max(2, int(budget // (self.kv_bytes_per_token(tensor_parallel_size) * block_size)))

    def activated_experts(self, num_tokens: int) -> float:
        """Expected number of distinct experts that `num_tokens` tokens reach under a uniform gate.

        Each token draws num_experts_per_tok of num_experts without replacement:
        E * (1 - (1 - k/E)^T). Trained gates reach up to 13 % fewer (LLMServingSim, `bench/core/runner.py`).
        """
        miss = 1.0 - self.num_experts_per_tok / self.num_experts
        return self.num_experts * (1.0 - miss**num_tokens)


# From each checkpoint's config.json.
_SPECS: Final = (
    ModelSpec("meta-llama/Llama-3.1-8B", 32, 4096, 32, 8, 128, 131072, 8.03e9, 0, 0, 14336, 128256),
    ModelSpec("meta-llama/Llama-3.1-70B", 80, 8192, 64, 8, 128, 131072, 70.6e9, 0, 0, 28672, 128256),
    ModelSpec("meta-llama/Llama-3.2-1B", 16, 2048, 32, 8, 64, 131072, 1.24e9, 0, 0, 8192, 128256),
    ModelSpec("meta-llama/Llama-3.2-3B", 28, 3072, 24, 8, 128, 131072, 3.21e9, 0, 0, 8192, 128256),
    ModelSpec("meta-llama/Llama-3.3-70B-Instruct", 80, 8192, 64, 8, 128, 131072, 70.6e9, 0, 0, 28672, 128256),
    ModelSpec("meta-llama/Meta-Llama-3-8B", 32, 4096, 32, 8, 128, 8192, 8.03e9, 0, 0, 14336, 128256),
    ModelSpec("meta-llama/Llama-2-7b-hf", 32, 4096, 32, 32, 128, 4096, 6.74e9, 0, 0, 11008, 32000),
    ModelSpec("meta-llama/Llama-2-70b-hf", 80, 8192, 64, 8, 128, 4096, 69.0e9, 0, 0, 28672, 32000),
    ModelSpec("Qwen/Qwen3-4B", 36, 2560, 32, 8, 128, 40960, 4.02e9, 0, 0, 9728, 151936),
    ModelSpec("Qwen/Qwen3-8B", 36, 4096, 32, 8, 128, 40960, 8.19e9, 0, 0, 12288, 151936),
    ModelSpec("Qwen/Qwen3-14B", 40, 5120, 40, 8, 128, 40960, 14.8e9, 0, 0, 17408, 151936),
    ModelSpec("Qwen/Qwen3-32B", 64, 5120, 64, 8, 128, 40960, 32.8e9, 0, 0, 25600, 151936),
    ModelSpec("Qwen/Qwen3-30B-A3B", 48, 2048, 32, 4, 128, 40960, 30.5e9, 128, 8, 768, 151936),
    ModelSpec("Qwen/Qwen3-30B-A3B-Instruct-2507", 48, 2048, 32, 4, 128, 262144, 30.5e9, 128, 8, 768, 151936),
    ModelSpec("mistralai/Mixtral-8x7B-v0.1", 32, 4096, 32, 8, 128, 32768, 46.7e9, 8, 2, 14336, 32000),
)
MODELS: Final = {spec.name: spec for spec in _SPECS}


def model_spec(name: str) -> ModelSpec:
    """The spec of a known model; an "-Instruct" tune has the shape of its base model.

    Raises:
        InputError: unknown model; names the closest known one.

    >>> model_spec("meta-llama/Llama-3.1-8B-Instruct").num_hidden_layers
    32
    """
    for known in (name, name.removesuffix("-Instruct")):
        if known in MODELS:
            return MODELS[known]
    close = difflib.get_close_matches(name, MODELS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(MODELS)}"
    raise InputError(
        f"unknown model {name!r}; {hint} (or give the path of its config.json, or a [model] table in target.toml)"
    )


def read_model(name: str) -> ModelSpec:
    """A known model by its name, or any decoder by the path of its Hugging Face `config.json`.

    Raises:
        InputError: no such model or file; or the file lacks a number.
    """
    if not name.endswith(".json"):
        return model_spec(name)
    path = Path(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as the config.json of a model: {error}", path=path) from None
    if not isinstance(config, dict):
        raise InputError("the config.json of a model is one JSON object", path=path)
    heads = _number(config, path, "num_attention_heads")
    hidden = _number(config, path, "hidden_size")
    num_experts = _number(config, path, "num_experts", "num_local_experts", default=0)
    expert_width = ("moe_intermediate_size",) if num_experts else ()
    spec = ModelSpec(
        name=str(config.get("_name_or_path") or path.parent.name or path.name),
        num_hidden_layers=_number(config, path, "num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=_number(config, path, "num_key_value_heads", default=heads),
        head_dim=_number(config, path, "head_dim", default=hidden // heads),
        max_position_embeddings=_number(config, path, "max_position_embeddings"),
        num_parameters=0.0,
        num_experts=num_experts,
        num_experts_per_tok=_number(config, path, "num_experts_per_tok", default=0),
        intermediate_size=_number(config, path, *expert_width, "intermediate_size"),
        vocab_size=_number(config, path, "vocab_size"),
    )
    return dataclasses.replace(spec, num_parameters=spec.counted_parameters())


def _number(config: Mapping[str, Any], path: Path, *names: str, default: int | None = None) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if not isinstance(value, int) or isinstance(value, bool) or value < (0 if default == 0 else 1):
        raise InputError(f"{value!r}: a positive integer expected", path=path, column=names[0])
    return value


def custom_model(table: Mapping[str, Any], where: str | PathLike[str]) -> ModelSpec:
    """A model described by its numbers, such as the `[model]` table of a target.toml.

    Raises:
        InputError: a key is unknown or missing, or a value is not a positive number.
    """
    fields = {field.name: field for field in dataclasses.fields(ModelSpec)}
    for name, field in fields.items():
        if name not in table and field.default is dataclasses.MISSING:
            raise InputError(f"{name} is missing; a model has {', '.join(fields)}", path=where, column="model")
    for name, value in table.items():
        if name not in fields:
            raise InputError(f"unknown key; known: {', '.join(fields)}", path=where, column=f"model.{name}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (isinstance(value, str) if name == "name" else number and value >= 0):
            raise InputError(f"{value!r} is not usable", path=where, column=f"model.{name}")
    return ModelSpec(**table)
