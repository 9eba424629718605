"""The page of `kvtwin compare`: runs side by side, the first one the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvtwin.reports.numbers import number, percent
from kvtwin.reports.pages.markup import Table, facts, plain_table, text, typeset
from kvtwin.reports.pages.plots import Figure, figure_html, layout, log_axis, plotly_text, specs_of
from kvtwin.reports.pages.shell import contents_of, render_page
from kvtwin.validate.compare import Metric, SideBySide

_TIMES: Final = {
    "ttft": "Time to first token (TTFT)",
    "tpot": "Time per output token (TPOT)",
    "latency": "End-to-end latency",
}
# Statistics from inside out: marker and whether it is filled, so that no colour is needed to tell them apart.
_STATISTICS: Final = {"mean": "diamond", "p50": "circle", "p90": "square-open", "p99": "triangle-right-open"}
# Parts of a stack, in order: metric, label, colour.
_LEVELS: Final = (
    ("cached_unknown_tokens", "level unknown", "mixed"),
    ("cached_device_tokens", "HBM", "decode"),
    ("cached_host_tokens", "host DRAM", "measured"),
    ("cached_storage_tokens", "storage", "prefill"),
    ("computed_tokens", "computed", "other"),
)
_QUEUES: Final = (
    ("waiting_mean", "waiting", "simulated"),
    ("prefetch_mean", "prefetch", "prefill"),
    ("running_mean", "running", "decode"),
    ("swapped_mean", "swapped", "other"),
)
_CARDS: Final = ("ttft_mean", "tpot_mean", "throughput", "hit_rate")
_LABELS: Final = {
    "ttft_mean": "TTFT mean",
    "tpot_mean": "TPOT mean",
    "latency_mean": "Latency mean",
    "throughput": "Throughput",
    "hit_rate": "Hit rate",
    "waiting_mean": "Waiting",
}
_CLOCKS: Final = {"arrival_ns": "from the client's sending", "queued_ns": "from the engine's queue"}


def render_comparison(found: SideBySide) -> str:
    """The whole page, plotly.js packed inside."""
    figures = [
        *(_time_figure(found, key, title) for key, title in _TIMES.items()),
        _throughput_figure(found),
        _stack_figure(found, "cache", "Prompt tokens by where they were found", _LEVELS, "hit_rate"),
        _stack_figure(found, "queues", "Mean time of a request in each queue", _QUEUES, "waiting_mean"),
    ]
    drawn = "".join(figure_html("all", figure, level=3) for figure in figures)
    sections = {
        "overview": ("At a glance", _cards(found)),
        "charts": ("Figures", f'<div class="grid">{drawn}</div>'),
        "numbers": ("All numbers", f'<div class="panel">{plain_table(_metrics_table(found))}</div>'),
        "settings": ("Settings that differ", f'<div class="panel">{plain_table(_settings_table(found))}</div>'),
        "runs": ("Runs", f'<div class="panel">{plain_table(_facts_table(found))}</div>'),
    }
    if not found.settings:
        del sections["settings"]
    main = "\n".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{title}</h2>{content}</section>'
        for key, (title, content) in sections.items()
    )
    title = " / ".join(found.names)
    links = {key: name for key, (name, _) in sections.items()}
    return render_page(title, _header(found, title), main, specs_of("all", figures), contents=contents_of(links))


def _header(found: SideBySide, title: str) -> str:
    notes = "".join(f'<p class="description">{text(note)}</p>' for note in found.notes)
    shown = [
        ("Baseline", found.names[0]),
        ("TTFT and latency count", _CLOCKS[found.clock]),
        ("Requests", f"{found.facts[0]['num_requests']:,}"),
    ]
    return f"""<p class="brand"><b>kvtwin</b> runs side by side</p>
<h1>{text(title)}</h1>{notes}
{facts((key, text(value)) for key, value in shown)}"""


def _cards(found: SideBySide) -> str:
    """One card per run, with what it is known by."""
    cards = []
    for index, name in enumerate(found.names):
        lines = "".join(
            f'<span>{_LABELS[key]} <b data-metric="{key}">{typeset(value_text(found.metric(key), index))}</b> '
            f"{typeset(_change(found.metric(key), index))}</span>"
            for key in _CARDS
        )
        cards.append(f'<li class="card"><span class="label">{text(name)}</span>{lines}</li>')
    return f'<ul class="cards" aria-label="Headline numbers">{"".join(cards)}</ul>'


def value_text(metric: Metric, index: int) -> str:
    """The value of one run, with its unit."""
    value = metric.values[index]
    if metric.unit == "share":
        return percent(value, signed=False)
    if metric.unit in ("", "tokens") and math.isfinite(value):
        return f"{value:,.0f} {metric.unit}".rstrip()
    return f"{number(value)} {metric.unit}".rstrip() if math.isfinite(value) else number(value)


def _change(metric: Metric, index: int) -> str:
    """Against the baseline; nothing for the baseline itself and where there is none."""
    change = metric.changes[index]
    return percent(change) if index and math.isfinite(change) else ""


# -- figures ----------------------------------------------------------------------------------------------


def _time_figure(found: SideBySide, key: str, title: str) -> Figure:
    """Mean and quantiles of one time, a row per run, on a logarithmic axis."""
    metrics = {name: found.metric(f"{key}_{name}") for name in _STATISTICS}
    table = Table(
        f"{title}, ms",
        ("run", *metrics),
        [
            (name, *(number(metric.values[index]) for metric in metrics.values()))
            for index, name in enumerate(found.names)
        ],
    )
    positive = [value for metric in metrics.values() for value in metric.values if value > 0]
    if not positive:
        return Figure(key, title, "No request of these runs has one.", None, table)
    data = [
        _dots(metric, name, symbol, found)
        for (name, symbol), metric in zip(_STATISTICS.items(), metrics.values(), strict=True)
    ]
    axis = {**log_axis(min(positive), max(positive)), "title": {"text": "ms"}, "tickformat": ","}
    return Figure(key, title, _sentence(found, f"{key}_mean"), _rows_spec(data, axis, found), table)


def _dots(metric: Metric, statistic: str, symbol: str, found: SideBySide) -> dict[str, Any]:
    rows = [index for index, value in enumerate(metric.values) if value > 0]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": statistic,
        "x": [metric.values[index] for index in rows],
        "y": rows,
        "customdata": [_hover(metric, index, found) for index in rows],
        "hovertemplate": "%{customdata}<extra>" + statistic + "</extra>",
        "marker": {
            "symbol": symbol,
            "size": 11 if statistic == "mean" else 9,
            "color": "var(--measured)" if statistic == "mean" else "var(--ink-soft)",
        },
    }


def _hover(metric: Metric, index: int, found: SideBySide) -> str:
    change = _change(metric, index)
    against = f"<br>{change} against {plotly_text(found.names[0])}" if change else ""
    return f"{plotly_text(found.names[index])}: {value_text(metric, index)}{against}"


def _sentence(found: SideBySide, key: str) -> str:
    """One metric of every run, in words."""
    metric = found.metric(key)
    values = (f"{name} {value_text(metric, index)}" for index, name in enumerate(found.names))
    return f"{_LABELS[key]}: {', '.join(values)}."


def _throughput_figure(found: SideBySide) -> Figure:
    title, metric = "Output throughput", found.metric("throughput")
    rows = [(name, value_text(metric, index), _change(metric, index)) for index, name in enumerate(found.names)]
    table = Table(title, ("run", "value", "change"), rows)
    known = [index for index, value in enumerate(metric.values) if math.isfinite(value)]
    sentence = "Output tokens per second from the first start to the last finish; no engine serves more than arrives."
    if not known:
        return Figure("throughput", title, "No run knows it.", None, table)
    bars = _bars(
        "throughput",
        "measured",
        known,
        [metric.values[index] for index in known],
        [_hover(metric, index, found) for index in known],
    )
    return Figure("throughput", title, sentence, _rows_spec([bars], {"title": {"text": metric.unit}}, found), table)


def _stack_figure(
    found: SideBySide, key: str, title: str, parts: Sequence[tuple[str, str, str]], headline: str
) -> Figure:
    """A bar per run, made of parts; a part that no run knows or has is left out of the picture."""
    unit = found.metric(parts[0][0]).unit
    metrics = [(found.metric(name), label, colour) for name, label, colour in parts]
    rows = [
        (name, *(number(metric.values[index]) for metric, _, _ in metrics)) for index, name in enumerate(found.names)
    ]
    table = Table(f"{title}, {unit}", ("run", *(label for _, label, _ in metrics)), rows)
    data = []
    for metric, label, colour in metrics:
        known = [index for index, value in enumerate(metric.values) if value > 0]
        values = [metric.values[index] for index in known]
        if known:
            data.append(_bars(label, colour, known, values, [_hover(metric, index, found) for index in known]))
    if not data:
        return Figure(key, title, "No run knows it.", None, table)
    spec = _rows_spec(data, {"title": {"text": unit}}, found, barmode="stack")
    return Figure(key, title, _sentence(found, headline), spec, table)


def _bars(name: str, colour: str, rows: Sequence[int], values: Sequence[float], hover: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": list(rows),
        "x": list(values),
        "customdata": list(hover),
        "hovertemplate": "%{customdata}<extra>" + name + "</extra>",
        "marker": {"color": f"var(--{colour})"},
    }


def _rows_spec(
    data: Sequence[Mapping[str, Any]], axis: Mapping[str, Any], found: SideBySide, **more: Any
) -> dict[str, Any]:
    """A row per run, the baseline on top."""
    names = [plotly_text(name, 18) for name in found.names]
    rows = {
        "tickvals": list(range(len(names))),
        "ticktext": names,
        "range": [len(names) - 0.5, -0.5],
        "showgrid": False,
    }
    drawn = layout(axis, rows, bargap=0.45, showlegend=len(data) > 1, **more)
    drawn["legend"]["traceorder"] = "normal"
    return {"data": list(data), "layout": drawn}


# -- tables -----------------------------------------------------------------------------------------------


def _metrics_table(found: SideBySide) -> Table:
    heads = ["metric", found.names[0], *(head for name in found.names[1:] for head in (name, "change"))]
    rows = []
    for metric in found.metrics:
        cells = [value_text(metric, 0)]
        for index in range(1, len(found.names)):
            cells += [value_text(metric, index), percent(metric.changes[index])]
        rows.append([metric.name, *cells])
    return Table(f"Changes against {found.names[0]}", heads, rows)


def _settings_table(found: SideBySide) -> Table:
    rows = [(key, *values) for key, values in found.settings.items()]
    return Table("Engine settings that are not the same in all runs", ("setting", *found.names), rows)


def _facts_table(found: SideBySide) -> Table:
    keys = dict.fromkeys(key for run in found.facts for key in run)
    rows = [(key.replace("_", " "), *(str(run.get(key, "-")) for run in found.facts)) for key in keys]
    return Table("What is known of the runs", ("fact", *found.names), rows)
