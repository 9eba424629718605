"""Kernel tables of a whole model -> composed step latency."""
