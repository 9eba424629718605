"""Compare: two runs, or a recording and a profile, become checks with intervals, noise floor and verdict.

Start with `result.py` (what a check says), then `e2e.py` and `step.py`, then `check.py` (a whole target).
"""
