"""How long a step takes: one contract (`base.py`), interchangeable models, and the Profile that holds one."""
