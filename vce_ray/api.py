"""The Python API: what `import vce_ray` offers, for notebooks and scripts. docs/python.md shows it at work.

Settings are RunConfig's, as keywords; a section is a dict or its config model:

    erasure = vce_ray.erase("deer", store="runs", train={"steps": 40})
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vce_ray.config import EMBEDDED, SEED_LIMIT
from vce_ray.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

    from vce_ray.models.base import ImageModel
    from vce_ray.storage.store import Store


@dataclass(frozen=True)
class Erasure:
    """What `erase` and `make_pairs` return: a run and where its results are."""

    name: str
    store: Store
    """Everything that the run made."""
    metrics: dict[str, Any]
    """Metrics of its evaluation (evaluation/metrics/); empty if it stopped at its pairs."""

    @property
    def adapter(self) -> str:
        """Path or URI of the adapter, for `load_model` and `vce-ray serve`."""
        return self.store.child("adapter").uri

    @property
    def report(self) -> str:
        """Where the report is."""
        return self.store.where("report/index.html")

    def pairs(self) -> pa.Table:
        """Read the pair set: prompts, captions, tokens and images of both sides."""
        return self.store.stage("pairs").read()


def load_model(base: str = EMBEDDED, adapter: str | None = None, device: str | None = None) -> ImageModel:
    """Load a base model, with an adapter merged into it if one is given.

    Args:
        base: emoji-world, a checkpoint folder, a folder in a store, or a hub id.
        adapter: folder or store URI, such as `Erasure.adapter`.
        device: 'cuda' or 'cpu'. Default: the GPU, if there is one.

    Raises:
        UserError: the base is unknown, or the adapter is damaged or was trained on another revision of the base.
        StoreError: the store cannot be reached or does not have the folder.
    """
    from vce_ray.models.adapter_location import local_adapter
    from vce_ray.models.load import load_model as load

    with local_adapter(adapter) as folder:
        return load(base, device, folder)


def draw(model: ImageModel, prompts: Sequence[str] | str, seed: int = 0, **sampling: Any) -> list[Image]:
    """Draw one image for each prompt, with seeds `seed`, `seed + 1`, ...

    Args:
        model: what `load_model` returned.
        sampling: SamplingConfig settings, such as guidance_scale=3; the base's recommended ones by default.

    Raises:
        UserError: a prompt is empty, too long or not valid Unicode, or a seed or setting is out of range.
    """
    from PIL import Image

    from vce_ray.pipeline.preflight import validated_sampling
    from vce_ray.sampling import draw as draw_tokens

    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    settings = validated_sampling(model.ref, sampling)
    model.check_prompts(prompts)
    last = SEED_LIMIT - len(prompts)
    if not 0 <= seed <= last:
        raise UserError(f"seed {seed} is out of range: give 0 to {last} for {len(prompts)} images")
    tokens = draw_tokens(model, prompts, list(range(seed, seed + len(prompts))), settings)
    return [Image.fromarray(image) for image in model.decode_pixels(tokens)]


def make_pairs(concept: str, log: Callable[[str], None] = print, **settings: Any) -> Erasure:
    """Make and publish the pair set of a concept, without training. `erase` with the same settings goes on from it.

    Raises:
        UserError, StoreError: as `erase` does.
    """
    return erase(concept, pairs_only=True, log=log, **settings)


def erase(concept: str, *, pairs_only: bool = False, log: Callable[[str], None] = print, **settings: Any) -> Erasure:
    """Erase a concept, from prompts to report. The same call resumes a run that was stopped.

    Uses the Ray session that is open; otherwise joins the cluster in RAY_ADDRESS or starts Ray on this machine for the
    duration of the call.

    Args:
        concept: a concept of the catalogue, or the path of a YAML file.
        pairs_only: stop once the pair set is published.
        log: takes the progress, line by line.
        settings: keys of RunConfig.

    Raises:
        UserError: something is wrong with the settings, or a stage rejected too many rows.
        StoreError: the store cannot be reached.
    """
    from vce_ray.pipeline.erase import erase as erase_all
    from vce_ray.pipeline.preflight import open_run

    run = open_run({"concept": concept} | settings, log)
    log(f"erasing {run.concept.name} ({run.concept.kind}) from {run.config.base}; run {run.name}")
    metrics = erase_all([run], pairs_only)[run.name]
    if isinstance(metrics, BaseException):
        raise metrics
    return Erasure(run.name, run.store, metrics)


def evaluate(run: str) -> dict[str, Any]:
    """Compute the metrics of a run from its published evaluation images.

    Args:
        run: the run's folder or bucket prefix.

    Raises:
        UserError: there is no run here.
        StoreError: its evaluation is not published.
    """
    from vce_ray.evaluation.detectors import evaluation_schema
    from vce_ray.evaluation.metrics import columns_to_read
    from vce_ray.evaluation.metrics import evaluate as compute
    from vce_ray.pipeline.before_after import read_before_after
    from vce_ray.pipeline.run import recorded_task
    from vce_ray.storage.store import Store

    task = recorded_task(Store(run))
    columns = columns_to_read(evaluation_schema(task.config, task.concept))
    return compute(read_before_after(task.store, columns), task.concept)


def status(store: str) -> Iterator[str]:
    """Yield lines about a run, or one about each run of a store, also while they run.

    Raises:
        UserError: there is no run here.
    """
    from vce_ray.pipeline.status import status_lines
    from vce_ray.storage.store import Store

    return status_lines(Store(store))
