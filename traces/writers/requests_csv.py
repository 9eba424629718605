"""The `requests` table as CSV, for spreadsheets and scripts: columns and units of `schema.py`, unknown is empty."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from kvtwin.traces.files import replacing
from kvtwin.traces.run import Run


def write_csv(run: Run, path: str | os.PathLike[str]) -> int:
    """Write the run's requests, replacing an older file: all of it or nothing.

    Columns that are unknown throughout are left out; block hashes are separated by blanks. Texts stand as they are: a
    spreadsheet may take a request id that begins with = as a formula unless it imports the column as text.

    Returns:
        How many requests were written.

    Raises:
        InputError: the place cannot be written to.
    """
    table = run.requests
    unknown = [
        name for name in table.column_names if table.num_rows and table.column(name).null_count == table.num_rows
    ]
    table = table.drop_columns(unknown)
    for place, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            hashes = table.column(place).cast(pa.list_(pa.string()))
            table = table.set_column(place, field.name, pc.binary_join(hashes, " "))
    with replacing(path) as stream:
        csv.write_csv(table, stream)
    return int(table.num_rows)
