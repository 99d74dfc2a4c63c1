"""Captioners and refiners behind an endpoint with OpenAI's chat completions API (vLLM, SGLang, vendors).

Requests go through urllib with redirects disabled, and past any proxy on loopback: the token must reach the configured
host only.
"""

from __future__ import annotations

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
from vce_ray.pairs.answers import ANSWER_TOKENS, Caption, caption_question, clean

CONCURRENCY = 8
"""Concurrent requests of one actor."""
READ_TIMEOUT_S = 60.0
"""Seconds without new bytes after which a request times out."""
MAX_ANSWER_BYTES = 1 << 20
"""Largest response body that is read. A normal one has a few hundred bytes."""
INITIAL_BACKOFF_S, MAX_BACKOFF_S = 0.5, 20.0
REWRITE = (
    "Rewrite this description of a picture so that it says nothing of: {terms}.{instead} Keep all else that it tells, "
    "such as objects, colours, background and style. Answer with the new description only, in one plain sentence."
    "\n\n{caption}"
)
"""Prompt for refiners. The answer is treated like any caption: the rules of refine.py are applied to it."""
_FIXES = {
    401: "set its token in {token}, on every machine whose actors caption",
    403: "set a token with access to this model in {token}",
    404: "correct the URL and the model: https://host/v1#model",
}
_REJECTED_REQUEST = (400, 413, 415, 422)
"""Statuses that refer to the content of one request. Content filters answer with them."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Turns redirects into errors, because following one could send the token to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _DeadlineExceeded(Exception):
    """A question was not answered before its deadline. The message is the last error."""


class Endpoint:
    """Sends questions to an endpoint concurrently and retries temporary errors.

    Args:
        deadline_s: seconds for which a question is retried. Default: env.CAPTIONER_DEADLINE_S.

    Raises:
        UserError: the token contains characters that cannot be sent in a header.
    """

    role = "captioner"
    subject = "picture"
    """What a question is about, for messages."""
    token_variable: Variable[str] = CAPTIONER_TOKEN

    def __init__(self, url: str, model: str, deadline_s: float | None = None):
        self.url, self.model = f"{url}/chat/completions", model
        self.token, self.deadline_s = self.token_variable.get(), deadline_s or CAPTIONER_DEADLINE_S.get()
        if not (self.token.isascii() and self.token.isprintable()) or " " in self.token:
            raise UserError(
                f"{self.token_variable.name} contains spaces or control or non-ASCII characters: set the bare token"
            )
        # http:// means loopback (parse_captioner), which the machine's proxy settings must not apply to
        handlers = [urllib.request.ProxyHandler({})] if url.startswith("http://") else []
        self._opener = urllib.request.build_opener(_NoRedirects, *handlers)

    def ask(self, questions: Sequence[list[dict[str, Any]]]) -> list[Caption]:
        """Return one answer per question. A question is the content of a chat message: a list of texts and images.

        If the endpoint is busy or unreachable, a question is retried until its deadline. A question that is still
        unanswered then is the only one to fail if the endpoint has answered another one since it was first sent.

        Raises:
            CaptionerError: the endpoint refuses the token, does not have the model, or answered no question at all
                between the first attempt at one of them and its deadline.
        """
        stop, last_answer_at = threading.Event(), 0.0

        def ask(question: list[dict[str, Any]]) -> Caption:
            nonlocal last_answer_at
            started = time.monotonic()
            try:
                answer = self._ask(question, started + self.deadline_s, stop)
            except _DeadlineExceeded as error:
                # An answer to any other question since `started` proves that the endpoint works, so this question
                # alone is rejected. With `stop` set, this thread was interrupted and another one raises the error.
                if last_answer_at >= started or stop.is_set():
                    return Caption("", str(error), f"{self.role} gave no answer")
                stop.set()  # the other questions would fail in the same way
                raise CaptionerError(
                    f"{self.role} {self.url} gave no answer within {self.deadline_s:g} s: {error}",
                    f"check that it is running, or increase {CAPTIONER_DEADLINE_S.name}, then run the same command "
                    "again",
                ) from None
            except CaptionerError:
                stop.set()
                raise
            last_answer_at = time.monotonic()
            return answer

        pool = ThreadPoolExecutor(CONCURRENCY)
        try:
            futures = [pool.submit(ask, question) for question in questions]
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done() and (error := future.exception()):
                    raise error
            return [future.result() for future in futures]
        finally:
            stop.set()  # wakes threads that wait for their next attempt
            pool.shutdown(cancel_futures=True)

    def _ask(self, question: list[dict[str, Any]], deadline: float, stop: threading.Event) -> Caption:
        """Ask one question, with retries. Raises _DeadlineExceeded or CaptionerError."""
        backoff = INITIAL_BACKOFF_S
        while True:
            delay = backoff * random.uniform(0.5, 1.0)  # jitter: actors must not retry in step
            try:
                return read_answer(self._post(question, deadline), self.role)
            except urllib.error.HTTPError as error:
                status, message = error.code, self._error_message(error)
                if status in _REJECTED_REQUEST:
                    return Caption("", message, f"{self.role} refused the {self.subject}")
                if status != 429 and status < 500:
                    fix = _FIXES.get(status, "correct its URL: https://host/v1#model")
                    fix = fix.format(token=self.token_variable.name)
                    raise CaptionerError(f"{self.role} {self.url} answers {message}", fix) from None
                delay = max(delay, _retry_after(error.headers.get("Retry-After", "")))
            except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and broken connections
                message = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
            if time.monotonic() + delay > deadline or stop.wait(delay):
                raise _DeadlineExceeded(self._redact(message))
            backoff = min(2 * backoff, MAX_BACKOFF_S)

    def _post(self, question: list[dict[str, Any]], deadline: float) -> bytes:
        """Send one request and return the response body, cut to MAX_ANSWER_BYTES + 1 bytes.

        The extra byte tells `read_answer` that the body was too large.
        """
        payload: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": question}]}
        payload |= {"temperature": 0, "max_tokens": ANSWER_TOKENS}
        request = urllib.request.Request(self.url, json.dumps(payload).encode(), {"Content-Type": "application/json"})
        if self.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        remaining = max(0.1, deadline - time.monotonic())
        body = bytearray()
        with self._opener.open(request, timeout=min(READ_TIMEOUT_S, remaining)) as response:
            # The socket's timeout restarts with every chunk, so a server that sends slowly is stopped by the clock.
            while len(body) <= MAX_ANSWER_BYTES and (chunk := response.read1(1 << 16)):
                body += chunk
                if time.monotonic() > deadline:
                    raise TimeoutError("the answer was incomplete at the deadline")
        return bytes(body[: MAX_ANSWER_BYTES + 1])

    def _error_message(self, error: urllib.error.HTTPError) -> str:
        """Return the status and the start of the body of an error response."""
        body = ""
        with contextlib.suppress(OSError, http.client.HTTPException), error:
            body = " ".join(error.read(2000).decode(errors="replace").split())[:300]
        return self._redact(f"{error.code} {error.reason} {body}".strip())

    def _redact(self, text: str) -> str:
        """Remove the token, which some servers repeat in their errors."""
        return text.replace(self.token, "***") if self.token else text


class EndpointCaptioner(Endpoint):
    """Describes images with a vision model behind an endpoint."""

    def caption(self, images: Sequence[bytes], questions: Sequence[str]) -> list[Caption]:
        """Return one caption per image (PNG bytes) and question, in order. Raises CaptionerError like `ask`."""
        return self.ask([caption_question(*asked) for asked in zip(images, questions, strict=True)])


class EndpointRefiner(Endpoint):
    """Rewrites captions without their concept, with a language model behind an endpoint."""

    role, subject = "refiner", "caption"
    token_variable = REFINER_TOKEN

    def rewrite(self, captions: Sequence[tuple[str, Concept]]) -> list[Caption]:
        """Return the rewritten captions, in order; terms may be left in them. Raises CaptionerError like `ask`."""
        return self.ask([[{"type": "text", "text": rewrite_question(text, concept)}] for text, concept in captions])


def rewrite_question(caption: str, concept: Concept) -> str:
    """Return the prompt for a refiner: the caption, the terms to remove, and the replacement if there is one."""
    terms = ", ".join(f"'{term}'" for term in concept.mentions(caption))
    instead = f" Where something must stand in its place, say '{concept.replacement}'." if concept.replacement else ""
    return REWRITE.format(terms=terms, instead=instead, caption=caption)


def read_answer(body: bytes, role: str) -> Caption:
    """Return the caption in the response body of a chat completion from a captioner or refiner."""
    if len(body) > MAX_ANSWER_BYTES:
        return Caption("", f"more than {MAX_ANSWER_BYTES} bytes", "answer too large")
    try:
        choice = json.loads(body)["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        refusal, text = message.get("refusal") or "", message.get("content") or ""
        if not isinstance(text, str) or not isinstance(refusal, str):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError):
        return Caption("", body[:200].decode(errors="replace"), "answer is no chat completion")
    return clean(text or refusal, finish == "length", bool(refusal) or finish == "content_filter", role)


def _retry_after(text: str) -> float:
    """Return the seconds to wait given by a Retry-After header, which is a number or a date; 0 if it is invalid."""
    if text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
