"""A language model behind any OpenAI-compatible endpoint: many questions at once, each until it is answered.

By urllib, since the HTTP client that huggingface_hub brings changes its name between versions, and a connection a
question costs nothing beside what a language model takes to answer.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from schemas.errors import WinnowError
from schemas.ids import digest

LARGEST = 4 * 2**20  # bytes of an answer
LONGEST_TEXT = 20_000  # characters of it that are kept
LONGEST_WAIT = 600.0  # seconds that Retry-After may ask for
#: Names in an address that stand before a secret.
KEYS = re.compile("key|token|secret|auth|pass|^sig$|^code$|signature|credential", re.IGNORECASE)
LONGEST_BACKOFF = 60.0  # seconds between two tries of our own accord
# Asked where one question fails for good: is it the question's fault, or is nobody there?
CONTROL = "Reply with the word yes."


class Reply(NamedTuple):
    """What the model said, or why there is no answer to this question; ``passing``: there may be one another time."""

    text: str | None
    problem: str | None = None
    passing: bool = False


class Down(Exception):
    """Nobody answers, or all are refused: the words say what came, and what to do."""


class _Again(Exception):
    """A failure that may pass. ``wait``: seconds that the server asked for."""

    def __init__(self, problem: str, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.problem, self.wait = problem, wait


class _Refused(Exception):
    """The request itself is refused, and would be again. ``cure``: where all of them are."""

    def __init__(self, problem: str, cure: str = "check prompts.judge.model and options") -> None:
        super().__init__(problem)
        self.cure = cure


class _Stopped(Exception):
    """Another question met an end; this one is not asked any more."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to wherever it points."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Endpoint:
    """``url``: up to ``/v1`` or with ``/chat/completions``. ``key_env``: the environment variable with the key.

    ``options`` are laid over the request's body; null takes a key out. ``timeout``: seconds for one answer in all;
    ``tries`` of a question, with waits of ``backoff`` · 2^n seconds, less up to half by chance; ``in_flight``:
    questions asked at once. ``revision`` names all that decides the answers, and the key is not in it.
    """

    def __init__(
        self, url: str, model: str, *, key_env: str | None = None, options: Mapping[str, Any] | None = None,
        longest: int = 400, timeout: float = 60.0, tries: int = 6, backoff: float = 1.0, in_flight: int = 8,
        chance: Callable[[], float] = random.random,
    ) -> None:  # fmt: skip
        self.name, self.url = model, _completions(url)
        body = {"model": model, "temperature": 0, "max_tokens": longest} | dict(options or {})
        self.body = {key: value for key, value in body.items() if value is not None}
        self.revision = digest(["endpoint", self.url, self.body])
        self.timeout, self.tries, self.backoff, self.in_flight = timeout, tries, backoff, in_flight
        self.chance = chance
        self.key_env, self.key = key_env, ""
        self.opener = urllib.request.build_opener(_NoRedirect)
        self.lock = threading.Lock()
        self.not_before = 0.0  # on the monotonic clock: when the server wants to be asked again

    def __call__(self, questions: Sequence[str]) -> Iterator[tuple[int, Reply]]:
        """(place of the question, Reply) as they come. Raises `Down` where it makes no sense to go on, after the
        replies that were still on their way."""
        self.key = _key(self.key_env) if self.key_env else ""
        stop = threading.Event()
        end: Down | None = None
        pool = ThreadPoolExecutor(self.in_flight, thread_name_prefix="ask")
        try:
            places = {pool.submit(self._answer, question, stop): i for i, question in enumerate(questions)}
            for done in as_completed(places):
                try:
                    reply = done.result()
                except _Stopped:
                    continue
                except Down as error:
                    end = end or error
                    continue
                yield places[done], reply
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if end:
            raise end

    def _answer(self, question: str, stop: threading.Event) -> Reply:
        try:
            return self._ask(question, stop)
        except Down:
            stop.set()
            raise

    def _ask(self, question: str, stop: threading.Event) -> Reply:
        problem = ""
        for attempt in range(self.tries):
            try:
                return self._try(question, stop)
            except _Refused as error:
                return self._blame(str(error), stop, passing=False)
            except _Again as error:
                problem = f"{error.problem} in {self.tries} tries" if self.tries > 1 else error.problem
                wait = min(LONGEST_BACKOFF, self.backoff * 2**attempt) * (1 - self.chance() / 2)
                if error.wait > LONGEST_WAIT:
                    raise Down(f"{self._who()}: asks to wait {error.wait:.0f} s ({error.problem})") from None
                if error.wait:
                    with self.lock:  # meant for all of us, not for this question alone
                        self.not_before = max(self.not_before, time.monotonic() + error.wait)
                if attempt + 1 < self.tries and stop.wait(wait):
                    raise _Stopped from None
        return self._blame(problem, stop, passing=True)

    def _blame(self, problem: str, stop: threading.Event, passing: bool) -> Reply:
        """A question that gets no answer is at fault itself where one that cannot be gets one."""
        try:
            self._try(CONTROL, stop)
        except _Again:
            raise Down(f"{self._who()}: {problem}; check prompts.judge.url") from None
        except _Refused as error:
            raise Down(f"{self._who()}: {problem}; {error.cure}") from None
        return Reply(None, f"no answer: {problem}", passing)

    def _try(self, question: str, stop: threading.Event) -> Reply:
        """One request."""
        while (left := self.not_before - time.monotonic()) > 0:
            if stop.wait(left):
                raise _Stopped
        if stop.is_set():
            raise _Stopped
        body = self.body | {"messages": [{"role": "user", "content": question}]}
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "winnow"}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        until = time.monotonic() + self.timeout
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                data = _whole(response, until)
        except urllib.error.HTTPError as error:
            with error:
                problem = f"HTTP {error.code}{self._why(error, until)}"
            if error.code in (408, 409, 425, 429) or error.code >= 500:
                raise _Again(problem, _retry_after(error.headers.get("Retry-After"))) from None
            cure = f"check the key in {self.key_env}" if self.key else "name its variable in prompts.judge.key_env"
            if error.code == 401:
                raise Down(f"{self._who()}: {problem}; {cure}") from None
            if error.code == 402:
                raise Down(f"{self._who()}: {problem}; see to the account of the key") from None
            if error.code == 403:  # of the key, or of this one question, as moderation answers
                raise _Refused(problem, cure) from None
            if error.code in (404, 405) or error.code < 400:
                raise Down(f"{self._who()}: {problem}; check prompts.judge.url and model") from None
            raise _Refused(problem) from None
        except (OSError, http.client.HTTPException) as error:  # with time-outs and URLError among them
            raise _Again(_reason(error, self.timeout)) from None
        return self._read(data)

    def _read(self, data: bytes) -> Reply:
        try:
            choice = json.loads(data)["choices"][0]
            text = choice["message"]["content"]
            ended = choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _Again(f"an answer that is no chat completion{self._said(data)}") from None
        if not isinstance(text, str) or not text.strip():
            return Reply(None, f"the model says nothing (finish_reason {str(ended)[:40]})")
        text = self._clean(text)[:LONGEST_TEXT]
        return Reply(text, "half an answer: cut at the longest length" if ended == "length" else None)

    def _why(self, error: urllib.error.HTTPError, until: float) -> str:
        """What the server says about its error, short."""
        try:
            return self._said(_whole(error, until))
        except (OSError, http.client.HTTPException):
            return ""

    def _said(self, data: bytes) -> str:
        """The error that a body tells of, short."""
        try:
            said = json.loads(data)
            words = said["error"]["message"] if isinstance(said["error"], dict) else said["error"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return ""
        words = self._clean(" ".join(str(words).split()))
        return f" ({words[:160]})" if words else ""

    def _clean(self, text: str) -> str:
        """Without the key, and without halves of characters, which JSON can hold and no file."""
        text = text.encode(errors="replace").decode()
        return text.replace(self.key, "[key]") if self.key else text

    def _who(self) -> str:
        return f"model {self.name!r} at {self.url}"


def check_url(url: str) -> str:
    """``url`` if questions can be sent there; what it says of keys stays out of the error."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and url.isascii() and url.isprintable()
        fine = fine and " " not in url
        _ = parts.port, (parts.hostname or "").encode("idna")
    except ValueError:
        fine = False
    if not fine:
        raise WinnowError("prompts.judge.url: not an address; write for example http://localhost:8000/v1")
    asked = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    told = parts.fragment or re.search("[/=]sk-", f"{parts.path}?{parts.query}")
    if "@" in parts.netloc or told or any(KEYS.search(name) for name in asked):
        raise WinnowError("prompts.judge.url: holds a key; put it into an environment variable, named in key_env")
    return url


def _completions(url: str) -> str:
    parts = urlsplit(check_url(url))
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return urlunsplit(parts._replace(path=path, fragment=""))


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise WinnowError(f"prompts.judge.key_env: {variable} is not set; export the endpoint's key in it")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise WinnowError(f"prompts.judge.key_env: what {variable} holds cannot be a key; set it again")
    return key


def _whole(response: Any, until: float) -> bytes:
    """The body, all of it and in time: urllib's own time-out begins anew with every packet."""
    data = bytearray()
    while chunk := response.read1(65536):
        data += chunk
        if len(data) > LARGEST:
            raise http.client.HTTPException(f"an answer above {LARGEST // 2**20} MiB")
        if time.monotonic() > until:
            raise TimeoutError
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and len(data) < int(length):
        raise http.client.HTTPException(f"half an answer ({len(data)} of {length} bytes)")
    return bytes(data)


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, which is a number or a date (RFC 9110, section 10.2.3); 0 for none."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value)) if value.strip().isdigit() else _until(value)
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _until(date: str) -> float:
    return max(0.0, email.utils.parsedate_to_datetime(date).timestamp() - time.time())


def _reason(error: BaseException, timeout: float) -> str:
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError):
        return f"no answer within {timeout:g} s"
    if isinstance(cause, http.client.IncompleteRead):
        return "half an answer"
    return " ".join(str(cause).split())[:160] or type(cause).__name__
