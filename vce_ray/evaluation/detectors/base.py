"""The protocol of a detector: a model or a formula that adds columns to the evaluation table, one row per image.

A new detector is one module in this folder and one line in `DETECTORS` (`__init__.py`):

    class Brightness(Detector):
        name = "brightness"
        columns = pa.schema({"brightness": pa.float64()}.items())

        def __init__(self, config: RunConfig): ...

        def encode(self, images_BHWC, prompts):
            return images_BHWC.mean((1, 2, 3)) / 255

        def detect(self, encoded, indices, concept):
            return [{"brightness": float(encoded[index])} for index in indices]

The driver reads `columns` to set up the flow and must start fast, so a detector's module may not import torch or a
model's library at the top: import those in the constructor, or in a module of their own (`clip_model.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from vce_ray.concepts.concept import Concept
from vce_ray.dataflow.rows import Row
from vce_ray.run_config import RunConfig

NOTHING = "nothing"
"""Label of an image that shows no object. As one of the choices, it keeps a classifier from giving an empty image the
name of some object."""


class Detector(ABC):
    """Adds columns to the rows of an evaluation.

    Work is split in two because the runs of a fleet share images of the base model: `encode` runs the model once on
    each distinct image of a batch, `detect` then answers for each run that asked for some of these images.
    """

    name: ClassVar[str]
    """Unique key: the runs of a fleet share what `encode` returned under this name."""
    columns: ClassVar[pa.Schema]
    """Columns that the detector adds to each row. No other detector may have a column of the same name."""

    @abstractmethod
    def __init__(self, config: RunConfig):
        """Load the model, in a worker, once.

        Args:
            config: settings of one of the runs that share the worker. Read only settings that such runs have in common
                (`pipeline.erase.SHARED`): the base, the sampling and the judge.
        """

    @classmethod
    def applies(cls, config: RunConfig, concept: Concept) -> bool:
        """Return whether a run uses this detector. Rows of other runs lack its columns; metrics over them are skipped.

        By default every run does. Called in the driver and in workers, so it must not load anything.
        """
        return True

    @abstractmethod
    def encode(self, images_BHWC: np.ndarray, prompts: Sequence[str]) -> Any:
        """Run the model once on each image; the result is passed to `detect` as it is.

        Args:
            images_BHWC: B distinct images, uint8, RGB.
            prompts: the prompt that each image was drawn from.
        """

    @abstractmethod
    def detect(self, encoded: Any, indices: Sequence[int], concept: Concept) -> list[Row]:
        """Return one row with exactly the keys of `columns` for each index.

        Args:
            encoded: what `encode` returned for a batch of B images.
            indices: the images that one run asks about, each in 0..B-1; an index may occur more than once.
            concept: the concept which that run erases.
        """
