"""Captions by a vision model in vLLM, through ray.data.llm:

    claims -> rows with pictures -> engine -> clean-up, refining and publishing, as for every captioner

Pictures travel through Ray's object store here, as those stages want it; elsewhere only claims do (fanout.py).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data

from vce_ray.config import PoolConfig
from vce_ray.dataflow.fanout import Step, Worker, await_nodes, ends
from vce_ray.dataflow.rows import Row
from vce_ray.dataflow.schemas import CLAIM
from vce_ray.dataflow.task import Task
from vce_ray.errors import UserError
from vce_ray.pairs.captioner import ANSWER_TOKENS, QUESTION

LONGEST_CONTEXT = 4096
"""Tokens of a picture, the question and its answer. The contexts of long documents and films would want memory."""
CPU_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Of vLLM where there is no GPU, unless the environment has its own: GiB of its cache, and threads that share cores."""
SMALL = 0.1
"""CPUs of the actors around the engine, which wait for it most of the time."""
_FAILURE = "__inference_error__"
_ANSWER = ("generated_text", "num_generated_tokens")


def caption_claims(
    batches: Sequence[pa.Table],
    step: Step,
    followers: Mapping[str, Step],
    tasks: Mapping[str, Task],
    model: str,
    pool: PoolConfig,
    wait_s: float,
) -> Iterator[Row]:
    """Takes claims to unsafe pictures through vLLM; each comes out once, as a claim to a caption or to a reject.

    Args:
        batches: claims whose next step is `step`, as many as the engine is given together.
        step: captions; its Describe takes the answers that rows bring.
        followers: the step after each stage.
        model: folder, on every machine, or hub id.
        pool: how many engines, and on what. More than one GPU for each of them are used by tensor parallelism.
        wait_s: how long what the pool asks for may take to come.

    Raises:
        UserError: it has not come, or the model cannot be read.
    """
    if not batches:
        return
    await_nodes(pool, wait_s)
    tasks = dict(tasks)
    rows = ray.data.from_blocks(list(batches)).map_batches(
        partial(_with_pictures, tasks), batch_size=None, batch_format="pyarrow", num_cpus=SMALL
    )
    answers = _engine(model, pool, max(map(len, batches)), len(batches))(rows)
    claims = answers.select_columns([*CLAIM.names, *_ANSWER, _FAILURE]).map_batches(
        _Publish,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_kwargs={"steps": [step], "followers": dict(followers), "tasks": tasks},
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=SMALL,
    )
    yield from ends(claims)


def _with_pictures(tasks: Mapping[str, Task], batch: pa.Table) -> pa.Table:
    """Claims with the pictures that they stand for."""
    parts: dict[tuple[str, str, str], dict[str, bytes]] = {}
    images = []
    for claim in batch.to_pylist():
        place = claim["run"], claim["stage"], claim["part"]
        if place not in parts:
            part = tasks[claim["run"]].store.stage(claim["stage"]).read_part(claim["part"])
            parts[place] = dict(zip(part[part.column_names[0]].to_pylist(), part["image"].to_pylist(), strict=True))
        images.append(parts[place][claim["key"]])
    return batch.select(CLAIM.names).append_column("image", pa.array(images, pa.binary()))


def _ask(row: Row) -> Row:
    """What the engine is asked about a row's picture; the bytes travel no further."""
    picture = "data:image/png;base64," + base64.b64encode(row["image"]).decode()
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": QUESTION}]
    return {
        "image": b"",
        "messages": [{"role": "user", "content": content}],
        "sampling_params": {"temperature": 0.0, "max_tokens": ANSWER_TOKENS},
    }


def _kept(row: Row) -> Row:
    """The columns that rows with an answer have in common with those whose inference failed."""
    return {name: row[name] for name in (*CLAIM.names, *_ANSWER)}


class _Publish(Worker):
    """Takes answered claims through the step of captions."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        self.answers = {(row["run"], row["key"]): _answer(row) for row in batch.to_pylist()}
        return super().__call__(batch.select(CLAIM.names))

    def row(self, claim: Row) -> Row:
        """The row of a claim, with its answer."""
        return super().row(claim) | self.answers[claim["run"], claim["key"]]


def _answer(row: Row) -> Row:
    """The columns of caption.ANSWER. Ray hands no finish reason on: an answer of all tokens was cut off."""
    cut_off = (row["num_generated_tokens"] or 0) >= ANSWER_TOKENS
    return {"answer": row["generated_text"] or "", "cut_off": cut_off, "failure": row[_FAILURE] or ""}


def _engine(model: str, pool: PoolConfig, batch_size: int, batches: int) -> Any:
    """The stages of ray.data.llm from rows with pictures to rows with answers."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    gpus = ray.cluster_resources().get("GPU", 0.0)
    each = (1.0 if gpus else 0.0) if pool.gpus_per_actor is None else pool.gpus_per_actor
    workers = max(1, int(each))
    largest = max(1, min(pool.max_actors or max(pool.min_actors, int(gpus / each) if each else 1), batches))
    settings: dict[str, Any] = {"limit_mm_per_prompt": {"image": 1, "video": 0}, "max_model_len": _context(model)}
    environment = {}
    if each:
        settings |= {"tensor_parallel_size": workers, "gpu_memory_utilization": 0.9 * min(1.0, each)}
    else:
        settings["enforce_eager"] = True
        environment = {name: os.environ.get(name, value) for name, value in CPU_SETTINGS.items()}
    bundle = {"CPU": 1.0, "GPU": each / workers} if each else {"CPU": 0.5}
    beside = {"num_cpus": SMALL, "concurrency": 1}
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs=settings,
        batch_size=batch_size,
        concurrency=(min(pool.min_actors, largest), largest),
        accelerator_type=pool.accelerator,
        placement_group_config={"bundles": [bundle] * workers},
        runtime_env={"env_vars": environment},
        prepare_multimodal_stage={"enabled": True, "chat_template_content_format": "openai", **beside},
        chat_template_stage={"enabled": True, **beside},
        tokenize_stage=False,  # the engine does both
        detokenize_stage=False,
        should_continue_on_error=True,
        log_engine_metrics=False,
    )
    small = {"num_cpus": SMALL}
    processor = build_processor(config, _ask, _kept, preprocess_map_kwargs=small, postprocess_map_kwargs=small)
    if pool.labels:
        processor.get_stage_by_name("vLLMEngineStage").map_batches_kwargs["label_selector"] = dict(pool.labels)
    return processor


def _context(model: str) -> int:
    """Tokens of the engine's context. Raises UserError where the model's config cannot be read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"captioner 'vllm:{model}' cannot be read: {error}") from error
    return min(LONGEST_CONTEXT, getattr(config.get_text_config(), "max_position_embeddings", LONGEST_CONTEXT))
