"""Time outside the engine: from the client to the engine's queue, and from the engine's token to the client."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kvtwin.sim.latency.host import HostTime

IntArray = npt.NDArray[np.int64]


def order_at_the_engine(requests: pa.Table, host: HostTime) -> tuple[IntArray, IntArray]:
    """When the engine gets each request after its way through the frontend, and their rows in that order."""
    sent_ns, num_tokens = (requests.column(name).to_numpy() for name in ("arrival_ns", "input_tokens"))
    arrival_ns: IntArray = sent_ns + host.frontend(num_tokens)
    return arrival_ns, np.argsort(arrival_ns, kind="stable")


def at_the_client(requests: pa.Table, host: HostTime) -> pa.Table:
    """A `requests` table with the client's times, where the way back is known; else as it is."""
    if not host.output_ns:
        return requests
    for name in ("first_token_ns", "finish_ns"):
        index = requests.schema.get_field_index(f"client_{name}")
        times = pc.add(requests.column(name), host.output_ns)
        requests = requests.set_column(index, requests.schema.field(index), times)
    return requests
