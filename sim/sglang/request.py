"""The state of one request while a simulated SGLang serves it, under the names of `schedule_batch.Req`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, eq=False)
class SglangRequest:
    """One request. Token ids are never held one by one: lengths, and runs of consecutive ids.

    Attributes:
        row: its row in the run's requests table; its name in every log.
        prompt_runs: the prompt's token ids as (first id, length) runs of consecutive ids.
        output_runs: the same of its output tokens, and of one more.
        max_new_tokens: output tokens after which it finishes, as clipped at arrival.
        priority: as sent; the configuration says whether high or low numbers go first.
        queue_entry: rank of its latest entry into the waiting queue (`wait_queue_entry_time`).
        num_outputs: output tokens known to the scheduler (`len(output_ids)`).
        fill_len: tokens of the prompt and outputs that its latest prefill covers (`len(fill_ids)`).
        prefix_len: tokens whose KV stood before its latest prefill step (`len(prefix_indices)`).
        extend_input_len: tokens that the latest prefill step computes.
        host_hit_len: matched tokens that only the host holds (`host_hit_length`).
        cache_protected_len: leading tokens whose KV slots belong to the tree.
        kv_len: tokens with a KV slot (`kv_committed_len`, which equals `kv_allocated_len` here).
        num_cached_tokens: prompt tokens found in the cache, for the log (`cached_tokens`).
        already_computed: tokens computed by earlier chunks, so that they do not count as cached.
        loaded_len: tokens of its prefix that its latest admission loads from the host.
        storage_hit_len: tokens that a prefetch has brought to the host since it last joined the queue.
        prefetch_ns: how long storage has worked for it since it last joined the queue.
        num_host_tokens, num_storage_tokens: of num_cached_tokens, those loaded from the host that came there from the
            device, and those that its prefetch brought (`cached_tokens_host`, `cached_tokens_storage` of 0.5.9).
        num_chunks_in_flight: chunk results still to come (`is_chunked`).
        is_retracted: lost its KV and has not been prefilled again.
        was_retracted: `retracted_stain`.
        last_node, last_host_node: where its match in the tree ends, on the device and on the host.
    """

    row: int
    arrival_ns: int
    num_prompt_tokens: int
    max_new_tokens: int
    prompt_runs: tuple[tuple[int, int], ...]
    output_runs: tuple[tuple[int, int], ...]
    priority: int = 0
    queue_entry: int = 0
    num_outputs: int = 0
    fill_len: int = 0
    prefix_len: int = 0
    extend_input_len: int = 0
    host_hit_len: int = 0
    cache_protected_len: int = 0
    kv_len: int = 0
    num_cached_tokens: int = 0
    already_computed: int = 0
    loaded_len: int = 0
    storage_hit_len: int = 0
    prefetch_ns: int = 0
    num_host_tokens: int = 0
    num_storage_tokens: int = 0
    num_chunks_in_flight: int = 0
    num_retractions: int = 0
    finished: bool = False
    is_retracted: bool = False
    was_retracted: bool = False
    last_node: Any = field(default=None, repr=False)
    last_host_node: Any = field(default=None, repr=False)

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt and the output so far (`seqlen`)."""
        return self.num_prompt_tokens + self.num_outputs

    def runs(self, num_tokens: int) -> list[tuple[int, int]]:
        """The first `num_tokens` of prompt and outputs, as (first id, length) runs, none of which continues another."""
        runs: list[tuple[int, int]] = []
        left = num_tokens
        for first, length in (*self.prompt_runs, *self.output_runs):
            if left <= 0:
                break
            taken = min(length, left)
            if runs and sum(runs[-1]) == first:
                runs[-1] = runs[-1][0], runs[-1][1] + taken
            else:
                runs.append((first, taken))
            left -= taken
        return runs

    def reset_for_retract(self) -> None:
        """Its KV is gone (`Req.reset_for_retract`)."""
        self.num_retractions += 1
        self.prefix_len = self.extend_input_len = self.already_computed = self.kv_len = 0
        self.cache_protected_len = 0
        self.last_node = None
        self.num_chunks_in_flight = 0
        self.is_retracted = self.was_retracted = True
