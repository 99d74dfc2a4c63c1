"""What is checked before a run starts, in which order, and that nothing is written or downloaded meanwhile."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, Repo

from vce_ray.concepts.load import load_concept
from vce_ray.config import EMBEDDED, SamplingConfig, TrainConfig
from vce_ray.defaults import default_settings
from vce_ray.errors import UserError
from vce_ray.pairs.build import run_prompts
from vce_ray.pipeline.pair_flow import publish_prompts
from vce_ray.pipeline.preflight import open_run, prepare
from vce_ray.pipeline.run import RUN_FILE, Run
from vce_ray.training.objectives.dpo import DPOConfig
from vce_ray.training.objectives.vsafe_dpo import VSafeDPOConfig

EVERY_MISTAKE: list[tuple[str, dict[str, Any], str]] = [
    ("settings", {"pairs": {"num_pairs": 0}}, "pairs.num_pairs: input should be greater than or equal to 1, not 0"),
    ("base's name", {"base": "no/such/base"}, "unknown base model 'no/such/base'"),
    ("concept", {"concept": "dear"}, "unknown concept 'dear'"),
    ("prompts", {"prompts_file": "no/such/file"}, "cannot read the prompts file"),
    ("training settings", {"train": {"steps": 0}}, "train.steps: input should be greater than or equal to 1, not 0"),
    ("store", {"store": "ftp://host/runs"}, "ftp"),
    (
        "detector",
        {"evaluation": {"judge": ["nudnet", "no/such/judge"]}},
        "unknown judge 'nudnet': did you mean nudenet",
    ),
    ("judge", {"evaluation": {"judge": "no/such/judge"}}, "no/such/judge"),
    ("base", {"base": "EMPTY"}, "has no config.json"),
    ("captioner", {"captioner": "no/such/captioner"}, "unknown base model 'no/such/captioner'"),
]
"""From the first check to the last, a setting that fails it."""


def make_judge(folder: Path) -> str:
    """A judge as far as its config and its list of files tell, for bases that have none of their own."""
    folder.mkdir()
    model = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    (folder / "open_clip_model.safetensors").write_bytes(b"weights")
    return str(folder)


def begin(settings: dict[str, Any]) -> Run:
    """Begin a run and stop it once its prompts are published."""
    run = open_run(settings, log=lambda _: None)
    run.start()
    publish_prompts(run.store.stage("prompts"), lambda: run_prompts(run.config, run.concept))
    run.finish("stopped")
    return run


@pytest.mark.parametrize("first", range(len(EVERY_MISTAKE)), ids=[name for name, *_ in EVERY_MISTAKE])
def test_of_several_mistakes_the_cheapest_to_find_is_reported(first: int, tmp_path: Path) -> None:
    (tmp_path / "EMPTY").mkdir()
    settings: dict[str, Any] = {"concept": "deer", "store": str(tmp_path / "runs")}
    settings["evaluation"] = {"judge": make_judge(tmp_path / "judge")}
    for _, mistake, _ in reversed(EVERY_MISTAKE[first:]):
        settings |= mistake
    if settings.get("base") == "EMPTY":
        settings["base"] = str(tmp_path / "EMPTY")
    with pytest.raises(UserError, match=EVERY_MISTAKE[first][2]):
        open_run(settings)
    assert not (tmp_path / "runs").exists()


def test_a_run_is_written_when_it_starts_and_not_when_it_is_opened(tmp_path: Path) -> None:
    run = open_run({"concept": "deer", "store": str(tmp_path)})
    assert not run.store.exists(RUN_FILE)
    run.start()
    assert run.store.read_json(RUN_FILE)["status"] == "running"


def test_of_models_on_the_hub_configs_alone_are_read(tmp_path: Path, hub: HubServer) -> None:
    hub.repos["owner/janus"] = Repo(
        {
            "config.json": b'{"model_type": "janus"}',
            "model.safetensors": b"weights",
            "chat_template.jinja": b"{{ chat }}",
        }
        | dict.fromkeys(("tokenizer.json", "tokenizer_config.json", "processor_config.json"), b"{}")
    )
    hub.repos["owner/clip"] = Repo.of(Path(make_judge(tmp_path / "judge")))
    settings = {"base": "owner/janus", "store": str(tmp_path), "evaluation": {"judge": "owner/clip"}}
    with pytest.raises(UserError, match="unknown concept 'dear'"):
        open_run(settings | {"concept": "dear"})
    assert hub.requests == [], "a misspelt concept is found before the hub is asked"
    run = open_run(settings | {"concept": "deer"})
    assert sorted(hub.downloads()) == ["chat_template.jinja", "config.json", "open_clip_config.json"]
    assert run.config.sampling == SamplingConfig() and run.config.train.learning_rate == 1e-4
    assert run.record["config"]["evaluation"]["judge"] == ["owner/clip"]


def test_defaults_depend_on_kind_method_base_and_the_concepts_own_file(tmp_path: Path) -> None:
    def train(**settings: Any) -> TrainConfig:
        return prepare({"store": str(tmp_path)} | settings).config.train

    def vsafe(**settings: Any) -> VSafeDPOConfig:
        found = train(**settings)
        assert isinstance(found, VSafeDPOConfig)
        return found

    plain, style = VSafeDPOConfig(), vsafe(concept="noto")
    assert vsafe(concept="deer") == plain
    assert style.anchor_weight > plain.anchor_weight and style.prompt_mode == "given"
    assert prepare({"concept": "noto"}).config.pairs.num_keep > prepare({"concept": "deer"}).config.pairs.num_keep
    assert train(concept="noto", train={"method": "dpo"}) == DPOConfig(), "a style's settings are VSafe-DPO's"
    assert prepare({"concept": "noto", "train": {"method": "dpo"}}).config.pairs.num_keep == (
        prepare({"concept": "noto"}).config.pairs.num_keep
    ), "so that methods can share pairs"
    own = load_concept("openmoji").train
    assert vsafe(concept="openmoji") == style.model_copy(update=own) and own
    assert train(concept="openmoji", train={"method": "dpo"}) == DPOConfig()
    assert vsafe(concept="violence").steps > 2 * plain.steps, "names share the pairs"
    mine = prepare({"concept": "violence", "train": {"beta": 2.0}, "pairs": {"num_keep": 5}}).config
    assert isinstance(mine.train, VSafeDPOConfig) and mine.train.beta == 2.0 and mine.pairs.num_keep == 5
    large = default_settings(load_concept("van_gogh", "a/janus"), "a/janus")["train"]
    small = default_settings(load_concept("noto"), EMBEDDED)["train"]
    assert large["learning_rate"] < small["learning_rate"]
    assert large | {"learning_rate": 0} == small | {"learning_rate": 0}


def test_sampling_is_the_bases_own_but_for_what_is_set(tmp_path: Path) -> None:
    config = prepare({"concept": "deer", "sampling": {"batch_size": 16}}).config
    assert config.sampling == SamplingConfig(guidance_scale=2.0, temperature=0.7, batch_size=16)
    sections = prepare({"concept": "deer", "train": DPOConfig(steps=3), "sampling": SamplingConfig(top_k=9)}).config
    assert sections.train == DPOConfig(steps=3)
    assert sections.sampling == SamplingConfig(guidance_scale=2.0, temperature=0.7, top_k=9)


def test_other_settings_under_the_same_name_are_refused_with_both_values(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"concept": "deer", "store": str(tmp_path)}
    begin(settings)
    open_run(settings | {"cluster": {"wait_s": 5}})
    with pytest.raises(UserError, match=r"other settings \(train.steps 5, was 80; train.beta 2.0, was 1.0\)"):
        open_run(settings | {"train": {"steps": 5, "beta": 2.0}})


def test_settings_bind_once_something_was_made_with_them(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"concept": "deer", "store": str(tmp_path)}
    run = open_run(settings | {"train": {"steps": 5}})
    run.start()
    run.finish("failed", "the cluster is full")
    assert open_run(settings | {"train": {"steps": 6}}).config.train.steps == 6


def test_prompts_that_were_edited_since_are_refused(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    settings: dict[str, Any] = {"concept": "deer", "store": str(tmp_path), "prompts_file": str(prompts)}
    prompts.write_text("a deer\na red deer\n")
    begin(settings)
    prompts.write_text("# another comment changes nothing\na deer\r\na red deer")
    open_run(settings)
    prompts.write_text("a deer\na blue deer\n")
    with pytest.raises(UserError, match=r"other settings \(the prompts in .*prompts\.txt\)"):
        open_run(settings)


def test_other_versions_of_the_code_are_mentioned(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"concept": "deer", "store": str(tmp_path)}
    run = begin(settings)
    record = run.store.read_json(RUN_FILE)
    versions = record["versions"] | {"torch": "2.0.0"}
    run.store.write_json(RUN_FILE, record | {"git": "0123abc", "versions": versions})
    lines: list[str] = []
    again = open_run(settings, lines.append)
    again.start()
    assert len(lines) == 1 and "versions.torch" in lines[0] and "was 2.0.0" in lines[0] and "was 0123abc" in lines[0]
    again.finish("stopped")
    lines.clear()
    begin({**settings, "name": "another"}).start()
    assert not lines


@pytest.mark.parametrize("unused", [{"prompts_file": "prompts.txt"}, {"pairs": {"num_pairs": 5}}])
def test_what_makes_pairs_is_refused_for_a_run_on_the_pairs_of_others(unused: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a deer\n")
    settings = {"concept": "deer", "store": str(tmp_path), "pairs_of": ["other"]} | unused
    with pytest.raises(UserError, match=r"has no use with --pairs-of"):
        open_run(settings)


def test_a_changed_concept_is_another_run(tmp_path: Path) -> None:
    path = tmp_path / "whale.yaml"
    path.write_text("{kind: object, names: [whale], keep: [fish]}")
    begin({"concept": str(path), "store": str(tmp_path)})
    path.write_text("{kind: object, names: [whale], keep: [fish, turtle]}")
    with pytest.raises(UserError, match="other settings \\(the concept's definition\\)"):
        open_run({"concept": str(path), "store": str(tmp_path)})


def test_training_settings_are_checked_together_with_the_concepts_own(tmp_path: Path) -> None:
    path = tmp_path / "whale.yaml"
    own = "train: {batch_size: 12, keep_batch_size: 12}"
    path.write_text(f"{{kind: object, names: [whale], keep: [fish], {own}}}")
    settings: dict[str, Any] = {"concept": str(path), "store": str(tmp_path)}
    assert prepare(settings | {"train": {"num_workers": 3}}).config.train.batch_size == 12
    with pytest.raises(UserError, match="batch_size 12 must be a multiple of num_workers 5"):
        prepare(settings | {"train": {"num_workers": 5}})


def test_a_concepts_file_may_name_its_method(tmp_path: Path) -> None:
    path = tmp_path / "whale.yaml"
    path.write_text("{kind: object, names: [whale], keep: [fish], train: {method: dpo, steps: 7}}")
    settings: dict[str, Any] = {"concept": str(path), "store": str(tmp_path)}
    assert prepare(settings).config.train == DPOConfig(steps=7) and prepare(settings).name == "whale-dpo-0"
    other = prepare(settings | {"train": {"method": "vsafe_dpo"}}).config.train
    assert isinstance(other, VSafeDPOConfig) and other.steps != 7, "its settings are those of its own method"


@pytest.mark.parametrize("concept", ["deer", "dear"])
def test_a_password_in_a_bases_uri_is_not_repeated(concept: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no credentials") as error:
        open_run({"concept": concept, "base": "s3://KEY:hidden-word@bucket/model", "store": str(tmp_path)})
    assert "hidden-word" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"captioner": "a b/c"}, "'a b/c' is not a hub id"),
        ({"train": {"method": ["dpo"]}}, "unknown training method"),
        ({"train": 3}, "train"),
        ({"pairs": {"num_keep": 0}}, "--keep 0 leaves no images to preserve"),
        ({"name": "a/b"}, "--name 'a/b' must be the name of one folder"),
        ({"store": __file__}, f"--store {__file__} is a file"),
        ({"pairs_of": ["nosuch"]}, "--pairs-of nosuch: "),
        (
            {"store": "s3://bucket/runs?endpoint_override=minio_server:9000&scheme=http"},
            "'minio_server:9000' is not a host",
        ),
        ({"store": "s3://[bucket/runs"}, "a store URI cannot be parsed"),
    ],
)
def test_what_libraries_refuse_is_a_users_error(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        open_run({"concept": "deer", "store": str(tmp_path)} | settings)


def test_a_record_of_a_later_version_is_refused_by_name(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"concept": "deer", "store": str(tmp_path)}
    run = begin(settings)
    record = run.store.read_json(RUN_FILE)
    record["config"]["pairs"]["later"] = 1
    run.store.write_json(RUN_FILE, record)
    with pytest.raises(UserError, match=r"settings that this version does not have .pairs: unknown setting 'later'"):
        open_run(settings)
