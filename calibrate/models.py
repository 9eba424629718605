"""Shapes of known models: what composing a step and sizing a KV cache need to know of a checkpoint."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
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

    def kv_bytes_per_token(self, tensor_parallel_size: int, element_bytes: int = 2) -> int:
        """KV-cache bytes that one token takes on each GPU."""
        heads = max(1, self.num_key_value_heads // tensor_parallel_size)
        return 2 * self.num_hidden_layers * heads * self.head_dim * element_bytes

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
    ModelSpec("meta-llama/Llama-3.1-8B", 32, 4096, 32, 8, 128, 131072, 8.03e9),
    ModelSpec("meta-llama/Llama-3.1-70B", 80, 8192, 64, 8, 128, 131072, 70.6e9),
    ModelSpec("meta-llama/Llama-3.2-1B", 16, 2048, 32, 8, 64, 131072, 1.24e9),
    ModelSpec("meta-llama/Llama-3.2-3B", 28, 3072, 24, 8, 128, 131072, 3.21e9),
    ModelSpec("meta-llama/Llama-3.3-70B-Instruct", 80, 8192, 64, 8, 128, 131072, 70.6e9),
    ModelSpec("meta-llama/Meta-Llama-3-8B", 32, 4096, 32, 8, 128, 8192, 8.03e9),
    ModelSpec("meta-llama/Llama-2-7b-hf", 32, 4096, 32, 32, 128, 4096, 6.74e9),
    ModelSpec("meta-llama/Llama-2-70b-hf", 80, 8192, 64, 8, 128, 4096, 69.0e9),
    ModelSpec("Qwen/Qwen3-4B", 36, 2560, 32, 8, 128, 40960, 4.02e9),
    ModelSpec("Qwen/Qwen3-8B", 36, 4096, 32, 8, 128, 40960, 8.19e9),
    ModelSpec("Qwen/Qwen3-14B", 40, 5120, 40, 8, 128, 40960, 14.8e9),
    ModelSpec("Qwen/Qwen3-32B", 64, 5120, 64, 8, 128, 40960, 32.8e9),
    ModelSpec("Qwen/Qwen3-30B-A3B", 48, 2048, 32, 4, 128, 40960, 30.5e9, 128, 8),
    ModelSpec("Qwen/Qwen3-30B-A3B-Instruct-2507", 48, 2048, 32, 4, 128, 262144, 30.5e9, 128, 8),
    ModelSpec("mistralai/Mixtral-8x7B-v0.1", 32, 4096, 32, 8, 128, 32768, 46.7e9, 8, 2),
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
    raise InputError(f"unknown model {name!r}; {hint} (or describe it in a [model] table of target.toml)")


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
