"""The replica that draws: one base model with at most one adapter, on its share of CPUs and GPUs."""

from __future__ import annotations

import asyncio
import base64
import io
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import serve

from vce_ray.config import SamplingConfig
from vce_ray.errors import UserError
from vce_ray.serving.adapters import fetch_adapter
from vce_ray.serving.batcher import Batcher, Busy
from vce_ray.serving.schema import ApiError, check_prompt

if TYPE_CHECKING:
    from vce_ray.models.base import ImageModel


class Drawing:
    """Pictures of (prompt, seed) pairs, as images uint8 [H, W, 3]: the batcher's work."""

    def __init__(self, model: ImageModel, sampling: SamplingConfig):
        from vce_ray.sampling.rolling import RollingBatch

        self._model = model
        self._batch: RollingBatch[int] = RollingBatch(model, sampling, reserve=model.device.type == "cuda")

    def join(self, numbers: Sequence[int], items: Sequence[tuple[str, int]]) -> int:
        """Begins as many pictures as there is room for, and says how many."""
        prompts, seeds = zip(*items, strict=True)
        return self._batch.join(numbers, prompts, seeds)

    def advance(self) -> list[tuple[int, np.ndarray]]:
        """A few steps of all pictures; those that are finished."""
        import torch

        from vce_ray.sampling.draw import CHECK_EVERY

        ended = self._batch.advance(CHECK_EVERY)
        if not ended:
            return []
        images = self._model.decode_pixels(torch.stack([tokens for _, tokens in ended]))
        return [(number, image) for (number, _), image in zip(ended, images, strict=True)]

    def drop(self, numbers: Sequence[int]) -> None:
        """Gives pictures up."""
        self._batch.drop(numbers)


@serve.deployment(max_constructor_retry_count=2)
class Engine:
    """Draws images. How many replicas, requests and resources it gets is set where it is bound, in deploy.py.

    Args:
        base: what load_model takes.
        adapter: a local folder or store URI, or None for the base as it is.
        sampling: how to draw; its batch_size is how many images are drawn at once.
        device: 'cpu' or 'cuda'.
        max_waiting: images that may wait in this replica before it says Busy.
    """

    def __init__(self, base: str, adapter: str | None, sampling: SamplingConfig, device: str, max_waiting: int):
        from vce_ray.models.load import load_model

        with tempfile.TemporaryDirectory() as folder:
            local = fetch_adapter(adapter, Path(folder)) if adapter else None
            self._model = load_model(base, device, local)
        work = Drawing(self._model, sampling)
        self._batcher: Batcher[tuple[str, int], np.ndarray] = Batcher(work, sampling.batch_size, max_waiting)
        self._encoder = ThreadPoolExecutor(2, thread_name_prefix="encoder")

    async def draw(self, prompt: str, seeds: list[int]) -> list[str] | Busy:
        """One image for each seed, as base64 of a PNG; or Busy if too many wait.

        Raises:
            ApiError: the prompt is empty or too long.
        """
        from vce_ray.models.base import MAX_PROMPT_CHARS

        check_prompt(prompt, MAX_PROMPT_CHARS)
        try:
            self._model.check_prompts([prompt])  # a prompt of too many tokens would fail all that is underway
        except UserError as error:
            raise ApiError(400, f"{error}: shorten it", param="prompt", code="prompt_too_long") from error
        images = await self._batcher.submit([(prompt, seed) for seed in seeds])
        if isinstance(images, Busy):
            return images
        loop = asyncio.get_running_loop()
        return list(await asyncio.gather(*(loop.run_in_executor(self._encoder, encode_png, x) for x in images)))

    async def describe(self) -> dict[str, Any]:
        """What the ingress needs to know of the model: revision, image_size, max_prompt_chars."""
        from vce_ray.models.base import MAX_PROMPT_CHARS

        return {
            "base_revision": self._model.revision,
            "image_size": self._model.image_size,
            "max_prompt_chars": MAX_PROMPT_CHARS,
        }

    async def check_health(self) -> None:
        """Called by Serve: raising has the replica replaced."""
        self._batcher.check()


def encode_png(image: np.ndarray) -> str:
    """Base64 of the PNG of one image uint8 [H, W, 3]."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
