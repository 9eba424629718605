"""The frame of every page: head, content security policy, style, scripts, and how it gets plotly.js.

A policy in the page lets only the scripts run that it was built with (by hash), so that even a mistake in the
escaping could not execute anything.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Final

from kvtwin.reports.pages.markup import script_json, text

PLOTLY_FILE: Final = "plotly.min.js"

_THEME_BUTTON = """<button type="button" id="theme" class="theme" hidden>Theme: system</button>"""


def render_page(
    title: str, header: str, main: str, specs: Mapping[str, Any], *, contents: str = "", plotly_url: str | None = None
) -> str:
    """One whole page; the same content gives the same bytes.

    Args:
        title: of the document, as plain text.
        header, main, contents: markup.
        specs: plotly specifications by the id of the element they are drawn in.
        plotly_url: where plotly.js lies, relative to the page; None packs it into the page.
    """
    script = _asset("page.js")
    scripts = [script]
    plotly = ""
    if specs and plotly_url is None:
        scripts.append(plotly_source())
        plotly = f'<script type="application/octet-stream" id="plotly">{_packed(plotly_source())}</script>'
    # strict-dynamic: what a trusted script loads is trusted; that is how a page finds the plotly.js beside it.
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'; "
        f"script-src 'strict-dynamic' {_hashes(*scripts)}"
    )
    linked = f' data-plotly="{text(plotly_url)}"' if plotly_url is not None else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)} · kvtwin</title>
<link rel="icon" href="data:,">
<style>
{_asset("page.css")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header class="top"><div class="wrap">{_THEME_BUTTON}{header}</div></header>
{contents}<main class="wrap" id="main" tabindex="-1">
{main}
</main>
<footer class="wrap">Made by kvtwin. This page needs no network; figures are drawn with plotly.js (MIT licence).</footer>
<script type="application/json" id="figures"{linked}>{script_json(specs)}</script>
{plotly}<script>{script}</script>
</body>
</html>
"""


def contents_of(links: Mapping[str, str]) -> str:
    """The page's contents above it: id of each section and its name."""
    items = "".join(f'<li><a href="#{key}">{text(name)}</a></li>' for key, name in links.items())
    return f'<nav class="contents" aria-label="On this page"><ul class="wrap">{items}</ul></nav>\n'


@cache
def plotly_source() -> str:
    """plotly.js as the Python package brings it."""
    from plotly.offline import get_plotlyjs  # heavy: only where a page is made

    source: str = get_plotlyjs()
    return source


@cache
def _asset(name: str) -> str:
    return (files("kvtwin.reports") / "assets" / name).read_text(encoding="utf-8")


@cache
def _packed(source: str) -> str:
    """gzip and base64: the library takes 4.8 MB as text, and less than half of that so; no time stamp inside."""
    return base64.b64encode(gzip.compress(source.encode(), 9, mtime=0)).decode()


def _hashes(*scripts: str) -> str:
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
