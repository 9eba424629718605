"""Time is an integer number of nanoseconds everywhere inside kvtwin; only readers and reports convert.

Integer addition is exact in any order, so a jump over many steps equals the same steps one by one.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

NS_PER_US = 1_000
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000


def from_seconds(seconds: float) -> int:
    """Seconds to nanoseconds, rounded half to even, as `round(seconds * 1e9)` does in the oracle's driver.

    >>> from_seconds(0.145041)
    145041000
    """
    return round(seconds * 1e9)


def from_decimal_seconds(text: str) -> int:
    """A decimal number of seconds to nanoseconds without passing through a float.

    An epoch time stamp in a float keeps only 0.2 microseconds; its text keeps them all.

    >>> from_decimal_seconds("1777142838.338653123")
    1777142838338653123
    """
    return int((Decimal(text) * NS_PER_S).to_integral_value())


def to_seconds(time_ns: float) -> float:
    """Nanoseconds to seconds, for reports."""
    return time_ns / NS_PER_S


def to_ms(time_ns: float) -> float:
    """Nanoseconds to milliseconds, for reports."""
    return time_ns / NS_PER_MS


def iso_day(text: str) -> str | None:
    """The day that an ISO 8601 text names; None where it is no date.

    >>> iso_day("2026-04-25T18:47:18.273385Z"), iso_day("2026-04-25"), iso_day("yesterday")
    ('2026-04-25', '2026-04-25', None)
    """
    try:
        return datetime.fromisoformat(text).date().isoformat()
    except ValueError:
        return None
