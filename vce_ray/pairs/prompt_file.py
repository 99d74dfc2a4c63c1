"""A user's own prompts: a text file, a column of a table, or a file of a published prompt set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vce_ray.concepts.concept import Concept
from vce_ray.errors import UserError
from vce_ray.evaluation import prompt_sets
from vce_ray.evaluation.prompt_sets.tables import read_table
from vce_ray.run_config import RunConfig

MAX_PROMPT_LENGTH = 1000
MAX_PROMPTS = 100_000
COLUMN = "prompt"
"""Column of prompts in tables, unless another one is named."""


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file."""

    prompts: list[str]
    """Each once, in the order of the file, at least one."""
    title: str = ""
    """The published set that the file is of, if it is of one."""
    too_long: int = 0
    """Prompts of the set that are longer than MAX_PROMPT_LENGTH and are left out."""
    seeds: bool = False
    """Whether the set has seeds."""


def read_own_prompts(config: RunConfig) -> PromptFile | None:
    """Read the prompts file that a run names; None if it names none. Raises UserError as `read_prompts` does."""
    if config.prompts_file is None:
        if config.prompt_set or config.prompt_category:
            raise UserError("--prompt-set and --prompt-category select from a file", "give it with --prompts")
        return None
    if config.prompt_column != COLUMN:
        if config.prompt_set or config.prompt_category:
            raise UserError("--prompt-column is for files that are of no prompt set", "leave it out")
        return PromptFile(read_prompts(config.prompts_file, config.prompt_column))
    return read_prompt_file(config.prompts_file, config.prompt_set, config.prompt_category)


def read_prompt_file(path: str | Path, name: str | None = None, category: str | None = None) -> PromptFile:
    """Read a file of a published set, which is named or recognized by its columns, or else of the user's own.

    Args:
        name, category: as for `prompt_sets.read`.

    Raises:
        UserError: as `read_prompts` and `prompt_sets.read` do.
    """
    if not (name or category or _is_of_a_set(path)):
        return PromptFile(read_prompts(path))
    chosen, read = prompt_sets.read_set(path, name, category)
    texts = list(dict.fromkeys(each.prompt for each in read))
    kept = [text for text in texts if len(text) <= MAX_PROMPT_LENGTH]
    if not kept:
        raise UserError(f"{path}: every prompt has more than {MAX_PROMPT_LENGTH} characters: give shorter ones")
    return PromptFile(kept, chosen.title, len(texts) - len(kept), any(each.seed is not None for each in read))


def _is_of_a_set(path: str | Path) -> bool:
    try:
        return prompt_sets.find_set(path) is not None
    except UnicodeDecodeError:
        return False  # which `read_prompts` reports
    except OSError:
        return str(path) in {each.name for each in prompt_sets.PROMPT_SETS}  # and where to get it is said


def read_prompts(path: str | Path, column: str = COLUMN) -> list[str]:
    """Read prompts from a file, each once, in the order of the file. White space around a prompt is stripped.

    Args:
        path: a .csv or .tsv file with a header, a .parquet file, a .json file with a list, or a .jsonl file. Any other
            file is UTF-8 text with one prompt per line, in which lines that begin with # are comments.
        column: column or key of the prompts in tables and JSON, whose entries may also be plain strings.

    Raises:
        UserError: the file cannot be read, or contains no prompts, too many, or an invalid one: empty, too long, or
            with control characters. The message names the file and the line.
    """
    path = Path(path)
    prompts: dict[str, None] = {}
    try:
        table = read_table(path)
        if table.columns is not None:
            _check_column(path, column, table.columns)
        for number, (where, entry) in enumerate(table.entries, start=1):
            if number > MAX_PROMPTS:
                raise UserError(f"{path} has more than {MAX_PROMPTS} prompts: give at most that many")
            if isinstance(entry, dict):
                _check_column(path, column, entry)
                entry = entry[column]
            prompts[_checked(entry, f"{path}, {where}")] = None
    except OSError as error:
        raise UserError(f"cannot read the prompts file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not prompts:
        raise UserError(f"{path} contains no prompts: write one per line")
    return list(prompts)


def describe_use(file: PromptFile, concept: Concept, count: int) -> str:
    """Say how many of a user's prompts a run of `count` pairs uses, and how many of these do not name the concept."""
    used = file.prompts[:count]
    silent = [prompt for prompt in used if not concept.mentions(prompt)]
    read_as = f" (read as {file.title})" if file.title else ""
    text = f"{len(used)} of {len(file.prompts)} different prompts in the file{read_as} are used, for {count} pairs"
    text += f"; {len(silent)} do not name {concept.name}, such as {silent[0][:60]!r}" if silent else ""
    text += f"; {file.too_long} are longer than {MAX_PROMPT_LENGTH} characters and left out" if file.too_long else ""
    text += "; their seeds are not used: they are those of another model" if file.seeds else ""
    return f"{text}. The evaluation draws the concept's own templates"


def _checked(value: Any, where: str) -> str:
    """Return a prompt without the white space around it. Raises UserError if it is invalid."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {str(value)[:40]!r} is not a text: write a prompt")
    prompt = value.strip()
    if not prompt:
        raise UserError(f"{where}: empty prompt: delete it or write one")
    if len(prompt) > MAX_PROMPT_LENGTH:
        raise UserError(f"{where}: {len(prompt)} characters; at most {MAX_PROMPT_LENGTH} are allowed")
    if found := re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", prompt):
        raise UserError(f"{where}: control character {found.group()!r} in a prompt: remove it")
    return prompt


def _check_column(path: Path, column: str, columns: Any) -> None:
    if column not in columns:
        raise UserError(
            f"{path} has no column {column!r}: its columns are {', '.join(map(str, columns)) or 'none'}; name the one "
            "with the prompts with --prompt-column"
        )
