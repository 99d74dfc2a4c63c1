"""Every environment variable of this project, and those of AWS and trackers it reads, with type, default and meaning.

Ray's own (RAY_ADDRESS, RAY_AUTH_*) are handled in pipeline/session.py. Credentials are not listed: pyarrow, boto3 and
Google's libraries find them by themselves (`AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, `GOOGLE_APPLICATION_CREDENTIALS`, or the
machine's role), and this project neither reads nor forwards them.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from vce_ray.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable. It is read at each `get`, so tests and workers may set it late."""

    name: str
    parse: Callable[[str], T]
    default: T
    meaning: str

    def get(self) -> T:
        """Return the parsed value, or the default if it is unset or empty. Raises UserError if it is invalid."""
        text = os.environ.get(self.name, "")
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise UserError(
                f"{self.name}={text!r} is invalid: {error}; unset it to use the default, {self.default!r}"
            ) from error


def _seconds(text: str) -> float:
    """Parse a positive, finite number of seconds."""
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError("must be a finite number of seconds greater than 0")
    return seconds


def _switch(text: str) -> bool:
    """Parse 0 or 1."""
    if text not in ("0", "1"):
        raise ValueError("must be 0 or 1")
    return text == "1"


AWS_CA_BUNDLE = Variable("AWS_CA_BUNDLE", str, "", "file of CA certificates to trust for https endpoints of stores")
AWS_ENDPOINT_URL = Variable(
    "AWS_ENDPOINT_URL", str, "", "endpoint of all services that speak AWS' protocols; empty: AWS itself"
)
AWS_ENDPOINT_URL_S3 = Variable(
    "AWS_ENDPOINT_URL_S3", str, "", "endpoint of the object store; takes precedence over AWS_ENDPOINT_URL"
)
AWS_REGION = Variable(
    "AWS_REGION", str, "", "region of the object store; empty: AWS_DEFAULT_REGION, or else the bucket's own"
)
AWS_DEFAULT_REGION = Variable("AWS_DEFAULT_REGION", str, "", "region of the object store if AWS_REGION is not set")
STORE_DEADLINE_S = Variable(
    "VCE_RAY_STORE_DEADLINE_S", _seconds, 60.0, "how long a failing store operation is retried, in seconds"
)
API_TOKEN = Variable(
    "VCE_RAY_API_TOKEN",
    str,
    "",
    "bearer token that clients of the endpoint must send; empty: no token, and only loopback is allowed",
)
CAPTIONER_TOKEN = Variable(
    "VCE_RAY_CAPTIONER_TOKEN", str.strip, "", "bearer token for the endpoint that captions images; empty: none is sent"
)
REFINER_TOKEN = Variable(
    "VCE_RAY_REFINER_TOKEN", str.strip, "", "bearer token for the endpoint that refines captions; empty: none is sent"
)
JUDGE_TOKEN = Variable(
    "VCE_RAY_JUDGE_TOKEN", str.strip, "", "bearer token for the endpoint that judges images; empty: none is sent"
)
CAPTIONER_DEADLINE_S = Variable(
    "VCE_RAY_CAPTIONER_DEADLINE_S",
    _seconds,
    120.0,
    "how long a request about one image or caption is retried at an endpoint, in seconds",
)
MODEL_CACHE = Variable(
    "VCE_RAY_MODEL_CACHE", str, "~/.cache/vce_ray/models", "folder for base models that are downloaded from a store"
)
CAPTURE = Variable(
    "VCE_RAY_CAPTURE",
    _switch,
    True,
    "0 disables CUDA graphs and custom kernels for sampling on GPUs: slower, for debugging",
)
COMPILE = Variable(
    "VCE_RAY_COMPILE", _switch, True, "0 disables compiled kernels for sampling on CPUs: slower, for debugging"
)
MLFLOW_EXPERIMENT_NAME = Variable("MLFLOW_EXPERIMENT_NAME", str, "vce_ray", "experiment of the runs that mlflow tracks")
WANDB_PROJECT = Variable("WANDB_PROJECT", str, "vce_ray", "project of the runs that wandb tracks")

VARIABLES: tuple[Variable, ...] = (
    AWS_CA_BUNDLE,
    AWS_ENDPOINT_URL,
    AWS_ENDPOINT_URL_S3,
    AWS_REGION,
    AWS_DEFAULT_REGION,
    STORE_DEADLINE_S,
    API_TOKEN,
    CAPTIONER_TOKEN,
    REFINER_TOKEN,
    JUDGE_TOKEN,
    CAPTIONER_DEADLINE_S,
    MODEL_CACHE,
    CAPTURE,
    COMPILE,
    MLFLOW_EXPERIMENT_NAME,
    WANDB_PROJECT,
)
