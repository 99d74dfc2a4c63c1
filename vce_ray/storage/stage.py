"""Stages: a folder of Parquet parts that readers do not see until a manifest, written last, publishes them.

    stage = store.stage('deer/pairs')
    parts = [stage.write_part(table) for table in tables]      # anywhere, by any number of workers
    stage.publish(parts, key='pair_id', concept='deer')        # once, by the driver
    stage.read(columns=['prompt'])                             # by anyone: each key once, sorted by key

A part is named by a hash of its content: a worker that is retried writes the same file again, and no part overwrites
another.

The folder of a published stage is a Parquet dataset that pandas, pyarrow and Ray read as it is. It holds the parts of
the manifest and no others, and no key is in two of them: rows that were made twice are left out before the manifest is
written. Other parts are deleted afterwards, so whoever has read the manifest finds its parts. A worker that is late
looks for the manifest once it has written its part, and deletes the part if the manifest does not list it.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from vce_ray.errors import UserError
from vce_ray.storage.errors import StoreError
from vce_ray.storage.files import MANIFEST, MANIFESTS, FileStore

T = TypeVar("T")

_THREADS = 8  # parts read concurrently
_ROWS_TAKEN = 1024  # rows reordered at once
_LARGE_TYPES = {pa.binary(): pa.large_binary(), pa.string(): pa.large_string()}
_RERUN_HINT = "Delete this stage (Store.delete_prefix) and run it again."


@dataclass(frozen=True)
class Stage:
    """A folder of Parquet parts. Cheap to pickle. Every method may raise StoreError."""

    store: FileStore  # the stage's own folder

    def published(self) -> bool:
        """Whether the stage has a manifest: it is complete and need not run again."""
        return self._manifest_file() is not None

    def manifest(self) -> dict[str, Any] | None:
        """Return what `publish` wrote, or None if the stage is not published. Raises StoreError if it is corrupt."""
        file = self._manifest_file()
        if file is None:
            return None
        manifest = self.store.read_json(file)
        if not (isinstance(manifest, dict) and {"parts", "rows", "key", "schema"} <= manifest.keys()):
            raise StoreError(f"{self.store.where(file)} is corrupt: not a manifest. {_RERUN_HINT}")
        return manifest

    def write_part(self, table: pa.Table) -> str:
        """Write one part and return its file name, `part-<hash of content>.parquet`, to be passed to `publish`.

        Readers do not see the part before that. Writing the same rows twice gives one file. A part that comes after
        publication and is not one of those published is deleted again.
        """
        sink = pa.BufferOutputStream()
        pq.write_table(
            table.replace_schema_metadata(None),
            sink,
            compression="zstd",
            write_page_checksum=True,
            use_compliant_nested_type=False,  # list columns keep their exact type when read back
        )
        data = memoryview(sink.getvalue())
        part = f"part-{hashlib.blake2b(data, digest_size=10).hexdigest()}.parquet"
        self.store.write_bytes(part, data)
        if self.store.exists(MANIFEST) and part not in self.parts():
            self.store.delete_prefix(part)
        return part

    def publish(self, parts: Sequence[str], key: str, **facts: Any) -> dict[str, Any]:
        """Make these parts visible to readers by writing the manifest, and return it. All other parts are deleted.

        Args:
            key: the column that identifies rows. Of identical rows one is published: parts that repeat rows of others
                are written again without these, or left out.
            facts: JSON values to store in the manifest.

        Raises:
            UserError: the stage is already published.
            ValueError: there are no parts, their columns differ, the key is missing or null in a row, or two different
                rows have the same key.
        """
        self._refuse_if_published()
        names = sorted(set(parts))
        if not names:
            raise ValueError(
                f"{self.store.where()}: no parts to publish; for an empty stage, write one part without rows"
            )
        try:
            inspected = self._map(names, lambda name: _Part.inspect(self, name, key))
            schema = self._common_schema(names, [part.schema for part in inspected])
            files = self._without_repeats(dict(zip(names, inspected)), key)
        except StoreError:
            self._refuse_if_published()  # another writer has published and deleted our parts
            raise
        manifest = {
            "parts": [{"name": n, "rows": len(f.keys), "bytes": f.num_bytes} for n, f in sorted(files.items())],
            "rows": sum(len(file.keys) for file in files.values()),
            "bytes": sum(file.num_bytes for file in files.values()),
            "key": key,
            "schema": {field.name: str(field.type) for field in schema},
            "facts": facts,
            # Makes the manifests of two writers differ even if they publish the same parts. Otherwise create_json would
            # take the other's manifest for its own, written by a retry, and both would believe that they published.
            "publication": uuid4().hex,
        }
        try:
            self.store.create_json(MANIFEST, manifest)
        except FileExistsError:
            self._refuse_if_published()
            raise
        self.sweep()
        return manifest

    def sweep(self) -> None:
        """Delete parts that the manifest does not list. Does nothing before publication."""
        files = self._part_files()  # listed first: what is written from now on, its writer deletes
        manifest = self.manifest()
        if manifest is not None:
            published = {part["name"] for part in manifest["parts"]}
            self._map([file for file in files if file not in published], self.store.delete_prefix)

    def read(self, columns: Sequence[str] | None = None, allow_missing: bool = False) -> pa.Table:
        """Return the published rows, each key once, sorted by key.

        Args:
            columns: the columns to read, in this order; all by default.
            allow_missing: read an unpublished stage as a table without rows (its columns have type null).

        Raises:
            StoreError: the stage is not published, or a part is missing or corrupt.
            ValueError: the stage does not have one of the columns.
        """
        manifest = self.manifest()
        if manifest is None:
            if allow_missing:
                return pa.table({name: pa.nulls(0) for name in columns or ()})
            raise StoreError(
                f"{self.store.where()} is not published: run the stage that produces it to completion"
                f"{self.store.no_folder()}"
            )
        selected = list(manifest["schema"] if columns is None else columns)
        unknown = [name for name in selected if name not in manifest["schema"]]
        if unknown:
            raise ValueError(f"{self.store.where()} has no column {unknown}: it has {list(manifest['schema'])}")
        key = manifest["key"]
        tables = self._map(manifest["parts"], lambda part: self._read_published(part, list({*selected, key})))
        table = pa.concat_tables(tables, promote_options="default")
        rows = pa.table({"key": table[key], "row": pa.array(range(len(table)), pa.int64())})
        first = rows.group_by("key").aggregate([("row", "min")]).sort_by("key")
        return _take_rows(table.select(selected), first["row_min"].combine_chunks())

    def parts(self) -> list[str]:
        """Return the sorted names of the parts in the manifest or, before publication, of all parts written so far."""
        manifest = self.manifest()
        if manifest is not None:
            return [part["name"] for part in manifest["parts"]]
        return self._part_files()

    def inventory(self, columns: Sequence[str] = ()) -> pa.Table:
        """Return which rows the parts hold, published or not: 'key' (the first column), 'part', and `columns`.

        A row that was written more than once is listed once, with its first part.
        """
        published, parts = self.published(), self.parts()
        try:
            tables = self._map(parts, lambda name: self._list_rows(name, list(columns)))
        except StoreError:
            if published or not self.published():
                raise
            return self.inventory(columns)  # published meanwhile, and some of these parts were deleted
        if not tables:
            return pa.table({name: pa.array([], pa.string()) for name in ("key", "part", *columns)})
        table = pa.concat_tables(tables, promote_options="default")
        if len(parts) == 1:
            return table
        seen: set[Any] = set()
        first = [key not in seen and not seen.add(key) for key in table["key"].to_pylist()]
        return table.filter(pa.array(first))

    def count_rows(self, name: str) -> int:
        """Return the number of rows of one part, published or not. Raises as `read_part` does."""
        return self._open_part(name, lambda file, size: file.metadata.num_rows)

    def read_part(self, name: str) -> pa.Table:
        """Return the rows of one part, published or not. Raises StoreError if it is missing or corrupt."""
        return self._open_part(name, lambda file, size: file.read())

    # Internals --------------------------------------------------------------------------------------------------------

    def _manifest_file(self) -> str | None:
        return next((name for name in MANIFESTS if self.store.exists(name)), None)

    def _part_files(self) -> list[str]:
        return [file for file in self.store.list() if file.endswith(".parquet") and "/" not in file]

    def _map(self, items: Sequence[Any], call: Callable[[Any], T]) -> list[T]:
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(call, items))

    def _open_part(self, name: str, load: Callable[[pq.ParquetFile, int], T]) -> T:
        """Return `load(file, size in bytes)`. Raises StoreError that says whether the file or the store is at fault."""

        def attempt() -> T:
            with self.store.filesystem.open_input_file(self.store.full(name)) as file:
                return load(pq.ParquetFile(file, page_checksum_verification=True), file.size())

        try:
            return self.store.attempt("reading", name, attempt)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{self.store.where(name)} is corrupt ({error}). {_RERUN_HINT}") from error

    def _list_rows(self, name: str, columns: list[str]) -> pa.Table:
        def load(file: pq.ParquetFile, size: int) -> pa.Table:
            key = file.schema_arrow.names[0]
            table = file.read(columns=list({key, *columns}))
            head = {"key": table[key], "part": pa.array([name] * len(table), pa.string())}
            return pa.table(head | {column: table[column] for column in columns})

        return self._open_part(name, load)

    def _read_published(self, part: dict[str, Any], columns: list[str]) -> pa.Table:
        def load(file: pq.ParquetFile, size: int) -> pa.Table:
            if size != part["bytes"]:
                raise pa.ArrowInvalid(f"it has {size:,} bytes, its manifest says {part['bytes']:,}")
            return file.read(columns=columns)

        return self._open_part(part["name"], load)

    def _common_schema(self, names: list[str], schemas: list[pa.Schema]) -> pa.Schema:
        for name, schema in zip(names, schemas):
            if set(schema.names) != set(schemas[0].names):
                raise ValueError(
                    f"{self.store.where()}: {names[0]} has columns {schemas[0].names}, {name} has {schema.names}"
                )
        try:
            return pa.unify_schemas(schemas)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"{self.store.where()}: parts have conflicting column types: {error}") from error

    def _without_repeats(self, parts: dict[str, "_Part"], key: str) -> dict[str, "_Part"]:
        """Return parts that hold every row once: some as they are, some written again without rows of earlier ones.

        Raises:
            ValueError: two different rows have the same key.
        """
        counts = Counter(value for part in parts.values() for value in part.keys)
        repeated = {value for value, count in counts.items() if count > 1}
        # Keys alone are cheap to read; only parts with repeated ones are read in full.
        kept = {name: part for name, part in parts.items() if repeated.isdisjoint(part.keys)}
        firsts: dict[str, list[int]] = {name: [] for name in parts if name not in kept}
        seen: dict[Any, tuple[str, str]] = {}
        for name, rows in firsts.items():
            table = self.read_part(name)
            for index, value in enumerate(parts[name].keys):
                if value not in seen:
                    rows.append(index)
                if value in repeated:
                    content = repr(sorted(table.slice(index, 1).to_pylist()[0].items()))  # makes NaN equal to NaN
                    other, first = seen.setdefault(value, (name, content))
                    if content != first:
                        raise ValueError(
                            f"{self.store.where()}: two different rows have {key} {value!r} (in {other} and {name}); "
                            "derive the id from everything that determines its row"
                        )
        for name, rows in firsts.items():  # now that all of them are sound
            if len(rows) == len(parts[name].keys):
                kept[name] = parts[name]
            elif rows:
                rewritten = self.write_part(_take_rows(self.read_part(name), pa.array(rows)))
                kept[rewritten] = _Part.inspect(self, rewritten, key)
        return kept

    def _refuse_if_published(self) -> None:
        if self.published():
            raise UserError(
                f"{self.store.where()} is already published and cannot change: use another run, or delete it first"
            )


@dataclass(frozen=True)
class _Part:
    """What `publish` needs to know about a part."""

    schema: pa.Schema
    keys: list[Any]
    num_bytes: int

    @classmethod
    def inspect(cls, stage: Stage, name: str, key: str) -> "_Part":
        """Read a part's schema and keys. Raises ValueError if the key is missing or null in a row."""

        def load(file: pq.ParquetFile, size: int) -> "_Part":
            schema = file.schema_arrow
            return cls(schema, file.read([key])[key].to_pylist() if key in schema.names else [None], size)

        part = stage._open_part(name, load)
        if None in part.keys:
            raise ValueError(f"{stage.store.where(name)}: key column {key!r} is missing, or null in a row")
        return part


def _take_rows(table: pa.Table, rows: pa.Array) -> pa.Table:
    """Return rows of a table in a given order. Unlike `Table.take`, works for columns of more than 2 GiB.

    Binary and string arrays have 32-bit offsets. The table is therefore cast to their large variants, and the rows are
    taken in slices small enough to cast back.
    """
    large = pa.schema([field.with_type(_LARGE_TYPES.get(field.type, field.type)) for field in table.schema])
    combined = table.cast(large).combine_chunks()
    slices = [
        combined.take(rows.slice(start, _ROWS_TAKEN)).cast(table.schema) for start in range(0, len(rows), _ROWS_TAKEN)
    ]
    return pa.concat_tables(slices) if slices else table.slice(0, 0)
