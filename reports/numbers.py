"""How numbers look in every report: three significant digits, signed percentages, no `nan`."""

from __future__ import annotations

import math

MISSING = "-"
_DIGITS = 3


def number(value: float) -> str:
    """A number with three significant digits, or all digits left of the point.

    >>> [number(value) for value in (0.0123456, 9.996, 35.1, 12345.6, 0.0, math.nan)]
    ['0.0123', '10.0', '35.1', '12,346', '0', '-']
    """
    if not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    rounded = float(f"{value:.{_DIGITS - 1}e}")  # 9.996 rounds to 10.0, which needs one decimal fewer
    magnitude = math.floor(math.log10(abs(rounded)))
    if magnitude < -6:
        return f"{value:.{_DIGITS - 1}e}"
    return f"{value:,.{max(0, _DIGITS - 1 - magnitude)}f}"


def percent(ratio: float, *, signed: bool = True) -> str:
    """A ratio as a percentage, with its sign unless it is a size without direction (a threshold, a MAPE).

    >>> percent(-0.0862), percent(0.05), percent(0.05, signed=False), percent(-0.00001)
    ('-8.62 %', '+5.00 %', '5.00 %', '0.00 %')
    """
    return f"{_hundredfold(ratio, signed)} %" if math.isfinite(ratio) else MISSING


def percent_interval(low: float, high: float, *, signed: bool = True) -> str:
    """Both ends of an interval of ratios.

    >>> percent_interval(-0.091, 0.0125)
    '-9.10 to +1.25 %'
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return MISSING
    return f"{_hundredfold(low, signed)} to {_hundredfold(high, signed)} %"


def _hundredfold(ratio: float, signed: bool) -> str:
    """100 x ratio with at most two decimals: no claim here is finer than a hundredth of a percent."""
    value = round(100 * ratio, 2) or 0.0  # `or` turns -0.0 into 0.0
    text = number(value) if abs(value) >= 1 else f"{value:.2f}"
    return f"+{text}" if signed and value > 0 else text


def count(number_of: int, noun: str) -> str:
    """A count with its noun.

    >>> count(1, "step"), count(7862, "step")
    ('1 step', '7,862 steps')
    """
    return f"{number_of:,} {noun}{'' if number_of == 1 else 's'}"
