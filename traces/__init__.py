"""What happened: tables, runs, and readers of public formats.

Start with `schema.py` (every column, its unit and meaning), then `run.py` (a folder of tables), then
`readers/` (one file per public format).
"""

from kvtwin.traces.errors import InputError, KvtwinError
from kvtwin.traces.run import Run, RunInfo

__all__ = ["InputError", "KvtwinError", "Run", "RunInfo"]
