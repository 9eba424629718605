"""Facts about GPUs that decide which attention kernel an engine runs, and how much it can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """From NVIDIA's data sheets.

    Attributes:
        num_sms: streaming multiprocessors.
        compute_capability: (major, minor).
        memory_bytes: device memory; sold as "GB", it is powers of two.
        memory_bytes_per_s: bandwidth of that memory (of an A100, A800 or H100 in its SXM form).
    """

    num_sms: int
    compute_capability: tuple[int, int]
    memory_bytes: int
    memory_bytes_per_s: float


# The first name that occurs in a GPU's name, letters and digits only, decides; longer names come first.
_GPUS: Final = {
    "RTXPRO6000": GpuSpec(188, (12, 0), 96 * GIB, 1597e9),
    "RTX6000ADA": GpuSpec(142, (8, 9), 48 * GIB, 960e9),
    "RTX5090": GpuSpec(170, (12, 0), 32 * GIB, 1792e9),
    "RTX4090": GpuSpec(128, (8, 9), 24 * GIB, 1008e9),
    "RTX3090": GpuSpec(82, (8, 6), 24 * GIB, 936e9),
    "RTXA6000": GpuSpec(84, (8, 6), 48 * GIB, 768e9),
    "GH200": GpuSpec(132, (9, 0), 96 * GIB, 4000e9),
    "H200": GpuSpec(132, (9, 0), 141 * GIB, 4800e9),
    "H100": GpuSpec(132, (9, 0), 80 * GIB, 3350e9),
    "B200": GpuSpec(148, (10, 0), 180 * GIB, 8000e9),
    "A800": GpuSpec(108, (8, 0), 80 * GIB, 2039e9),
    "A6000": GpuSpec(84, (8, 6), 48 * GIB, 768e9),
    "A100": GpuSpec(108, (8, 0), 80 * GIB, 2039e9),
    "L40S": GpuSpec(142, (8, 9), 48 * GIB, 864e9),
    "L4": GpuSpec(58, (8, 9), 24 * GIB, 300e9),
    "A10": GpuSpec(72, (8, 6), 24 * GIB, 600e9),
}


def gpu_spec(name: str) -> GpuSpec | None:
    """The spec of a GPU by its marketing name, or None where it is not known.

    >>> gpu_spec("NVIDIA RTX PRO 6000 Blackwell Server Edition").num_sms
    188
    """
    plain = "".join(character for character in name.upper() if character.isalnum())
    return next((spec for key, spec in _GPUS.items() if key in plain), None)
