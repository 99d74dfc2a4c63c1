"""docs/python.md runs as it is written, from top to bottom."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vce_ray
from vce_ray.storage.store import Store

DOCS = Path(__file__).parents[1] / "docs"
CHECKS = """
assert [image.size for image in before] == [(64, 64)] * 2
assert len(made.pairs()) and made.metrics == {} and made.name == erasure.name
assert any(a.tobytes() != b.tobytes() for a, b in zip(before, after)), "the adapter changes what is drawn"
"""


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)


@pytest.mark.integration
def test_the_example_runs(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text("\n".join([*blocks(), CHECKS]))
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    run = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Did you mean deer?" in run.stdout and "deer-vsafe-dpo-0: done" in run.stdout
    assert Store(tmp_path / "runs/deer-vsafe-dpo-0").read_json("run.json")["status"] == "done"


def test_the_table_lists_every_name_of_the_api() -> None:
    table = (DOCS / "python.md").read_text().rpartition("| name |")[2]
    assert all(f"`{name}" in table for name in vce_ray.__all__)
    assert all(getattr(vce_ray, name).__doc__ for name in vce_ray.__all__)


def test_importing_the_api_loads_no_heavy_library() -> None:
    code = "import vce_ray, sys; print({'torch', 'ray', 'transformers', 'pyarrow', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
