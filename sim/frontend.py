"""Time outside the engine: from the client to the engine's queue, and from the engine's token to the client."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.sim.latency.host import HostTime


class _Arrival(Protocol):
    """A request of any engine."""

    arrival_ns: int
    num_prompt_tokens: int


AnyRequest = TypeVar("AnyRequest", bound=_Arrival)


def at_the_engine(requests: Iterable[AnyRequest], host: HostTime) -> list[AnyRequest]:
    """Delay each request by its way through the frontend; returns them in the order in which the engine gets them."""
    delayed = list(requests)
    for request in delayed:
        request.arrival_ns += host.frontend(request.num_prompt_tokens)
    return sorted(delayed, key=lambda request: request.arrival_ns)


def at_the_client(requests: pa.Table, host: HostTime) -> pa.Table:
    """A `requests` table with the client's times, where the way back is known; else as it is."""
    if not host.output_ns:
        return requests
    for name in ("first_token_ns", "finish_ns"):
        index = requests.schema.get_field_index(f"client_{name}")
        times = pc.add(requests.column(name), host.output_ns)
        requests = requests.set_column(index, requests.schema.field(index), times)
    return requests
