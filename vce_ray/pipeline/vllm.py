"""Captions images with a vision model in vLLM, through ray.data.llm:

    row references -> rows with images -> engine -> cleaning, refining and publishing, as for every captioner

Images pass through Ray's object store here, because the stages of ray.data.llm read them from their input. Everywhere
else only row references travel (dataflow/fanout.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data

from vce_ray.config import PoolConfig
from vce_ray.dataflow.fanout import Step, Worker, await_nodes, results_of
from vce_ray.dataflow.rows import Row
from vce_ray.dataflow.schemas import ROW_REF
from vce_ray.dataflow.task import Task
from vce_ray.errors import UserError
from vce_ray.pairs.answers import ANSWER_TOKENS, caption_question, question_for

MAX_CONTEXT = 4096
"""Context length in tokens: enough for one image, the question and the answer. Models allow far more, for documents and
video, and vLLM requires KV cache for at least one sequence of full length."""
CPU_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Environment of vLLM without a GPU, unless already set: GiB of KV cache, and threads that are not bound to cores."""
HELPER_CPUS = 0.1
"""CPUs of the tasks and actors around the engine, which mostly wait for it."""
_ERROR = "__inference_error__"
"""Column in which ray.data.llm reports a row's error."""
_ANSWER = ("generated_text", "num_generated_tokens")


def caption_refs(
    batches: Sequence[pa.Table],
    step: Step,
    followers: Mapping[str, Step],
    tasks: Mapping[str, Task],
    model: str,
    pool: PoolConfig,
    wait_s: float,
) -> Iterator[Row]:
    """Caption the unsafe images behind row references. Each comes out once, as a reference to a caption or a reject.

    Args:
        batches: references whose next step is `step`; a batch is submitted to the engine together.
        step: the step `captions`. Its core takes the answers from the rows (caption.ANSWER).
        followers: the step after each stage.
        tasks: the runs by name.
        model: hub id, or a folder that exists on every machine.
        pool: number and resources of the engines. Several GPUs per engine are used by tensor parallelism.
        wait_s: seconds to wait for the nodes that the pool asks for.

    Raises:
        UserError: the cluster has no room for the pool within `wait_s`, or the model's config cannot be read.
    """
    if not batches:
        return
    await_nodes(pool, wait_s)
    tasks = dict(tasks)
    rows = ray.data.from_blocks(list(batches)).map_batches(
        partial(_with_images, tasks), batch_size=None, batch_format="pyarrow", num_cpus=HELPER_CPUS
    )
    answers = _engine(model, pool, max(map(len, batches)), len(batches))(rows)
    refs = answers.select_columns([*ROW_REF.names, *_ANSWER, _ERROR]).map_batches(
        _CaptionWorker,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_kwargs={"steps": [step], "followers": dict(followers), "tasks": tasks},
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=HELPER_CPUS,
    )
    yield from results_of(refs)


def _with_images(tasks: Mapping[str, Task], batch: pa.Table) -> pa.Table:
    """Add the image behind each row reference, and the question to ask about it. Each part is read once per batch."""
    parts: dict[tuple[str, str, str], dict[str, bytes]] = {}
    images, questions = [], []
    for ref in batch.to_pylist():
        place = ref["run"], ref["stage"], ref["part"]
        if place not in parts:
            part = tasks[ref["run"]].store.stage(ref["stage"]).read_part(ref["part"])
            parts[place] = dict(zip(part[part.column_names[0]].to_pylist(), part["image"].to_pylist(), strict=True))
        images.append(parts[place][ref["key"]])
        questions.append(question_for(tasks[ref["run"]].concept.kind))
    refs = batch.select(ROW_REF.names).append_column("image", pa.array(images, pa.binary()))
    return refs.append_column("question", pa.array(questions, pa.string()))


def _request(row: Row) -> Row:
    """Return the engine's input for a row: the chat message and the sampling parameters."""
    return {
        "image": b"",  # the message contains it: later stages must not carry the bytes twice
        "messages": [{"role": "user", "content": caption_question(row["image"], row["question"])}],
        "sampling_params": {"temperature": 0.0, "max_tokens": ANSWER_TOKENS},
    }


def _response(row: Row) -> Row:
    """Return the columns that answered rows have in common with those whose inference failed."""
    return {name: row[name] for name in (*ROW_REF.names, *_ANSWER)}


class _CaptionWorker(Worker):
    """Takes row references with their answers through the step `captions`."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        self.answers = {(row["run"], row["key"]): _answer(row) for row in batch.to_pylist()}
        return super().__call__(batch.select(ROW_REF.names))

    def row(self, ref: Row) -> Row:
        """Return the row behind a reference, with its answer."""
        return super().row(ref) | self.answers[ref["run"], ref["key"]]


def _answer(row: Row) -> Row:
    """Return the columns caption.ANSWER. Ray drops the finish reason, so truncation shows in the number of tokens."""
    cut_off = (row["num_generated_tokens"] or 0) >= ANSWER_TOKENS
    return {"answer": row["generated_text"] or "", "cut_off": cut_off, "failure": row[_ERROR] or ""}


def _engine(model: str, pool: PoolConfig, batch_size: int, batches: int) -> Any:
    """Return the processor of ray.data.llm that turns rows with images into rows with answers."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    gpus = ray.cluster_resources().get("GPU", 0.0)
    gpus_each = (1.0 if gpus else 0.0) if pool.gpus_per_actor is None else pool.gpus_per_actor
    workers = max(1, int(gpus_each))
    available = int(gpus / gpus_each) if gpus_each else 1
    max_engines = max(1, min(pool.max_actors or max(pool.min_actors, available), batches))
    settings: dict[str, Any] = {"limit_mm_per_prompt": {"image": 1, "video": 0}, "max_model_len": _context(model)}
    environment = {}
    if gpus_each:
        # an engine on a share of a GPU must leave the rest of its memory to others
        settings |= {"tensor_parallel_size": workers, "gpu_memory_utilization": 0.9 * min(1.0, gpus_each)}
    else:
        settings["enforce_eager"] = True
        environment = {name: os.environ.get(name, value) for name, value in CPU_SETTINGS.items()}
    bundle = {"CPU": 1.0, "GPU": gpus_each / workers} if gpus_each else {"CPU": 0.5}
    helper = {"num_cpus": HELPER_CPUS, "concurrency": 1}
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs=settings,
        batch_size=batch_size,
        concurrency=(min(pool.min_actors, max_engines), max_engines),
        accelerator_type=pool.accelerator,
        placement_group_config={"bundles": [bundle] * workers},
        runtime_env={"env_vars": environment},
        prepare_multimodal_stage={"enabled": True, "chat_template_content_format": "openai", **helper},
        chat_template_stage={"enabled": True, **helper},
        tokenize_stage=False,  # the engine tokenizes and detokenizes itself
        detokenize_stage=False,
        should_continue_on_error=True,
        log_engine_metrics=False,
    )
    cpus = {"num_cpus": HELPER_CPUS}
    processor = build_processor(config, _request, _response, preprocess_map_kwargs=cpus, postprocess_map_kwargs=cpus)
    if pool.labels:  # the config has no field for label selectors
        processor.get_stage_by_name("vLLMEngineStage").map_batches_kwargs["label_selector"] = dict(pool.labels)
    return processor


def _context(model: str) -> int:
    """Return the engine's context length in tokens. Raises UserError if the model's config cannot be read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"captioner 'vllm:{model}' cannot be read: {error}") from error
    return min(MAX_CONTEXT, getattr(config.get_text_config(), "max_position_embeddings", MAX_CONTEXT))
