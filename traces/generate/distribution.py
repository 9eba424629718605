"""Distributions that a user can write in one word: `512`, `uniform:120:160`, `lognormal:1000:0.8`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtwin.traces.errors import InputError
from kvtwin.traces.readers.text import MAX_TOKENS

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Parameters of each kind; a plain number is a constant.
_PARAMETERS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "constant": ("VALUE",),
        "uniform": ("LOW", "HIGH"),
        "exponential": ("MEAN",),
        "geometric": ("MEAN",),
        "lognormal": ("MEAN", "CV"),
    }
)
FORMS: Final = ", ".join(":".join((kind, *names)) for kind, names in _PARAMETERS.items())


@dataclass(frozen=True, slots=True)
class Distribution:
    """A distribution of lengths, counts or seconds, never negative.

    Attributes:
        kind: "constant"; "uniform" (both ends included); "exponential"; "geometric" (1, 2, 3, ...); or "lognormal",
            by its own mean and coefficient of variation, not by those of its logarithm.
        parameters: as `FORMS` lists them.

    >>> Distribution.parse("lognormal:1000:0.8")
    Distribution(kind='lognormal', parameters=(1000.0, 0.8))
    >>> Distribution.parse("7").mean
    7.0
    """

    kind: str
    parameters: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse what is no distribution.

        Raises:
            InputError: a parameter is missing, negative or too large, or the mean is too small for the kind.
        """
        wanted, given = _PARAMETERS[self.kind], self.parameters
        problem = ""
        if len(given) != len(wanted):
            problem = f"{len(wanted)} numbers expected, {len(given)} given"
        elif not all(math.isfinite(value) and 0 <= value <= MAX_TOKENS for value in given):
            problem = f"numbers from 0 to {MAX_TOKENS} expected"
        elif self.kind == "uniform" and given[0] > given[1]:
            problem = "LOW is above HIGH"
        elif self.kind == "geometric" and given[0] < 1:
            problem = "it counts from 1, so its mean is at least 1"
        elif self.kind == "lognormal" and given[0] == 0:
            problem = "a mean above 0 expected"
        if problem:
            raise InputError(f"{':'.join((self.kind, *map(str, given)))!r}: {problem}; forms are {FORMS}")

    @classmethod
    def parse(cls, text: str) -> Distribution:
        """Read one of `FORMS`, or a plain number.

        Raises:
            InputError: anything else.
        """
        kind, *rest = text.split(":") if ":" in text else ("constant", text)
        try:
            parameters = tuple(float(word) for word in rest)
        except ValueError:
            kind, parameters = "", ()
        if kind not in _PARAMETERS:
            raise InputError(f"{text!r} is no distribution: a number, or one of {FORMS} expected")
        return cls(kind, parameters)

    @property
    def mean(self) -> float:
        """The expectation of `sample`."""
        return sum(self.parameters) / 2 if self.kind == "uniform" else self.parameters[0]

    def sample(self, rng: np.random.Generator, n: int) -> FloatArray:
        """Draw n real numbers (whole ones where geometric): float64 of shape (n,)."""
        first, last = self.parameters[0], self.parameters[-1]
        if self.kind == "uniform":
            return rng.uniform(first, last, n)
        if self.kind == "exponential":
            return rng.exponential(first, n)
        if self.kind == "geometric":
            return rng.geometric(1 / first, n).astype(np.float64)
        if self.kind == "lognormal":
            variance = math.log1p(last * last)
            return rng.lognormal(math.log(first) - variance / 2, math.sqrt(variance), n)
        return np.full(n, first)

    def sample_whole(self, rng: np.random.Generator, n: int, least: int = 1) -> IntArray:
        """Draw n whole numbers, `least` or more: the nearest to what `sample` would draw; int64 of shape (n,)."""
        drawn = self.sample(rng, n)
        if self.kind == "uniform":  # both ends are as likely as what lies between
            low, high = self.parameters
            drawn = np.floor(low + (drawn - low) * ((high + 1 - low) / (high - low) if high > low else 0))
            drawn = np.minimum(drawn, high)
        return np.clip(np.rint(drawn), least, MAX_TOKENS).astype(np.int64)
