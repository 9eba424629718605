"""The scheduler level: what a recorded scheduler decided, step by step, beside what the simulated one decides."""
