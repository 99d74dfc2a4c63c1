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

A detector that says whether an image shows the concept is a judge. It has a column of type `ANSWERS`, and its answers
count in the verdict (`metrics/judges.py`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from vce_ray.concepts.concept import Concept
from vce_ray.config import DETECTORS
from vce_ray.dataflow.rows import Row
from vce_ray.errors import UserError
from vce_ray.run_config import RunConfig

NOTHING = "nothing"
"""Label of an image that shows no object. As one of the choices, it keeps a classifier from giving an empty image the
name of some object."""
ANSWERS = pa.list_(
    pa.struct({"judge": pa.string(), "rule": pa.string(), "seen": pa.bool_(), "score": pa.float64()}.items())
)
"""Type of a column with the answers of judges about one image, in which all fields but `score` may be compared:

judge: its name and version.
rule: when it sees the concept, with the threshold.
seen: whether it does; None if it gave no usable answer.
score: what was compared with the threshold, in 0..1; None if there is no such number.
"""


class Detector(ABC):
    """Adds columns to the rows of an evaluation.

    Work is split in two because the runs of a fleet share images of the base model: `encode` runs the model once on
    each distinct image of a batch, `detect` then answers for each run that asked for some of these images.
    """

    name: ClassVar[str]
    """Unique key: the runs of a fleet share what `encode` returned under this name."""
    columns: ClassVar[pa.Schema]
    """Columns that the detector adds to each row. No other detector may have a column of the same name."""
    package: ClassVar[str] = ""
    """Package that it needs, by its name on the package index; it is installed by the extra of the detector's name."""
    model_file: ClassVar[str] = ""
    """File of the model in the package, such as 'nudenet/320n.onnx'."""
    rule: ClassVar[str] = ""
    """When it sees the concept, with the threshold, if it is one of `config.DETECTORS`."""

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

        By default every run does, but one of `config.DETECTORS` only judges the content that it recognizes, where it is
        asked to. Called in the driver and in workers, so it must not load anything.
        """
        return cls.name not in DETECTORS or cls.name in config.evaluation.detectors(concept.content)

    @classmethod
    def revision(cls) -> str:
        """Return its rule, and the version of its package and a hash of its model file, if it has one.

        Raises:
            UserError: the package is not installed.
        """
        cls.check()
        return f"{_release(cls.package)}, model {_digest(cls.model_file)}: {cls.rule}" if cls.package else cls.rule

    @classmethod
    def check(cls) -> None:
        """Check that its package is installed, without importing it. Raises UserError."""
        if cls.package and find_spec(cls.model_file.partition("/")[0]) is None:
            raise UserError(
                f"judge {cls.name} needs the package {cls.package}, which is not installed",
                f"run pip install '.[{cls.name}]' in a checkout, on every machine that draws",
            )

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

    def answer(self, seen: bool, score: float) -> Row:
        """Return the answer about one image of a detector that has a package."""
        return {"judge": _release(self.package), "rule": self.rule, "seen": seen, "score": score}


def numbered(names: Sequence[str]) -> list[str]:
    """Return names that differ: of several equal ones, all but the first get a number."""
    return [
        name if name not in names[:index] else f"{name} ({names[: index + 1].count(name)})"
        for index, name in enumerate(names)
    ]


@cache
def _release(package: str) -> str:
    """Return the name and version of an installed package."""
    return f"{package} {version(package)}"


@cache
def _digest(model_file: str) -> str:
    """Hash a file of an installed package: 16 hex digits."""
    package, _, name = model_file.partition("/")
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return hashlib.blake2b((Path(spec.origin).with_name(name)).read_bytes(), digest_size=8).hexdigest()
