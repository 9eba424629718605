"""Kernel tables as arrays, facts of the GPU and the model behind them, and full grids over their samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvtwin.calibrate.gpus import GpuSpec, gpu_spec
from kvtwin.calibrate.models import ModelSpec
from kvtwin.sim.latency.grid import FloatArray, Grid
from kvtwin.traces.readers.llmservingsim_profile import KernelProfile


@dataclass(frozen=True)
class Table:
    """Columns of a kernel table as arrays."""

    columns: Mapping[str, npt.NDArray[Any]]

    @classmethod
    def of(cls, table: pa.Table) -> Table:
        """All columns of a table without nulls."""
        return cls({name: table.column(name).to_numpy() for name in table.column_names})

    def where(self, keep: npt.NDArray[np.bool_]) -> Table:
        """The rows to keep."""
        return Table({name: values[keep] for name, values in self.columns.items()})

    def __getattr__(self, name: str) -> npt.NDArray[Any]:
        try:
            return self.columns[name]
        except KeyError:
            raise AttributeError(name) from None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def gpu_of(kernels: KernelProfile) -> GpuSpec | None:
    """Facts of the GPU that was measured; None where it is not known."""
    return gpu_spec(hardware_of(kernels))


def hardware_of(kernels: KernelProfile) -> str:
    """Name of the GPU that was measured; "" where it is not known."""
    return str(kernels.meta.get("gpu") or kernels.meta.get("hardware") or "")


def kv_heads_of(kernels: KernelProfile, model: ModelSpec) -> int:
    """Key-value heads on each GPU."""
    return max(1, model.num_key_value_heads // kernels.tensor_parallel_size)


def filled(coordinates: Sequence[npt.NDArray[Any]], values: FloatArray) -> Grid:
    """A full grid over scattered samples on a union of rectangular grids.

    Samples of one point are averaged. Holes are interpolated linearly along the last axis, then along the
    others, the last but one first; what lies outside the samples on every axis (large batches of long contexts
    that did not fit the GPU) is continued in a straight line, in the same order.
    """
    axes, places = zip(*(np.unique(values_, return_inverse=True) for values_ in coordinates), strict=True)
    shape = tuple(len(axis) for axis in axes)
    total, count = np.zeros(shape), np.zeros(shape)
    np.add.at(total, places, values)
    np.add.at(count, places, 1)
    table = np.divide(total, count, out=np.full(shape, np.nan), where=count > 0)
    for fill in (_interpolated, _continued):
        for dimension in reversed(range(len(axes))):
            table = np.apply_along_axis(fill, dimension, table, axes[dimension].astype(np.float64))
    return Grid([axis.tolist() for axis in axes], table)


def _interpolated(line: FloatArray, axis: FloatArray) -> FloatArray:
    """Fill the holes of one line between its known points."""
    known = ~np.isnan(line)
    return np.interp(axis, axis[known], line[known], left=np.nan, right=np.nan) if known.any() else line


def _continued(line: FloatArray, axis: FloatArray) -> FloatArray:
    """Continue one line beyond its known points; a single known point is held, times stay positive."""
    known = np.flatnonzero(~np.isnan(line))
    if len(known) in (0, len(line)):
        return line
    if len(known) == 1:
        return np.full_like(line, line[known[0]])
    straight = Grid([axis[known].tolist()], line[known])(axis)
    return np.where(np.isnan(line), np.maximum(straight, np.nanmin(line)), line)
