"""The KV cache: blocks, prefix cache, free queue."""
