"""Who describes pictures: a base model, a model in vLLM, or an endpoint that speaks OpenAI's chat completions.

    'emoji-world', a folder, s3://..., a hub id    a base model that reads pictures (models/load.py)
    'vllm:Qwen/Qwen2.5-VL-7B-Instruct'             a vision model in vLLM, by hub id or folder (pairs/vllm.py)
    'https://host/v1#model'                        an endpoint; http:// on this machine only

What models answer is cleaned up here, picture by picture: a refusal, an empty, a cut-off or an overlong answer becomes
a Caption with a fault, and one that goes on and on is cut to its first sentence. Nothing here imports Ray or torch.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol
from urllib.parse import urlsplit

from vce_ray.errors import UserError
from vce_ray.models.load import base_model, reads_images
from vce_ray.pairs.images import from_png

if TYPE_CHECKING:
    from vce_ray.pairs.endpoint import EndpointRefiner

CAPTION_BATCH = 32
"""Pictures that a base model reads at once."""
QUESTION = (
    "Describe what is visible in this image in one plain sentence: its objects, their colours, the background and the "
    "style in which it is made. Answer with that sentence only."
)
"""What endpoints and vLLM are asked. It names no concept, so no answer can be led by it."""
ANSWER_TOKENS = 128
"""Tokens that an answer may have: several times what the sentence needs."""
LONGEST = 400
"""Characters of the longest caption: a drawing model reads no more of a prompt."""
_EXAMPLE = "vllm:Qwen/Qwen2.5-VL-7B-Instruct"


@dataclass(frozen=True)
class Caption:
    """What a captioner says of a picture."""

    text: str
    """One sentence; '' where there is a fault."""
    said: str
    """All of the answer."""
    fault: str = ""
    """Why the answer is of no use: the reason of a reject."""


class Captioner(Protocol):
    """Describes pictures."""

    def caption(self, images: Sequence[bytes]) -> list[Caption]:
        """One caption for each picture, PNG bytes, in their order. Raises CaptionerError."""
        ...


@dataclass(frozen=True)
class CaptionerRef:
    """A captioner's name, taken apart."""

    kind: Literal["base", "vllm", "endpoint"]
    model: str
    url: str = ""
    """Of an endpoint, up to and with its '/v1'."""


def parse_captioner(name: str, role: str = "captioner") -> CaptionerRef:
    """Takes a captioner's name apart; whether a base model of that name is there is not looked at.

    Args:
        role: what messages call it.

    Raises:
        UserError: it is none of the three kinds. A password in it is not repeated.
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
        raise UserError(f"the {role}'s address cannot be read ({error}): give https://host/v1#model") from None
    if url.username is not None or url.query:
        raise UserError(
            f"the {role}'s address holds a user, a password or a query, which would be written into run.json: "
            f"give https://host/v1#model, and the token in VCE_RAY_{role.upper()}_TOKEN"
        )
    if not host or not url.fragment:
        raise UserError(f"{role} {name!r} names no host or no model: give https://host/v1#model")
    if url.scheme == "http" and not _on_this_machine(host):
        raise UserError(f"{role} {name!r} is on another machine: over the network give https://, not http://")
    return CaptionerRef("endpoint", url.fragment, f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}")


def _on_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_captioner(name: str, base: str) -> None:
    """Sees that a captioner can be used for a run on a base, as far as that shows before any model loads.

    Raises:
        UserError: it is unknown, cannot describe pictures, or wants what is not installed.
    """
    ref = parse_captioner(name)
    if ref.kind == "base" and not reads_images(name):
        raise UserError(f"{name!r} cannot describe pictures: name a captioner, such as a Janus-Pro")
    if ref.kind == "endpoint":
        open_captioner(name)
    if ref.kind != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"captioner {name!r} wants vLLM, which is not installed: pip install 'vce_ray[vllm]'")
    if not reads_images(base):
        raise UserError(
            f"captioner {name!r} reads the unsafe pictures only, and {base!r} cannot describe the safe ones: "
            "serve the model (vllm serve) and give its endpoint, http://localhost:8000/v1#model"
        )


def checks_safe_images(captioner: str, base: str) -> str:
    """Which captioner says whether a safe picture is safe: the same one, or the base where that is in vLLM, whose
    engine has no place beside the model that draws anew what it finds unsafe."""
    return base if parse_captioner(captioner).kind == "vllm" else captioner


def open_captioner(name: str) -> Captioner:
    """The captioner of a name, ready to be used. Raises UserError for one in vLLM, which is a stage of Ray Data."""
    ref = parse_captioner(name)
    if ref.kind == "endpoint":
        from vce_ray.pairs.endpoint import EndpointCaptioner

        return EndpointCaptioner(ref.url, ref.model)
    if ref.kind == "vllm":
        raise UserError(f"captioner {name!r} is a stage of its own: caption_claims of pairs/vllm.py")
    return BaseCaptioner(name)


def open_refiner(name: str) -> EndpointRefiner:
    """The refiner of a name, ready to be used. Raises UserError where it is no endpoint."""
    from vce_ray.pairs.endpoint import EndpointRefiner

    ref = parse_captioner(name, "refiner")
    if ref.kind != "endpoint":
        raise UserError(f"refiner {name!r} is no endpoint: give https://host/v1#model")
    return EndpointRefiner(ref.url, ref.model)


class BaseCaptioner:
    """A base model that reads pictures, such as a Janus."""

    def __init__(self, ref: str):
        self.model = base_model(ref)

    def caption(self, images: Sequence[bytes]) -> list[Caption]:
        """One caption for each picture."""
        starts = range(0, len(images), CAPTION_BATCH)
        return [clean(said) for i in starts for said in self.model.caption(from_png(images[i : i + CAPTION_BATCH]))]


# What becomes of an answer --------------------------------------------------------------------------------------------

_THOUGHT = re.compile(r"^.*?</think>|^\s*<think>.*", re.DOTALL)
_BREAK = re.compile(r"\n\s*\n|\n\s*(?:[-*#\u2022]|\d+[.)])\s")
_OPENING = re.compile(
    r"(?:(?:sure|certainly|of course|okay|absolutely)(?: thing)?[.!,:]\s+)?"
    r"(?:here(?:'s| is| it is| you go)\b[^:.]{0,80}:\s*)?"
    r"(?:(?:caption|description|answer)\s*:\s*)?",
    re.IGNORECASE,
)
ABBREVIATIONS = "".join(rf"(?<!\b{word}\.)" for word in ("St", "Mr", "Mrs", "Ms", "Dr", "Jr", "Sr", "vs", "Mt", "No"))
"""A pattern for where no stop lies behind that belongs to its word and ends no sentence."""
_GAP = re.compile(rf"(?<=[^\W_]{{2}}[.!?]){ABBREVIATIONS}\s+(?=[\"'(]?[A-Z])|(?<=[.!?][\")])\s+(?=[\"'(]?[A-Z])")
_REFUSAL = re.compile(
    r"^(?:(?:i'?m|i am|we'?re|we are) )?(?:(?:very|so|really) )?(?:sorry|afraid)"
    r"(?=[,.!;:]| (?:but|i|we|that|this|for)\b|$)"
    r"|^(?:unfortunately|my apologies|i (?:must )?apologi[sz]e|as an ai|i must decline|i(?:'d| would) rather not)\b"
    r"|\b(?:i|we)(?: (?:cannot|can't|can not|won't|will not|could not|couldn't|do not|don't)|(?:'m| am|'re| are)"
    r" (?:unable|not able|not comfortable|not allowed|not permitted))\b"
    r"|\b(?:against|violates?|violating) (?:my|our|the|your)? ?(?:[\w-]+ ){0,2}(?:polic(?:y|ies)|guidelines|terms)\b",
    re.IGNORECASE,
)


def clean(answer: str, cut_off: bool = False, refused: bool = False) -> Caption:
    """What an answer says of its picture in one sentence, or why it says nothing.

    Args:
        cut_off: the answer ended because it had all tokens that it may have.
        refused: whoever gave the answer says that it is a refusal.
    """
    plain = answer.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')
    plain = _THOUGHT.sub("", plain).replace("**", "").strip()
    said = " ".join(plain.split())
    told = " ".join(_BREAK.split(plain)[0].split())
    told = told[_opening(told) :]
    if len(told) > 1 and told[0] == told[-1] and told[0] in "\"'`" and told.count(told[0]) == 2:
        told = told[1:-1].strip()
    sentences = _GAP.split(told)
    text = sentences[0].strip()
    whole = len(sentences) > 1 or text.endswith((".", "!", "?"))
    if refused or _REFUSAL.search(text):
        fault = "captioner refused"
    elif cut_off and not whole:
        fault = "caption cut off"
    elif not text:
        fault = "empty caption"
    elif len(text) > LONGEST:
        fault = "caption too long"
    else:
        return Caption(text, said)
    return Caption("", said or answer.strip(), fault)


def _opening(text: str) -> int:
    """How many characters of polite opening come first."""
    match = _OPENING.match(text)
    return match.end() if match else 0
