"""Where prompt tokens were found: hits by level of the cache."""

from __future__ import annotations

from kvtwin.reports.aggregate.document import CacheHits
from kvtwin.reports.numbers import MISSING, percent
from kvtwin.reports.pages.markup import Table
from kvtwin.reports.pages.plots import Figure, layout


def cache_figure(measured: CacheHits | None, simulated: CacheHits | None) -> Figure:
    """Hit tokens per level; a level that a run does not know is left out of it."""
    title = "Prefix-cache hits by level"
    if measured is None and simulated is None:
        return Figure("cache", title, "Neither run knows its prefix-cache hits (cached_tokens).", None, columns=4)
    sides = [(name, found) for name, found in (("measured", measured), ("simulated", simulated)) if found]
    levels = {name: _levels(found) for name, found in sides}
    names = [level for level in ("HBM", "host DRAM", "storage") if any(level in found for found in levels.values())]
    rows = [
        (
            level,
            *(_tokens(levels[side].get(level)) if side in levels else MISSING for side in ("measured", "simulated")),
        )
        for level in names
    ]
    shares = [f"{name} {percent(found.hit_tokens / max(found.input_tokens, 1), signed=False)}" for name, found in sides]
    unknown = "" if len(sides) == 2 else f" The {'simulation' if measured else 'recording'} does not know its hits."
    text = f"Share of prompt tokens found in a cache: {' and '.join(shares)}.{unknown}"
    table = Table("Hit tokens by level", ("level", "measured", "simulated"), rows)
    if not any(found.hit_tokens for _, found in sides):
        return Figure("cache", title, f"No prompt token was found in a cache.{unknown}", None, table, columns=4)
    data = [
        {
            "type": "bar",
            "name": name,
            "x": names,
            "y": [levels[name].get(level) for level in names],
            "marker": {"color": f"var(--{name})"},
            "hovertemplate": "%{y:,} tokens from %{x}<extra>" + name + "</extra>",
        }
        for name, _ in sides
    ]
    spec = {
        "data": data,
        "layout": layout({"type": "category"}, {"title": {"text": "hit tokens"}}, barmode="group", bargap=0.55),
    }
    return Figure("cache", title, text, spec, table, columns=4)


def _levels(hits: CacheHits) -> dict[str, int]:
    """Hit tokens of each level that the run knows; what came from no lower level was in HBM."""
    lower = {"host DRAM": hits.host_tokens, "storage": hits.storage_tokens}
    known = {level: tokens for level, tokens in lower.items() if tokens is not None}
    return {"HBM": hits.hit_tokens - sum(known.values()), **known}


def _tokens(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"
