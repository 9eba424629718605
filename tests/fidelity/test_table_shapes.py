"""Held-out errors of shapes of matrix products that were not measured: `make fidelity` prints the table, gates decide.

Left out are whole shapes (a fifth at a time, at random), whole n and whole k (each in turn, with every shape that has
it): the sizes of a model that a table does not know. Only shapes between others count.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest

from kvtwin.calibrate.tables.calibrate import fit_samples, slots_of
from kvtwin.calibrate.tables.candidates import fit_all
from kvtwin.traces.readers.op_tables import read_op_table
from kvtwin.traces.readers.optable import OpSamples

pytestmark = pytest.mark.fidelity

# Largest MAPE in percent of left-out shapes, n and k; a tenth and more above what was measured when it was set.
TABLES: Final = {
    ("a100_sxm", "0.14.0", "bfloat16"): (5.0, 5.8, 5.8),
    ("h100_sxm", "0.24.0", "bfloat16"): (4.5, 5.2, 5.2),
    ("h100_sxm", "0.24.0", "fp8_block"): (5.5, 9.0, 10.6),
    ("b200_sxm", "0.24.0", "fp8"): (7.8, 8.2, 9.0),
    ("rtx_pro_6000_server", "0.24.0", "bfloat16"): (4.8, 6.3, 5.8),
}


def test_shapes_that_were_not_measured(shared: Path) -> None:
    print(f"\n{'left out, MAPE in % (median)':44} {'model':34} {'shapes':>14} {'n':>14} {'k':>14}")
    failed = []
    for (hardware, version, dtype), limits in TABLES.items():
        path = shared / f"data/ops/aiconfigurator/{hardware}/gemm/vllm/{version}/gemm_perf.parquet"
        table = read_op_table(path).only({"gemm_dtype": dtype})
        (samples,), gpu = table.samples, table.facts["hardware"]
        slots, name = slots_of(samples, gpu), fit_samples(samples, gpu).choice.name
        errors = [np.concatenate([error_of(name, samples, out, slots) for out in folds]) for folds in parts(samples)]
        shown = " ".join(f"{100 * error.mean():6.2f} ({100 * np.median(error):5.2f})" for error in errors)
        print(f"{hardware + ', ' + dtype:44} {name:34} {shown}")
        failed += [
            f"{hardware}, {dtype}: {100 * error.mean():.2f} % (gate {limit} %)"
            for error, limit in zip(errors, limits, strict=True)
            if 100 * error.mean() > limit
        ]
    assert not failed, failed


def parts(samples: OpSamples) -> Iterator[list[npt.NDArray[np.bool_]]]:
    """Rows left out together, by what is left out: shapes, n, k."""
    n, k = samples.shape["n"], samples.shape["k"]
    _, shape = np.unique(np.column_stack([n, k]), axis=0, return_inverse=True)
    fifth = np.random.default_rng(0).permutation(int(shape.max()) + 1) % 5
    yield [fifth[shape.ravel()] == part for part in range(5)]
    for sizes in (n, k):
        inner = np.unique(sizes)[1:-1]
        yield [np.isin(sizes, inner[first::5]) for first in range(5)]


def error_of(
    name: str, samples: OpSamples, left_out: npt.NDArray[np.bool_], slots: list[float] | None
) -> npt.NDArray[np.float64]:
    """Errors of left-out rows whose n and k lie between others, by the model of this name fitted to the rest."""
    train = samples.where(~left_out)
    between = left_out.copy()
    for column, known in train.shape.items():
        between &= (samples.shape[column] > known.min()) & (samples.shape[column] < known.max())
    test = samples.where(between)
    fitted = next(found for found in fit_all(train, slots) if found.name == name)
    return np.abs(fitted.time_us(test.columns) / test.time_us - 1)
