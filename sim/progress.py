"""How long work says how far it is: a callback, and the bar on the terminal that listens to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int], object]  # told how many more are done

_DESC_WIDTH = 60


@contextmanager
def progress_bar(total: int, unit: str, desc: str) -> Iterator[Progress]:
    """A bar on stderr that counts: only on a terminal, and only where it takes longer than a moment."""
    from tqdm import tqdm  # here: `kvtwin --help` must not wait for it

    with tqdm(total=total, unit=unit, desc=desc, delay=2.0, disable=None, leave=False) as bar:
        yield bar.update


@contextmanager
def stage_bar(total: int, unit: str) -> Iterator[Callable[[str], None]]:
    """A bar as `progress_bar` makes it, told the name of each stage as it begins."""
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, delay=1.0, disable=None, leave=False) as bar:

        def tell(stage: str) -> None:
            bar.set_description(stage[:_DESC_WIDTH], refresh=False)
            bar.update()

        yield tell
