"""A stage of a run: a folder of Parquet parts that nobody reads until a manifest, written last, publishes them.

    stage = store.stage('deer/pairs')
    parts = [stage.write_part(table) for table in tables]      # anywhere, by any number of workers
    stage.publish(parts, key='pair_id', concept='deer')        # once, by the driver
    stage.read(columns=['prompt'])                             # by anyone: each key once, sorted by key

A part is named by a hash of its content, so a worker that is tried again writes the same file, a part is never
overwritten by another, and what is left of a worker that died is not in the manifest and does no harm.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vce_ray.storage.errors import StoreError

if TYPE_CHECKING:
    from vce_ray.storage.store import Store

T = TypeVar("T")

MANIFEST = "manifest.json"  # the last file of a published stage

_THREADS = 8  # parts opened at once
_ROWS_TAKEN = 1024  # rows put in order at once
_LARGE = {pa.binary(): pa.large_binary(), pa.string(): pa.large_string()}


@dataclass(frozen=True)
class Stage:
    """One folder of Parquet parts. Cheap to pickle. Every method may raise StoreError."""

    store: "Store"  # the stage's own folder

    def published(self) -> bool:
        """Whether there is a manifest: the stage is whole and needs no further run."""
        return self.store.exists(MANIFEST)

    def manifest(self) -> dict[str, Any] | None:
        """What `publish` wrote, or None before it did. Raises StoreError if the manifest is damaged."""
        if not self.published():
            return None
        manifest = self.store.read_json(MANIFEST)
        if not (isinstance(manifest, dict) and {"parts", "rows", "key", "schema"} <= manifest.keys()):
            raise StoreError(f"{self.store.where(MANIFEST)} is damaged: it is no manifest. {self._mend()}")
        return manifest

    def write_part(self, table: pa.Table, name: str | None = None) -> str:
        """Write one part and return its file name, `<name>-<hash of content>.parquet`, to be handed to `publish`.

        Readers do not see it before that. The same rows written twice are one file.
        """
        sink = pa.BufferOutputStream()
        pq.write_table(
            table.replace_schema_metadata(None),
            sink,
            compression="zstd",
            write_page_checksum=True,
            use_compliant_nested_type=False,  # a list column comes back with the very type it had
        )
        data = memoryview(sink.getvalue())
        part = f"{name or 'part'}-{hashlib.blake2b(data, digest_size=10).hexdigest()}.parquet"
        self.store.write_bytes(part, data)
        return part

    def publish(self, parts: Sequence[str], key: str, **facts: Any) -> dict[str, Any]:
        """Show these parts to readers, by one manifest that is written last, and return it.

        key: the column that tells rows apart. Rows that are equal in full may occur more than once and are read once.
        facts: what else the manifest is to say, in JSON's types.
        Raises ValueError if the stage is published already, if there are no parts, if their columns differ, if the key
        is missing or null somewhere, or if two rows have the same key and differ.
        """
        self._refuse_if_published()
        names = sorted(set(parts))
        if not names:
            raise ValueError(f"{self.store.where()}: no parts to publish; an empty stage takes one part without rows")
        files = self._each(names, lambda name: _Part.inspect(self, name, key))
        schema = self._common_schema(names, [file.schema for file in files])
        rows = self._distinct_rows(names, key, [file.keys for file in files])
        manifest = {
            "parts": [{"name": n, "rows": len(f.keys), "bytes": f.num_bytes} for n, f in zip(names, files)],
            "rows": rows,
            "bytes": sum(file.num_bytes for file in files),
            "key": key,
            "schema": {field.name: str(field.type) for field in schema},
            "facts": facts,
            "publication": uuid4().hex,  # tells writers apart that publish the same
        }
        try:
            self.store.create_json(MANIFEST, manifest)
        except FileExistsError:
            self._refuse_if_published()
            raise
        return manifest

    def read(self, columns: Sequence[str] | None = None, allow_missing: bool = False) -> pa.Table:
        """The published rows, each key once, sorted by key, with all columns or those named, in that order.

        allow_missing: read a stage that is not published as a table without rows (columns of type null).
        Raises StoreError if the stage is not published, or a part is missing or damaged; ValueError for a column that
        it does not have.
        """
        manifest = self.manifest()
        if manifest is None:
            if allow_missing:
                return pa.table({name: pa.nulls(0) for name in columns or ()})
            raise self._not_published()
        wanted = list(manifest["schema"] if columns is None else columns)
        unknown = [name for name in wanted if name not in manifest["schema"]]
        if unknown:
            raise ValueError(f"{self.store.where()} has no column {unknown}: it has {list(manifest['schema'])}")
        key = manifest["key"]
        tables = self._each(manifest["parts"], lambda part: self._read_part(part, list({*wanted, key})))
        table = pa.concat_tables(tables, promote_options="default")
        rows = pa.table({"key": table[key], "row": pa.array(range(len(table)), pa.int64())})
        first = rows.group_by("key").aggregate([("row", "min")]).sort_by("key")
        return _take(table.select(wanted), first["row_min"].combine_chunks())

    def parts(self) -> list[str]:
        """Names of the parts that the manifest lists or, before there is one, of all that were written; sorted."""
        manifest = self.manifest()
        if manifest is not None:
            return [part["name"] for part in manifest["parts"]]
        return [file for file in self.store.list() if file.endswith(".parquet") and "/" not in file]

    def inventory(self, columns: Sequence[str] = ()) -> pa.Table:
        """What `parts` hold: the first column as 'key', the part's name as 'part', and the columns named.

        Rows that were written twice are told once, of the first part.
        """
        parts = self.parts()
        tables = self._each(parts, lambda name: self._inventory_of(name, list(columns)))
        if not tables:
            return pa.table({name: pa.array([], pa.string()) for name in ("key", "part", *columns)})
        table = pa.concat_tables(tables, promote_options="default")
        if len(parts) == 1:
            return table
        seen: set[Any] = set()
        first = [key not in seen and not seen.add(key) for key in table["key"].to_pylist()]
        return table.filter(pa.array(first))

    def read_part(self, name: str) -> pa.Table:
        """The rows of one part, published or not. Raises StoreError where it is missing or damaged."""
        return self._open_part(name, lambda file, size: file.read())

    def paths(self) -> list[str]:
        """The parts' paths inside `store.filesystem`, for `ray.data.read_parquet`; equal rows may occur twice there.

        Raises StoreError if the stage is not published.
        """
        manifest = self.manifest()
        if manifest is None:
            raise self._not_published()
        return [self.store.full(part["name"]) for part in manifest["parts"]]

    def reset(self) -> None:
        """Delete what is not published: every part before `publish`, the parts that the manifest leaves out after it.

        Not to be called while workers write parts.
        """
        manifest = self.manifest()
        published = {MANIFEST, *(part["name"] for part in manifest["parts"])} if manifest else set()
        for file in self.store.list():
            if file not in published:
                self.store.delete_prefix(file)

    # Within -----------------------------------------------------------------------------------------------------------

    def _each(self, items: Sequence[Any], call: Callable[[Any], T]) -> list[T]:
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(call, items))

    def _open_part(self, name: str, load: Callable[[pq.ParquetFile, int], T]) -> T:
        """`load(file, its size in bytes)`, with what is wrong with the file told apart from what ails the store."""

        def attempt() -> T:
            with self.store.filesystem.open_input_file(self.store.full(name)) as file:
                return load(pq.ParquetFile(file, page_checksum_verification=True), file.size())

        try:
            return self.store.attempt("reading", name, attempt)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{self.store.where(name)} is damaged ({error}). {self._mend()}") from error

    def _inventory_of(self, name: str, columns: list[str]) -> pa.Table:
        def load(file: pq.ParquetFile, size: int) -> pa.Table:
            key = file.schema_arrow.names[0]
            table = file.read(columns=list({key, *columns}))
            named = {"key": table[key], "part": pa.array([name] * len(table), pa.string())}
            return pa.table(named | {column: table[column] for column in columns})

        return self._open_part(name, load)

    def _read_part(self, part: dict[str, Any], columns: list[str]) -> pa.Table:
        def load(file: pq.ParquetFile, size: int) -> pa.Table:
            if size != part["bytes"]:
                raise pa.ArrowInvalid(f"it has {size:,} bytes, the manifest says {part['bytes']:,}")
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
            raise ValueError(f"{self.store.where()}: parts differ in the type of a column: {error}") from error

    def _distinct_rows(self, names: list[str], key: str, keys: list[list[Any]]) -> int:
        """The number of distinct keys. Raises ValueError if rows of the same key differ."""
        counts = Counter(value for part in keys for value in part)
        doubled = {value for value, count in counts.items() if count > 1}
        seen: dict[Any, tuple[str, str]] = {}
        for name, part in zip(names, keys):
            if doubled.isdisjoint(part):
                continue
            table = self._open_part(name, lambda file, size: file.read())
            for row in table.filter(pc.field(key).isin(list(doubled))).to_pylist():
                content = repr(sorted(row.items()))
                other, first = seen.setdefault(row[key], (name, content))
                if content != first:
                    raise ValueError(
                        f"{self.store.where()}: two rows have {key} {row[key]!r} and differ (in {other} and {name}); "
                        "an id must be made of all that determines its row"
                    )
        return len(counts)

    def _refuse_if_published(self) -> None:
        if self.published():
            raise ValueError(
                f"{self.store.where()} is published already and stays as it is: use another run, or delete it first"
            )

    def _not_published(self) -> StoreError:
        return StoreError(f"{self.store.where()} is not published: run the stage that makes it to its end")

    def _mend(self) -> str:
        return "Delete this stage (Store.delete_prefix) and run it again."


@dataclass(frozen=True)
class _Part:
    """What `publish` has to know of a part."""

    schema: pa.Schema
    keys: list[Any]
    num_bytes: int

    @classmethod
    def inspect(cls, stage: Stage, name: str, key: str) -> "_Part":
        """Read a part's schema and keys. Raises ValueError if the key is missing or null somewhere."""

        def load(file: pq.ParquetFile, size: int) -> "_Part":
            schema = file.schema_arrow
            return cls(schema, file.read([key])[key].to_pylist() if key in schema.names else [None], size)

        part = stage._open_part(name, load)
        if None in part.keys:
            raise ValueError(f"{stage.store.where(name)}: key {key!r} is no column, or null in a row")
        return part


def _take(table: pa.Table, rows: pa.Array) -> pa.Table:
    """Rows of a table in a given order. Unlike `Table.take` it bears columns of more than 2 GiB."""
    large = pa.schema([field.with_type(_LARGE.get(field.type, field.type)) for field in table.schema])
    whole = table.cast(large).combine_chunks()
    taken = [
        whole.take(rows.slice(start, _ROWS_TAKEN)).cast(table.schema) for start in range(0, len(rows), _ROWS_TAKEN)
    ]
    return pa.concat_tables(taken) if taken else table.slice(0, 0)
