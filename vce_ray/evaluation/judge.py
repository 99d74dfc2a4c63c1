"""Find and check the judge: a CLIP in open_clip's format, given as base models are. Reads no weights, imports no torch.

A judge that changed in the course of a run would judge the images before and after by two standards. So a run records
its judge's revision together with the prompts of its evaluation, and refuses any other (`check_judge_of`).
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from vce_ray.config import EMBEDDED
from vce_ray.dataflow.task import Task
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
STAMP = "judge_revision"
"""Fact of an evaluation: the revision of its judge."""


def judge_ref(base: str, judge: str | None) -> str:
    """Return the reference of the judge: `judge`, or the one that ships with the embedded model.

    Raises:
        UserError: the base is not the embedded one and no judge is given.
    """
    if judge is None and base != EMBEDDED:
        raise UserError(f"base model {base!r} has no judge", f"give one with --judge, {_FORMAT}")
    return judge or EMBEDDED


def check_judge(base: str, judge: str | None) -> str:
    """Check that the judge is a CLIP in open_clip's format, complete, and fits on the disk.

    Returns:
        In a few words, where the judge is.

    Raises:
        UserError: it is not.
        StoreError: the object store cannot be reached.
    """
    ref = judge_ref(base, judge)
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


def judge_folder(base: str = EMBEDDED, judge: str | None = None) -> Path:
    """Return the local folder of the judge, downloading it on first use.

    Raises:
        UserError: there is no such judge, or it has no weights.
        StoreError: the object store cannot be reached.
    """
    ref = judge_ref(base, judge)
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


def judge_stamp(base: str, judge: str | None) -> dict[str, str]:
    """Return the fact that a run records of its judge: a hash of its config, weights and tokenizer."""
    folder = judge_folder(base, judge)
    names = {path.name for path in folder.iterdir()}
    used = [folder / name for name in sorted(names.intersection((*_SMALL, weights_file(names) or "")))]
    return {STAMP: _revision(folder, tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in used))}


@cache
def _revision(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash files once, as long as their sizes and times are the same: the runs of a fleet have one judge."""
    return files_revision(folder, [path for path, _, _ in files])


def check_judge_of(task: Task) -> None:
    """Check that the judge on this machine is the one that a run began with.

    A run that has not begun has none to compare it with, nor has one that version 0.1 began.

    Raises:
        UserError: it is another one; the message names both.
        StoreError: the store cannot be reached.
    """
    manifest = task.store.stage("evaluation/prompts").manifest()
    began_with = manifest["facts"].get(STAMP) if manifest else None
    if began_with is None:
        return
    base, judge = task.config.base, task.config.evaluation.judge
    if began_with != (revision := judge_stamp(base, judge)[STAMP]):
        raise UserError(
            f"run {task.name} began with judge revision {began_with}, {judge_ref(base, judge)} on {platform.node()} is "
            f"{revision}",
            "give the judge that the run began with (pin one on the hub with @revision), or another --name",
        )
