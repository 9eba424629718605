"""Conversations: each turn's prompt is the whole conversation so far and something new.

A conversation is one stream of tokens: the common prefix (a system prompt that all share), its own prefix (a document),
then question and answer by turns. A turn's prompt is the stream's beginning up to its question, so the next prompt
begins with this prompt and its answer, block by block and in the last, partial block token by token. The parameters are
those of vLLM's `benchmark_serving_multi_turn`, but arrivals are fixed beforehand, as in a recorded trace: a slow engine
does not hold back the next question.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.traces.errors import InputError
from kvtwin.traces.generate.arrivals import arrival_times
from kvtwin.traces.generate.distribution import Distribution, IntArray
from kvtwin.traces.readers.text import MAX_TIME_NS, MAX_TOKENS
from kvtwin.traces.rng import stream
from kvtwin.traces.run import MAX_HASH_BLOCK_TOKENS, Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.traces.time import NS_PER_S
from kvtwin.traces.workload import places

_MAX_REQUESTS: Final = 100_000_000
_MAX_BLOCKS: Final = (1 << 31) - 1  # a list column counts its entries in 32 bits


@dataclass(frozen=True, slots=True)
class Conversations:
    """What to generate. Lengths in tokens.

    Attributes:
        num_conversations: how many; one turn each makes independent requests.
        rate_per_s, burstiness: of their first questions; see `arrival_times`.
        num_turns: questions per conversation.
        turn_interval_s: seconds from one question to the next: the answer and the time to read it and to think.
        common_prefix_tokens: system prompt of all; its whole blocks are shared.
        prefix_tokens: what a conversation starts with besides, such as a document.
        input_tokens, output_tokens: a question, and its answer.
        max_model_len: a conversation ends before a turn whose prompt and answer are longer; 0 for no limit.
        block_tokens: tokens per entry of block_hashes.
        seed: of all streams.
    """

    num_conversations: int
    rate_per_s: float
    burstiness: float
    num_turns: Distribution
    turn_interval_s: Distribution
    common_prefix_tokens: int
    prefix_tokens: Distribution
    input_tokens: Distribution
    output_tokens: Distribution
    max_model_len: int = 0
    block_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be generated.

        Raises:
            InputError: names the setting, its value and what would be right.
        """
        for name, low, high in (
            ("num_conversations", 1, _MAX_REQUESTS),
            ("common_prefix_tokens", 0, MAX_TOKENS),
            ("max_model_len", 0, MAX_TOKENS),
            ("block_tokens", 1, MAX_HASH_BLOCK_TOKENS),
            ("seed", 0, MAX_TOKENS),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{name} is {value}: {low} to {high} expected")
        if self.num_conversations * self.num_turns.mean > _MAX_REQUESTS:
            raise InputError(f"{self.num_conversations} conversations: more than {_MAX_REQUESTS} requests in all")


@dataclass(frozen=True, slots=True)
class _Turns:
    """All turns, by arrival: arrays of one entry per request."""

    conversation: IntArray
    turn: IntArray
    arrival_ns: IntArray
    input_tokens: IntArray
    output_tokens: IntArray


def generate(spec: Conversations) -> Run:
    """A workload of conversations, or of single requests where no conversation has a second turn.

    Requests are called `c<conversation>t<turn>`, with session_id and parent_id; single requests `r<number>`. Block
    hashes are left out where nothing is shared.

    Raises:
        InputError: more blocks than a table holds, arrivals beyond 146 years, or max_model_len leaves nothing.
    """
    turns = _turns(spec)
    columns: dict[str, Any] = {
        "arrival_ns": turns.arrival_ns,
        "input_tokens": turns.input_tokens,
        "output_tokens": turns.output_tokens,
    }
    several = bool(turns.turn.any())
    if several:
        columns |= _names(turns)
    else:
        columns["request_id"] = pc.binary_join_element_wise("r", _text(np.arange(len(turns.turn))), "")
    shares = several or spec.common_prefix_tokens >= spec.block_tokens
    if shares:
        columns["block_hashes"] = _block_hashes(spec, turns)
    info = RunInfo(
        "workload",
        hash_block_tokens=spec.block_tokens if shares else None,
        source={"generator": "kvtwin trace generate", "settings": asdict(spec)},
    )
    return Run(info, {"requests": from_columns("requests", columns, "generated")}, name="the generated workload")


def _turns(spec: Conversations) -> _Turns:
    n = spec.num_conversations
    starts = arrival_times(n, spec.rate_per_s, spec.burstiness, stream(spec.seed, "arrivals"))
    num_turns = spec.num_turns.sample_whole(stream(spec.seed, "turns"), n)
    total = int(num_turns.sum())
    if total > _MAX_REQUESTS:
        raise InputError(f"{total} requests: at most {_MAX_REQUESTS} expected")
    conversation, turn = np.repeat(np.arange(n), num_turns), places(num_turns)
    first = np.cumsum(num_turns) - num_turns
    asked = spec.input_tokens.sample_whole(stream(spec.seed, "questions"), total)
    answered = spec.output_tokens.sample_whole(stream(spec.seed, "answers"), total)
    prefix = spec.prefix_tokens.sample_whole(stream(spec.seed, "prefixes"), n, least=0) + spec.common_prefix_tokens
    waits_s = spec.turn_interval_s.sample(stream(spec.seed, "turn intervals"), total)
    waits_s[first] = 0

    spoken = np.cumsum(asked + answered)
    before = spoken - (asked + answered)
    prompt = (prefix - before[first])[conversation] + before + asked
    if starts[-1] + waits_s.sum() * NS_PER_S > MAX_TIME_NS:
        raise InputError(f"turn_interval_s: all intervals together are longer than {MAX_TIME_NS} ns")
    # Each wait in whole nanoseconds, so that their sums are exact.
    waited_ns = np.cumsum(np.rint(waits_s * NS_PER_S).astype(np.int64))
    arrival_ns = (starts - waited_ns[first])[conversation] + waited_ns

    # Prompts only grow: after a turn that does not fit, none does.
    fits = prompt + answered <= (spec.max_model_len or MAX_TOKENS)
    if not fits.any():
        raise InputError(f"max_model_len is {spec.max_model_len}: not one first turn fits")
    rows = np.flatnonzero(fits)
    rows = rows[np.argsort(arrival_ns[rows], kind="stable")]
    return _Turns(conversation[rows], turn[rows], arrival_ns[rows], prompt[rows], answered[rows])


def _names(turns: _Turns) -> dict[str, pa.Array]:
    session = pc.binary_join_element_wise("c", _text(turns.conversation), "")
    name = pc.binary_join_element_wise(session, _text(turns.turn), "t")
    parent = pc.binary_join_element_wise(session, _text(turns.turn - 1), "t")
    return {
        "request_id": name,
        "session_id": session,
        "parent_id": pc.if_else(pa.array(turns.turn > 0), parent, pa.scalar(None, pa.string())),
    }


def _text(numbers: IntArray) -> pa.Array:
    return pa.array(numbers).cast(pa.string())


def _block_hashes(spec: Conversations, turns: _Turns) -> pa.ListArray:
    """The common blocks are 0, 1, 2, ...; then come the blocks of each conversation, consecutive numbers of its own."""
    size = spec.block_tokens
    common = spec.common_prefix_tokens // size
    counts = -(-turns.input_tokens // size)
    ends = np.cumsum(counts)
    if ends[-1] > _MAX_BLOCKS:
        raise InputError(f"{ends[-1]} blocks of {size} tokens in all prompts: at most {_MAX_BLOCKS} expected")
    longest = np.zeros(spec.num_conversations, dtype=np.int64)
    np.maximum.at(longest, turns.conversation, counts)
    own = np.maximum(longest - common, 0)
    base = np.cumsum(own) - own  # of a conversation's block `common`, counted behind the common ones
    hashes = places(counts)
    hashes += np.where(hashes >= common, np.repeat(base[turns.conversation], counts), 0)
    offsets = pa.array(np.concatenate(([0], ends)), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(hashes.astype(np.uint64)))
