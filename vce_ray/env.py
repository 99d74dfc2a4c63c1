"""Every environment variable that the project reads: name, type, default and meaning.

Credentials are not among them: pyarrow and boto3 find those by themselves, in `AWS_ACCESS_KEY_ID` and its kin, in
`~/.aws` (`AWS_PROFILE`) or from the machine's role, and this project neither reads nor passes them on.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from vce_ray.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable. It is read each time it is asked for, so that tests and workers may set it late."""

    name: str
    parse: Callable[[str], T]
    default: T
    meaning: str

    def get(self) -> T:
        """The variable's value, or its default where it is unset or empty. Raises UserError if it does not parse."""
        text = os.environ.get(self.name, "")
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise UserError(f"{self.name}={text!r}: {error}; unset it for its default, {self.default!r}") from error


def _seconds(text: str) -> float:
    """A positive number of seconds."""
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError("seconds must be more than 0 and finite")
    return seconds


def _switch(text: str) -> bool:
    """0 or 1."""
    if text not in ("0", "1"):
        raise ValueError("must be 0 or 1")
    return text == "1"


AWS_CA_BUNDLE = Variable("AWS_CA_BUNDLE", str, "", "file of certificates trusted for https endpoints of object stores")
AWS_ENDPOINT_URL = Variable("AWS_ENDPOINT_URL", str, "", "endpoint of any AWS-like service; empty for AWS itself")
AWS_ENDPOINT_URL_S3 = Variable("AWS_ENDPOINT_URL_S3", str, "", "endpoint of the object store; before AWS_ENDPOINT_URL")
AWS_REGION = Variable(
    "AWS_REGION", str, "", "region of the object store; empty: AWS_DEFAULT_REGION or the bucket's own"
)
AWS_DEFAULT_REGION = Variable("AWS_DEFAULT_REGION", str, "", "region where AWS_REGION is not set")
STORE_DEADLINE_S = Variable(
    "VCE_RAY_STORE_DEADLINE_S", _seconds, 60.0, "how long one operation on a store is tried again before it fails"
)
API_TOKEN = Variable(
    "VCE_RAY_API_TOKEN", str, "", "bearer token that callers of the endpoint must send; empty: loopback only, no token"
)
CAPTIONER_TOKEN = Variable(
    "VCE_RAY_CAPTIONER_TOKEN", str.strip, "", "bearer token for a captioner that is an endpoint; empty: none is sent"
)
REFINER_TOKEN = Variable(
    "VCE_RAY_REFINER_TOKEN", str.strip, "", "bearer token for the endpoint that refines captions; empty: none is sent"
)
CAPTIONER_DEADLINE_S = Variable(
    "VCE_RAY_CAPTIONER_DEADLINE_S",
    _seconds,
    120.0,
    "how long an endpoint is asked about one picture or caption before it fails",
)
MODEL_CACHE = Variable(
    "VCE_RAY_MODEL_CACHE", str, "~/.cache/vce_ray/models", "folder for base models that are copied from a store"
)
CAPTURE = Variable(
    "VCE_RAY_CAPTURE", _switch, True, "0 draws on a GPU without CUDA graphs and own kernels: slower, for finding faults"
)
COMPILE = Variable(
    "VCE_RAY_COMPILE",
    _switch,
    True,
    "0 draws on a CPU without kernels compiled for it: slower, for finding faults",
)

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
    CAPTIONER_DEADLINE_S,
    MODEL_CACHE,
    CAPTURE,
    COMPILE,
)
