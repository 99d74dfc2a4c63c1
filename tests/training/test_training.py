"""Training on real Ray Train: the pair is learned, workers change nothing, a killed training goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import ray.train.torch
import torch
from safetensors.torch import load_file

from vce_ray.config import PROMPT_MODES, SamplingConfig, TrainConfig
from vce_ray.dataflow import schemas
from vce_ray.models.adapter import attach_adapter, remove_lora
from vce_ray.models.load import base_stamp, check_stamp, load_model
from vce_ray.run_config import RunConfig
from vce_ray.sampling import draw
from vce_ray.storage.store import Store
from vce_ray.training import step as training_step
from vce_ray.training.data import TrainingData, order
from vce_ray.training.fsdp import in_own_dtype, make_trainable, recompute_layers, reference_context
from vce_ray.training.loss import preservation_loss
from vce_ray.training.queue import Event, TrainingQueue
from vce_ray.training.reference import Reference
from vce_ray.training.step import (
    AnchorBatch,
    PairBatch,
    Targets,
    anchor_target,
    keep_target,
    pair_log_probs,
    step_loss,
)
from vce_ray.training.train import Trainings, on_cpus

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


def test_a_lane_of_two_workers_gives_the_same_trainings(finished: Store, local_ray, tmp_path: Path) -> None:
    """Whole weights, on the base that the run before has left, and sharded; the run that they are held to had one
    worker and a base of its own. A run between them that is not to be trained on fails alone."""
    record = finished.read_json("run.json")["config"]
    stores = {name: copy(finished, tmp_path / name) for name in ("whole", "poisoned", "again", "sharded")}
    stores["poisoned"].delete_prefix("reference")
    stage = stores["poisoned"].stage("reference")
    lacking = finished.stage("reference").read().slice(1)
    stage.publish([stage.write_part(lacking)], key="pair_id", **base_stamp("emoji-world"))
    runs = {
        name: RunConfig.model_validate(
            record | {"train": record["train"] | {"num_workers": 2, "shard": name == "sharded"}}
        )
        for name in stores
    }
    begun, ended = [], []
    lanes = Trainings([run.train for run in runs.values()], 1, began=begun.append, ended=ended.append)
    futures = {name: lanes.submit(name, runs[name], store, {"concept": "deer"}) for name, store in stores.items()}
    with pytest.raises(ValueError, match="1 pairs have no reference log-probs"):
        futures.pop("poisoned").result(timeout=600)
    for future in futures.values():
        future.result(timeout=600)
    lanes.close()
    assert begun == list(stores) and ended == list(futures)
    assert not stores["poisoned"].exists("training.json")
    alone, theirs = finished.read_json("training.json"), weights(finished, tmp_path / "alone")
    for name in futures:
        for one, two in zip(alone, stores[name].read_json("training.json"), strict=True):
            for figure in ("loss", "margin", "preservation", "gradient_norm"):
                assert two[figure] == pytest.approx(one[figure], abs=2e-4), (name, figure, one["step"])
        ours = weights(stores[name], tmp_path / f"weights-{name}")
        assert ours.keys() == theirs.keys()
        assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 2e-3


SCRIPT = """
import sys, ray
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store
from vce_ray.training.train import Trainings
ray.init(address=sys.argv[3])
run = RunConfig.model_validate_json(sys.argv[1])
Trainings([run.train], 1, print, print).submit("killed", run, Store(sys.argv[2]), {}).result()
"""


def test_a_killed_training_goes_on_from_its_checkpoint(pair_set: Store, local_ray: str, tmp_path: Path) -> None:
    store = copy(pair_set, tmp_path / "killed")
    run = config(steps=40, checkpoint_every=2).model_dump_json()
    command = [sys.executable, "-c", SCRIPT, run, store.uri, local_ray]
    driver = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "2"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not store.exists("checkpoints/last.json"):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not store.exists("adapter/adapter_model.safetensors")
    latest = settled(store)
    behind = [json.loads(line) for line in store.read_bytes(f"checkpoints/{latest}/0/metrics.jsonl").splitlines()]
    assert len(behind) == latest
    history = trained(config(steps=len(behind) + 2, checkpoint_every=2), store)
    assert history[: len(behind)] == behind, "steps were done again"
    assert [row["step"] for row in history] == list(range(1, len(behind) + 3))
    assert store.exists("adapter/adapter_model.safetensors")
    assert not store.list("checkpoints"), "nothing goes on from them any more"


@pytest.mark.slow
def test_a_training_that_fails_each_time_fails_alone(pair_set: Store, local_ray: str, tmp_path: Path) -> None:
    """Its workers are started anew four times; then the lane goes on with the next run."""
    bad, good = (copy(pair_set, tmp_path / name) for name in ("bad", "good"))
    keep = pair_set.stage("keep").read()
    tokens = pa.array([[30_000] * 64] * keep.num_rows, schemas.TOKENS)  # of no image vocabulary
    bad.delete_prefix("keep")
    stage = bad.stage("keep")
    stage.publish([stage.write_part(keep.set_column(2, "tokens", tokens))], key="sample_id")
    lanes = Trainings([config().train], 1, began=print, ended=print)
    failing, passing = lanes.submit("bad", config(), bad, {}), lanes.submit("good", config(), good, {})
    with pytest.raises(ray.train.TrainingFailedError, match="index out of range"):
        failing.result(timeout=600)
    passing.result(timeout=600)
    lanes.close()
    assert good.exists("training.json") and not bad.exists("training.json")


def trained(run: RunConfig, store: Store) -> list[dict]:
    lanes = Trainings([run.train], 1, began=print, ended=print)
    lanes.submit("alone", run, store, {}).result(timeout=600)
    lanes.close()
    return store.read_json("training.json")


def settled(store: Store) -> int:
    """The step of the last checkpoint, once what wrote it is gone: a worker outlives its driver for a moment."""
    seen = -1
    while (step := store.read_json("checkpoints/last.json")["step"]) != seen:
        seen = step
        time.sleep(4)
    return seen


def test_a_queue_gives_a_lane_what_it_lost_and_gives_up_what_is_lost_too_often() -> None:
    async def scenario() -> None:
        queue, fault = TrainingQueue(1), ValueError("not to be trained on")
        assert await queue.add("a", {"run": "a"}) == 0 and await queue.add("b", {"run": "b"}) is None
        assert await queue.take(0) == {"run": "a"} == await queue.take(0), "its workers were lost"
        assert await queue.lose(0) is None and await queue.goes_on(0), "lost no more than twice"
        assert await queue.take(0) == {"run": "a"} == await queue.take(0)
        assert await queue.lose(0) == "a"
        assert await queue.take(0) == {"run": "b"}
        await queue.end(0, fault)
        assert await queue.take(0) is None
        assert await queue.add("c", {"run": "c"}) is None and await queue.goes_on(0), "it came while the lane closed"
        assert await queue.lose(0) == "c", "no worker took it up: it fails by what kept them from it"
        assert await queue.lose(0) is None and not await queue.goes_on(0)
        assert await queue.add("d", {"run": "d"}) == 0
        await queue.close()
        events = [event async for event in all_events(queue)]
        assert [(event.name, event.kind, event.fault) for event in events] == [
            ("a", "begun", None),
            ("b", "begun", None),
            ("b", "ended", fault),
        ]

    asyncio.run(scenario())


async def all_events(queue: TrainingQueue) -> AsyncIterator[Event]:
    while (event := await queue.next_event()) is not None:
        yield event


def test_layers_that_are_computed_again_and_adapters_in_bfloat16_change_no_gradient(pair_set: Store) -> None:
    """On a net of bfloat16, as Janus-Pro is trained on GPUs."""
    table = pair_set.stage("pairs").read().slice(0, 2).to_pylist()
    prompts = [row["prompt"] for row in table]
    chosen, rejected = (torch.tensor([row[side] for row in table]) for side in ("chosen", "rejected"))
    zeros = torch.zeros(chosen.shape)
    pairs = PairBatch(prompts, [False, False], torch.arange(2), chosen, rejected, zeros, zeros)
    gradients = []
    for change in (lambda net: None, recompute_layers):
        model = load_model(dtype="bfloat16")
        torch.manual_seed(0)
        make_trainable(model.net, TrainConfig())
        for name, parameter in model.net.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.02)
        change(model.net)
        targets = Targets(model, reference_context(model, model))
        with in_own_dtype(model.net) if change is recompute_layers else nullcontext():
            loss, _ = step_loss(
                model, targets, pairs, None, None, 0, TrainConfig(keep_weight=0, allow_no_preservation=True)
            )
            loss.backward()
        trained = [parameter for parameter in model.net.parameters() if parameter.requires_grad]
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)
        gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98
    remove_lora(model.net)
    assert model.net.state_dict().keys() == load_model(dtype="bfloat16").net.state_dict().keys()


def test_a_worker_asks_for_no_more_cpus_than_a_node_has() -> None:
    one, three = TrainConfig(num_workers=1), TrainConfig(num_workers=3, batch_size=3, keep_batch_size=3)
    assert on_cpus([one], [2], 1) == (1, 2) and on_cpus([three], [8], 1) == (3, 2) and on_cpus([one], [2], 3) == (1, 1)
    assert on_cpus([one], [1, 1, 1], 1) == (1, 1) and on_cpus([one], [0, 4, 6], 1) == (1, 6)
    assert on_cpus([three], [0, 4, 6], 1) == (3, 3) and on_cpus([one], [], 1) == (1, 1)


def test_by_default_cpus_of_a_node_share_a_training() -> None:
    assert on_cpus([TrainConfig()], [2], 1) == (2, 1) and on_cpus([TrainConfig()], [2], 2) == (1, 1)
    assert on_cpus([TrainConfig()], [1, 1, 1], 1) == (1, 1) and on_cpus([TrainConfig()], [16], 1) == (4, 4)
    assert on_cpus([TrainConfig(), TrainConfig(batch_size=6)], [16], 1) == (2, 8) and on_cpus(
        [TrainConfig()], [], 1
    ) == (1, 1)


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
