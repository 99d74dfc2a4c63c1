"""Atomic writes on a local disk: files and folders are written under a temporary name, synced, then renamed."""

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from vce_ray.storage.errors import StoreError, disk_full
from vce_ray.storage.local_folder import FULL

CHUNK_BYTES = 8 << 20
TEMPORARY = ".tmp-"
"""Prefix of the names of unfinished files and folders."""


def write_local(target: Path, source: BinaryIO, size: int, exclusive: bool = False) -> None:
    """Write a local file atomically. Leaves nothing behind on failure.

    Args:
        size: number of bytes, for the message if they do not fit.
        exclusive: refuse to replace an existing file.

    Raises:
        FileExistsError: `exclusive` is set and `target` exists.
        StoreError: the disk cannot hold `size` bytes, or the folder of `target` cannot be made.
    """
    _make_folder(target.parent)
    temporary = target.with_name(f"{TEMPORARY}{uuid4().hex}")
    try:
        with open(temporary, "xb") as sink:
            shutil.copyfileobj(source, sink, CHUNK_BYTES)
            sink.flush()
            os.fsync(sink.fileno())
        if exclusive:
            os.link(temporary, target)  # unlike rename, fails if the target exists
        else:
            os.replace(temporary, target)
        # The new name lives in the folder: without this a power cut could lose it although the content was synced.
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in FULL:
            raise disk_full(target, size) from error
        if error.filename == str(temporary):
            error.filename = str(target)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError) as error:  # callers would take these two as news of the target itself
        raise StoreError(
            f"folder {folder} cannot be made ({error.strerror}): a part of its path is a file, or a link to a folder "
            "that does not exist. Use another folder."
        ) from error


def replace_folder(new: Path, target: Path) -> None:
    """Rename folder `new` to `target`, replacing an existing one. Safe to call from several processes at once.

    A rename cannot replace a folder that has files, so the old folder is moved away first. Another process may put its
    own folder there in between; hence the loop.
    """
    while True:
        try:
            new.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = target.with_name(f"{TEMPORARY}{uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):  # another process moved it first
            target.rename(old)
        shutil.rmtree(old, ignore_errors=True)
