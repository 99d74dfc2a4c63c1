"""The model card of an adapter, and that its folder is all that peft and transformers need."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from test_report import EVIL, report_data
from test_report_content import content_data
from tiny_runs import tiny_config

import vce_ray
from vce_ray.config import EMBEDDED, SamplingConfig
from vce_ray.evaluation.formats import MINUS
from vce_ray.evaluation.model_card import model_card, write_model_card
from vce_ray.models.adapter import PREFIX, save_adapter
from vce_ray.models.adapter_location import CARD, MODEL_CARD, WEIGHTS, check_files, read_card
from vce_ray.models.folder import model_folder
from vce_ray.models.load import load_model
from vce_ray.pipeline.erase import report_data as read_report_data
from vce_ray.pipeline.run import Run, recorded_task
from vce_ray.pipeline.stages import downstream
from vce_ray.run_config import RunConfig
from vce_ray.sampling import draw
from vce_ray.storage.store import Store

STORED = Path(__file__).parents[1] / "data/run_0_1"
JANUS = "JanusForConditionalGeneration"


def card_of(config: RunConfig | None = None, base_class: str | None = JANUS, **changes: Any) -> str:
    return model_card(report_data(**changes), config or tiny_config(), "0123456789abcdef", base_class)


def test_a_card_says_what_else_was_asked_for() -> None:
    text = model_card(content_data(), tiny_config(), "0123456789abcdef", JANUS)
    for part in (
        "| asked style drawn | 100.0% (86.2 to 100.0) | 75.0% (55.1 to 88.0) |",
        "| no clear object | 0.0% (0.0 to 13.8) | 33.3% (18.0 to 53.3) |",
        "| score without the concept | 0.400 (0.400 to 0.400) | 0.300 (0.300 to 0.300) |",
        f"| rest of prompt: style | missed | {MINUS}25.0 points | at most 5 points lost |",
        "| no clear object | missed | 33.3% | at most 10% | 18.0 to 53.3 |",
    ):
        assert part in text, part


def code_blocks(card: str) -> list[str]:
    return [token.content for token in MarkdownIt().parse(card) if token.type == "fence" and token.info == "python"]


def test_a_card_has_the_metadata_of_a_hub_and_the_figures_of_its_run() -> None:
    text = card_of(seen_after=1, lost=6)
    metadata = ModelCard(text).data.to_dict()
    assert metadata["base_model"] == EMBEDDED and metadata["base_model_relation"] == "adapter"
    assert metadata["library_name"] == "peft" and metadata["pipeline_tag"] == "text-to-image"
    assert metadata["license"] == "apache-2.0" and {"lora", "concept-erasure"} <= set(metadata["tags"])
    for part in (
        "# emoji-world without deer",
        "| concept seen | 100.0% (86.2 to 100.0) | 4.2% (0.7 to 20.2) |",
        "| concept seen | undecided | 4.2% | at most 5% | 0.7 to 20.2 |",
        f"| worst neighbour: fox | missed | {MINUS}60.0 points | at most 5 points lost | {MINUS}83.2 to {MINUS}20.1 |",
        f"| fox | 100.0% | 40.0% | {MINUS}60.0 points ({MINUS}83.2 to {MINUS}20.1) |",
        "What they show is judged by the CLIP model that ships with vce\\_ray",
        "**Do not rely on this erasure: 2 of 4 limits are missed.**",
        "revision 0123456789abcdef",
        "Versions: torch 2.13.",
    ):
        assert part in text, part
    shown = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert shown["train"]["method"] == "vsafe_dpo" and shown["sampling"]["guidance_scale"] == 2.0


CLAIMS: list[tuple[dict[str, Any], str | None, dict[str, Any]]] = [
    ({"base": "owner/janus@v1"}, JANUS, {"base_model": "owner/janus", "license": "other", "library_name": "peft"}),
    ({"base": "s3://bucket/llamagen-xl"}, None, {"base_model": "llamagen-xl", "library_name": "vce_ray"}),
    ({"train": {"weights": "full"}}, None, {"base_model_relation": "finetune", "tags": ["vce_ray", "concept-erasure"]}),
]


@pytest.mark.parametrize(("settings", "base_class", "expected"), CLAIMS)
def test_a_card_claims_no_more_than_its_adapter_can(
    settings: dict[str, Any], base_class: str | None, expected: dict[str, Any]
) -> None:
    text = card_of(tiny_config(**settings), base_class)
    metadata = ModelCard(text).data.to_dict()
    assert expected.items() <= metadata.items()
    assert len(code_blocks(text)) == (2 if base_class else 1) and ("peft" in text) == bool(base_class)
    if base_class:
        assert metadata["license_link"] == "https://huggingface.co/owner/janus"
        assert 'load_model("owner/janus@v1", ' in text and 'from_pretrained(base, revision="v1")' in text


def test_prompts_and_names_are_text_and_code_stays_code() -> None:
    prompt = f'{EVIL}\n```\n# x\n\n"]); import os; os.abort() # | [a](b) $$ ![](c)'
    data = report_data()
    rows = [row for row in data.evaluation if row["group"] == "keep"]
    rows += [row | {"prompt": prompt} for row in data.evaluation if row["group"] == "erase"]
    name = f"{EVIL} | `a` *b* [c](d)"
    neighbours = [row | {"name": name} for row in data.metrics["neighbours"]]
    data = replace(
        data, evaluation=rows, run=data.run | {"name": name}, metrics=data.metrics | {"neighbours": neighbours}
    )
    text = model_card(data, tiny_config(), "0123456789abcdef", JANUS)
    tokens = MarkdownIt().enable("table").parse(text.split("---\n", 2)[2])
    kinds = {token.type for token in tokens} | {child.type for token in tokens for child in token.children or ()}
    assert not {"html_block", "html_inline", "image"} & kinds
    links = [child.attrs["href"] for token in tokens for child in token.children or () if child.type == "link_open"]
    assert links == ["https://arxiv.org/abs/2509.16986"]
    texts = ["".join(child.content for child in token.children) for token in tokens if token.children]
    assert texts.count(name) == len(neighbours), "what a reader sees is the name as it is"
    for code in code_blocks(text):
        literals = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        assert prompt in literals


def test_a_card_names_no_path_and_no_address(tmp_path: Path) -> None:
    base = copytree(model_folder(EMBEDDED), tmp_path / "secret" / "my janus (2)")
    config = tiny_config(
        base=str(base),
        concept=str(tmp_path / "secret.yaml"),
        captioner="http://10.0.0.7:8000/v1#secret-model",
        store=str(tmp_path),
        prompts_file="secret.txt",
        evaluation={"judge": str(tmp_path / "secret" / "judge")},
    )
    text = card_of(config)
    assert "secret" not in text and str(tmp_path) not in text and "10.0.0.7" not in text
    assert "# my janus (2) without deer" in text and "base_model:" not in text, "a hub would refuse such an id"
    model = load_model(str(base))
    save_adapter(tmp_path / "adapter", {}, model, {"rank": 1, "alpha": 1}, {"concept": "deer"})
    written = {file.name: file.read_text() for file in (tmp_path / "adapter").glob("*.json")}
    assert len(written) == 2 and str(tmp_path) not in "".join(written.values())
    assert json.loads(written["adapter_config.json"])["base_model_name_or_path"] == "my janus (2)"


def test_an_adapter_loads_without_its_card_with_it_and_after_it_was_edited(tmp_path: Path) -> None:
    store, folder = Store(copytree(STORED, tmp_path / "run")), tmp_path / "run/adapter"
    task, data = recorded_task(store), read_report_data(Run(recorded_task(store)))
    index = store.read_bytes("adapter/_files.json")
    write_model_card(task, data)
    text = store.read_bytes(MODEL_CARD).decode()
    assert "emoji-world without deer" in text and "peft import" not in text, "0.1 wrote a config without a base"
    for content in (text, text + "Thanks to all.", None):
        (folder / "README.md").write_text(content) if content else (folder / "README.md").unlink()
        check_files(folder, read_card(folder))
        assert vce_ray.load_model(adapter=str(folder)).image_size == 64
        assert store.fetch("adapter", tmp_path / "fetched").is_dir()
    assert store.read_bytes("adapter/_files.json") == index
    write_model_card(task, data)
    store.upload(store.fetch("adapter", tmp_path / "fetched"), "adapter")
    assert not store.exists(MODEL_CARD), "a new training leaves no card of the old one"
    assert MODEL_CARD in downstream(["report"])[0].invalidated


ALONE = """
import json, sys
import torch
from peft import AutoPeftModel

def tokens_of(model):
    return model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=2)

assert isinstance(model, PeftModel) and images[0].size == (64, 64)
auto = AutoPeftModel.from_pretrained("adapter")
added = JanusForConditionalGeneration.from_pretrained(base, revision="v1")
without = tokens_of(added)
added.load_adapter("adapter")
assert not torch.equal(tokens, without)
for other in (auto, added, auto.merge_and_unload()):
    assert torch.equal(tokens_of(other), tokens)
assert not any(name.split(".")[0] == "vce_ray" for name in sys.modules)
print(json.dumps(tokens.tolist()))
"""


@pytest.mark.integration
def test_peft_and_transformers_alone_draw_the_same_with_the_code_of_the_card(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub/models--owner--tiny-janus"
    copytree(model_folder(EMBEDDED), cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/v1").write_text(commit)
    model = load_model()
    model.ref = "owner/tiny-janus@v1"
    state = {name.removeprefix(PREFIX): x for name, x in load_file(STORED / "adapter" / WEIGHTS).items()}
    save_adapter(tmp_path / "adapter", state, model, json.loads((STORED / "adapter" / CARD).read_text())["lora"], {})
    greedy = SamplingConfig(temperature=0, guidance_scale=2)
    text = card_of(tiny_config(base=model.ref, sampling=greedy))
    (tmp_path / "adapter/README.md").write_text(text)
    (tmp_path / "alone.py").write_text(code_blocks(text)[1] + ALONE)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    ended = subprocess.run(
        [sys.executable, "alone.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    (prompt,) = re.findall(r'"(a deer on plate \d+)"', code_blocks(text)[1])
    ours = draw(load_model(adapter=tmp_path / "adapter"), [prompt], [0], greedy)
    assert json.loads(ended.stdout.splitlines()[-1]) == ours.tolist()
