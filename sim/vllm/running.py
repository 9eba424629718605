"""The running requests as an event loop sees them: sums over the decodes, and keys that say when one ends.

A decode is a base (its cache_len at step s is base + s) and the step of its last token. Whoever runs has a *place*: the
n-th admission has place n, so places in order are vLLM's running list.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from kvtwin.sim.vllm.block_tables import BlockTables
from kvtwin.sim.vllm.recorder import StepRows

PLACE_BITS = 40  # of a heap key: the request's place in the order of admission
PLACE_MASK = (1 << PLACE_BITS) - 1

# Plain tuples, because millions are made. A prompt chunk in a batch: place, row, cache_len, new tokens.
Chunk = tuple[int, int, int, int]
# A request whose prompt a step completes: place, row, prompt length, output tokens still to sample.
Ready = tuple[int, int, int, int]


@dataclass(slots=True)
class Partial:
    """The running request whose prompt is not computed yet; there is never more than one, the last one admitted."""

    place: int
    row: int
    num_computed: int
    num_tokens: int  # to compute before its next token is sampled
    num_left: int  # output tokens still to sample


@dataclass(slots=True)
class Batch:
    """A scheduled batch whose tokens have not been taken in yet.

    Attributes:
        first_rows: requests whose prompt it completes.
        last_places: places of the requests whose last token it samples, in the order of the running list.
        chunks: its prompt chunks.
        rows: what the log will hold of it; None if nothing is recorded.
    """

    sched_ns: int
    start_ns: int
    end_ns: int
    num_reqs: int
    chunks: list[Chunk]
    first_rows: list[int]
    last_places: list[int]
    rows: StepRows | None = None

    def chunk_of(self, place: int) -> Chunk | None:
        """The prompt chunk of the request at `place`, if it has one in the batch."""
        return next((chunk for chunk in self.chunks if chunk[0] == place), None)


class Running:
    """Who runs, and where the clock stands.

    Args:
        blocks: KV blocks of the running requests.
        needs_spread: also keep the sum of squares and the longest of the decodes' contexts.

    Attributes:
        now_ns: the host's time.
        device_free_ns: when the device can start the next step.
        num_steps: steps scheduled so far; the index of the next one.
        row_at, base_at: row of the request at each place, and its base once it decodes.
        ends: heap of the decodes, (step of the last token) << PLACE_BITS | place.
        partial: the request with a prompt to compute.
        pending: under asynchronous scheduling, the batch in flight.
        num_running: length of the running list.
        num_decode, context, context_sq: decodes of the next step, and the sums over their cache_len.
    """

    def __init__(self, blocks: BlockTables, *, needs_spread: bool) -> None:
        self._blocks, self._needs_spread = blocks, needs_spread
        self.now_ns = self.device_free_ns = self.num_steps = 0
        self.row_at = array("q")
        self.base_at = array("q")
        self.ends: list[int] = []
        self.partial: Partial | None = None
        self.pending: Batch | None = None
        self.num_running = self.num_decode = self.context = self.context_sq = 0
        self._longest: list[int] = []  # heap of -base << PLACE_BITS | place; left ones are dropped when seen
        self._left: set[int] = set()

    def running_places(self) -> list[int]:
        """Places of the running requests, in the order of the running list."""
        places = [key & PLACE_MASK for key in self.ends]
        if self.pending:
            places += self.pending.last_places
        if self.partial:
            places.append(self.partial.place)
        return sorted(places)

    def num_steps_left(self, place: int) -> int:
        """Steps that a decode still has to be scheduled for."""
        end = next((key >> PLACE_BITS for key in self.ends if key & PLACE_MASK == place), self.num_steps - 1)
        return end - self.num_steps + 1

    def clear(self) -> None:
        """Nobody runs any more: the plain loop has taken over."""
        for key in self.ends:
            place = key & PLACE_MASK
            self._blocks.leave(self.row_at[place], self.base_at[place])
        self.ends, self._longest, self._left = [], [], set()
        self.partial = self.pending = None
        self.num_running = self.num_decode = self.context = self.context_sq = 0

    def batch_with(self, chunks: Sequence[Chunk]) -> tuple[int, ...]:
        """The next step's batch, with these prompt chunks: its statistics, as `latency.stats.batch_row` gives them.

        A chunk of one token is a decode. Sums that only the spread of contexts needs are 0 without `needs_spread`.
        """
        num_decode, context, context_sq = self.num_decode, self.context, self.context_sq
        longest = num_prefill = tokens = prefix = pairs = tokens_sq = 0
        for _, _, cache_len, count in chunks:
            if count > 1:
                num_prefill += 1
                tokens += count
                prefix += cache_len
            else:
                num_decode += 1
                context += cache_len
        if self._needs_spread:
            longest = self.longest_context()
            for _, _, cache_len, count in chunks:
                if count > 1:
                    pairs += count * cache_len + count * (count + 1) // 2
                    tokens_sq += count * count
                else:
                    context_sq += cache_len * cache_len
                    longest = max(longest, cache_len)
        return num_decode, context, context_sq, longest, num_prefill, tokens, prefix, pairs, tokens_sq

    def take_place(self, row: int) -> int:
        """The next place in the running list."""
        self.row_at.append(row)
        self.base_at.append(0)
        self.num_running += 1
        return len(self.row_at) - 1

    def join(self, place: int, row: int, base: int, end: int) -> None:
        """A request decodes from the next step on, to the step `end`."""
        self.base_at[place] = base
        heappush(self.ends, end << PLACE_BITS | place)
        cache_len = base + self.num_steps
        self.num_decode += 1
        self.context += cache_len
        self._blocks.join(row, base)
        if self._needs_spread:
            self.context_sq += cache_len * cache_len
            heappush(self._longest, -base << PLACE_BITS | place)

    def leave(self, step: int) -> list[int]:
        """Those whose last token the step samples leave the decodes; their places, in order."""
        ends, places = self.ends, []
        while ends and ends[0] >> PLACE_BITS == step:
            place = heappop(ends) & PLACE_MASK
            base = self.base_at[place]
            cache_len = base + self.num_steps
            self.num_decode -= 1
            self.context -= cache_len
            self._blocks.leave(self.row_at[place], base)
            if self._needs_spread:
                self.context_sq -= cache_len * cache_len
                self._left.add(place)
            places.append(place)
        return places

    def drop(self, place: int, cache_len: int) -> None:
        """A decode is preempted."""
        self.ends = [key for key in self.ends if key & PLACE_MASK != place]
        heapify(self.ends)
        self.num_decode -= 1
        self.context -= cache_len
        self._blocks.leave(self.row_at[place], self.base_at[place])
        if self._needs_spread:
            self.context_sq -= cache_len * cache_len
            self._left.add(place)

    def longest_context(self) -> int:
        """Largest cache_len among the decodes of the next step."""
        heap, left = self._longest, self._left
        while heap and heap[0] & PLACE_MASK in left:
            left.discard(heappop(heap) & PLACE_MASK)
        return self.num_steps - (heap[0] >> PLACE_BITS) if heap else 0
