"""Docs that repeat what the code declares, held to it."""

from __future__ import annotations

import re
from pathlib import Path

from vce_ray import env

ROOT = Path(__file__).parents[1]
EXAMPLES = {"sft.py", "brightness.py", "mini.py", "turtle.yaml"}
"""Files that docs/extending.md shows how to write."""
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "cluster/README.md"]


def test_every_environment_variable_is_documented() -> None:
    page = (ROOT / "docs/run.md").read_text()
    assert [variable.name for variable in env.VARIABLES if f"`{variable.name}`" not in page] == []


def test_links_and_paths_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        text = re.sub(r"^## \[0\.1\.0\].*|^### Moved.*?(?=^## )", "", page.read_text(), flags=re.S | re.M)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in link and not (page.parent / link).exists():
                broken.append(f"{page.name}: {link}")
        for path in re.findall(r"`((?:vce_ray|docs|tests|jobs|cluster|benchmarks|tools)/[\w/.-]+)`", text):
            planned = re.search(rf"`{re.escape(path)}`[^\n|]*\(planned\)", text)
            if not planned and Path(path).name not in EXAMPLES and not (ROOT / path).exists():
                broken.append(f"{page.name}: {path}")
    assert not broken, broken
