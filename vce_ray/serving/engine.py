"""The engine replica: generates images with one base model and at most one adapter."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import serve

from vce_ray.config import SamplingConfig
from vce_ray.errors import UserError
from vce_ray.models.adapter_location import local_adapter
from vce_ray.models.png import to_png
from vce_ray.serving.batcher import Batcher, Busy
from vce_ray.serving.schema import ApiError, check_prompt

if TYPE_CHECKING:
    from vce_ray.models.base import ImageModel


ROUND_TOKENS = 16
"""Tokens of each image drawn between chances for waiting images to join."""


class ImageWork:
    """The batcher's work: (prompt, seed) pairs in, images uint8 [H, W, 3] out."""

    def __init__(self, model: ImageModel, sampling: SamplingConfig):
        from vce_ray.sampling.rolling import RollingBatch

        self._model = model
        # On a GPU the cache is allocated once, at full size: if it grew, the decoding step would be captured again.
        self._batch: RollingBatch[int] = RollingBatch(model, sampling, reserve=model.device.type == "cuda")

    def join(self, numbers: Sequence[int], items: Sequence[tuple[str, int]]) -> int:
        """Start as many images as there is capacity for; return how many were started."""
        prompts, seeds = zip(*items, strict=True)
        return self._batch.join(numbers, prompts, seeds)

    def advance(self) -> list[tuple[int, np.ndarray]]:
        """Run a few decoding steps of all images; return those that finished."""
        import torch

        finished = self._batch.advance(ROUND_TOKENS)
        if not finished:
            return []
        images = self._model.decode_pixels(torch.stack([tokens for _, tokens in finished]))
        return [(number, image) for (number, _), image in zip(finished, images, strict=True)]

    def drop(self, numbers: Sequence[int]) -> None:
        """Cancel images."""
        self._batch.drop(numbers)


@serve.deployment(max_constructor_retry_count=2)
class Engine:
    """Generates images. Replicas, request limits and resources are set in deploy.py, where the engine is bound.

    Args:
        base: a base model, as load_model takes it.
        adapter: a local folder or store URI, or None for the unmodified base.
        sampling: sampling settings; batch_size is the number of images generated at once.
        device: 'cpu' or 'cuda'.
        max_waiting: images that may wait in this replica before it returns Busy.
    """

    def __init__(self, base: str, adapter: str | None, sampling: SamplingConfig, device: str, max_waiting: int):
        from vce_ray.models.load import load_model

        with local_adapter(adapter) as folder:
            self._model = load_model(base, device, folder)
        work = ImageWork(self._model, sampling)
        self._batcher: Batcher[tuple[str, int], np.ndarray] = Batcher(work, sampling.batch_size, max_waiting)
        self._encoder = ThreadPoolExecutor(2, thread_name_prefix="encoder")

    async def generate(self, prompt: str, seeds: list[int]) -> list[str] | Busy:
        """Return one base64 PNG per seed, or Busy if too many images are waiting.

        Raises:
            ApiError: the prompt is empty or too long.
        """
        from vce_ray.models.base import MAX_PROMPT_CHARS

        check_prompt(prompt, MAX_PROMPT_CHARS)
        try:
            self._model.check_prompts([prompt])  # a prompt with too many tokens would fail every image in flight
        except UserError as error:
            raise ApiError(400, str(error), param="prompt", code="invalid_value") from error
        images = await self._batcher.submit([(prompt, seed) for seed in seeds])
        if isinstance(images, Busy):
            return images
        loop = asyncio.get_running_loop()
        return list(await asyncio.gather(*(loop.run_in_executor(self._encoder, _base64_png, x) for x in images)))

    async def describe(self) -> dict[str, Any]:
        """Return what the ingress needs to know about the model: base_revision, image_size, max_prompt_chars."""
        from vce_ray.models.base import MAX_PROMPT_CHARS

        return {
            "base_revision": self._model.revision,
            "image_size": self._model.image_size,
            "max_prompt_chars": MAX_PROMPT_CHARS,
        }

    async def check_health(self) -> None:
        """Raise if the batcher has stopped. Serve calls this, and replaces the replica if it raises."""
        self._batcher.check()


def _base64_png(image: np.ndarray) -> str:
    return base64.b64encode(to_png(image)).decode("ascii")
