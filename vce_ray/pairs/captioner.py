"""Captioners, which describe images: a base model, a model in vLLM, or an endpoint with OpenAI's chat completions API.

    'emoji-world', a folder, s3://..., a hub id    a base model that reads images (models/load.py)
    'vllm:Qwen/Qwen2.5-VL-7B-Instruct'             a vision model in vLLM, by hub id or folder (pipeline/vllm.py)
    'https://host/v1#model'                        an endpoint; http:// on this machine only

This module imports neither Ray nor torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, Protocol
from urllib.parse import urlsplit

import numpy as np

from vce_ray.errors import CaptionerError, UserError
from vce_ray.models.check import check_base, check_lfs, list_files
from vce_ray.models.families import reads_images
from vce_ray.models.folder import BASE, CONFIG, Kind, model_config
from vce_ray.models.load import base_model
from vce_ray.models.png import from_png, to_png
from vce_ray.net import is_loopback
from vce_ray.pairs.answers import QUESTION, Caption, clean
from vce_ray.pairs.endpoint import REWRITE, Endpoint, EndpointCaptioner, EndpointRefiner

CAPTION_BATCH = 32
"""Images that a base model captions in one batch."""
RED_SQUARE = np.full((64, 64, 3), (220, 20, 20), np.uint8)
"""What an endpoint is asked about as a test, [H, W, 3]. It is as large as an image of the embedded model."""
_IN_VLLM = Kind("captioner", CONFIG, "a vision model in transformers' format", (*BASE.patterns, "*.bin"))
_EXAMPLE = "vllm:Qwen/Qwen2.5-VL-7B-Instruct"


class Captioner(Protocol):
    """Describes images."""

    def caption(self, images: Sequence[bytes], questions: Sequence[str]) -> list[Caption]:
        """Return one caption per image (PNG bytes) as an answer to its question, in order. Raises CaptionerError."""
        ...


@dataclass(frozen=True)
class CaptionerRef:
    """The parts of a captioner's name."""

    kind: Literal["base", "vllm", "endpoint"]
    model: str
    url: str = ""
    """Base URL of an endpoint, such as 'https://host/v1'."""


def parse_captioner(name: str, role: str = "captioner") -> CaptionerRef:
    """Parse the name of a captioner. Does not check whether a base model of that name exists.

    Args:
        role: 'captioner' or 'refiner', for messages.

    Raises:
        UserError: the name is invalid. The message does not repeat a password.
    """
    if name.startswith("vllm:"):
        model = name.removeprefix("vllm:")
        if not model or "://" in model or "@" in model:
            raise UserError(f"{role} {name!r}: give a folder or a hub id without a revision, such as {_EXAMPLE}")
        return CaptionerRef("vllm", model)
    if not name.startswith(("http://", "https://")):
        return CaptionerRef("base", name)
    try:
        url = urlsplit(name)
        host, _ = url.hostname, url.port
    except ValueError as error:
        raise UserError(f"invalid {role} URL ({error}): give https://host/v1#model") from None
    if url.username is not None or url.query:
        raise UserError(
            f"the {role} URL contains a user, a password or a query, which would be written to run.json: "
            f"give https://host/v1#model, and the token in VCE_RAY_{role.upper()}_TOKEN"
        )
    if not host or not url.fragment:
        raise UserError(f"{role} {name!r} lacks a host or a model: give https://host/v1#model")
    if url.scheme == "http" and not is_loopback(host):
        raise UserError(f"{role} {name!r} is on another machine: give https://, not http://")
    return CaptionerRef("endpoint", url.fragment, f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}")


def check_captioner(name: str, base: str) -> str:
    """Check that a captioner can be used with a base model, without loading any model or asking any endpoint.

    Returns:
        In a few words, what the captioner is.

    Raises:
        UserError: it is unknown, incomplete, cannot describe images, or needs a package that is not installed.
        StoreError: the object store cannot be reached.
    """
    ref = parse_captioner(name)
    if ref.kind == "endpoint":
        return EndpointCaptioner(ref.url, ref.model).url
    if ref.kind == "base":
        if not reads_images(name):
            raise UserError(f"{name!r} cannot describe images", "set a captioner, such as a Janus-Pro")
        return "the base itself" if name == base else check_base(name)
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"captioner {name!r} needs vLLM, which is not installed", "run pip install '.[vllm]' in a checkout"
        )
    if not reads_images(base):
        raise UserError(
            f"captioner {name!r} describes only the unsafe images, and {base!r} cannot describe the safe ones",
            "serve the model (vllm serve) and give its endpoint, http://localhost:8000/v1#model",
        )
    model_config(ref.model, _IN_VLLM)
    files = list_files(ref.model, _IN_VLLM)  # the nodes of the engines download it, so its size is not compared
    if not any(PurePath(file).suffix in (".safetensors", ".bin") for file in files.sizes):
        raise files.fault("has no weights")
    check_lfs(files)
    return f"{ref.model} in vLLM"


def try_captioner(name: str, deadline_s: float | None = None) -> str:
    """Ask an endpoint to describe a red square, as a run asks about images, and return its answer.

    Captioners that are no endpoints are not asked; for them the answer is ''.

    Args:
        deadline_s: seconds to retry temporary errors for. Default: as long as a run does.

    Raises:
        CaptionerError: it gives no answer, refuses the token, does not have the model, or cannot read images.
    """
    ref = parse_captioner(name)
    if ref.kind != "endpoint":
        return ""
    captioner = EndpointCaptioner(ref.url, ref.model, deadline_s)
    return _usable(captioner, captioner.caption([to_png(RED_SQUARE)], [QUESTION])[0], "give a model that reads images")


def try_refiner(name: str, deadline_s: float | None = None) -> str:
    """Ask a refiner to rewrite a caption, and return its answer.

    Args:
        deadline_s: seconds to retry temporary errors for. Default: as long as a run does.

    Raises:
        CaptionerError: it gives no answer, refuses the token, or does not have the model.
    """
    refiner = open_refiner(name, deadline_s)
    question = [{"type": "text", "text": REWRITE.format(terms="'square'", instead="", caption="A square on sand.")}]
    return _usable(refiner, refiner.ask([question])[0], "give a chat model")


def _usable(endpoint: Endpoint, answer: Caption, fix: str) -> str:
    if answer.error:
        detail = " ".join(answer.answer.split())[:200]
        raise CaptionerError(f"{endpoint.role} {endpoint.url} is of no use: {answer.error} ({detail})", fix)
    return answer.answer


def safe_image_captioner(captioner: str, base: str) -> str:
    """Return the name of the captioner that checks whether safe images are safe.

    It is the run's captioner. If that one runs in vLLM it is the base model instead: safe images are checked by the
    actor that draws them, and that actor's GPU has no room for a vLLM engine beside the base model.
    """
    return base if parse_captioner(captioner).kind == "vllm" else captioner


def open_captioner(name: str) -> Captioner:
    """Create the captioner of this name. Raises UserError for one in vLLM, which runs as its own stage of Ray Data."""
    ref = parse_captioner(name)
    if ref.kind == "endpoint":
        return EndpointCaptioner(ref.url, ref.model)
    if ref.kind == "vllm":
        raise UserError(f"captioner {name!r} runs in vLLM, as its own stage (pipeline/vllm.py): it cannot be opened")
    return BaseCaptioner(name)


def open_refiner(name: str, deadline_s: float | None = None) -> EndpointRefiner:
    """Create the refiner of this name. Raises UserError if it is not an endpoint."""
    ref = parse_captioner(name, "refiner")
    if ref.kind != "endpoint":
        raise UserError(f"refiner {name!r} is not an endpoint: give https://host/v1#model")
    return EndpointRefiner(ref.url, ref.model, deadline_s)


class BaseCaptioner:
    """A base model that reads images, such as a Janus."""

    def __init__(self, ref: str):
        self.model = base_model(ref)

    def caption(self, images: Sequence[bytes], questions: Sequence[str]) -> list[Caption]:
        """Return one caption per image, PNG bytes."""
        captions: dict[int, Caption] = {}
        for question in dict.fromkeys(questions):
            asked = [i for i, other in enumerate(questions) if other == question]
            for start in range(0, len(asked), CAPTION_BATCH):
                batch = asked[start : start + CAPTION_BATCH]
                answers = self.model.caption(from_png([images[i] for i in batch]), question)
                captions |= {i: clean(text, not complete) for i, (text, complete) in zip(batch, answers, strict=True)}
        return [captions[i] for i in range(len(images))]
