"""Find and check a judge that is a CLIP in open_clip's format, given as base models are. Imports no torch.

judges.py knows who judges a run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from vce_ray.config import EMBEDDED
from vce_ray.errors import UserError
from vce_ray.models.check import TOKENIZERS, check_lfs, check_space, check_tokenizer, list_files
from vce_ray.models.folder import BASE, CONFIG, Kind, NoConfig, files_revision, model_config, model_folder
from vce_ray.models.words import WORDS

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""Files of which a judge needs one: its weights, in the order in which open_clip looks for them."""
_TOKENIZER = (*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "merges.txt", CONFIG)
_SMALL = ("open_clip_config.json", *_TOKENIZER, WORDS)
"""Files of a judge besides its weights. Some tokenizers' class is found by the config.json of transformers' format."""
_EMBEDDED_FOLDER = Path(__file__).parents[1] / "models" / "emoji_world" / "judge"
_FORMAT = "a CLIP in open_clip's format, such as laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
JUDGE = Kind("judge", _SMALL[0], _FORMAT, (*_SMALL, *WEIGHTS[:2]), _EMBEDDED_FOLDER)
_PICKLED = replace(JUDGE, patterns=(*_SMALL, WEIGHTS[2]))
_ANY = replace(JUDGE, patterns=(*_SMALL, *WEIGHTS))


def check_judge(ref: str) -> str:
    """Check that a judge is a CLIP in open_clip's format, complete, and fits on the disk.

    Returns:
        In a few words, where the judge is.

    Raises:
        UserError: it is not.
        StoreError: the object store cannot be reached.
    """
    try:
        config = model_config(ref, JUDGE)
    except NoConfig as error:
        raise _in_another_format(ref) or error from error
    model = config.get("model_cfg")
    if not isinstance(model, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys():
        raise UserError(f"{JUDGE.config} of {ref} does not describe a CLIP", f"give {_FORMAT}")
    files = list_files(ref, _ANY)
    weights = weights_file(files.sizes)
    if weights is None:
        raise files.fault(f"has no weights ({' or '.join(WEIGHTS[::2])})")
    check_lfs(files)
    if needs_tokenizer(config):
        check_tokenizer(files)
    return check_space(files, [weights, *(name for name in files.sizes if name in _SMALL)])


def _in_another_format(ref: str) -> UserError | None:
    """Return the error for a judge that is a model in transformers' format; None if it is not."""
    try:
        model_config(ref, BASE)
    except NoConfig:
        return None
    return UserError(f"judge {ref!r} is in transformers' format", f"give {_FORMAT}")


def judge_folder(ref: str = EMBEDDED) -> Path:
    """Return the local folder of a judge, by default the embedded one, downloading it on first use.

    Raises:
        UserError: there is no such judge, or it has no weights.
        StoreError: the object store cannot be reached.
    """
    for kind in (JUDGE, _PICKLED):  # pickled weights are fetched only where there are no others
        folder = model_folder(ref, kind)
        if weights_file({path.name for path in folder.iterdir()}):
            return folder
    raise UserError(f"judge {ref!r} has no weights ({' or '.join(WEIGHTS[::2])})", f"give {_FORMAT}")


def weights_file(names: Collection[str]) -> str | None:
    """Return the name of the file that open_clip loads the weights from; None if a folder has none."""
    return next((name for name in WEIGHTS if name in names), None)


def needs_tokenizer(config: Mapping[str, Any]) -> bool:
    """Return whether a judge comes with a tokenizer of its own; others use the one in open_clip."""
    text = config["model_cfg"]["text_cfg"]
    return isinstance(text, dict) and bool(text.get("hf_tokenizer_name"))


def judge_revision(ref: str) -> str:
    """Return the revision of a judge: a hash of its config, weights and tokenizer."""
    folder = judge_folder(ref)
    names = {path.name for path in folder.iterdir()}
    used = [folder / name for name in sorted(names.intersection((*_SMALL, weights_file(names) or "")))]
    return _revision(folder, tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in used))


@cache
def _revision(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash files once, as long as their sizes and times are the same: the runs of a fleet have one judge."""
    return files_revision(folder, [path for path, _, _ in files])


def judge_name(ref: str) -> str:
    """Return the name of a judge as reports and cards show it: of a folder or bucket the last part alone."""
    if ref == EMBEDDED:
        return "the CLIP model that ships with vce_ray"
    name, _, revision = ref.partition("?")[0].partition("@")
    if "://" in name or name.count("/") != 1 or name.startswith("."):
        name = Path(name).name
    return f"{name} at revision {revision}" if revision else name
