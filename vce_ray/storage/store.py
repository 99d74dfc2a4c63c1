"""The single place for everything a run produces: a `Store`, a prefix on a local disk or in an S3 or GCS bucket.

    store = Store('s3://bucket/runs?endpoint_override=localhost:9000&scheme=http')     # or Store('runs')
    store.write_json('deer/run.json', {'concept': 'deer'})
    stage = store.stage('deer/pairs')                                                  # see stage.py

Writes are atomic (see files.py). Transient faults (network, throttling, 5xx) are retried until
`VCE_RAY_STORE_DEADLINE_S` has passed. Credentials come from where pyarrow, boto3 and Google's libraries look for them
and are never part of a URI. A store does not depend on Ray: it pickles as its URI, and `store.root` and
`store.filesystem` are what Ray's own functions take.
"""

import os
import shutil
from pathlib import Path
from uuid import uuid4

from vce_ray.storage.errors import StoreError
from vce_ray.storage.files import FileStore
from vce_ray.storage.folder import FOLDER_INDEX, file_digest, relative_path
from vce_ray.storage.local import TEMPORARY, replace_folder, write_local
from vce_ray.storage.stage import Stage

__all__ = ["Stage", "Store", "StoreError"]


class Store(FileStore):
    """A FileStore that also holds stages and whole folders."""

    def stage(self, name: str) -> Stage:
        """Return the stage of that name: a folder of Parquet parts published by a manifest."""
        return Stage(self.child(name))

    def upload(self, local_dir: str | os.PathLike[str], path: str) -> None:
        """Copy a folder into the store, replacing an existing one. Its index is written last.

        Until then `fetch` refuses the folder.

        Raises:
            ValueError: `local_dir` is not a folder or has no files.
        """
        local = Path(local_dir)
        files = sorted(str(file.relative_to(local)) for file in local.rglob("*") if file.is_file())
        if not files:
            raise ValueError(f"{local} has no files to upload: use a folder that has")
        self.delete_prefix(f"{path}/{FOLDER_INDEX}")
        for name in files:
            with open(local / name, "rb") as source:
                self._write("uploading", f"{path}/{name}", source, (local / name).stat().st_size)
        for leftover in set(self.list(path)) - {f"{relative_path(path)}/{name}" for name in files}:
            self.delete_prefix(leftover)
        self.write_json(f"{path}/{FOLDER_INDEX}", {"files": {name: file_digest(local / name) for name in files}})

    def fetch(self, path: str, local_dir: str | os.PathLike[str]) -> Path:
        """Copy an uploaded folder to `local_dir`, atomically, replacing an existing one.

        Raises:
            StoreError: the folder was not uploaded completely, or a file is missing or corrupt.
        """
        target = Path(local_dir).absolute()
        index = f"{path}/{FOLDER_INDEX}"
        if not self.exists(index):
            raise StoreError(f"{self.where(path)} is missing or incomplete: upload the folder again")
        temporary = target.with_name(f"{TEMPORARY}{uuid4().hex}")
        try:
            for name, digest in self.read_json(index)["files"].items():
                source, file = f"{path}/{name}", temporary / relative_path(name)
                self.attempt("fetching", source, lambda source=source, file=file: self._fetch_file(source, file))
                if file_digest(file) != digest:
                    raise StoreError(f"{self.where(source)} is corrupt: upload the folder again")
            replace_folder(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def _fetch_file(self, path: str, file: Path) -> None:
        with self.filesystem.open_input_file(self.full(path)) as source:
            write_local(file, source, source.size())
