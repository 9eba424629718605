"""What a step reads from the GPU's memory, whatever a benchmark's loop kept in the cache.

Operators are timed in loops, where weights or keys and values that fit in the L2 cache (50 MB on H100, 128 MB on RTX PRO
6000) are read from there. In a step, each layer's have been pushed out by the other layers' since the step before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvtwin.traces.readers.optable import OpSamples

VALUE_BYTES: Final = 2  # 16 bits
_BYTES: Final[Mapping[str, float]] = {
    "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_block": 1, "fp8_static": 1, "int8_wo": 1, "nvfp4": 0.5, "int4_wo": 0.5,
}  # fmt: skip
# Four times the largest L2 cache of a GPU (128 MB): no loop keeps such weights.
_LARGE_BYTES: Final = 512e6
_FEW_ROWS: Final = 16  # whose arithmetic hides behind the reading
_MIN_PRODUCTS: Final = 3


@dataclass(frozen=True)
class Memory:
    """How fast a GPU's memory is.

    Attributes:
        peak: of the data sheet, bytes per microsecond.
        streamed: what matrix products reach that are too large for the cache, bytes per microsecond.
    """

    peak: float
    streamed: float

    @classmethod
    def of(cls, peak: float, products: OpSamples | None) -> Memory:
        """Of a GPU whose matrix products were measured; the peak where none was large enough.

        Args:
            peak: bytes per microsecond.
            products: with columns m, n and k.
        """
        if products is None or not {"m", "n", "k"} <= set(products.columns):
            return cls(peak, peak)
        m, n, k = (np.asarray(products.columns[name], np.float64) for name in ("m", "n", "k"))
        num_bytes = n * k * bytes_of(products)
        large = (num_bytes >= _LARGE_BYTES) & (m <= _FEW_ROWS)
        if np.count_nonzero(large) < _MIN_PRODUCTS:
            return cls(peak, peak)
        return cls(peak, min(peak, float(np.median(num_bytes[large] / products.time_us[large]))))


def bytes_of(samples: OpSamples) -> float:
    """Bytes of each weight of a product, or of each cached key and value; 0 where the type is not known."""
    names = [samples.key[name] for name in ("gemm_dtype", "kv_cache_dtype") if name in samples.key]
    return _BYTES.get(names[0], 0) if names else VALUE_BYTES
