"""A captioner behind an endpoint that speaks OpenAI's chat completions: vLLM's server, SGLang's, or a vendor's."""

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

from vce_ray.env import CAPTIONER_DEADLINE_S, CAPTIONER_TOKEN
from vce_ray.pairs.captioner import ANSWER_TOKENS, QUESTION, Caption, CaptionerError, clean

AT_ONCE = 8
"""Pictures that an actor sends at once."""
REQUEST_S = 60.0
"""How long one request may wait for the next bytes of its answer."""
LARGEST = 1 << 20
"""Bytes of the largest answer that is read: a sentence has some hundred."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 20.0
_MEND = {
    401: "give its token in VCE_RAY_CAPTIONER_TOKEN, on every machine whose actors caption",
    403: "give a token with a right to this model in VCE_RAY_CAPTIONER_TOKEN",
    404: "correct address and model: https://host/v1#model",
}
_THIS_PICTURE = (400, 413, 415, 422)
"""Statuses that blame what was sent: filters of contents answer so."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: a token must not follow one to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Unanswered(Exception):
    """The deadline has passed."""


class EndpointCaptioner:
    """Asks an endpoint about pictures, some at once, and tries again what may yet succeed.

    Raises:
        ValueError: the token in VCE_RAY_CAPTIONER_TOKEN is none that can be sent.
    """

    def __init__(self, url: str, model: str):
        self.url, self.model = f"{url}/chat/completions", model
        self.token, self.deadline_s = CAPTIONER_TOKEN.get(), CAPTIONER_DEADLINE_S.get()
        if not (self.token.isascii() and self.token.isprintable()) or " " in self.token:
            raise ValueError("VCE_RAY_CAPTIONER_TOKEN holds blanks or other signs that no token has")
        near = [urllib.request.ProxyHandler({})] if url.startswith("http://") else []  # loopback: past any proxy
        self._opener = urllib.request.build_opener(_NoRedirects, *near)

    def caption(self, images: Sequence[bytes]) -> list[Caption]:
        """One caption for each picture.

        An endpoint that is busy or out of reach is tried again until the deadline. If meanwhile it has answered about
        another picture, the one without an answer is at fault.

        Raises:
            CaptionerError: the endpoint refuses the token, knows no such model, or has answered about no picture while
                one of them was tried.
        """
        stop, heard = threading.Event(), 0.0

        def ask(image: bytes) -> Caption:
            nonlocal heard
            begun = time.monotonic()
            try:
                answer = self._ask(image, begun + self.deadline_s, stop)
            except _Unanswered as error:
                if heard >= begun or stop.is_set():  # where it is set, another picture's failure is raised
                    return Caption("", str(error), "captioner gave no answer")
                stop.set()  # it would be the same for all
                raise CaptionerError(
                    f"captioner {self.url} gave no answer within {self.deadline_s:g} s: {error}. See that it runs, or "
                    "wait longer by VCE_RAY_CAPTIONER_DEADLINE_S, then give the same command again"
                ) from None
            except CaptionerError:
                stop.set()
                raise
            heard = time.monotonic()
            return answer

        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            asked = [pool.submit(ask, image) for image in images]
            wait(asked, return_when=FIRST_EXCEPTION)
            for future in asked:
                if future.done() and (error := future.exception()):
                    raise error
            return [future.result() for future in asked]
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def _ask(self, image: bytes, deadline: float, stop: threading.Event) -> Caption:
        pause = FIRST_PAUSE_S
        while True:
            rest = pause * random.uniform(0.5, 1.0)
            try:
                return read_answer(self._post(image, deadline))
            except urllib.error.HTTPError as error:
                status, told = error.code, self._told(error)
                if status in _THIS_PICTURE:
                    return Caption("", told, "captioner refused the picture")
                if status != 429 and status < 500:
                    mend = _MEND.get(status, "correct its address: https://host/v1#model")
                    raise CaptionerError(f"captioner {self.url} answers {told}: {mend}") from None
                rest = max(rest, _retry_after(error.headers.get("Retry-After", "")))
            except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and broken connections
                told = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
            if time.monotonic() + rest > deadline or stop.wait(rest):
                raise _Unanswered(self._hidden(told))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _post(self, image: bytes, deadline: float) -> bytes:
        """The answer's body, at most LARGEST + 1 bytes of it."""
        picture = "data:image/png;base64," + base64.b64encode(image).decode()
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": QUESTION}]
        asked = {"model": self.model, "messages": [{"role": "user", "content": content}]}
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
