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
    """

    num_sms: int
    compute_capability: tuple[int, int]
    memory_bytes: int


# The first name that occurs in a GPU's name, letters and digits only, decides; longer names come first.
_GPUS: Final = {
    "RTXPRO6000": GpuSpec(188, (12, 0), 96 * GIB),
    "RTX6000ADA": GpuSpec(142, (8, 9), 48 * GIB),
    "RTX5090": GpuSpec(170, (12, 0), 32 * GIB),
    "RTX4090": GpuSpec(128, (8, 9), 24 * GIB),
    "RTX3090": GpuSpec(82, (8, 6), 24 * GIB),
    "RTXA6000": GpuSpec(84, (8, 6), 48 * GIB),
    "GH200": GpuSpec(132, (9, 0), 96 * GIB),
    "H200": GpuSpec(132, (9, 0), 141 * GIB),
    "H100": GpuSpec(132, (9, 0), 80 * GIB),
    "B200": GpuSpec(148, (10, 0), 180 * GIB),
    "A800": GpuSpec(108, (8, 0), 80 * GIB),
    "A6000": GpuSpec(84, (8, 6), 48 * GIB),
    "A100": GpuSpec(108, (8, 0), 80 * GIB),
    "L40S": GpuSpec(142, (8, 9), 48 * GIB),
    "L4": GpuSpec(58, (8, 9), 24 * GIB),
    "A10": GpuSpec(72, (8, 6), 24 * GIB),
}


def gpu_spec(name: str) -> GpuSpec | None:
    """The spec of a GPU by its marketing name, or None where it is not known.

    >>> gpu_spec("NVIDIA RTX PRO 6000 Blackwell Server Edition").num_sms
    188
    """
    plain = "".join(character for character in name.upper() if character.isalnum())
    return next((spec for key, spec in _GPUS.items() if key in plain), None)
