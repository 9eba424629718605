"""The errors of kvtwin: each is one clear line, and the command line turns it into exit code 2."""

from __future__ import annotations

from os import PathLike


class KvtwinError(Exception):
    """Base of everything that a user can cause and can mend. `str(error)` is one line."""


class InputError(KvtwinError):
    """A file or setting holds something that kvtwin cannot use.

    Args:
        problem: what is wrong, with the value, and what would be right.
        path: the file or folder.
        row: 1-based line of a text file, or 0-based row of a table (`row 17`).
        column: the field's name.

    >>> str(InputError("-3 is negative: tokens must be >= 1", path="a.jsonl", row=4, column="input_length"))
    'a.jsonl, row 4, input_length: -3 is negative: tokens must be >= 1'
    """

    def __init__(
        self,
        problem: str,
        *,
        path: str | PathLike[str] | None = None,
        row: int | None = None,
        column: str | None = None,
    ) -> None:
        self.problem, self.path, self.row, self.column = problem, path, row, column
        place = [] if path is None else [str(path)]
        place += [] if row is None else [f"row {row}"]
        place += [] if column is None else [column]
        text = f"{', '.join(place)}: {problem}" if place else problem
        super().__init__(" ".join(text.split()))
