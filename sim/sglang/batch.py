"""A batch that the scheduler has formed."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtwin.sim.sglang.request import SglangRequest

EXTEND, DECODE, MIXED = "E", "D", "M"


@dataclass(slots=True, eq=False)
class Batch:
    """Requests of one forward, in order.

    Attributes:
        mode: EXTEND (prefill), DECODE, or MIXED (prefill rows, then decode rows).
        requests: its rows; never changed once the batch has been formed.
        cache_lens, input_lens: tokens with KV before the step and new tokens, per row; None for a decode, whose rows
            have one new token each and as many cached as `kv_len` says when it is formed.
        num_prefills: leading rows that prefill.
        chunked: the request whose prefill goes on after this batch.
        load_end_ns: when the KV that it reads from the host has arrived.
    """

    mode: str
    requests: list[SglangRequest]
    cache_lens: list[int]
    input_lens: list[int]
    num_prefills: int
    chunked: SglangRequest | None = None
    load_end_ns: int | None = None
    retracted: list[SglangRequest] = field(default_factory=list)
