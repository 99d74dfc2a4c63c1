"""Training on real Ray Train: the pair is learned, workers change nothing, a killed training goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import ray.train.torch
import torch
from safetensors.torch import load_file

from vce_ray import schemas
from vce_ray.config import PROMPT_MODES, RunConfig, SamplingConfig, TrainConfig
from vce_ray.models.adapter import attach_adapter
from vce_ray.models.load import base_stamp, check_stamp, load_model
from vce_ray.sampling import draw
from vce_ray.store import Store
from vce_ray.training import step as training_step
from vce_ray.training.data import TrainingData, order
from vce_ray.training.loss import preservation_loss
from vce_ray.training.reference import Reference
from vce_ray.training.step import AnchorBatch, Targets, anchor_target, keep_target, pair_log_probs, step_loss

PAIRS = 8


def config(**changes) -> RunConfig:
    train = {"steps": 4, "batch_size": 4, "keep_batch_size": 4, "learning_rate": 2e-3}
    train |= {"checkpoint_every": 50, "num_workers": 1}
    return RunConfig(concept="deer", train=TrainConfig(**(train | changes)))


@pytest.fixture(scope="module")
def pair_set(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A small pair set, drawn without Ray: deer against other animals, and cats and houses to keep."""
    torch.set_num_threads(2)
    store = Store(tmp_path_factory.mktemp("training"))
    model = load_model()
    prompts = [f"a deer in the style of {s} on a {b} background" for s in ("noto", "fluent") for b in ("red", "white")]
    prompts = prompts * (PAIRS // len(prompts))
    refined = [prompt.replace("a deer", "a fox") for prompt in prompts]
    keep = [prompt.replace("a deer", name) for prompt, name in zip(prompts, ["a cat", "a house"] * 4, strict=True)]
    seeds = list(range(PAIRS))
    drawn = draw(model, prompts + refined + keep, seeds * 3, SamplingConfig()).tolist()
    rejected, chosen, kept = drawn[:PAIRS], drawn[PAIRS : 2 * PAIRS], drawn[2 * PAIRS :]
    tokens = schemas.TOKENS
    ids = [f"pair{i}" for i in range(PAIRS)]
    pairs = pa.table(
        {
            "pair_id": ids,
            "prompt": prompts,
            "refined_caption": refined,
            "chosen": pa.array(chosen, tokens),
            "rejected": pa.array(rejected, tokens),
        }
    )
    stage = store.stage("pairs")
    stage.publish([stage.write_part(pairs)], key="pair_id")
    stage = store.stage("keep")
    table = pa.table({"sample_id": ids, "prompt": keep, "tokens": pa.array(kept, tokens)})
    stage.publish([stage.write_part(table)], key="sample_id")
    rows, _ = Reference("emoji-world", {"a": PROMPT_MODES})([row | {"run": "a"} for row in pairs.to_pylist()])
    stage = store.stage("reference")
    part = stage.write_part(pa.Table.from_pylist(rows, schemas.reference(PROMPT_MODES)))
    stage.publish([part], key="pair_id", **base_stamp("emoji-world"))
    return store


def test_reference_is_of_the_modes_that_a_run_may_draw_from() -> None:
    row = {"pair_id": "p", "prompt": "a deer", "refined_caption": "an animal", "chosen": [3] * 64, "rejected": [5] * 64}
    rows, rejects = Reference("emoji-world", {"a": PROMPT_MODES, "b": ("given",)})(
        [row | {"run": run} for run in "abba"]
    )
    assert [set(made) - {"run", "pair_id"} for made in rows[:2]] == [
        {f"{side}_{mode}" for side in ("chosen", "rejected") for mode in modes} for modes in (PROMPT_MODES, ("given",))
    ]
    assert [made["run"] for made in rows] == list("abba") and not rejects
    assert rows[1]["chosen_given"] == pytest.approx(rows[0]["chosen_given"], abs=1e-4) != rows[0]["chosen_null"]


def test_the_anchor_leaves_out_what_the_unsafe_prompt_makes_likelier() -> None:
    model = load_model()
    tokens = draw(model, ["a deer in the style of noto"], [1], SamplingConfig(guidance_scale=2.0, temperature=0.7))
    batch = AnchorBatch([0], ["a deer in the style of noto"], ["a deer"], tokens)
    plain, one, three = (
        anchor_target(Targets(model, nullcontext), batch, guidance).exp() for guidance in (0.0, 1.0, 3.0)
    )
    unsafe = model.image_logits(model.encode_prompts(batch.prompts), tokens).softmax(-1)
    likelier, ones = unsafe > plain, torch.ones(1, 64)
    assert torch.allclose(plain.sum(-1), ones, atol=1e-4), "the refined caption's own, before anything is left out"
    assert torch.equal(plain[unsafe < 0.99 * plain], three[unsafe < 0.99 * plain])
    assert (plain - one)[likelier].min() >= 0 and (one - three)[likelier].min() >= 0
    assert three[likelier].sum() + 1 < one[likelier].sum() < plain[likelier].sum() - 1


@pytest.fixture(scope="module")
def local_ray():
    """The address of a small Ray on this machine."""
    context = ray.init("local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")
    yield context.address_info["gcs_address"]
    ray.shutdown()


def copy(store: Store, place: Path) -> Store:
    """The same pair set in another place, so that trainings do not meet."""
    target = Store(place)
    for file in store.list():
        if file.split("/")[0] in ("pairs", "keep", "reference"):
            target.write_bytes(file, store.read_bytes(file))
    return target


def weights(store: Store, folder: Path) -> dict[str, torch.Tensor]:
    return load_file(store.fetch("adapter", folder) / "adapter_model.safetensors")


def test_training_prefers_the_safe_image_and_the_adapter_carries_it(finished: Store, tmp_path: Path) -> None:
    history = finished.read_json("training.json")
    assert history[0]["preference"] == pytest.approx(0.6931, abs=1e-3)
    assert history[-1]["margin"] > 0.05 > abs(history[0]["margin"])
    model, pairs = load_model(), finished.stage("pairs").read().to_pylist()
    prompts = model.encode_prompts([row["prompt"] for row in pairs])
    chosen, rejected = (torch.tensor([row[side] for row in pairs]) for side in ("chosen", "rejected"))
    with torch.no_grad():
        before = pair_log_probs(model, prompts, chosen, rejected)
        attach_adapter(model, finished.fetch("adapter", tmp_path / "adapter"))
        after = pair_log_probs(model, prompts, chosen, rejected)
    margin = (after[0] - before[0]).mean() - (after[1] - before[1]).mean()
    assert margin > 0.05


def test_two_workers_give_the_same_training(finished: Store, local_ray, tmp_path: Path) -> None:
    """With and without shards of the weights, in one pair of processes; the run that they are held to had one."""
    record = finished.read_json("run.json")["config"]
    stores = {shard: copy(finished, tmp_path / f"shard-{shard}") for shard in (True, False)}
    trainings = [
        {
            "run": record | {"train": record["train"] | {"num_workers": 2, "shard": shard}},
            "store": store.uri,
            "facts": {"concept": "deer"},
        }
        for shard, store in stores.items()
    ]

    def loops(settings: dict) -> list:
        from vce_ray.training.loop import train_loop

        return [train_loop(training) for training in settings["trainings"]]

    trainer = ray.train.torch.TorchTrainer(
        loops,
        train_loop_config={"trainings": trainings},
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path / "checkpoints")),
    )
    histories: Any = trainer.fit().return_value
    alone, theirs = finished.read_json("training.json"), weights(finished, tmp_path / "alone")
    for (shard, store), history in zip(stores.items(), histories, strict=True):
        for one, two in zip(alone, history, strict=True):
            for name in ("loss", "margin", "preservation", "gradient_norm"):
                assert two[name] == pytest.approx(one[name], abs=2e-4), (shard, name, one["step"])
        ours = weights(store, tmp_path / f"two-{shard}")
        assert ours.keys() == theirs.keys()
        assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 2e-3


SCRIPT = """
import sys, ray
from vce_ray.config import RunConfig
from vce_ray.store import Store
from vce_ray.training.train import train
ray.init(address=sys.argv[3])
train(RunConfig.model_validate_json(sys.argv[1]), Store(sys.argv[2]), {})
"""


def test_a_killed_training_goes_on_from_its_checkpoint(pair_set: Store, local_ray: str, tmp_path: Path) -> None:
    from vce_ray.training.train import train

    store = copy(pair_set, tmp_path / "killed")
    run = config(steps=40, checkpoint_every=2).model_dump_json()
    command = [sys.executable, "-c", SCRIPT, run, store.uri, local_ray]
    driver = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "2"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    snapshot = "checkpoints/checkpoint_manager_snapshot.json"  # Ray Train's word for what a training goes on from
    while not (store.exists(snapshot) and store.read_json(snapshot)["latest_checkpoint_result"]):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not store.exists("adapter/adapter_model.safetensors")
    latest = store.read_json(snapshot)["latest_checkpoint_result"]["checkpoint_dir_name"]
    behind = [json.loads(line) for line in store.read_bytes(f"checkpoints/{latest}/metrics.jsonl").splitlines()]
    history = train(config(steps=len(behind) + 2, checkpoint_every=2), store, {})
    assert history[: len(behind)] == behind, "steps were done again"
    assert [row["step"] for row in history] == list(range(1, len(behind) + 3))
    assert store.exists("adapter/adapter_model.safetensors")


def test_a_worker_asks_for_no_more_cpus_than_a_node_has() -> None:
    from vce_ray.training.train import on_cpus

    one, three = TrainConfig(num_workers=1), TrainConfig(num_workers=3, batch_size=3, keep_batch_size=3)
    assert on_cpus(one, [2], 1) == (1, 2) and on_cpus(three, [8], 1) == (3, 2) and on_cpus(one, [2], 3) == (1, 1)
    assert on_cpus(one, [1, 1, 1], 1) == (1, 1) and on_cpus(one, [0, 4, 6], 1) == (1, 6)
    assert on_cpus(three, [0, 4, 6], 1) == (3, 3) and on_cpus(one, [], 1) == (1, 1)


def test_by_default_cpus_of_a_node_share_a_training() -> None:
    from vce_ray.training.train import on_cpus

    assert on_cpus(TrainConfig(), [2], 1) == (2, 1) and on_cpus(TrainConfig(), [2], 2) == (1, 1)
    assert on_cpus(TrainConfig(), [1, 1, 1], 1) == (1, 1) and on_cpus(TrainConfig(), [16], 1) == (4, 4)
    assert on_cpus(TrainConfig(batch_size=6), [16], 1) == (2, 8) and on_cpus(TrainConfig(), [], 1) == (1, 1)


def test_reference_log_probs_of_another_base_are_refused() -> None:
    ours = base_stamp("emoji-world")
    check_stamp(dict(ours), ours)
    with pytest.raises(ValueError, match="base_revision feedfacefeedface, this run has"):
        check_stamp(ours | {"base_revision": "feedfacefeedface"}, ours)


def test_a_pair_without_reference_is_refused(pair_set: Store) -> None:
    pairs, reference = pair_set.stage("pairs").read(), pair_set.stage("reference").read()
    keep = pair_set.stage("keep").read()
    with pytest.raises(ValueError, match="2 pairs have no reference log-probs, the first is pair0"):
        TrainingData.from_tables(pairs, reference.slice(2), keep, config().train)
    with pytest.raises(ValueError, match="the pair set is empty"):
        TrainingData.from_tables(pairs.slice(0, 0), reference, keep, config().train)


def test_every_epoch_sees_every_row_once_in_its_own_order() -> None:
    epochs = [order(10, range(10 * epoch, 10 * epoch + 10), seed=3) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(10, range(7, 13), seed=3) == epochs[0][7:] + epochs[1][:3]


def test_workers_share_a_batch_without_overlap(pair_set: Store) -> None:
    pairs, reference, keep = (pair_set.stage(name).read() for name in ("pairs", "reference", "keep"))
    train = config().train
    data = TrainingData.from_tables(pairs, reference, keep, train)
    whole = data.pair_batch(3, 0, 1, train, seed=5)
    halves = [data.pair_batch(3, rank, 2, train, seed=5) for rank in (0, 1)]
    assert whole.prompts == halves[0].prompts + halves[1].prompts
    assert torch.equal(whole.chosen_ref_BT, torch.cat([half.chosen_ref_BT for half in halves]))
    assert whole.blank == halves[0].blank + halves[1].blank


def test_a_step_is_one_pass_and_the_sum_of_its_terms(pair_set: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under two prompt modes of three the anchor has rows of its own; what it shares is computed once."""
    train = TrainConfig(batch_size=6, keep_batch_size=2, keep_weight=0.5, anchor_weight=2.0)
    pairs, reference, keep = (pair_set.stage(name).read() for name in ("pairs", "reference", "keep"))
    data = TrainingData.from_tables(pairs, reference, keep, train)
    share = 6, 0, 1, train, 5
    batch, kept, safe = data.pair_batch(*share), data.keep_batch(*share), data.anchor_batch(*share)
    given = [a == b and not blank for a, b, blank in zip(batch.prompts, safe.prompts, batch.blank, strict=True)]
    assert sum(given) > 0 and sum(batch.blank) > 0 and sum(given) + sum(batch.blank) < 6, "a step of all three modes"
    model = load_model()
    passes: list[int] = []
    logits = model.image_logits

    def counted(prompts: Any, tokens: torch.Tensor) -> torch.Tensor:
        passes.append(len(tokens))
        return logits(prompts, tokens)

    with torch.no_grad():
        for parameter in model.language_model.layers.parameters():  # a policy that is not the base
            parameter.mul_(1.02)
        targets = Targets(load_model(), torch.no_grad)
        monkeypatch.setattr(model, "image_logits", counted)
        loss, figures = step_loss(model, targets, batch, kept, safe, 6, train)
        assert passes == [6 * 2 + 2 + 6 - sum(given)]
        plain, told = step_loss(model, targets, batch, None, None, 6, train)
        assert "anchor" not in told and plain.item() == pytest.approx(figures["preference"], abs=1e-4)
        held = model.encode_prompts(kept.prompts).blanked(kept.blank)
        preservation = preservation_loss(logits(held, kept.tokens_BT), keep_target(targets, kept)).mean().item()
        under = model.encode_prompts(safe.prompts)
        anchor = preservation_loss(logits(under, safe.tokens_BT), anchor_target(targets, safe)).mean().item()
    assert figures["preservation"] == pytest.approx(preservation, rel=1e-3) and preservation > 1e-3
    assert figures["anchor"] == pytest.approx(anchor, rel=1e-3) and anchor > 1e-3
    assert loss.item() == pytest.approx(figures["preference"] + 0.5 * preservation + 2 * anchor, rel=1e-3)
    assert figures["loss"] == loss.item()


class Counted:
    """In place of a reference: counts the rows that it is asked for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def target(self, values: list[float], rows: torch.Tensor) -> torch.Tensor:
        self.asked.append(rows.tolist())
        return torch.tensor(values)[rows, None, None].expand(-1, 2, 3)


def test_targets_are_computed_once_for_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(targets: Targets, *keys: str) -> list[float]:
        values = [float(ord(key)) for key in keys]
        return targets(keys, lambda reference, rows: model.target(values, rows))[:, 0, 0].tolist()

    model: Any = Counted()
    targets = Targets(model, nullcontext)
    assert ask(targets, "a", "b") == [97, 98] and ask(targets, "b", "c", "b") == [98, 99, 98]
    assert ask(targets, "c", "a") == [99, 97] and model.asked == [[0, 1], [1]]
    model.asked.clear()
    sharded = Targets(model, nullcontext, sharded=True)
    for _ in range(2):
        assert ask(sharded, "a", "b") == [97, 98]
    assert model.asked == [[0, 1], [0]]  # the other workers wait for its share of the weights
    model.asked.clear()
    monkeypatch.setattr(training_step, "TARGET_BYTES", 30)  # room for one of 24 bytes
    small = Targets(model, nullcontext)
    for _ in range(2):
        assert ask(small, "a", "b") == [97, 98]
    assert model.asked == [[0, 1], [1]]
