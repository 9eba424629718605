"""All figures of one recorded run, drawn from figures.json."""

from __future__ import annotations

from kvtwin.reports.aggregate.document import RunFigures
from kvtwin.reports.pages.figures.cache import cache_figure
from kvtwin.reports.pages.figures.latencies import latency_figures
from kvtwin.reports.pages.figures.steps import step_figures
from kvtwin.reports.pages.figures.timeline import timeline_figure
from kvtwin.reports.pages.plots import Figure


def figures_of_run(run: RunFigures) -> list[Figure]:
    """All figures in reading order."""
    return [
        *step_figures(run.steps),
        *latency_figures(run.latencies),
        timeline_figure(run.timeline),
        cache_figure(*run.cache),
    ]
