"""Layer times of LLMServingSim v0: `layers.csv`, one row per operator and number of tokens.

    layer_name,input,kv_cache,tp_size,latency(ns)
    embedding,1,0,1,2642

Nanoseconds per call. Its attention.csv is in Vidur's format (`vidur.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from kvtwin.traces.readers.columns import read_wide_csv
from kvtwin.traces.readers.optable import OpTable, group_samples, op_table

TIME_COLUMN: Final = "latency(ns)"
_NS_PER_US: Final = 1e3


def read(path: Path) -> OpTable:
    """Read one file.

    Raises:
        InputError: a column missing; with row and column: a time that is not positive and finite, a size that is not a
            count.
    """
    table = read_wide_csv(path)
    names, times = table.text("layer_name"), table.times(TIME_COLUMN) / _NS_PER_US
    key = {"tensor_parallel_size": table.text("tp_size"), "kv_cache": table.text("kv_cache")}
    load = {"num_tokens": table.sizes("input")}
    samples = []
    for name in sorted(set(names.tolist())):
        keep = np.asarray(names == name, np.bool_)
        samples += group_samples(table, name, "tokens", times, key=key, shape={}, load=load, keep=keep)
    return op_table(path, "llmservingsim_v0", samples, {})
