"""How long transfers between KV levels take: FIFO links on the virtual clock."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvtwin.traces.errors import InputError

DEFAULT_PAGE_TOKENS: Final = 64  # of the pages whose default prices `LinkTimes` has


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """Start-up times and prices of transfers between KV levels, in ns.

    A copy between device and host costs `base + tokens * per_token`, a storage query, read or write
    `base + pages * per_page`. Copies in one direction follow one another (one stream each); so do queries, reads and
    writes (one thread each). A bandwidth is a price: 128 KiB of KV per token over 25 GB/s are 5,243 ns a token.
    The defaults are such a PCIe 4.0 link, and storage at 2 GB/s for pages of 64 such tokens.

    Attributes:
        d2h_base, d2h_per_token: device to host.
        h2d_base, h2d_per_token: host to device; runs beside the forward that needs it.
        query_base, query_per_page: asking storage what it holds.
        read_base, read_per_page: storage to host, per batch of pages.
        write_base, write_per_page: host to storage, per batch of pages.
    """

    d2h_base: float = 20_000
    d2h_per_token: float = 5_243
    h2d_base: float = 20_000
    h2d_per_token: float = 5_243
    query_base: float = 200_000
    query_per_page: float = 1_000
    read_base: float = 100_000
    read_per_page: float = 4_194_304
    write_base: float = 100_000
    write_per_page: float = 4_194_304

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> LinkTimes:
        """From a table such as `hicache_links` of an engine file.

        Raises:
            InputError: an unknown name, or a time that is no finite number >= 0.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name, value in settings.items():
            if name not in names:
                raise InputError(f"unknown link time {name!r}; known: {', '.join(names)}")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise InputError(f"{name} is {value!r}: nanoseconds >= 0 expected")
        return cls(**settings)


class Link:
    """One transfer at a time, in the order they are asked for."""

    __slots__ = ("_base_ns", "_unit_ns", "busy_ns", "free_ns")

    def __init__(self, base_ns: float, unit_ns: float) -> None:
        self._base_ns, self._unit_ns = base_ns, unit_ns
        self.free_ns = 0
        self.busy_ns = 0

    def send(self, now_ns: int, units: int) -> int:
        """Queue a transfer of so many tokens or pages; returns when it ends."""
        duration_ns = round(self._base_ns + units * self._unit_ns)
        self.free_ns = max(now_ns, self.free_ns) + duration_ns
        self.busy_ns += duration_ns
        return self.free_ns
