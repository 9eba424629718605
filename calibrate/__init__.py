"""Find the numbers: measurements become a Profile, with hold-out errors, intervals and provenance.

Start with `steps.py` (recorded steps) or `kernels.py` (kernel tables).
"""
