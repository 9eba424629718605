"""`kvtwin report`: a static site of hardware targets from what `kvtwin check` wrote."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kvtwin.validate.checks_json import StoredReport

FIGURES_FILE: Final = "figures.json"
_MAX_SLUG: Final = 60


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `report`."""
    report = subparsers.add_parser(
        "report",
        help="a static site of dashboards per hardware target",
        description="Draws what `kvtwin check` wrote: an index of targets and a page for each. Several OUTs of one "
        "target (the same name, hardware and model) are its history; the newest is shown. The site opens from a file and needs no network.",
    )
    report.add_argument(
        "outs", nargs="+", type=Path, metavar="OUT", help="output folder of kvtwin check, of one target or several"
    )
    report.add_argument(
        "-o", "--output", type=Path, required=True, metavar="SITE", help="folder to write; must not exist"
    )
    report.add_argument("--json", action="store_true", help="print the list of pages as one JSON document")
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    pages = write_site(args.outs, args.output)
    if args.json:
        print(json.dumps({"index": str(args.output / "index.html"), "targets": pages}, allow_nan=False))
    else:
        print(f"{args.output / 'index.html'}: {len(pages)} target{'' if len(pages) == 1 else 's'}")
        for page in pages:
            if older := page["history"]:
                print(f"{page['name']}: {page['shown']} is shown; its history, oldest first: {', '.join(older)}")
    return 0


@dataclass(frozen=True)
class _Check:
    """One output folder of one target."""

    folder: Path
    report: StoredReport


def write_site(outs: Sequence[Path], site: Path) -> list[dict[str, Any]]:
    """Write index.html, a page per target and one plotly.js for all: the whole site or nothing.

    Args:
        outs: output folders of `kvtwin check`, each of one target or with one sub-folder per target.
        site: must not exist.

    Returns:
        One entry per target, in the index's order: its name, its page, how many reports it has, the folder of the one
        that is shown and those of its history, oldest first.

    Raises:
        InputError: an OUT holds no report, is given twice, or cannot be read; or `site` exists or cannot be written.
    """
    from kvtwin.reports.pages.index import Entry, render_index
    from kvtwin.reports.pages.shell import PLOTLY_FILE, plotly_source
    from kvtwin.reports.words import title
    from kvtwin.traces.files import new_folder, refuse_existing, write_text

    refuse_existing(site)
    histories = _histories([check for out in outs for check in _checks_in(out)])
    with new_folder(site) as folder:
        entries: list[Entry] = []
        for history in histories:
            slug = _slug(title(history[-1].report), {entry.url.split("/")[1] for entry in entries})
            entry = Entry(f"targets/{slug}/index.html", tuple(check.report for check in history))
            write_text(folder / entry.url, _target_page(history))
            entries.append(entry)
        write_text(folder / "assets" / PLOTLY_FILE, plotly_source())
        write_text(folder / "index.html", render_index(entries))
    return [
        {
            "name": title(entry.newest),
            "page": str(site / entry.url),
            "num_reports": len(entry.history),
            "shown": str(history[-1].folder),
            "history": [str(check.folder) for check in history[:-1]],
        }
        for entry, history in zip(entries, histories, strict=True)
    ]


def _target_page(history: Sequence[_Check]) -> str:
    """The newest report, with the others as its history."""
    from kvtwin.reports.aggregate import document
    from kvtwin.reports.pages.shell import PLOTLY_FILE
    from kvtwin.reports.pages.target import render_target

    newest = history[-1]
    path = newest.folder / FIGURES_FILE
    return render_target(
        newest.report,
        document.read(path) if path.exists() else None,
        [check.report for check in history],
        index_url="../../index.html",
        plotly_url=f"../../assets/{PLOTLY_FILE}",
    )


def _checks_in(out: Path) -> list[_Check]:
    from kvtwin.validate import checks_json

    return [_Check(path.parent, checks_json.read(path)) for path in checks_json.report_files(out)]


def _histories(checks: Sequence[_Check]) -> list[list[_Check]]:
    """By target, oldest first (an unknown date is the oldest); failing targets first, then by name.

    Reports of one name on other hardware, or of another model, are of another target.

    Raises:
        InputError: a report is given twice.
    """
    from kvtwin.reports.words import title, verdict_word
    from kvtwin.traces.errors import InputError

    by_target: dict[tuple[str | None, ...], list[_Check]] = {}
    for check in checks:
        facts = (title(check.report), *map(check.report.target.get, ("hardware", "model")))
        group = by_target.setdefault(facts, [])
        if any(check.folder.resolve() == other.folder.resolve() for other in group):
            raise InputError("is given twice", path=check.folder)
        group.append(check)
    histories = [sorted(group, key=lambda check: check.report.created or "") for group in by_target.values()]
    order = ("fail", "not judged", "pass")
    return sorted(histories, key=lambda group: (order.index(verdict_word(group[-1].report)), title(group[-1].report)))


def _slug(name: str, taken: set[str]) -> str:
    """A folder name made of letters, digits and dashes only, that no other target has.

    >>> _slug("RTX PRO 6000, tp 2", set()), _slug("../<b>", {"b"}), _slug("..", set())
    ('rtx-pro-6000-tp-2', 'b-2', 'target')
    """
    base = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_MAX_SLUG].strip("-") or "target"
    slug, number = base, 1
    while slug in taken:
        number += 1
        slug = f"{base}-{number}"
    return slug
