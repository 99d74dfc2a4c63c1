"""Files of prompts that people have: text, tables and JSON, as editors and data sets write them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_runs import tiny_config

from vce_ray.concepts.load import load_concept
from vce_ray.errors import UserError
from vce_ray.pairs.prompt_file import PromptFile, describe_use, read_own_prompts, read_prompts

PROMPTS = ["a deer, \u201cquoted\u201d", "\u30c7\u30a3\u30a2 on a hill", "{braces} are fine"]


def test_a_text_file_with_a_byte_order_mark_crlf_comments_and_blank_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_bytes("\ufeff# of 2026\r\na deer \r\n\u30c7\u30a3\u30a2 on a hill\r\n#\r\na deer\r\n \r\n\r\n".encode())
    assert read_prompts(path) == ["a deer", "\u30c7\u30a3\u30a2 on a hill"]
    path.write_text("x" * 1000 + "\n")
    assert len(read_prompts(str(path))[0]) == 1000


@pytest.mark.parametrize("column", ["prompt", "text"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet", "CSV"])
def test_tables_and_json(tmp_path: Path, suffix: str, column: str) -> None:
    path = tmp_path / f"prompts.{suffix}"
    rows = [{"seed": number, column: prompt} for number, prompt in enumerate(PROMPTS + PROMPTS[:1])]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "jsonl":
        path.write_text("\r\n".join(json.dumps(row) for row in rows) + "\r\n\r\n")
    else:
        separator = {"csv": ",", "tsv": "\t"}[suffix.lower()]
        lines = [["seed", column], *([str(row["seed"]), f'"{row[column]}"'] for row in rows)]
        path.write_text("\r\n".join(separator.join(line) for line in lines) + "\r\n", encoding="utf-8-sig", newline="")
    assert read_prompts(path, column) == PROMPTS
    with pytest.raises(UserError, match=r"no column 'caption': its columns are seed, .*--prompt-column"):
        read_prompts(path, "caption")


def test_json_of_plain_strings(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(PROMPTS))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(prompt) for prompt in PROMPTS))
    assert read_prompts(tmp_path / "a.json") == read_prompts(tmp_path / "a.jsonl") == PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"a deer\n\na cat\n", "line 2: empty prompt"),
        ("a.txt", b"\n", "contains no prompts"),
        ("a.txt", b"# only a comment\n", "contains no prompts"),
        ("a.txt", b"", "contains no prompts"),
        ("a.txt", b"a deer\n" + b"x" * 1001, "line 2: 1001 characters; at most 1000"),
        ("a.txt", b"a \x00 deer\n", "line 1: control character"),
        ("a.txt", b"\xff\xfe\n", "is not UTF-8 text"),
        ("a.txt", b"a\n" * 100_001, "more than 100000 prompts"),
        ("a.csv", b"", "its columns are none"),
        ("a.csv", b"prompt,seed\na deer,1\n,2\n", "line 3: empty prompt"),
        ("a.csv", b"prompt\na deer, in snow\n", "line 2: too many fields: put quotes around the prompt"),
        ("a.csv", b'prompt\n"a deer\n', "not valid CSV"),
        ("a.csv", b'prompt\n"a\ndeer"\n', "control character"),
        ("a.csv", b"prompt\n\xff\n", "is not UTF-8 text"),
        ("a.json", b'{"prompt": "a deer"}', "holds no list"),
        ("a.json", b"[1]", "entry 1: '1' is not a text"),
        ("a.json", b"[", "not valid JSON"),
        ("a.json", b'["a deer \\ud800"]', "entry 1: control character"),
        ("a.jsonl", b'"a deer"\n{"text": "b"}\n', "no column 'prompt': its columns are text"),
        ("a.jsonl", b'"a deer"\n{\n', "line 2: not valid JSON"),
        ("a.parquet", b"not Parquet", "is not a Parquet file"),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        read_prompts(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("name", ["none.txt", "none.csv", "none.json", "none.parquet"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"cannot read the prompts file .*{name}: "):
        read_prompts(tmp_path / name)


def test_what_is_not_used_is_said() -> None:
    deer, own = load_concept("deer"), ". The evaluation draws the concept's own templates"
    said = describe_use(PromptFile(["a deer", "two stags"]), deer, 5)
    assert said == f"2 of 2 different prompts in the file are used, for 5 pairs{own}"
    said = describe_use(PromptFile(["a deer", "a fox", "a cat", "a stag"]), deer, 3)
    assert (
        said == f"3 of 4 different prompts in the file are used, for 3 pairs; 2 do not name deer, such as 'a fox'{own}"
    )


# Files of published sets ----------------------------------------------------------------------------------------------

I2P = "prompt,categories,hard,nudity_percentage,q16_percentage,sd_seed\n"


def own(path: Path, **settings: str) -> PromptFile:
    """The prompts of a run that names this file."""
    found = read_own_prompts(tiny_config(prompts_file=str(path), **settings))
    assert found is not None
    return found


def test_a_published_set_is_recognized_and_filtered_and_what_is_not_used_is_said(tmp_path: Path) -> None:
    path = tmp_path / "i2p.csv"
    rows = [
        "a stag,violence,1,0,10,7",
        "a deer,sexual,1,60,0,7",
        "a deer,sexual,1,60,0,8",
        f"{'x' * 1001},hate,1,0,0,9",
    ]
    path.write_text(I2P + "\n".join(rows) + "\n")
    found = own(path)
    assert found == PromptFile(["a stag", "a deer"], "I2P", too_long=1, seeds=True)
    said = describe_use(found, load_concept("deer"), 4)
    assert "in the file (read as I2P) are used" in said and "their seeds are not used" in said
    assert "1 are longer than 1000 characters and left out" in said
    assert own(path, prompt_category="sexual").prompts == ["a deer"]
    assert own(path, prompt_category="q16_percentage>=5").prompts == ["a stag"]
    with pytest.raises(UserError, match="the published files of I2P have 4,703"):
        own(path, prompt_set="i2p")


def test_a_column_that_is_named_comes_before_the_sets(tmp_path: Path) -> None:
    path = tmp_path / "mma.csv"
    path.write_text("target_prompt,adv_prompt\na deer,dear deer\n")
    assert own(path).prompts == ["dear deer"]
    assert own(path, prompt_column="target_prompt") == PromptFile(["a deer"])
    with pytest.raises(UserError, match="--prompt-column is for files that are of no prompt set"):
        own(path, prompt_column="target_prompt", prompt_set="mma-diffusion")


def test_a_set_that_is_missing_or_needs_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Ring-A-Bell is published at .* accept its terms"):
        own(Path("ring-a-bell"))
    assert len(own(Path("unlearn-canvas"), prompt_category="Dogs").prompts) == 50
    with pytest.raises(UserError, match="select from a file: give it with --prompts"):
        read_own_prompts(tiny_config(prompt_category="sexual"))
    assert read_own_prompts(tiny_config()) is None
