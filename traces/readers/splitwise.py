"""Whole-step times of Splitwise: `perf_model.csv`, one row per run of one batch shape, several runs per shape.

    model,hardware,prompt_size,batch_size,token_size,...,prompt_time,token_time,e2e_time,tensor_parallel[,suspect]

Milliseconds. `prompt_time` is the prefill of `batch_size` prompts of `prompt_size` tokens; `token_time` the mean decode
step of that batch while each request generates `token_size` tokens, at a mean context of prompt_size + token_size / 2. Both
sizes are kept: Llama2-70B on two GPUs takes 55 ms a token where 128 are generated and 60 ms where 256 and more are, whatever
the context.
`e2e_time` repeats so badly (up to 137 %) that it is not read. Rows that the publisher calls suspect are kept apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from kvtwin.traces.readers.columns import read_wide_csv
from kvtwin.traces.readers.optable import OpTable, group_samples, op_table

_US_PER_MS: Final = 1e3


def read(path: Path) -> OpTable:
    """Read one file.

    Raises:
        InputError: a column missing; with row and column: a time that is not positive and finite, a size that is not a
            count.
    """
    table = read_wide_csv(path)
    batch, prompt, tokens = (table.sizes(name) for name in ("batch_size", "prompt_size", "token_size"))
    key = {
        name: table.text(column)
        for name, column in (("model", "model"), ("hardware", "hardware"), ("tensor_parallel_size", "tensor_parallel"))
    }
    suspect = np.zeros(len(table), np.bool_)
    if "suspect" in table.names:
        suspect = np.array([text.lower() == "true" for text in table.text("suspect")], np.bool_)
    samples = []
    for op, work, load in (
        ("prompt_time", "prompt_step", {"num_seqs": batch, "prompt_tokens": prompt}),
        ("token_time", "token_step", {"num_decode": batch, "prompt_tokens": prompt, "output_tokens": tokens}),
    ):
        times = table.times(op) * _US_PER_MS
        samples += group_samples(table, op, work, times, key=key, shape={}, load=load, suspect=suspect)
    return op_table(path, "splitwise", samples, {})
