"""Measures the cost of the data plane, that is, of Ray Data and the store between actors, apart from any model.

    python -m benchmarks.data_plane plain                     # Ray Data against a plain loop, same decoder and batch
    python -m benchmarks.data_plane nodes 1 2 4 8 16 32       # a stand-in model on simulated nodes with fake GPUs
    python -m benchmarks.data_plane rows 1000 10000 100000 1000000

`nodes` and `rows` use a STAND-IN for a model, which sleeps for as long as a batch would take and returns made-up rows.
The nodes are Ray's test cluster on one machine: each is a raylet with a GPU that exists only as a resource number. This
measures scheduling and storage. Results go to docs/results/data_plane.json and replace those of the same command. Each
measurement runs in its own process, whose peak memory is the driver's.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from vce_ray.concepts.load import load_concept
from vce_ray.config import EMBEDDED, PoolConfig, SamplingConfig
from vce_ray.dataflow import schemas
from vce_ray.dataflow.fanout import Step, batched, flow, open_refs, publish
from vce_ray.dataflow.rows import Outcome, Row
from vce_ray.dataflow.task import Task
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store

RESULTS = Path("docs/results/data_plane.json")
BATCH, TOKENS, IMAGE_BYTES = 64, 576, 20_000
LATENCY_S = {"draw": 10.0, "caption": 2.5}
"""Per batch: about as long as 64 images of Janus-Pro-7B and their captions take on a large GPU."""
BATCHES_PER_NODE = 20
"""Enough that the first batches, which start one after another, do not dominate the rate."""
SOURCE = pa.schema([("prompt_id", pa.string()), ("prompt", pa.string()), ("seed", pa.int64())])
_TIMES = [("worker", pa.string()), ("began", pa.float64()), ("ended", pa.float64())]
DRAWN = pa.schema([("sample_id", pa.string()), ("prompt_id", pa.string()), ("tokens", schemas.TOKENS)])
DRAWN = pa.schema([*DRAWN, pa.field("image", pa.binary()), *_TIMES])
CAPTIONED = pa.schema([("caption_id", pa.string()), ("sample_id", pa.string()), ("caption", pa.string()), *_TIMES])
STAND_IN = "benchmarks.data_plane:StandIn"


class StandIn:
    """A stand-in for a model: takes as long for a batch, and returns made-up rows."""

    def __init__(self, what: str, latency_s: float, image_bytes: int):
        self.what, self.latency_s = what, latency_s
        self.image = os.urandom(image_bytes)

    def __call__(self, rows: list[Row]) -> Outcome:
        started = time.time()
        time.sleep(self.latency_s * len(rows) / BATCH)
        times = {"worker": str(os.getpid()), "began": started, "ended": time.time()}
        return [{"run": row["run"], **self._result(row["key"]), **times} for row in rows], []

    def _result(self, key: str) -> Row:
        if self.what == "draw":
            return {"sample_id": f"s{key}", "prompt_id": key, "tokens": [7] * TOKENS, "image": self.image}
        return {"caption_id": f"c{key}", "sample_id": key, "caption": "an image"}


def source(task: Task, count: int) -> None:
    """Publish `count` prompts in parts of a thousand."""
    stage, parts = task.store.stage("prompts"), []
    for start in range(0, count, 1000):
        ids = [f"{number:07d}" for number in range(start, min(start + 1000, count))]
        parts.append(stage.write_part(pa.table([ids, [f"prompt {i}" for i in ids], list(map(int, ids))], SOURCE)))
    stage.publish(parts, key="prompt_id")


def steps(latency: dict[str, float], image_bytes: int) -> tuple[Step, Step]:
    """Return the two steps of the stand-in: one that draws images and one that captions them."""
    settings = [{"what": what, "latency_s": seconds, "image_bytes": image_bytes} for what, seconds in latency.items()]
    alike = ("prompt", "seed")
    return (
        Step("drawn", "prompts", DRAWN, "prompt_id", STAND_IN, settings[0], alike=alike),
        Step("said", "drawn", CAPTIONED, "sample_id", STAND_IN, settings[1]),
    )


def nodes(count: int) -> dict[str, Any]:
    """Measure throughput on simulated nodes, with one drawing and one captioning actor per node."""
    import ray
    import ray.data
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(count):
        cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
    ray.init(address=cluster.address, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().wait_for_min_actors_s = 900  # starting all of them on one machine is slow
    rows = count * BATCHES_PER_NODE * BATCH
    with tempfile.TemporaryDirectory() as folder:
        task = Task("bench", _config(SamplingConfig()), load_concept("deer"), Store(folder))
        source(task, rows)
        draw, caption = steps(LATENCY_S, IMAGE_BYTES)
        pools = [
            ([draw], PoolConfig(min_actors=count, max_actors=count, gpus_per_actor=0.75)),
            ([caption], PoolConfig(min_actors=count, max_actors=count, gpus_per_actor=0.25)),
        ]
        started = time.time()
        finished = sum(1 for _ in flow(list(batched(open_refs(task, draw), BATCH)), pools, {"bench": task}, BATCH))
        seconds = time.time() - started
        assert finished == rows
        drawn = task.store.stage("drawn").inventory(["worker", "began", "ended"]).to_pandas()
        captioned = task.store.stage("said").inventory(["ended"]).to_pandas()
    ray.shutdown()
    cluster.shutdown()
    batches = drawn.groupby(["worker", "ended"]).agg(began=("began", "first"), rows=("key", "size")).reset_index()
    firsts = batches.groupby("worker")["ended"].min()
    later = rows - batches.loc[batches.groupby("worker")["ended"].idxmin(), "rows"].sum()
    ordered = batches.sort_values("ended")
    gaps = (ordered["began"] - ordered.groupby("worker")["ended"].shift()).dropna()
    ideal = count * BATCH / LATENCY_S["draw"]
    rate = later / (batches["ended"].max() - firsts.min())  # from the first finished batch to the end of the last
    return {
        "nodes": count,
        "rows": rows,
        "rows_per_s": round(float(rate), 1),
        "of_ideal": round(float(rate / ideal), 3),
        "gap_ms": round(1000 * float(gaps.median()), 1),
        "first_caption_s": round(float(captioned["ended"].min() - drawn["began"].min()), 1),
        "startup_s": round(float(batches["began"].min() - started), 1),
        "seconds": round(seconds, 1),
    }


def rows(count: int) -> dict[str, Any]:
    """Measure throughput and the driver's memory with many rows, through one pool of the stand-in with zero latency."""
    import ray

    ray.init(logging_level=logging.ERROR, include_dashboard=False)
    with tempfile.TemporaryDirectory() as folder:
        task = Task("bench", _config(SamplingConfig()), load_concept("deer"), Store(folder))
        source(task, count)
        draw, caption = steps({"draw": 0.0, "caption": 0.0}, image_bytes=200)
        started = time.time()
        batches = list(batched(open_refs(task, draw), 4 * BATCH))
        listed = time.time()
        finished = sum(1 for _ in flow(batches, [([draw, caption], PoolConfig())], {"bench": task}, 4 * BATCH))
        flowed = time.time()
        published = [publish(task, step)["rows"] for step in (draw, caption)]
        assert finished == count and published == [count, count]
    return {
        "rows": count,
        "refs_s": round(listed - started, 1),
        "flow_s": round(flowed - listed, 1),
        "publish_s": round(time.time() - flowed, 1),
        "rows_per_s": round(count / (flowed - listed), 1),
    }


def plain(count: int) -> dict[str, Any]:
    """Compare a plain loop with Ray Data for images of the embedded model, timed from each process's first batch on."""
    import ray
    import torch

    from vce_ray.models.families import default_sampling
    from vce_ray.pairs.generate import DrawUnsafe
    from vce_ray.pairs.prompts import erase_prompts
    from vce_ray.pipeline.pair_flow import pair_steps, publish_prompts

    sampling = default_sampling(EMBEDDED)
    concept = load_concept("deer")
    with tempfile.TemporaryDirectory() as folder:
        tasks = [Task(name, _config(sampling), concept, Store(folder).child(name)) for name in ("loop", "ray")]
        for task in tasks:
            publish_prompts(task.store.stage("prompts"), lambda: erase_prompts(concept, count, 0))
        rates = {}
        core = DrawUnsafe(EMBEDDED, sampling)
        stage = tasks[0].store.stage("unsafe")
        prompts = [
            row | {"run": "loop", "key": row["prompt_id"]} for row in tasks[0].store.stage("prompts").read().to_pylist()
        ]
        times = []
        for start in range(0, count, sampling.batch_size):
            drawn, _ = core(prompts[start : start + sampling.batch_size])
            stage.write_part(pa.Table.from_pylist(drawn, schemas.UNSAFE))
            times += [time.time()] * len(drawn)
        rates["loop"] = _rate(times, sampling.batch_size)
        threads = torch.get_num_threads()
        del core
        ray.init(logging_level=logging.ERROR, include_dashboard=False)
        task = tasks[1]
        step = pair_steps({"ray": task})["unsafe"]
        batches = list(batched(open_refs(task, step), sampling.batch_size))
        times = [time.time() for _ in flow(batches, [([step], PoolConfig())], {"ray": task}, sampling.batch_size)]
        rates["ray"] = _rate(times, sampling.batch_size * int(ray.cluster_resources()["CPU"]))
    return {
        "images": count,
        "batch": sampling.batch_size,
        "loop_images_per_s": round(rates["loop"], 2),
        "loop_threads": threads,
        "ray_images_per_s": round(rates["ray"], 2),
        "ray_over_loop": round(rates["ray"] / rates["loop"], 3),
    }


def _config(sampling: SamplingConfig) -> RunConfig:
    return RunConfig(concept="deer", sampling=sampling)


def _rate(times: list[float], warmup: int) -> float:
    """Return rows per second after the first `warmup` rows, given the time at which each row was finished."""
    return (len(times) - warmup) / (times[-1] - times[warmup - 1])


MEASURES = {"plain": plain, "nodes": nodes, "rows": rows}


def main() -> int:
    """Run each measurement in its own process, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("counts", nargs="*", type=int, default=[768])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        result = MEASURES[args.what](args.counts[0])
        result["driver_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        print(json.dumps({"what": args.what, **result}), flush=True)
        return 0
    for count in args.counts:
        command = [sys.executable, "-m", "benchmarks.data_plane", args.what, str(count)]
        done = subprocess.run([*command, "--here"], stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.strip().splitlines()[-1])
        row["command"] = " ".join(["python", *command[1:]])
        print({key: value for key, value in row.items() if key != "command"}, flush=True)
        old = json.loads(args.out.read_text()) if args.out.exists() else []
        kept = [other for other in old if other["command"] != row["command"]]
        table = sorted([*kept, row], key=lambda row: (row["what"], row.get("nodes", 0), row.get("rows", 0)))
        args.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in table) + "\n]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
