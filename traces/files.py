"""Write a file so that a reader never sees half of it."""

from __future__ import annotations

import gzip
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from kvtwin.traces.errors import InputError


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` as UTF-8 to `path`, replacing an older file: all of it or nothing.

    Folders on the way are made.

    Raises:
        InputError: the place cannot be written to.
    """
    with replacing(path) as stream:
        stream.write(text.encode())
    return Path(path)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A stream to a new file beside `path`, which takes its place when the block ends well; else nothing is left.

    Folders on the way are made.

    Raises:
        InputError: the place cannot be written to.
    """
    target = Path(path)
    scratch: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(handle, "wb") as stream:
            yield stream
        os.chmod(scratch, 0o644)
        os.replace(scratch, target)
    except BaseException as error:
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"cannot be written ({error.strerror})", path=target) from error
        raise


@contextmanager
def replacing_text(path: str | os.PathLike[str]) -> Iterator[IO[str]]:
    """Like `replacing`, for UTF-8 text with Unix line ends; a name that ends in .gz compresses it, without a date inside.

    Raises:
        InputError: the place cannot be written to.
    """
    with replacing(path) as raw, ExitStack() as stack:
        sink: Any = raw
        if str(path).endswith(".gz"):
            sink = stack.enter_context(gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=5, mtime=0))
        text = io.TextIOWrapper(sink, encoding="utf-8", newline="\n")
        yield text
        text.detach()  # flushed, and left open for what closes it
