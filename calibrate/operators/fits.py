"""The tables' operators, fitted when they are asked for: those of one key, and only those that a step needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from kvtwin.calibrate.models import ModelSpec
from kvtwin.calibrate.tables.calibrate import Fitted, fit_samples
from kvtwin.calibrate.tables.checks import prepare
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.optable import OpSamples, OpTable

# What is meant where nothing is said, if the tables have it: plain attention, 16 bits, one search beam.
_USUAL: Final = {
    "window_size": ("0",),
    "beam_width": ("1",),
    "attn_dtype": ("bfloat16", "float16"),
    "kv_cache_dtype": ("bfloat16", "float16"),
    "gemm_dtype": ("bfloat16", "float16"),
    "moe_dtype": ("bfloat16", "float16"),
    "allreduce_dtype": ("bfloat16", "float16"),
    "mode": ("even",),
    "kv_cache": ("0",),
    "expert_parallel_size": ("1",),
    "backend": ("vllm_graph",),  # of aiconfigurator's all-reduces: engines replay decodes from CUDA graphs
}
_DEGREES: Final = ("num_tensor_parallel_workers", "tensor_parallel_size")


class OperatorFits:
    """Fitted operators by name.

    Args:
        tables: of one GPU and one engine version.
        model: the checkpoint's shape.
        tensor_parallel_size: GPUs per layer.
        hardware: the GPU's name, where it is known.
        progress: told what is fitted next.

    Attributes:
        ops: names of the operators in the tables.
        fitted: those that have been fitted, by name.

    Raises:
        InputError: a table is refused (`tables/checks.py`).
    """

    def __init__(
        self,
        tables: Sequence[OpTable],
        model: ModelSpec,
        tensor_parallel_size: int,
        hardware: str | None,
        progress: Callable[[str], None],
    ) -> None:
        self._samples = [sample for table in tables for sample in prepare(table).samples]
        self._model, self._degree = model, tensor_parallel_size
        self._hardware, self._progress = hardware, progress
        self.ops = {sample.op for sample in self._samples}
        self.fitted: dict[str, Fitted] = {}

    def fit(self, ops: Sequence[str]) -> None:
        """Fit operators under the key that the model, the degree and the usual data types leave.

        Raises:
            InputError: none is left of one, or several; before anything is fitted.
        """
        chosen = {op: self._only([sample for sample in self._samples if sample.op == op]) for op in ops}
        for op, sample in chosen.items():
            self._progress(sample.name)
            self.fitted[op] = fit_samples(sample.where(~sample.suspect), self._hardware)

    def _only(self, samples: Sequence[OpSamples]) -> OpSamples:
        fixed = {**dict.fromkeys(_DEGREES, str(self._degree)), "head_dim": str(self._model.head_dim)}
        left = list(samples)
        for name, value in fixed.items():
            agreeing = [sample for sample in left if sample.key.get(name, value) == value]
            if not agreeing:
                known = ", ".join(dict.fromkeys(sample.key[name] for sample in left))
                raise InputError(f"{left[0].op}: no times with {name}={value} ({self._model.name}); found: {known}")
            left = agreeing
        for name, values in _USUAL.items():
            usual = next((value for value in values if any(sample.key.get(name) == value for sample in left)), None)
            left = [sample for sample in left if usual is None or sample.key.get(name) == usual]
        if len(left) > 1:
            raise InputError(
                f"{left[0].op}: {len(left)} kinds of times, which are never averaged over; choose with --filter "
                + " or ".join(_differences([sample.key for sample in left]))
            )
        self._check_gpus(left[0])
        return left[0]

    def _check_gpus(self, sample: OpSamples) -> None:
        known = sample.columns.get("num_gpus")
        if known is not None and self._degree not in known:
            counts = ", ".join(map(str, sorted(set(known.tolist()))))
            raise InputError(f"no {sample.op} times for {self._degree} GPUs; found: {counts}")


def _differences(keys: Sequence[Mapping[str, str]]) -> list[str]:
    """NAME=VALUE pairs by which the keys differ, the first few."""
    names = {name for key in keys for name in key if len({other.get(name) for other in keys}) > 1}
    return list(dict.fromkeys(f"{name}={key[name]}" for name in sorted(names) for key in keys if name in key))[:6]
