"""Synthetic workloads: arrivals, lengths, conversations and shared prompts, from one seed."""
