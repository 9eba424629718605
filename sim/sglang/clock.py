"""The virtual clock that scheduler, caches and loops share."""

from __future__ import annotations


class Clock:
    """Virtual time in integer nanoseconds; it only moves forward."""

    __slots__ = ("now_ns",)

    def __init__(self) -> None:
        self.now_ns = 0

    def advance(self, time_ns: int) -> None:
        """Move to `time_ns` unless it has passed."""
        self.now_ns = max(self.now_ns, time_ns)
