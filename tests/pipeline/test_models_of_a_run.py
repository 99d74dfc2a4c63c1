"""The models of a run on workers: folders given relative to the driver, and a judge that changes in the middle."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from chat_server import ChatServer
from hub_server import HubServer, Repo

from vce_ray import api
from vce_ray.cli.app import main
from vce_ray.errors import CaptionerError, UserError
from vce_ray.evaluation.draw_and_detect import DrawAndDetect
from vce_ray.evaluation.judge import JUDGE, judge_revision
from vce_ray.evaluation.judges import STAMP
from vce_ray.models.folder import BASE
from vce_ray.pairs.build import run_prompts
from vce_ray.pipeline.fleet import open_fleet
from vce_ray.pipeline.pair_flow import publish_prompts
from vce_ray.pipeline.preflight import open_run
from vce_ray.pipeline.run import RUN_FILE, recorded_task
from vce_ray.storage.store import Store

ONE_ACTOR: dict[str, Any] = {"draw": {"min_actors": 1, "max_actors": 1}}


@pytest.fixture
def local_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray whose processes work in another folder than this one, which has copies of the embedded models."""
    assert BASE.embedded and JUDGE.embedded
    shutil.copytree(BASE.embedded, tmp_path / "here" / "janus", ignore=shutil.ignore_patterns("words.txt"))
    shutil.copytree(JUDGE.embedded, tmp_path / "here" / "clip")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    ray.init("local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")
    monkeypatch.chdir(tmp_path / "here")
    yield
    ray.shutdown()


def test_relative_folders_and_a_judge_that_changes(local_ray: None) -> None:
    concept = Path("fox.yaml")
    labels = "labels: [deer, cat, dog]"
    concept.write_text(f"{{kind: object, names: [deer], keep: [cat, dog], {labels}}}")
    settings: dict[str, Any] = {"base": "janus", "cluster": ONE_ACTOR, "sampling": {"batch_size": 4}}
    settings |= {"pairs": {"num_pairs": 4, "num_keep": 2, "max_reject_ratio": 1.0}, "store": "runs"}
    settings |= {"evaluation": {"judge": "clip", "num_erase": 2, "num_keep": 2}, "sampling": {"guidance_scale": 2.0}}
    made = api.make_pairs(str(concept), **settings)
    record = made.store.read_json(RUN_FILE)
    assert (record["config"]["base"], record["config"]["evaluation"]["judge"]) == ("janus", ["clip"]), "as given"
    assert made.store.stage("evaluation/before").read(columns=["label"]).num_rows
    manifest = made.store.stage("evaluation/prompts").manifest()
    assert manifest is not None and manifest["facts"] == {STAMP: judge_revision("clip")}

    with Path("clip", JUDGE.config).open("a") as file:
        file.write("\n")
    changed = f"began with judge revision {manifest['facts'][STAMP]}, clip on .* is {judge_revision('clip')}"
    with pytest.raises(UserError, match=changed):
        api.erase(str(concept), **settings)
    task = recorded_task(Store("runs").child(made.name))
    with pytest.raises(UserError, match=changed):  # on a node whose folder differs from the driver's
        DrawAndDetect({task.name: task}, "after")


def test_endpoints_are_asked_before_a_run_starts_once_for_a_fleet_and_not_when_its_pairs_are_made(
    tmp_path: Path,
) -> None:
    server = ChatServer()
    settings: dict[str, Any] = {"store": str(tmp_path), "captioner": server.name, "refiner": server.name}
    members = open_fleet([settings | {"concept": name} for name in ("deer", "cat")], lambda name, line: None)
    assert [member.error for member in members] == [None, None] and len(server.requests) == 2
    server.respond = lambda *_: (401, {}, b"")
    with pytest.raises(CaptionerError, match="VCE_RAY_CAPTIONER_TOKEN"):
        open_run(settings | {"concept": "deer"})
    with pytest.raises(CaptionerError, match="VCE_RAY_REFINER_TOKEN"):
        open_run(settings | {"concept": "deer", "captioner": None})
    assert not list(tmp_path.iterdir())
    run = members[0].run
    assert run is not None
    run.start()
    publish_prompts(run.store.stage("prompts"), lambda: run_prompts(run.config, run.concept))
    run.start_stage("pairs")
    run.finish_stage("pairs")
    open_run(settings | {"concept": "deer"})
    server.close()


@pytest.mark.parametrize(
    "command",
    [
        ["erase", "deer", "--judge", "o/clip"],
        ["fleet", "deer", "--judge", "o/clip"],
        ["generate", "a deer"],
        ["serve"],
        ["plan"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_says_in_one_line_what_is_wrong_with_a_model_on_the_hub(
    command: list[str], hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vce_ray.pipeline.session.ray_session", lambda: pytest.fail("Ray was started"))
    assert JUDGE.embedded
    hub.repos |= {"o/clip": Repo.of(JUDGE.embedded), "o/gated": Repo({"config.json": b"{}"}, access="gated")}
    base = ["--model" if command[0] == "plan" else "--base", "o/gated"]
    assert main([*command, *base]) == 2
    said = "".join(capsys.readouterr())
    assert re.search(r"^.*o/gated is gated: accept its licence at .* or give a folder(\.|$)", said, re.MULTILINE)
    assert "Traceback" not in said
