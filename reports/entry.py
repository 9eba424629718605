"""The command `kvtwin` as it is installed: what must be set before numpy is loaded, then `cli.main`."""

from __future__ import annotations

import os


def main() -> int:
    """Run the command on one core; the user's own setting wins.

    kvtwin's matrices are small: the threads of BLAS that wait for one another double the time of a calibration.
    """
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from kvtwin.reports.cli import main as run

    return run()
