"""Writing files: whole or not at all, and with one line for whatever the disk refuses."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tucka.demo.errors import DemoError
from tucka.errors import expected

__all__ = ["check_space", "whole_file", "writing"]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_space(folder: Path, least: int) -> None:
    """Raise if the disk that holds, or will hold, a folder has too little room.

    Parameters
    ----------
    folder : Path
        It need not exist yet.
    least : int
        Bytes that must be free.

    Raises
    ------
    DemoError
        If fewer bytes are free.

    Examples
    --------
    >>> check_space(Path("."), 1)
    """
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < least:
        rule, value = f"{least / 1e6:.0f} MB of free disk space", f"{free / 1e6:.1f} MB"
        raise DemoError(expected(str(folder), rule, value, cure="Free some space, or choose another folder"))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the operating system says about an unusable folder into a `DemoError`.

    Parameters
    ----------
    folder : Path
        Where the block writes; named in the message.

    Yields
    ------
    None
        Nothing; the block runs inside.

    Raises
    ------
    DemoError
        If the block raised an `OSError`.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in _DISK_FULL
        rule = "free disk space" if full else "a folder that can be written"
        cure = "Free some space, or choose another folder" if full else "Choose another folder"
        raise DemoError(expected(str(folder), rule, error.strerror or error, cure=cure)) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Let a block write a file beside its place, and move it there when the block is through.

    Parameters
    ----------
    path : Path
        Where the file is to be; an older one stays until then, and stays if the block fails.

    Yields
    ------
    Path
        Where to write.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
