"""What the data plane itself costs: Ray Data and the store between actors, apart from any model.

    python -m benchmarks.data_plane plain                     # Ray Data against a plain loop, same decoder and batch
    python -m benchmarks.data_plane nodes 1 2 4 8 16 32       # a stand-in model on simulated nodes with fake GPUs
    python -m benchmarks.data_plane rows 1000 10000 100000 1000000

`nodes` and `rows` use a STAND-IN for a model: it sleeps as long as a batch takes and makes up what it draws. The nodes
are Ray's own, all on one machine, each a raylet with one GPU that is a number; what is measured is scheduling and
storing. Figures go to docs/results/data_plane.json, in place of older ones of the same command; each measurement has a
process of its own, whose peak memory is the driver's.
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

from vce_ray.concepts.concept import load_concept
from vce_ray.config import PoolConfig
from vce_ray.dataflow import schemas
from vce_ray.dataflow.fanout import Step, batched, flow, open_claims, publish
from vce_ray.dataflow.rows import Outcome, Row
from vce_ray.dataflow.task import Task
from vce_ray.run_config import RunConfig
from vce_ray.storage.store import Store

RESULTS = Path("docs/results/data_plane.json")
BATCH, TOKENS, IMAGE_BYTES = 64, 576, 20_000
LATENCY_S = {"draw": 10.0, "caption": 2.5}
"""Of a batch: about what 64 pictures of Janus-Pro-7B and their captions take on a large GPU."""
BATCHES_OF_A_NODE = 20
"""Long enough that the first batches, which start one after the other, do not rule the rate."""
SOURCE = pa.schema([("prompt_id", pa.string()), ("prompt", pa.string()), ("seed", pa.int64())])
_TOLD = [("worker", pa.string()), ("began", pa.float64()), ("ended", pa.float64())]
DRAWN = pa.schema([("sample_id", pa.string()), ("prompt_id", pa.string()), ("tokens", schemas.TOKENS)])
DRAWN = pa.schema([*DRAWN, pa.field("image", pa.binary()), *_TOLD])
SAID = pa.schema([("caption_id", pa.string()), ("sample_id", pa.string()), ("caption", pa.string()), *_TOLD])
STAND_IN = "benchmarks.data_plane:StandIn"


class StandIn:
    """Not a model: takes as long as one for a batch, and makes up its rows."""

    def __init__(self, what: str, latency_s: float, image_bytes: int):
        self.what, self.latency_s = what, latency_s
        self.image = os.urandom(image_bytes)

    def __call__(self, rows: list[Row]) -> Outcome:
        began = time.time()
        time.sleep(self.latency_s * len(rows) / BATCH)
        told = {"worker": str(os.getpid()), "began": began, "ended": time.time()}
        made = [{"run": row["run"], **self._made(row["key"]), **told} for row in rows]
        return made, []

    def _made(self, key: str) -> Row:
        if self.what == "draw":
            return {"sample_id": f"s{key}", "prompt_id": key, "tokens": [7] * TOKENS, "image": self.image}
        return {"caption_id": f"c{key}", "sample_id": key, "caption": "a picture"}


def source(task: Task, count: int) -> None:
    """Publishes prompts, a thousand to a part."""
    stage, parts = task.store.stage("prompts"), []
    for start in range(0, count, 1000):
        ids = [f"{number:07d}" for number in range(start, min(start + 1000, count))]
        parts.append(stage.write_part(pa.table([ids, [f"prompt {i}" for i in ids], list(map(int, ids))], SOURCE)))
    stage.publish(parts, key="prompt_id")


def steps(latency: dict[str, float], image_bytes: int) -> tuple[Step, Step]:
    """A step that draws and one that captions, of the stand-in."""
    settings = [{"what": what, "latency_s": seconds, "image_bytes": image_bytes} for what, seconds in latency.items()]
    alike = ("prompt", "seed")
    return (
        Step("drawn", "prompts", DRAWN, "prompt_id", STAND_IN, settings[0], alike=alike),
        Step("said", "drawn", SAID, "sample_id", STAND_IN, settings[1]),
    )


def nodes(count: int) -> dict[str, Any]:
    """Throughput on so many simulated nodes: pools that draw and that caption, one actor of each to a node."""
    import ray
    import ray.data
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(count):
        cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
    ray.init(address=cluster.address, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().wait_for_min_actors_s = 900  # starting them on one machine takes long
    rows = count * BATCHES_OF_A_NODE * BATCH
    with tempfile.TemporaryDirectory() as folder:
        task = Task("bench", RunConfig(concept="deer"), load_concept("deer"), Store(folder))
        source(task, rows)
        draw, say = steps(LATENCY_S, IMAGE_BYTES)
        pools = [
            ([draw], PoolConfig(min_actors=count, max_actors=count, gpus_per_actor=0.75)),
            ([say], PoolConfig(min_actors=count, max_actors=count, gpus_per_actor=0.25)),
        ]
        began = time.time()
        ended = sum(1 for _ in flow(list(batched(open_claims(task, draw), BATCH)), pools, {"bench": task}, BATCH))
        seconds = time.time() - began
        assert ended == rows
        drawn = task.store.stage("drawn").inventory(["worker", "began", "ended"]).to_pandas()
        said = task.store.stage("said").inventory(["ended"]).to_pandas()
    ray.shutdown()
    cluster.shutdown()
    batches = drawn.groupby(["worker", "ended"]).agg(began=("began", "first"), rows=("key", "size")).reset_index()
    firsts = batches.groupby("worker")["ended"].min()
    later = rows - batches.loc[batches.groupby("worker")["ended"].idxmin(), "rows"].sum()
    ordered = batches.sort_values("ended")
    gaps = (ordered["began"] - ordered.groupby("worker")["ended"].shift()).dropna()
    ideal = count * BATCH / LATENCY_S["draw"]
    rate = later / (batches["ended"].max() - firsts.min())  # from the first batch that is there to the very last
    return {
        "nodes": count,
        "rows": rows,
        "rows_per_s": round(float(rate), 1),
        "of_ideal": round(float(rate / ideal), 3),
        "gap_ms": round(1000 * float(gaps.median()), 1),
        "first_caption_s": round(float(said["ended"].min() - drawn["began"].min()), 1),
        "startup_s": round(float(batches["began"].min() - began), 1),
        "seconds": round(seconds, 1),
    }


def rows(count: int) -> dict[str, Any]:
    """Rows through one pool of the stand-in at no latency: what the driver holds, and how fast it goes."""
    import ray

    ray.init(logging_level=logging.ERROR, include_dashboard=False)
    with tempfile.TemporaryDirectory() as folder:
        task = Task("bench", RunConfig(concept="deer"), load_concept("deer"), Store(folder))
        source(task, count)
        draw, say = steps({"draw": 0.0, "caption": 0.0}, image_bytes=200)
        began = time.time()
        batches = list(batched(open_claims(task, draw), 4 * BATCH))
        claimed = time.time()
        ended = sum(1 for _ in flow(batches, [([draw, say], PoolConfig())], {"bench": task}, 4 * BATCH))
        flowed = time.time()
        published = [publish(task, step)["rows"] for step in (draw, say)]
        assert ended == count and published == [count, count]
    return {
        "rows": count,
        "claim_s": round(claimed - began, 1),
        "flow_s": round(flowed - claimed, 1),
        "publish_s": round(time.time() - flowed, 1),
        "rows_per_s": round(count / (flowed - claimed), 1),
    }


def plain(count: int) -> dict[str, Any]:
    """The embedded model's pictures by a plain loop and by Ray Data, from when each process has drawn a batch."""
    import ray
    import torch

    from vce_ray.config import default_sampling
    from vce_ray.pairs.generate import DrawUnsafe
    from vce_ray.pairs.prompts import erase_prompts
    from vce_ray.pipeline.pair_flow import pair_steps, publish_rows

    sampling = default_sampling("emoji-world")
    concept = load_concept("deer")
    with tempfile.TemporaryDirectory() as folder:
        tasks = [Task(name, RunConfig(concept="deer"), concept, Store(folder).child(name)) for name in ("loop", "ray")]
        for task in tasks:
            publish_rows(task.store.stage("prompts"), erase_prompts(concept, count, 0))
        rates = {}
        core = DrawUnsafe("emoji-world", sampling)
        stage = tasks[0].store.stage("unsafe")
        asked = [
            row | {"run": "loop", "key": row["prompt_id"]} for row in tasks[0].store.stage("prompts").read().to_pylist()
        ]
        ends = []
        for start in range(0, count, sampling.batch_size):
            made, _ = core(asked[start : start + sampling.batch_size])
            stage.write_part(pa.Table.from_pylist(made, schemas.UNSAFE))
            ends += [time.time()] * len(made)
        rates["loop"] = _rate(ends, sampling.batch_size)
        threads = torch.get_num_threads()
        del core
        ray.init(logging_level=logging.ERROR, include_dashboard=False)
        task = tasks[1]
        step = pair_steps({"ray": task})["unsafe"]
        batches = list(batched(open_claims(task, step), sampling.batch_size))
        ends = [time.time() for _ in flow(batches, [([step], PoolConfig())], {"ray": task}, sampling.batch_size)]
        rates["ray"] = _rate(ends, sampling.batch_size * int(ray.cluster_resources()["CPU"]))
    return {
        "images": count,
        "batch": sampling.batch_size,
        "loop_images_per_s": round(rates["loop"], 2),
        "loop_threads": threads,
        "ray_images_per_s": round(rates["ray"], 2),
        "ray_over_loop": round(rates["ray"] / rates["loop"], 3),
    }


def _rate(ends: list[float], first: int) -> float:
    """Rows per second once the first so many are there, from the times at which rows were."""
    return (len(ends) - first) / (ends[-1] - ends[first - 1])


MEASURES = {"plain": plain, "nodes": nodes, "rows": rows}


def main() -> int:
    """Measures what is asked for, each in a process of its own, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("counts", nargs="*", type=int, default=[768])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        figures = MEASURES[args.what](args.counts[0])
        figures["driver_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        print(json.dumps({"what": args.what, **figures}), flush=True)
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
