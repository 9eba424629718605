"""KV blocks below the GPU's pool: host memory, and a disk under it."""
