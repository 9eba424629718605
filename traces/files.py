"""Write a file or a folder so that a reader never sees half of it."""

from __future__ import annotations

import gzip
import io
import os
import shutil
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


def refuse_existing(path: Path) -> None:
    """Refuse an output path that exists, so that nothing is ever overwritten by accident, or that cannot be made.

    Raises:
        InputError: it exists, or the folder that it would be in cannot be written to.
    """
    if path.exists():
        raise InputError("exists already: give a new path, or remove it first", path=path)
    refuse_unwritable(path)


def refuse_unwritable(path: Path) -> None:
    """Refuse an output path whose folder is none or may not be written to: found out before the work, not after.

    Raises:
        InputError: see above.
    """
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise InputError(f"cannot be written: {above} is a file, not a folder", path=path)
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"cannot be written: no permission to write in {above}", path=path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A scratch folder beside `path`, which becomes `path` when the block ends well; else nothing is left.

    Folders on the way are made.

    Raises:
        InputError: `path` exists, or cannot be written.
    """
    refuse_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InputError(f"cannot be written ({error.strerror})", path=path) from error
    try:
        scratch.chmod(0o755)
        yield scratch
        scratch.rename(path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A stream to a new file beside `path`, which takes its place when the block ends well; else nothing is left.

    Folders on the way are made.

    Raises:
        InputError: the place cannot be written to.
    """
    target = Path(path)
    refuse_unwritable(target)
    if target.is_dir():
        raise InputError("cannot be written: it is a folder", path=target)
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
