"""Other simulators on the same recording: our errors and theirs, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvtwin.reports.numbers import MISSING
from kvtwin.reports.words import AnyReport, cells
from kvtwin.validate.result import Check, Peer
from kvtwin.validate.summary import NO_PAIRS


@dataclass(frozen=True, slots=True)
class PeerTable:
    """One recorded run: a row per metric of the end-to-end level.

    Attributes:
        run: its name.
        heads: "metric", "measured", "kvtwin", then the peers.
        rows: as long as `heads`; what a simulator does not say is MISSING.
        notes: what a reader must know of a peer's numbers.
    """

    run: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def peer_tables(report: AnyReport) -> Iterator[PeerTable]:
    """A table for each run that other simulators predicted as well."""
    for run in dict.fromkeys(peer.run for peer in report.peers):
        peers = [peer for peer in report.peers if peer.run == run]
        ours = {check.metric: check for check in report.checks if check.run == run and check.level == "e2e"}
        sides = [ours, *({check.metric: check for check in peer.checks} for peer in peers)]
        metrics = dict.fromkeys(metric for side in sides for metric in side)
        rows = tuple(_row(metric, [side.get(metric) for side in sides]) for metric in metrics)
        heads = ("metric", "measured", "kvtwin", *(peer.name for peer in peers))
        yield PeerTable(run, heads, rows, tuple(note for peer in peers for note in _notes(peer)))


def _notes(peer: Peer) -> list[str]:
    told = dict.fromkeys(check.note for check in peer.checks if NO_PAIRS in check.note)
    return [f"{peer.name}: {note}" for note in told]


def _row(metric: str, checks: list[Check | None]) -> tuple[str, ...]:
    measured = next(cells(check).measured for check in checks if check is not None)
    return (metric, measured, *(_cell(check) for check in checks))


def _cell(check: Check | None) -> str:
    if check is None:
        return MISSING
    shown = cells(check)
    return shown.error if shown.simulated == MISSING else f"{shown.simulated} ({shown.error})"
