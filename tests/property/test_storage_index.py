"""What storage holds, run by run, against pages in an ordered dictionary, one at a time."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtwin.sim.sglang.runs import Runs, cut, merge_runs, num_tokens
from kvtwin.sim.sglang.storage_index import StorageIndex, StorageLimit
from kvtwin.traces.errors import InputError

# Few ids, so that sequences share beginnings and part in the middle of runs.
RUNS = st.lists(st.tuples(st.integers(0, 8), st.integers(1, 6)), min_size=1, max_size=5).map(merge_runs)


class PageFiles:
    """SGLang 0.5.23's `HiCacheFile` with its `LRUFileEvictor`: a file per page, named by all tokens up to its end."""

    def __init__(self, page_size: int, max_tokens: int | None, ratio: float) -> None:
        self.page_size, self.max_tokens, self.ratio = page_size, max_tokens, ratio
        self.files: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self.num_evicted = 0

    def names(self, key: Runs, start: int, end: int) -> list[tuple[int, ...]]:
        """The files of a range of tokens."""
        ids = [first + place for first, length in key for place in range(length)]
        return [tuple(ids[: at + self.page_size]) for at in range(start, end, self.page_size)]

    def put(self, key: Runs, start: int, end: int) -> None:
        """`batch_set`."""
        for name in self.names(key, start, end):
            if name not in self.files:
                self._make_room()
            self.files[name] = None
            self.files.move_to_end(name)

    def _make_room(self) -> None:
        if self.max_tokens is None or (len(self.files) + 1) * self.page_size <= self.max_tokens:
            return
        target = max(0, int(self.max_tokens * self.ratio) - self.page_size)
        while len(self.files) * self.page_size > target:
            self.files.popitem(last=False)
            self.num_evicted += self.page_size

    def count(self, key: Runs, start: int, end: int, *, touch: bool = False) -> int:
        """`batch_exists`, or `batch_get` up to the first page that is missing."""
        held = 0
        for name in self.names(key, start, end):
            if name not in self.files:
                break
            held += self.page_size
            if touch:
                self.files.move_to_end(name)
        return held


@settings(max_examples=300)
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([None, 1, 2, 5, 12]),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    st.lists(
        st.tuples(st.sampled_from(["put", "count", "read"]), RUNS, st.integers(0, 5), st.integers(0, 9)), max_size=25
    ),
)
def test_runs_are_held_as_pages_are(
    page_size: int, max_pages: int | None, ratio: float, work: list[tuple[str, Runs, int, int]]
) -> None:
    max_tokens = None if max_pages is None else max_pages * page_size
    evicted: list[int] = []
    index = StorageIndex(page_size, StorageLimit(max_tokens, ratio), lambda _, tokens: evicted.append(tokens))
    files = PageFiles(page_size, max_tokens, ratio)
    for kind, key, first, pages in work:
        whole = num_tokens(key) // page_size * page_size
        start = min(first * page_size, whole)
        end = min(start + pages * page_size, whole)
        if kind == "put":
            index.put(index.reach(key, start), cut(key, start, end), end - start, 0)
            files.put(key, start, end)
        elif kind == "count":
            assert index.count(key, start, end) == files.count(key, start, end)
        elif max_tokens is not None:
            assert index.read(key, start, end) == files.count(key, start, end, touch=True)
        assert index.num_tokens == len(files.files) * page_size
        assert sum(evicted) == files.num_evicted


@pytest.mark.parametrize(
    ("settings_", "problem"),
    [
        ({"max_size": "200G"}, "max_size is in bytes"),
        ({"max_tokens": 15}, "a page .16 tokens. or more"),
        ({"max_tokens": "many"}, "max_tokens is 'many'"),
        ({"eviction_ratio": 0}, "eviction_ratio is 0"),
    ],
)
def test_limits_that_make_no_sense_are_refused(settings_: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        StorageLimit.of(settings_, 16)
