"""Carry an engine's state over between the event loop and the plain loop, at the top of a turn.

The waiting queue, the pool, the time stamps and the log are shared. What changes its shape are the running requests,
from bases and heap keys to `Request` objects and back, and the batch in flight.
"""

from __future__ import annotations

from kvtwin.sim.vllm.block_tables import BlockTables
from kvtwin.sim.vllm.jump import JumpLoop
from kvtwin.sim.vllm.plain import InFlight, PlainLoop
from kvtwin.sim.vllm.plan import StepPlan
from kvtwin.sim.vllm.recorder import UNKNOWN, StepRows
from kvtwin.sim.vllm.request import Request, RequestBook, Status
from kvtwin.sim.vllm.running import Batch, Chunk, Partial


def to_plain(jump: JumpLoop, plain: PlainLoop, requests: RequestBook, blocks: BlockTables) -> None:
    """The plain loop goes on where the event loop stopped."""
    clock = plain.clock
    if jump.num_steps > clock.num_steps:  # all its requests but the last decode, and the last one's prompt gets done
        plain.note_progress()
    clock.now_ns, clock.device_free_ns = jump.now_ns, jump.device_free_ns
    clock.num_steps, clock.num_arrived = jump.num_steps, jump.num_arrived
    pending = jump.pending
    running = [requests[jump.row_at[place]] for place in jump.running_places()]
    if pending:
        plan = _plan(jump, pending, running, requests)
        plain.in_flight.append(InFlight(plan, pending.sched_ns, pending.start_ns, pending.end_ns))
    for place, request in zip(jump.running_places(), running, strict=True):
        chunk = pending.chunk_of(place) if pending else None
        _restore(request, jump, place, chunk)
        decoded = pending is not None and chunk is None
        num_known = request.num_computed_tokens - (1 if decoded else 0)
        request.blocks, request.num_cached_blocks = blocks.unload(request.row, request.num_computed_tokens, num_known)
    plain.scheduler.running = running
    jump.clear()


def _restore(request: Request, jump: JumpLoop, place: int, chunk: Chunk | None) -> None:
    """What the plain loop knows of a running request. `chunk`: its part of the batch in flight, if a prompt's."""
    request.status = Status.RUNNING
    partial, pending = jump.partial, jump.pending
    request.num_in_flight_tokens = 0 if pending is None else chunk[3] if chunk else 1
    if partial and partial.place == place:
        request.num_computed_tokens = partial.num_computed
        request.num_output_tokens = request.max_tokens - partial.num_left
        request.num_output_placeholders = 0
        return
    # Tokens still to be scheduled; the one in flight is sampled but not known.
    num_left = jump.num_steps_left(place)
    request.num_output_placeholders = 1 if pending else 0
    request.num_output_tokens = request.max_tokens - num_left - request.num_output_placeholders
    request.num_computed_tokens = request.num_prompt_tokens + request.max_tokens - num_left - 1


def _plan(jump: JumpLoop, pending: Batch, running: list[Request], requests: RequestBook) -> StepPlan:
    """The batch in flight as the plain loop keeps it: every running request is in it."""
    cache_lens, input_lens, samples = [], [], []
    for place, request in zip(jump.running_places(), running, strict=True):
        chunk = pending.chunk_of(place)
        cache_lens.append(chunk[2] if chunk else jump.base_at[place] + jump.num_steps - 1)
        input_lens.append(chunk[3] if chunk else 1)
        samples.append(chunk is None or request.row in pending.first_rows)
    rows = pending.rows
    return StepPlan(
        requests=list(running),
        cache_lens=cache_lens,
        input_lens=input_lens,
        samples=samples,
        preempted=[requests[row] for row in rows.preempted] if rows else [],
        num_waiting=rows.num_waiting if rows else 0,
        num_running=rows.num_running if rows else 0,
        num_free_blocks=rows.num_free_blocks[0] if rows else 0,
        num_evicted_blocks=rows.num_evicted_blocks[0] if rows else 0,
    )


def is_calm(plain: PlainLoop, requests: RequestBook, *, cuts_prompts: bool) -> bool:
    """Whether the event loop can go on: all running requests decode, but for the last one, which may have a prompt."""
    scheduler, in_flight = plain.scheduler, plain.in_flight
    running = scheduler.running
    if scheduler.swapped:
        return False
    if not running:
        return not in_flight
    if len(running) >= scheduler.config.max_num_batched_tokens or len(in_flight) != plain.depth - 1:
        return False
    if in_flight and in_flight[0].plan.requests != running:
        return False
    waiting_in_flight = any(
        request.num_in_flight_tokens or request.num_output_placeholders or request.num_stale_output_tokens
        for request in requests.started.values()
        if request.status is Status.WAITING
    )
    if waiting_in_flight or any(request.num_stale_output_tokens for request in running):
        return False
    *others, last = running
    return all(_decodes(request, plain) for request in others) and (not cuts_prompts or _decodes(last, plain))


def _decodes(request: Request, plain: PlainLoop) -> bool:
    in_flight = plain.depth - 1
    return (
        request.num_output_tokens + in_flight > 0
        and request.num_output_placeholders == in_flight
        and request.num_computed_tokens == request.num_tokens - 1 + in_flight
    )


def to_jump(plain: PlainLoop, jump: JumpLoop, blocks: BlockTables) -> None:
    """The event loop goes on where the plain loop stopped; only if `is_calm`."""
    clock = plain.clock
    jump.resume(clock.now_ns, clock.device_free_ns, clock.num_steps, clock.num_arrived)
    in_flight = plain.in_flight.popleft() if plain.in_flight else None
    batch = None
    if in_flight:
        num_reqs = len(in_flight.plan.requests)
        batch = Batch(in_flight.sched_ns, in_flight.start_ns, in_flight.end_ns, num_reqs, [], [], [])
    for index, request in enumerate(plain.scheduler.running):
        place = jump.take_place(request.row)
        blocks.load(request.row, request.blocks, request.num_cached_blocks)
        num_left = request.max_tokens - request.num_output_tokens - request.num_output_placeholders
        if batch and in_flight:
            plan = in_flight.plan
            cache_len, input_len, samples = plan.cache_lens[index], plan.input_lens[index], plan.samples[index]
            if input_len > 1 or not samples or request.num_output_tokens == 0:
                batch.chunks.append((place, request.row, cache_len, input_len))
                if samples:
                    batch.first_rows.append(request.row)
        if not _decodes(request, plain):
            jump.partial = Partial(place, request.row, request.num_computed_tokens, request.num_tokens, num_left)
        elif num_left:
            base = request.num_computed_tokens - clock.num_steps
            jump.join(place, request.row, base, clock.num_steps + num_left - 1)
        else:
            assert batch is not None
            batch.last_places.append(place)
            jump.base_at[place] = request.num_computed_tokens - clock.num_steps
    if batch and in_flight and jump.records_steps:
        times_ns = (in_flight.sched_ns, in_flight.start_ns, in_flight.end_ns, UNKNOWN)
        batch.rows = StepRows.of_plan(in_flight.plan, (), times_ns)
    jump.pending = batch
    plain.scheduler.running = []
