"""Fetch models from object storage. pyarrow is imported on first use."""

from __future__ import annotations

import errno
import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from vce_ray.env import MODEL_CACHE
from vce_ray.errors import UserError
from vce_ray.storage.local_folder import FULL, local_path, writable_folder

if TYPE_CHECKING:
    from vce_ray.storage.store import Store


def store_folder(ref: str) -> Path:
    """Return the copy of a model in this machine's model cache, after fetching it if it is not there yet.

    Raises:
        UserError: the disk has no room for it.
        StoreError: the object store cannot be reached.
    """
    from pyarrow import fs

    from vce_ray.storage.errors import StoreError

    store, sizes, folder = stored_files(ref)
    if sizes and not folder.exists():
        writable_folder(folder.parent, MODEL_CACHE.name, needed=sum(sizes.values()))
        # Several processes of a machine may copy the same model at once: each copies into a folder of its own, and
        # the rename, which is atomic, lets the first one win.
        partial = folder.with_name(f"{folder.name}.{uuid4().hex}")

        def copy() -> None:
            partial.mkdir(parents=True, exist_ok=True)  # pyarrow makes subfolders only
            fs.copy_files(store.root, str(partial), store.filesystem)

        try:
            store.attempt("fetching", "", copy)
            partial.rename(folder)
        except StoreError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL:
                raise no_space(ref, sum(sizes.values()), folder, MODEL_CACHE.name) from error
            raise
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # these two: another process finished first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def stored_files(ref: str) -> tuple[Store, dict[str, int], Path]:
    """Return the store of a model, its files by name with their bytes, and the folder in the cache for its copy.

    The folder's name covers the path, size and modification time of every file, so a changed model is copied again.

    Raises:
        StoreError: the object store cannot be reached.
    """
    from pyarrow import fs

    from vce_ray.storage.store import Store

    store = Store(ref)
    selector = fs.FileSelector(store.root, recursive=True, allow_not_found=True)
    infos = store.attempt("listing", "", lambda: store.filesystem.get_file_info(selector))
    files = sorted((info.path, info.size, str(info.mtime)) for info in infos if info.is_file)
    key = hashlib.blake2b(repr([store.uri, files]).encode(), digest_size=8).hexdigest()
    sizes = {path.removeprefix(f"{store.root.rstrip('/')}/"): size for path, size, _ in files}
    return store, sizes, local_path(MODEL_CACHE.get()) / key


def free_space(folder: Path) -> int:
    """Return the free bytes of the disk that a folder, which need not exist yet, is or would be on."""
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def no_space(ref: str, needed: int, folder: Path, variable: str) -> UserError:
    """Return the error for a disk without room for the files of a model.

    Args:
        needed: bytes of the files.
        folder: where they would be written.
        variable: the environment variable that moves it.
    """
    return UserError(
        f"{ref} needs {needed / 1e9:.2f} GB, the disk of {folder} has {free_space(folder) / 1e9:.2f} GB free",
        f"free some, or set {variable} to a folder on another disk",
    )
