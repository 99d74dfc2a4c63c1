"""Folders on this machine outside of a store: those that a user names, and temporary ones. Needs no pyarrow."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vce_ray.errors import UserError, file_problems
from vce_ray.storage.errors import StoreError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, quota or file-size limit that leaves no room."""
_NEARLY_FULL = 1 << 20


def local_path(text: str | os.PathLike[str]) -> Path:
    """Return an absolute path, with `~` replaced by the home folder.

    Raises:
        UserError: there is no home folder, or the current folder does not exist any more.
    """
    try:
        return Path(text).expanduser().absolute()
    except (RuntimeError, FileNotFoundError) as error:
        reason = "the current folder was deleted" if isinstance(error, FileNotFoundError) else "no such home folder"
        raise UserError(f"{os.fspath(text)!r} cannot be resolved ({reason}): give an absolute path") from error


def writable_folder(folder: Path, setting: str, needed: int = 0) -> Path:
    """Create a folder, if need be, and check that files can be written to it.

    Args:
        setting: the option or variable that names the folder, for the message.
        needed: bytes that must be free on its disk.

    Raises:
        UserError: it is a file, no file can be written to it, or its disk has no room.
    """
    with file_problems(f"set {setting} to a folder that you may write to", folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"the disk of {folder} has {free:,} bytes free, {needed:,} are needed: free some space, or set {setting} "
            "to a folder on another disk"
        )
    return folder


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield an empty folder, which is deleted afterwards.

    Raises:
        StoreError: it cannot be made, or its disk was full when the body failed.
    """
    try:
        folder = tempfile.mkdtemp()
    except OSError as error:
        raise StoreError(
            f"no temporary folder can be made ({error.strerror}): set TMPDIR to a folder with free space that you may "
            "write to"
        ) from error
    try:
        yield Path(folder)
    except (StoreError, UserError):
        raise
    except Exception as error:  # torch reports a full disk as a RuntimeError
        full = isinstance(error, OSError) and error.errno in FULL
        if full or shutil.disk_usage(folder).free < _NEARLY_FULL:
            raise StoreError(f"the disk of {folder} is full: free some space, or set TMPDIR to another disk") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
