"""SHOW: a TargetReport as a terminal table, as Markdown, and as one self-contained HTML page.

Start with `words.py` (what a check says, in words), then `figures.py` and `html.py`. `cli.py` is the root
of the command line.
"""
