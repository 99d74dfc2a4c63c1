"""Files of prompt sets in their published columns, filled with harmless made-up rows."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vce_ray.errors import UserError
from vce_ray.evaluation.prompt_sets import PROMPT_SETS, SetPrompt, find_set, read, read_set
from vce_ray.evaluation.prompt_sets.unlearn_canvas import OBJECTS, STYLES

I2P_COLUMNS = (
    "prompt", "categories", "hard", "inappropriate_percentage", "nudity_percentage", "q16_percentage",
    "sd_safety_percentage", "prompt_toxicity", "lexica_url", "sd_seed", "sd_guidance_scale", "sd_image_width",
    "sd_image_height", "sd_model",
)  # fmt: skip
OF_ESD = ("", *(column.replace("sd_seed", "evaluation_seed") for column in I2P_COLUMNS), "case_number")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "i2p": I2P_COLUMNS,
    "unisafe": (
        "id", "category", "subcategory", "unsafe_trigger", "target", "scenario_type", "instruction", "input_image",
        "input_image_b", "turns",
    ),
    "ecgvf": ("original_prompt", "modified_prompt", "concept", "replaced"),
    "mma-diffusion": ("target_prompt", "adv_prompt", "clean_prompt"),
    "mace": ("", "type", "artist", "prompt", "evaluation_seed"),
    "coco": ("case_number", "source", "prompt", "evaluation_seed", "coco_id"),
    "six-cd": ("case_number", "evaluation_seed", "prompt"),
    "unlearn-diff-atk": ("case_number", "prompt", "evaluation_seed", "evaluation_guidance"),
    "ring-a-bell": ("prompt", "case_number", "evaluation_seed"),
    "coco-annotations": ("image_id", "id", "caption"),
}  # fmt: skip
"""The header of a published file of each set."""


def write(path: Path, columns: tuple[str, ...], *rows: dict[str, Any]) -> Path:
    """Write a CSV file as pandas does; a column that a row lacks is filled with a number."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([row.get(column, number) for column in columns] for number, row in enumerate(rows))
    path.write_text(text.getvalue())
    return path


def i2p(path: Path, columns: tuple[str, ...] = I2P_COLUMNS) -> Path:
    seeds = {"sd_seed": 4063862389, "evaluation_seed": 4063862389, "sd_guidance_scale": "7.5"}
    return write(
        path,
        columns,
        {"prompt": "a red barn ", "categories": "shocking", "nudity_percentage": "10.0"} | seeds,
        {"prompt": "two bathers, oil", "categories": "shocking, sexual", "nudity_percentage": "50.0"} | seeds,
        {"prompt": "a diver", "categories": "sexual", "nudity_percentage": 80} | seeds,
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_is_recognized_by_the_columns_that_its_authors_gave_it(name: str, tmp_path: Path) -> None:
    texts = dict.fromkeys(("prompt", "instruction", "original_prompt", "adv_prompt", "caption"), "a hill")
    path = write(tmp_path / "file.csv", LAYOUTS[name], texts | {"scenario_type": "TI", "category": "x"})
    found = find_set(path)
    assert found is not None and found.name == name == read_set(path)[0].name
    assert [prompt.prompt for prompt in read(path)] == ["a hill"]
    assert set(LAYOUTS) == {each.name for each in PROMPT_SETS} - {"unlearn-canvas"}


@pytest.mark.parametrize("columns", [I2P_COLUMNS, OF_ESD])
def test_i2p_keeps_seeds_and_selects_by_category_and_by_share_of_nude_images(
    columns: tuple[str, ...], tmp_path: Path
) -> None:
    path = i2p(tmp_path / "unsafe-prompts4703.csv", columns)
    assert read(path)[0] == SetPrompt("a red barn", 4063862389, 7.5, ("shocking",))
    assert [each.prompt for each in read(path, category="Sexual")] == ["two bathers, oil", "a diver"]
    assert [each.prompt for each in read(path, category="nudity_percentage>=50")] == ["two bathers, oil", "a diver"]
    assert [each.prompt for each in read(path, category="nudity_percentage >= 50.5")] == ["a diver"]
    with pytest.raises(UserError, match=r"category 'violence': .* has shocking \(2\), sexual \(2\)"):
        read(path, category="violence")
    with pytest.raises(UserError, match="has no column 'nudity' among"):
        read(path, category="nudity>=50")
    with pytest.raises(UserError, match=r"no prompt of .* has that much"):
        read(path, category="nudity_percentage>=99")
    with pytest.raises(UserError, match=r"'shocking' in .* is no number"):
        read(path, category="categories>=1")


def test_a_named_set_must_have_its_columns_and_its_size(tmp_path: Path) -> None:
    path = i2p(tmp_path / "i2p.csv")
    with pytest.raises(UserError, match=r"has 3 rows; the published files of I2P have 4,703: give a whole file"):
        read(path, "i2p")
    with pytest.raises(UserError, match="is no file of MACE: it has no column 'type'"):
        read(path, "mace")
    rows = [{"prompt": f"hill {number}", "categories": "", "nudity_percentage": 0} for number in range(4703)]
    assert len(read(write(path, I2P_COLUMNS, *rows), "i2p")) == 4703
    nudity = write(tmp_path / "nudity.csv", OF_ESD, *rows[:142])
    assert len(read(nudity, "unlearn-diff-atk")) == 142
    with pytest.raises(UserError, match="unknown prompt set 'p2i': give one of i2p, unisafe"):
        read(path, "p2i")


@pytest.mark.parametrize(
    ("path", "name", "told"),
    [
        ("ring-a-bell", None, "https://huggingface.co/datasets/Chia15/RingABell-Nudity: sign in, accept its terms"),
        ("absent.csv", "mma-diffusion", "huggingface.co/datasets/YijunYang280/MMA-Diffusion.*accept its terms"),
        ("unisafe", "unisafe", "huggingface.co/datasets/segyulee/UniSAFE.*accept its terms"),
        ("i2p", None, "huggingface.co/datasets/AIML-TUDA/i2p: download"),
    ],
)
def test_of_a_file_that_is_not_there_it_is_said_where_to_get_it(path: str, name: str | None, told: str) -> None:
    with pytest.raises(UserError, match=rf"cannot read the prompts file {path}: No such file.*{told}") as caught:
        read(path, name)
    assert "\n" not in str(caught.value)


def test_a_file_of_no_set_is_refused_with_its_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "own.csv", ("id", "concept"), {"concept": "tench"})
    assert find_set(path) is None
    with pytest.raises(UserError, match="of no known prompt set: its columns are id, concept: known are i2p, "):
        read(path)
    (tmp_path / "lines.txt").write_text("a hill\n")
    with pytest.raises(UserError, match="its columns are none"):
        read(tmp_path / "lines.txt")


def test_coco_as_a_table_and_as_annotations(tmp_path: Path) -> None:
    table = write(
        tmp_path / "coco_30k.csv",
        LAYOUTS["coco"],
        {"prompt": "A dog on a stool\n", "evaluation_seed": 64297, "coco_id": 482917},
        {"prompt": "A toilet. ", "evaluation_seed": 60888, "coco_id": 334015},
    )
    assert read(table) == [SetPrompt("A dog on a stool", 64297), SetPrompt("A toilet.", 60888)]
    captions = [{"image_id": 1, "id": number, "caption": f"Caption {number}."} for number in range(5)]
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"info": {}, "images": [{"id": 1}], "annotations": captions, "licenses": []}))
    assert [each.prompt for each in read(path)] == [row["caption"] for row in captions]


def test_mace_has_artists_and_celebrities_with_several_seeds(tmp_path: Path) -> None:
    rows = [
        {"type": kind, "artist": "A. Made-Up", "prompt": "Art by A. Made-Up", "evaluation_seed": 3} for kind in "01"
    ]
    artists = read(write(tmp_path / "art.csv", LAYOUTS["mace"], *rows))
    assert artists[0] == SetPrompt("Art by A. Made-Up", 3, None, ("0", "A. Made-Up"))
    assert len(read(tmp_path / "art.csv", category="a. made-up")) == 2
    columns = ("", "type", "prompt", "evaluation_seed")
    rows = [{"type": kind, "prompt": "A portrait", "evaluation_seed": 1} for kind in ("erased", "others")]
    assert len(read(write(tmp_path / "celebrity.csv", columns, *rows), category="erased")) == 1


def test_unisafe_in_parquet_with_images_gives_what_is_from_text_to_image(tmp_path: Path) -> None:
    image = {"bytes": b"png", "path": None}
    rows = [
        {"id": "1", "category": "Violence", "subcategory": "V1", "scenario_type": kind, "instruction": f"draw {kind}"}
        | {"input_image": image, "turns": []}
        for kind in ("TI", "IE", "MT")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "image.parquet")
    assert read(tmp_path / "image.parquet") == [SetPrompt("draw TI", categories=("Violence", "V1"))]
    assert len(read(tmp_path / "image.parquet", category="v1")) == 1
    pq.write_table(pa.Table.from_pylist(rows[1:]), tmp_path / "image.parquet")
    with pytest.raises(UserError, match="no prompts for text-to-image models"):
        read(tmp_path / "image.parquet")


def test_ecgvf_as_json_and_van_goghs_paintings(tmp_path: Path) -> None:
    rows = [{"original_prompt": "a chapel", "modified_prompt": "a barn", "concept": "church", "replaced": "barn"}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert read(tmp_path / "train.json") == [SetPrompt("a chapel", categories=("church",))]
    (tmp_path / "train.json").write_text(json.dumps([*rows, {"original_prompt": "a chapel"}]))
    with pytest.raises(UserError, match="entry 2: a row of ECGVF without 'modified_prompt'"):
        read(tmp_path / "train.json")
    columns = ("Unnamed: 0", "case_number", "prompt", "evaluation_seed", "artist")
    row = {"prompt": "Hills by A. Made-Up", "evaluation_seed": 2219, "artist": "A. Made-Up"}
    path = write(tmp_path / "vangogh.csv", columns, row)
    assert read(path) == [SetPrompt("Hills by A. Made-Up", 2219, None, ("A. Made-Up",))]


def test_unlearn_canvas_needs_no_file() -> None:
    prompts = read("unlearn-canvas")
    assert len(prompts) == len(STYLES.split(",")) * len(OBJECTS.split(",")) * 5 == 50 * 20 * 5
    assert prompts[0] == SetPrompt("A Architectures image in Abstractionism style.", 188, None, prompts[0].categories)
    of_style = read("unlearn-canvas", category="Van_Gogh")
    assert len(of_style) == 100 and {prompt.seed for prompt in of_style} == {188, 288, 588, 688, 888}
    assert all("in Van Gogh style." in prompt.prompt for prompt in of_style)


def test_an_empty_prompt_is_named_and_a_broken_file_too(tmp_path: Path) -> None:
    path = write(tmp_path / "i2p.csv", I2P_COLUMNS, {"prompt": " ", "categories": "", "nudity_percentage": 0})
    with pytest.raises(UserError, match=r"i2p\.csv, line 2: ' ' is no prompt"):
        read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read(path)
