"""vLLM V1: its scheduler and KV cache decision for decision, and the loop that jumps from event to event."""
