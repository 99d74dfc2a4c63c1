"""Captioners and refiners behind endpoints of OpenAI's chat completions: vLLM's server, SGLang's, or a vendor's."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from vce_ray.concepts.concept import Concept
from vce_ray.env import CAPTIONER_DEADLINE_S, CAPTIONER_TOKEN, REFINER_TOKEN, Variable
from vce_ray.errors import CaptionerError, UserError
from vce_ray.pairs.captioner import ANSWER_TOKENS, QUESTION, Caption, clean

AT_ONCE = 8
"""Questions that an actor sends at once."""
REQUEST_S = 60.0
"""How long one request may wait for the next bytes of its answer."""
LARGEST = 1 << 20
"""Bytes of the largest answer that is read: a sentence has some hundred."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 20.0
REWRITE = (
    "Rewrite this description of a picture so that it says nothing of: {terms}.{instead} Keep all else that it tells, "
    "such as objects, colours, background and style. Answer with the new description only, in one plain sentence."
    "\n\n{caption}"
)
"""What a refiner is asked. Its answer is trusted no further than a caption: the rules go over it (refine.py)."""
_MEND = {
    401: "give its token in {token}, on every machine whose actors caption",
    403: "give a token with a right to this model in {token}",
    404: "correct address and model: https://host/v1#model",
}
_THIS_QUESTION = (400, 413, 415, 422)
"""Statuses that blame what was sent: filters of contents answer so."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: a token must not follow one to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Unanswered(Exception):
    """The deadline has passed."""


class Endpoint:
    """Asks an endpoint some questions at once, and tries again what may yet succeed.

    Raises:
        UserError: its token is none that can be sent.
    """

    role = "captioner"
    token_in: Variable[str] = CAPTIONER_TOKEN

    def __init__(self, url: str, model: str):
        self.url, self.model = f"{url}/chat/completions", model
        self.token, self.deadline_s = self.token_in.get(), CAPTIONER_DEADLINE_S.get()
        if not (self.token.isascii() and self.token.isprintable()) or " " in self.token:
            raise UserError(f"{self.token_in.name} holds blanks or other signs that no token has")
        near = [urllib.request.ProxyHandler({})] if url.startswith("http://") else []  # loopback: past any proxy
        self._opener = urllib.request.build_opener(_NoRedirects, *near)

    def ask(self, questions: Sequence[list[dict[str, Any]]]) -> list[Caption]:
        """One answer to each question, which is the content of a message: texts and pictures.

        An endpoint that is busy or out of reach is tried again until the deadline. If meanwhile it has answered another
        question, the one without an answer is at fault.

        Raises:
            CaptionerError: the endpoint refuses the token, knows no such model, or has answered no question while one
                of them was tried.
        """
        stop, heard = threading.Event(), 0.0

        def ask(question: list[dict[str, Any]]) -> Caption:
            nonlocal heard
            begun = time.monotonic()
            try:
                answer = self._ask(question, begun + self.deadline_s, stop)
            except _Unanswered as error:
                if heard >= begun or stop.is_set():  # where it is set, another question's failure is raised
                    return Caption("", str(error), f"{self.role} gave no answer")
                stop.set()  # it would be the same for all
                raise CaptionerError(
                    f"{self.role} {self.url} gave no answer within {self.deadline_s:g} s: {error}. See that it runs, "
                    "or wait longer by VCE_RAY_CAPTIONER_DEADLINE_S, then give the same command again"
                ) from None
            except CaptionerError:
                stop.set()
                raise
            heard = time.monotonic()
            return answer

        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            asked = [pool.submit(ask, question) for question in questions]
            wait(asked, return_when=FIRST_EXCEPTION)
            for future in asked:
                if future.done() and (error := future.exception()):
                    raise error
            return [future.result() for future in asked]
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def _ask(self, question: list[dict[str, Any]], deadline: float, stop: threading.Event) -> Caption:
        pause = FIRST_PAUSE_S
        while True:
            rest = pause * random.uniform(0.5, 1.0)
            try:
                return read_answer(self._post(question, deadline))
            except urllib.error.HTTPError as error:
                status, told = error.code, self._told(error)
                if status in _THIS_QUESTION:
                    return Caption("", told, f"{self.role} refused the picture")
                if status != 429 and status < 500:
                    mend = _MEND.get(status, "correct its address: https://host/v1#model")
                    mend = mend.format(token=self.token_in.name)
                    raise CaptionerError(f"{self.role} {self.url} answers {told}: {mend}") from None
                rest = max(rest, _retry_after(error.headers.get("Retry-After", "")))
            except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and broken connections
                told = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
            if time.monotonic() + rest > deadline or stop.wait(rest):
                raise _Unanswered(self._hidden(told))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _post(self, question: list[dict[str, Any]], deadline: float) -> bytes:
        """The answer's body, at most LARGEST + 1 bytes of it."""
        asked: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": question}]}
        asked |= {"temperature": 0, "max_tokens": ANSWER_TOKENS}
        request = urllib.request.Request(self.url, json.dumps(asked).encode(), {"Content-Type": "application/json"})
        if self.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        left = max(0.1, deadline - time.monotonic())
        body = bytearray()
        with self._opener.open(request, timeout=min(REQUEST_S, left)) as response:
            while len(body) <= LARGEST and (chunk := response.read1(1 << 16)):
                body += chunk
                if time.monotonic() > deadline:
                    raise TimeoutError("the answer was still coming at the deadline")
        return bytes(body[: LARGEST + 1])

    def _told(self, error: urllib.error.HTTPError) -> str:
        """Status and first words of a refusal."""
        words = ""
        with contextlib.suppress(OSError, http.client.HTTPException), error:
            words = " ".join(error.read(2000).decode(errors="replace").split())[:300]
        return self._hidden(f"{error.code} {error.reason} {words}".strip())

    def _hidden(self, text: str) -> str:
        """Without the token, which some servers repeat."""
        return text.replace(self.token, "***") if self.token else text


class EndpointCaptioner(Endpoint):
    """Describes pictures."""

    def caption(self, images: Sequence[bytes]) -> list[Caption]:
        """One caption for each picture, PNG bytes. Raises CaptionerError, as `ask` does."""
        pictures = ["data:image/png;base64," + base64.b64encode(image).decode() for image in images]
        words = {"type": "text", "text": QUESTION}
        return self.ask([[{"type": "image_url", "image_url": {"url": picture}}, words] for picture in pictures])


class EndpointRefiner(Endpoint):
    """Rewrites captions without a concept, as a language model does it."""

    role = "refiner"
    token_in = REFINER_TOKEN

    def rewrite(self, captions: Sequence[tuple[str, Concept]]) -> list[Caption]:
        """Each caption without its concept, as far as the model did so. Raises CaptionerError, as `ask` does."""
        return self.ask([[{"type": "text", "text": rewriting(text, concept)}] for text, concept in captions])


def rewriting(caption: str, concept: Concept) -> str:
    """What a refiner is asked about a caption: the terms that stand in it are to go, and what may take their place."""
    terms = ", ".join(f"'{term}'" for term in concept.mentions(caption))
    instead = f" Where something must stand in its place, say '{concept.replacement}'." if concept.replacement else ""
    return REWRITE.format(terms=terms, instead=instead, caption=caption)


def read_answer(body: bytes) -> Caption:
    """The caption in the body of a chat completion."""
    if len(body) > LARGEST:
        return Caption("", f"more than {LARGEST} bytes", "answer too large")
    try:
        choice = json.loads(body)["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        refusal, text = message.get("refusal") or "", message.get("content") or ""
        if not isinstance(text, str) or not isinstance(refusal, str):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError):
        return Caption("", body[:200].decode(errors="replace"), "answer is no chat completion")
    return clean(text or refusal, finish == "length", bool(refusal) or finish == "content_filter")


def _retry_after(text: str) -> float:
    """Seconds that a server asks to wait, as a number or as a date; 0 where it says nothing readable."""
    if text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
