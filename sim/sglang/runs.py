"""Token sequences as runs of consecutive ids: what the caches compare, split and hash.

Traces name blocks, not tokens, and a simulated output has ids of its own, so a prompt of 13,000 tokens is a few dozen
runs at most. A key is a tuple of `(first id, length)` pairs in which no run continues the one before it; two keys are
equal exactly when their token sequences are.
"""

from __future__ import annotations

from collections.abc import Iterable

Runs = tuple[tuple[int, int], ...]
# How a node hangs below its parent: its first page, as one id where that page is one run.
Edge = int | Runs


def merge_runs(runs: Iterable[tuple[int, int]]) -> Runs:
    """The one key of a token sequence: empty runs dropped, runs that continue each other joined.

    >>> merge_runs([(0, 4), (4, 2), (9, 0), (7, 1)])
    ((0, 6), (7, 1))
    """
    merged: list[tuple[int, int]] = []
    for first, length in runs:
        if merged and merged[-1][0] + merged[-1][1] == first:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        elif length > 0:
            merged.append((first, length))
    return tuple(merged)


def num_tokens(key: Runs) -> int:
    """How many tokens a key holds."""
    return sum([length for _, length in key])


def last_token(key: Runs) -> int:
    """The id of a key's last token."""
    first, length = key[-1]
    return first + length - 1


def cut(key: Runs, start: int, end: int) -> Runs:
    """Tokens `start` to `end` of a key, as a key.

    >>> cut(((0, 6), (7, 4)), 4, 8)
    ((4, 2), (7, 2))
    """
    if start == 0 and end >= num_tokens(key):
        return key
    part: list[tuple[int, int]] = []
    for first, length in key:
        if end <= 0:
            break
        if start < length:
            skipped = max(start, 0)
            part.append((first + skipped, min(length, end) - skipped))
        start -= length
        end -= length
    return tuple(part)


def edge_at(key: Runs, index: int, offset: int, page_size: int) -> Edge:
    """The page that begins `offset` tokens into run `index`."""
    first, length = key[index]
    if length - offset >= page_size:
        return first + offset
    page = [(first + offset, length - offset)]
    missing = page_size - length + offset
    while missing > 0:
        index += 1
        first, length = key[index]
        page.append((first, min(length, missing)))
        missing -= length
    return tuple(page)


def place_of(key: Runs, depth: int) -> tuple[int, int]:
    """Run and offset at which token `depth` of a key stands.

    >>> place_of(((0, 6), (7, 4)), 8)
    (1, 2)
    """
    for index, (_, length) in enumerate(key):
        if depth < length:
            return index, depth
        depth -= length
    return len(key), 0


def common_prefix(node_key: Runs, key: Runs, index: int, offset: int) -> tuple[int, int, int]:
    """How far a node's key agrees with the rest of `key` that begins `offset` tokens into run `index`.

    Returns:
        Tokens in common, and where in `key` (run, offset) the comparison ended; the place is right if the whole
        node agrees.
    """
    common, num_runs = 0, len(key)
    for first, length in node_key:
        if index == num_runs:
            break
        at, left = key[index]
        if at + offset != first:
            break
        left -= offset
        if left > length:
            common += length
            offset += length
        else:
            common += left
            index += 1
            offset = 0
            if left < length:
                break
    return common, index, offset
