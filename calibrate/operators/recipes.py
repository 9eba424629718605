"""Which operators a step is made of, and how often each runs: one recipe per family of tables.

* Matrix products by shape, aiconfigurator's tables: its `sdk/models/llama.py` and `moe.py`. Norms and activations have
  no table there; they cost what they move, at 0.8 of the memory's bandwidth, and 3 us each (`query_mem_op`, the `gpu`
  section of its systems' files). So do the rotary embedding and greedy sampling, which that SDK leaves out: vLLM and
  SGLang run them as kernels of their own (`rotary_emb` of the model's attention, `v1/sample/sampler.py`).
* Operators by name, Vidur's and Frontier's tables: Vidur's `entities/execution_time.py` (`model_time`), which leaves
  out the embedding and lm_head; they are added where the tables have them.
* Operators by name, LLMServingSim v0's tables.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from kvtwin.calibrate.models import ModelSpec
from kvtwin.calibrate.operators.memory import VALUE_BYTES
from kvtwin.traces.errors import InputError

_SAMPLED_BYTES: Final = 10  # of a logit: 16 bits are read, written as 32 bits, and read for the largest


@dataclass(frozen=True)
class Dense:
    """An operator whose time depends on the number of rows it works on.

    Attributes:
        op: its name in the tables.
        times: how often a step runs it.
        rows: column of the tables that counts the rows.
        shape: other columns, which the model fixes.
        weights: values read from memory at each run; 0 where that is not followed.
    """

    op: str
    times: float
    rows: str = "num_tokens"
    shape: Mapping[str, float] = field(default_factory=dict)
    weights: float = 0.0


@dataclass(frozen=True)
class Moved:
    """An operator without a table, which costs the bytes that it moves.

    Attributes:
        name: what it is.
        times: how often a step runs it.
        bytes_per_row: read and written, for each token or request.
    """

    name: str
    times: float
    bytes_per_row: float


@dataclass(frozen=True)
class Recipe:
    """A step.

    Attributes:
        per_token: operators that run over all new tokens.
        per_request: operators that run once for each request of the batch.
        moved, moved_per_request: what has no table, for each token and once for each request.
        prefill, decode: names of attention's operators.
        all_reduces: how often a step adds up tokens * hidden_size values over the GPUs.
        missing: what the tables do not have and nothing stands for.
    """

    per_token: tuple[Dense, ...]
    per_request: tuple[Dense, ...]
    moved: tuple[Moved, ...]
    prefill: str
    decode: str
    all_reduces: int
    missing: tuple[str, ...] = ()
    moved_per_request: tuple[Moved, ...] = ()

    def operators(self, tensor_parallel_size: int) -> list[str]:
        """Names of the operators whose times it needs."""
        names = [*(dense.op for dense in (*self.per_token, *self.per_request)), self.prefill, self.decode]
        return list(dict.fromkeys(names + (["all_reduce"] if tensor_parallel_size > 1 else [])))


_VIDUR_LAYER: Final = (
    "input_layernorm", "attn_pre_proj", "attn_rope", "attn_kv_cache_save", "attn_post_proj", "post_attention_layernorm",
    "mlp_up_proj", "mlp_act", "mlp_down_proj", "add",
)  # fmt: skip
_VIDUR_MOE: Final = ("moe_gating_linear", "moe_gating_routing_topk", "moe_shuffling", "moe_grouped_gemm")
_V0_LAYER: Final = (
    "input_layernorm", "q_proj", "k_proj", "v_proj", "rope", "o_proj", "post_layernorm", "gate_proj", "up_proj",
    "act_fn", "down_proj",
)  # fmt: skip


def recipe_for(model: ModelSpec, tensor_parallel_size: int, ops: Collection[str]) -> Recipe:
    """The recipe that the operators of the tables allow.

    Args:
        model: the checkpoint's shape.
        tensor_parallel_size: GPUs per layer.
        ops: names of operators in the tables.

    Raises:
        InputError: an operator is missing, or the model's shape does not say enough.
    """
    if "gemm" in ops:
        recipe = _by_shape(model, tensor_parallel_size)
    elif "attn_pre_proj" in ops:
        recipe = _vidur(model, ops)
    elif "q_proj" in ops:
        recipe = _v0(model)
    else:
        raise InputError(
            "no table of matrix products among these: gemm (aiconfigurator), attn_pre_proj (Vidur, Frontier) or "
            f"q_proj (LLMServingSim v0) expected; found: {', '.join(sorted(ops))}"
        )
    missing = [op for op in recipe.operators(tensor_parallel_size) if op not in ops]
    if missing:
        raise InputError(
            f"a step of {model.name} on {tensor_parallel_size} GPUs needs the times of {', '.join(missing)}: give "
            f"their tables too; found: {', '.join(sorted(ops))}"
        )
    return recipe


def _by_shape(model: ModelSpec, tp: int) -> Recipe:
    if not (model.intermediate_size and model.vocab_size):
        raise InputError(f"intermediate_size and vocab_size of {model.name} are not known: give its config.json")
    layers, hidden, width = model.num_hidden_layers, model.hidden_size, model.intermediate_size / tp
    heads, kv_heads = model.num_attention_heads / tp, max(1.0, model.num_key_value_heads / tp)

    def product(n: float, k: float, times: float = layers) -> Dense:
        return Dense("gemm", times, "m", {"n": n, "k": k}, n * k)

    attention = (
        product((heads + 2 * kv_heads) * model.head_dim, hidden),
        product(hidden, heads * model.head_dim),
    )
    moved = [
        Moved("embedding", 1, 2 * hidden * VALUE_BYTES),
        Moved("add and norm", 2 * layers, 4 * hidden * VALUE_BYTES),
        Moved("rotary embedding", layers, 2 * (heads + kv_heads) * model.head_dim * VALUE_BYTES),
    ]
    if model.num_experts:
        experts = {
            "hidden_size": hidden, "inter_size": model.intermediate_size, "topk": model.num_experts_per_tok,
            "num_experts": model.num_experts, "moe_tp_size": tp, "moe_ep_size": 1,
        }  # fmt: skip
        mlp = (product(model.num_experts, hidden), Dense("moe", layers, "num_tokens", experts))
    else:
        mlp = (product(2 * width, hidden), product(hidden, width))
        moved.append(Moved("activation", layers, 3 * width * VALUE_BYTES))
    return Recipe(
        per_token=(*attention, *mlp),
        per_request=(product(model.vocab_size / tp, hidden, 1),),
        moved=tuple(moved),
        prefill="context_attention",
        decode="generation_attention",
        all_reduces=2 * layers + 1,
        moved_per_request=(Moved("sampling", 1, model.vocab_size * _SAMPLED_BYTES),),
    )


def _vidur(model: ModelSpec, ops: Collection[str]) -> Recipe:
    layers = model.num_hidden_layers
    names = [name for name in _VIDUR_LAYER if name in ops or name != "add"]
    if model.num_experts:
        names = [name for name in names if not name.startswith("mlp_")] + list(_VIDUR_MOE)
    once = [Dense("emb", 1)] if "emb" in ops else []
    head = (Dense("lm_head_linear", 1),) if "lm_head_linear" in ops else ()
    return Recipe(
        per_token=(*(Dense(name, layers) for name in names), *once),
        per_request=head,
        moved=(),
        prefill="attn_prefill",
        decode="attn_decode",
        all_reduces=2 * layers,
        missing=() if head else ("lm_head",),
    )


def _v0(model: ModelSpec) -> Recipe:
    layers = model.num_hidden_layers
    return Recipe(
        per_token=(*(Dense(name, layers) for name in _V0_LAYER), Dense("embedding", 1), Dense("final_layernorm", 1)),
        per_request=(Dense("lm_head", 1),),
        moved=(),
        prefill="attn_prefill",
        decode="attn_decode",
        all_reduces=2 * layers,
    )
