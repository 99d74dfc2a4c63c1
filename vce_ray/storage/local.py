"""Files and folders of a local disk that are there whole or not at all: written aside, synced, then named."""

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from vce_ray.storage.errors import disk_full

CHUNK_BYTES = 8 << 20
TEMPORARY = ".tmp-"
"""How names begin that are not given yet."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_local(target: Path, source: BinaryIO, size: int, exclusive: bool = False) -> None:
    """Write a local file aside, sync it to the disk and give it its name. On failure nothing is left behind.

    exclusive: raise FileExistsError if the name is taken. Raises StoreError if the disk cannot hold `size` bytes.
    """
    aside = target.with_name(f"{TEMPORARY}{uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "xb") as sink:
            shutil.copyfileobj(source, sink, CHUNK_BYTES)
            sink.flush()
            os.fsync(sink.fileno())
        if exclusive:
            os.link(aside, target)
        else:
            os.replace(aside, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(target, size) from error
        raise
    finally:
        aside.unlink(missing_ok=True)


def replace_folder(new: Path, target: Path) -> None:
    """Give a folder its name, in place of any that was there, also while other processes do the same."""
    while True:
        try:
            new.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = target.with_name(f"{TEMPORARY}{uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):  # another moved it first
            target.rename(old)
        shutil.rmtree(old, ignore_errors=True)
