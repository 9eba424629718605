"""`kvtwin validate LEVEL`: two runs compared, or a run and a profile or engine. (`kvtwin check` is in reports/.)"""

from __future__ import annotations

import argparse

from kvtwin.validate.commands import attribution, cache, e2e, scheduler, step


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `validate`."""
    parser = subparsers.add_parser("validate", help="compare a recording with a prediction")
    levels = parser.add_subparsers(metavar="LEVEL", dest="level", required=True)
    for level in (step, scheduler, cache, e2e, attribution):
        level.add(levels)
