"""Of what notes say, that which nobody must miss."""

from __future__ import annotations

from typing import Final

from kvtwin.validate.summary import NO_PAIRS

_LOUD: Final = ("units taken", "error:", "queued_ns takes", "_ns lies", "numbers of tokens", NO_PAIRS)


def loud_words(note: str) -> list[str]:
    """The parts of a note that tell of a fault, or of what was not compared."""
    return [word for word in note.split("; ") if any(sign in word for sign in _LOUD)]
