"""The socket of the fake server: JSON over HTTP/1.1, a key, and refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

Json = dict[str, Any]


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, **headers: str):
        self.status, self.message, self.headers = status, message, headers
        super().__init__(message)


class Answers(Protocol):
    """What is behind the socket."""

    @property
    def api_key(self) -> str | None:
        """Asked of every request."""

    def models(self) -> Json:
        """Answer of `/v1/models`."""
        ...

    def complete(self, body: Json) -> Json:
        """Answer of `/v1/completions`; `Refused` for what it does not do."""
        ...


class Http(ThreadingHTTPServer):
    """A socket with the server that answers behind it."""

    daemon_threads = True
    fake: Answers

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Quiet about clients that left before their answer; errors of the server itself are printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer leaves as one packet: the second of two would wait for the client's word on the first
    server: Http

    def do_GET(self) -> None:
        self._answer(self.server.fake.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(lambda: self.server.fake.complete(body))

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _answer(self, make: Callable[[], Json]) -> None:
        try:
            self._check()
            self._send(200, make(), {})
        except Refused as refused:
            self._send(refused.status, {"error": {"message": refused.message, "code": refused.status}}, refused.headers)

    def _check(self) -> None:
        key = self.server.fake.api_key
        given = self.headers.get("Authorization", "")
        if key and given != f"Bearer {key}":
            raise Refused(401, f"Incorrect API key provided: {given.removeprefix('Bearer ')}")
        if self.path not in ("/v1/models", "/v1/completions"):
            raise Refused(404, "not found")

    def _send(self, status: int, content: Json, headers: dict[str, str]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)
