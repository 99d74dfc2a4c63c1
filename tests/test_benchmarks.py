"""The bars of the benchmark of erasures: met or missed, and never met by what was not measured."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.emoji_world import BARS, CONCEPTS, SEEDS, bars_table

ROOT = Path(__file__).parents[1]


def rows(**changes: float | None) -> list[dict[str, Any]]:
    """Rows that meet every bar exactly; `changes` are those of violence with the last seed."""
    found = [
        {"concept": concept, "method": "vsafe_dpo", "seed": seed} | {name: bar for name, (_, bar) in BARS.items()}
        for concept, seed in product(CONCEPTS, SEEDS)
    ]
    found[-1] |= changes
    return found


def test_all_bars_are_met() -> None:
    table, met = bars_table(rows())
    lines = table.splitlines()
    assert met and len(lines) == 2 + 9 and all(line.endswith("| met |") for line in lines[2:])
    assert "seen after, at most 3.0%" in lines[0] and "asked style, at most 5.0 points lost" in lines[0]
    deer, openmoji = lines[2].split(" | "), lines[5].split(" | ")
    assert deer[2] == "3.0% met" and deer[5] == "\u22125.0 points met" and deer[7] == "", "deer is no slot of deer"
    assert openmoji[5] == "" and openmoji[7] == "\u22125.0 points met", (
        "prompts for a style name an object, and no style"
    )


def test_a_row_misses_a_bar_or_was_not_measured() -> None:
    table, met = bars_table(rows(unclear_after=0.11))
    assert not met and table.splitlines()[-1].endswith("11.0% missed | missed |")
    for lacking in (rows(unclear_after=None), rows(asked_style_drop=None)):
        table, met = bars_table(lacking)
        assert not met and table.splitlines()[-1].endswith("| not measured |")
    assert not bars_table(rows()[:-1])[1] and not bars_table([])[1]
    others = [row | {"method": "dpo", "seen_after": 0.9} for row in rows()]
    assert bars_table(rows() + others)[1], "the bars are those of VSafe-DPO"


def test_a_command_says_whether_the_bars_are_met(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for found, code in ((rows(), 0), (rows(seen_after=0.04), 1)):
        path.write_text(json.dumps(found))
        command = [sys.executable, "-m", "benchmarks.emoji_world", "--bars", "--out", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == code and done.stdout.strip() == bars_table(found)[0]
