"""YAML files of users: whatever is wrong with one is said in a short line, by every command that reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vce_ray.concepts.load import load_concept
from vce_ray.errors import UserError
from vce_ray.pipeline.fleet import read_fleet
from vce_ray.pipeline.preflight import open_run
from vce_ray.yaml_file import MAX_BYTES

LEVELS = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 9)]
BOMB = "\n".join(["l0: &l0 [lol, lol]", *LEVELS, "kind: *l8", "names: *l8", "concepts: *l8"])
"""A billion laughs: 2 * 10**8 words in ten lines."""


FAULTS = {
    "bomb": (BOMB.encode(), "aliases repeat values of more than 1024 kB"),
    "repeated text": (b"names: &n [" + b"x" * 2000 + b"]\nconcepts: [" + b"*n, " * 1000 + b"]", "aliases repeat"),
    "endless": (b"names: &n [*n]", "line 1, column 8: an alias in its own value"),
    "large": (b"#" * (MAX_BYTES + 1), "larger than 256 kB"),
    "deep": (b"names: " + b"[" * 50_000, "nested too deeply"),
    "Windows": ("names: [deer]".encode("utf-16"), "not UTF-8 text (invalid start byte at byte 0): save it as UTF-8"),
    "accent": (b"names: [\xe9tang]", "not UTF-8 text (invalid continuation byte at byte 8)"),
    "tab": (b"kind: object\n\tnames: [deer]", "line 2, column 1: found character '\\t'"),
    "twice": (b"names: [deer]\nkind: object\nnames: [cat]", "line 3, column 1: the key 'names' is given twice"),
    "twice below": (b"kind: object\ntrain: {steps: 1, steps: 2}", "line 2, column 19: the key 'steps' is given twice"),
    "open": (b"names: [deer\n", "line 2, column 1: expected ',' or ']'"),
    "two documents": (b"kind: object\n---\nkind: style", "line 2, column 1: but found another document"),
    "date": (b"names: [2024-13-01]", "month must be in 1..12: put quotes around the value"),
    "object": (b"names: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "control": (b"names: [\x00]", "special characters are not allowed"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_file_is_refused_in_a_short_line(name: str, tmp_path: Path) -> None:
    content, message = FAULTS[name]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    for read in (lambda: load_concept(str(path)), lambda: read_fleet([str(path)], {})):
        with pytest.raises(UserError) as error:
            read()
        assert message in str(error.value) and str(path) in str(error.value)
        assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_an_empty_file_is_no_concept(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for content in ("", "# names: [deer]\n", "---\n"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"mine\.yaml is empty: write 'key: value' lines"):
            load_concept(str(path))


def test_a_byte_order_mark_and_a_few_aliases_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("\ufeffkind: object\nnames: [owl]\nkeep: &k [cat, dog]\nlabels: [owl, cat, dog]\n", "utf-8")
    assert load_concept(str(path)).keep == ("cat", "dog")


@pytest.mark.parametrize(
    "text",
    [
        "kind: {long}",
        "kind: object\nnames: {long}",
        "kind: object\nnames: [{long}]",
        "kind: object\nnames: [owl]\nkeep: [{long}]",
        "kind: object\nnames: [owl]\nreplacement: owl {long}",
        "kind: object\nnames: [owl]\ntemplates: ['{long}']",
        "kind: object\nnames: [owl]\ntemplates: ['a {{name}} {{{long}}}']",
        "kind: object\nnames: [owl]\nkeep: [cat]\nslots: {{{long}: [a]}}",
        "kind: object\nnames: [owl]\nkeep: [cat]\nslots: {{{long}: [1]}}",
        "kind: object\nnames: [owl]\nkeep: [cat]\ntrain: {{{long}: 1}}",
        "kind: object\nnames: [owl]\nkeep: [cat]\ntrain: {{steps: {long}}}",
        "kind: object\nnames: [owl]\nlabels: [{long}]",
        "kind: object\nnames: [1{many}]",
        "{long}: 1",
        "concepts: [[{long}]]",
        "concepts: [deer]\nbase: {long}",
        "concepts: [deer]\ntrain: {{method: {long}}}",
        "concepts: [deer]\nseed: {long}",
        "concepts: [{long}]",
        "concepts: [{long}, {long}]",
    ],
)
def test_a_long_value_is_not_repeated_in_full(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text.format(long="q" * 10_000, many=", 1" * 10_000))
    with pytest.raises(UserError) as error:
        for settings in read_fleet([str(path)], {"store": str(tmp_path)}):
            open_run(settings)
    assert len(str(error.value)) < 1500
