"""Check that a model can be used before anything loads it: by its config and a list of its files, not its weights.

Runs are checked with these functions before they start (pipeline/preflight.py), and `vce-ray doctor` calls the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vce_ray.env import MODEL_CACHE
from vce_ray.errors import UserError
from vce_ray.models.checkpoint import check_headers, first
from vce_ray.models.families import Family, family_of
from vce_ray.models.folder import (
    BASE,
    LARGE_SUFFIXES,
    LFS_POINTER,
    LFS_POINTER_BYTES,
    Kind,
    lfs_error,
    local_folder,
    model_folder,
    source_of,
)
from vce_ray.models.hub import download_command, hub_cache, hub_files, hub_text
from vce_ray.models.stored import free_space, no_space, stored_files
from vce_ray.models.template import FILES, chat_template

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files of which a judge needs one, for its tokenizer."""
OTHER_FORMATS = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
"""Ends of the names of weights that are not used."""
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
INDEX = ".safetensors.index.json"
"""End of the name of the file that says which shard has which weight."""


@dataclass(frozen=True)
class Listing:
    """The files of a model, wherever it is."""

    ref: str
    kind: Kind
    sizes: Mapping[str, int]
    """Bytes of each file, by its path in the model's folder."""
    here: Collection[str]
    """Those that are on this machine."""
    cache: Path
    """Where the others will be downloaded to."""
    read: Callable[[str], bytes]
    """Returns the content of a file; meant for small ones."""

    def fault(self, found: str, fix: str = "") -> UserError:
        """Return the error for a model that lacks a file, by default with the fix that suits where the model is."""
        if fix:
            return UserError(f"{self.kind.role} {self.ref!r} {found}", fix)
        match source_of(self.ref, self.kind):
            case "hub" if len(self.here) == len(self.sizes):  # of the cache, which may hold a part of the model
                fix = f"{download_command(self.ref)}, or give {self.kind.format}"
            case "hub":
                fix = f"give {self.kind.format}"
            case "store":
                fix = f"upload the whole folder again, or give {self.kind.format}"
            case _:
                fix = f"copy or download the whole folder again, or give {self.kind.format}"
        return UserError(f"{self.kind.role} {self.ref!r} {found}", fix)


def list_files(ref: str, kind: Kind = BASE) -> Listing:
    """List the files of a model without downloading it.

    Raises:
        UserError: there is no such model, or it cannot be reached.
        StoreError: the object store cannot be reached.
    """
    match source_of(ref, kind):
        case "hub":
            files = hub_files(ref, kind.patterns)
            sizes = {name: file.size for name, file in files.items()}
            here = {name for name, file in files.items() if file.cached}
            return Listing(ref, kind, sizes, here, hub_cache(), lambda name: (hub_text(ref, name) or "").encode())
        case "store":
            store, sizes, copy = stored_files(ref)
            return Listing(ref, kind, sizes, sizes if copy.exists() else (), copy, store.read_bytes)
        case _:
            return list_folder(model_folder(ref, kind), ref, kind)


def list_folder(folder: Path, ref: str, kind: Kind = BASE) -> Listing:
    """List the files of a local folder."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return Listing(ref, kind, sizes, sizes, folder, lambda name: (folder / name).read_bytes())


def check_base(ref: str) -> str:
    """Check that a base model, or a captioner that is one, is complete and fits on the disk.

    Returns:
        In a few words, where the model is.

    Raises:
        UserError: it is unknown, out of reach, of an unknown family, incomplete, or too large for the disk.
        StoreError: the object store cannot be reached.
    """
    family, files = family_of(ref), list_files(ref)
    check_files(files, family)
    if folder := local_folder(ref):
        check_headers(folder)
    return f"{family.name}, {check_space(files, files.sizes)}"


def check_folder(folder: Path, ref: str) -> Family:
    """Check that the local copy of a base model is complete, and return its family. Raises UserError."""
    family = family_of(str(folder))
    check_files(list_folder(folder, ref), family)
    check_headers(folder)
    return family


def check_files(files: Listing, family: Family) -> None:
    """Check that a base model has all its weights and what else its family needs. Raises UserError."""
    check_weights(files)
    for names in family.files:
        if not any(name in files.sizes for name in names):
            raise files.fault(f"has no {' or '.join(names)}")
    if family.chats:

        def read(name: str) -> str | None:
            return files.read(name).decode(errors="replace") if name in files.sizes else None

        if chat_template(read) is None:
            raise files.fault(f"has no chat template ({FILES[0]})")


def check_weights(files: Listing) -> None:
    """Check that a model has weights, all shards of them, and that no file is a Git LFS pointer. Raises UserError."""
    shards = [name for name in files.sizes if name.endswith(".safetensors")]
    if not shards:
        found = sorted(name for name in files.sizes if name.endswith(OTHER_FORMATS))
        fix = "convert them with transformers, from_pretrained(folder) and save_pretrained(folder)" if found else ""
        if any(name.endswith(".gguf") for name in found):
            fix = "GGUF files are quantized; give the checkpoint that they were made from"
        raise files.fault("has no weights in *.safetensors" + (f", only {first(found)}" if found else ""), fix)
    check_lfs(files)
    if missing := missing_files(files):
        raise files.fault(f"lacks {first(missing)} of the files that its index lists")
    if lone := [name for name in shards if _SHARD.search(name) and not any(map(_is_index, files.sizes))]:
        raise files.fault(f"has {lone[0]}, but no *{INDEX}, which lists its other files")


def _is_index(name: str) -> bool:
    return name.endswith(INDEX)


def check_lfs(files: Listing) -> None:
    """Raise UserError if a large file of a model is a Git LFS pointer. The hub itself never serves one."""
    if source_of(files.ref, files.kind) == "hub":
        return
    small = [name for name, size in files.sizes.items() if name.endswith(LARGE_SUFFIXES) and size <= LFS_POINTER_BYTES]
    if pointers := [name for name in small if files.read(name).startswith(LFS_POINTER)]:
        raise lfs_error(files.ref, pointers)


def check_tokenizer(files: Listing) -> None:
    """Raise UserError if a model has no tokenizer."""
    if not any(PurePosixPath(name).name in TOKENIZERS for name in files.sizes):
        raise files.fault(f"has no tokenizer ({', '.join(TOKENIZERS[:2])}, ...)")


def missing_files(files: Listing) -> list[str]:
    """Return the shards that an index of a model's weights lists and that its folder does not have.

    Raises:
        UserError: an index is not one.
    """
    missing = []
    for index in filter(_is_index, files.sizes):
        try:
            shards = set(json.loads(files.read(index))["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise files.fault(f"has a damaged {index}") from error
        folder = PurePosixPath(index).parent
        missing += sorted({(folder / shard).as_posix() for shard in shards} - files.sizes.keys())
    return missing


def check_space(files: Listing, needed: Collection[str]) -> str:
    """Check that the files of a model that this machine lacks fit on its disk.

    Args:
        needed: names of the files to be downloaded.

    Returns:
        Where the files are, or what has to be downloaded.

    Raises:
        UserError: they do not fit.
    """
    download = sum(files.sizes[name] for name in needed if name not in files.here)
    if not download:
        return f"in {files.cache}"
    if download > (free := free_space(files.cache)):
        variable = "HF_HOME" if source_of(files.ref, files.kind) == "hub" else MODEL_CACHE.name
        raise no_space(files.ref, download, files.cache, variable)
    return f"{download / 1e9:.2f} GB to download, {free / 1e9:.2f} GB free on the disk of {files.cache}"
