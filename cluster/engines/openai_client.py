"""Talks HTTP with an OpenAI-compatible server: paced, repeated when it is busy, and never telling the key."""

from __future__ import annotations

import datetime
import os
import random
import threading
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from time import monotonic, sleep
from typing import Any

import httpx2

from cluster.config import OpenAIEndpoint
from cluster.offers import Unfit

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Statuses of a server that may do better a moment later."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 60.0
LONGEST_RETRY_AFTER_SECONDS = 600.0
SHOWN_CHARACTERS = 240
"""Of a server's own words."""
Json = dict[str, Any]


class ServerFailed(ConnectionError):
    """A request that was not answered. `status` is None when there was no answer at all."""

    def __init__(self, url: str, status: int | None, words: str, tries: int):
        self.url, self.status, self.words, self.tries = url, status, words, tries
        said = f"status {status}" if status is not None else "no answer"
        super().__init__(f"{url}: {said} after {tries} {'try' if tries == 1 else 'tries'}; it said: {words or 'nothing'}")

    def __reduce__(self) -> tuple[type[ServerFailed], tuple[str, int | None, str, int]]:
        return (ServerFailed, (self.url, self.status, self.words, self.tries))

    @property
    def refused(self) -> bool:
        """Whether the server understood and does not do it, so that asking again is no use."""
        client_errors = range(HTTPStatus.BAD_REQUEST, HTTPStatus.INTERNAL_SERVER_ERROR)
        return self.status in client_errors and self.status not in RETRIED


class Pace:
    """A token bucket that holds a second's worth of requests, one at least. Threads share it."""

    def __init__(self, per_minute: float | None):
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._slack = max(0.0, 1.0 - self._interval)
        self._next = 0.0
        self._lock = threading.Lock()

    def take(self) -> None:
        """Sleeps until a request may go."""
        if not self._interval:
            return
        with self._lock:
            now = monotonic()
            at = max(self._next, now - self._slack)
            self._next = at + self._interval
        if at > now:
            sleep(at - now)


class Server:
    """One server under one base URL. Threads share it."""

    def __init__(self, config: OpenAIEndpoint, max_retries: int | None = None):
        """`Unfit` for a URL that names no server or carries a password, and for a missing key where one is needed."""
        self.url = _checked(config.base_url)
        self._key = _key(config, self.url)
        self._retries = config.max_retries if max_retries is None else max_retries
        self._pace = Pace(config.requests_per_minute / config.actors if config.requests_per_minute else None)
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=config.timeout_seconds,
            limits=httpx2.Limits(max_connections=config.requests_at_once),
            trust_env=not _on_this_machine(self.url),  # a proxy does not reach what listens here only
        )

    def get(self, path: str) -> Json:
        """The answer to GET; raises like `post`."""
        return self._send("GET", path, None)

    def post(self, path: str, body: Json) -> Json:
        """The JSON object that answers `body`. `ServerFailed` when it refuses, or when repeating did not help."""
        return self._send("POST", path, body)

    def close(self) -> None:
        self._client.close()

    def _send(self, method: str, path: str, body: Json | None) -> Json:
        tries = 0
        while True:
            tries += 1
            self._pace.take()
            answer, words = self._once(method, path, body)
            if answer is not None and answer.is_success:
                return self._parsed(answer, tries)
            failure = ServerFailed(self.url + path, answer.status_code if answer is not None else None, words, tries)
            if tries > self._retries or (answer is not None and answer.status_code not in RETRIED):
                raise failure
            sleep(_pause(tries, answer.headers.get("retry-after") if answer is not None else None))

    def _once(self, method: str, path: str, body: Json | None) -> tuple[httpx2.Response | None, str]:
        """An answer and its first words; no answer and why when the connection failed."""
        try:
            answer = self._client.request(method, self.url + path, json=body)
        except httpx2.TransportError as error:
            return None, self._shown(f"{type(error).__name__} {error}")
        return answer, "" if answer.is_success else self._shown(answer.text)

    def _parsed(self, answer: httpx2.Response, tries: int) -> Json:
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ServerFailed(str(answer.url), answer.status_code, f"no JSON object but {self._shown(answer.text)!r}", tries)
        return found

    def _shown(self, text: str) -> str:
        """First words of a text that may repeat the key."""
        hidden = text.replace(self._key, "***") if self._key else text
        return " ".join(hidden.split())[:SHOWN_CHARACTERS]


def _checked(base_url: str) -> str:
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL:
        url = httpx2.URL()
    do = "Write the address as http://host:port/v1."
    if url.userinfo or url.query:
        expected = "the key in the environment variable that api_key_env names"
        raise Unfit("base_url", f"an address of {url.host!r} that carries a password or a query", expected, do)
    if url.scheme not in ("http", "https") or not url.host:
        raise Unfit("base_url", repr(base_url), "an address that begins with http:// or https://", do)
    return base_url.rstrip("/")


def _key(config: OpenAIEndpoint, url: str) -> str | None:
    key = os.environ.get(config.api_key_env, "").strip()
    if not key and not _on_this_machine(url):
        do = f"Export {config.api_key_env} here and on every node (any word, if the server asks for none)."
        raise Unfit("api_key_env", f"no environment variable {config.api_key_env}", f"the key of {url} in it", do)
    return key or None


def _on_this_machine(url: str) -> bool:
    host = httpx2.URL(url).host
    return host in ("localhost", "::1") or host.startswith("127.")


def _pause(tries: int, retry_after: str | None) -> float:
    """Seconds until the next try: doubling, up to half of it left to chance so that actors spread, and what the server asks for."""
    grown = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** (tries - 1)) * random.uniform(0.5, 1.0)
    return max(grown, min(LONGEST_RETRY_AFTER_SECONDS, _seconds(retry_after)))


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header: seconds or a date; 0 for one that is neither."""
    try:
        return float(retry_after or 0.0)
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(retry_after or "")
    except ValueError:
        return 0.0
    return (at - datetime.datetime.now(at.tzinfo)).total_seconds()
