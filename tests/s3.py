"""A real S3 server on loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_bucket(name: str, folder: Path) -> Iterator[str]:
    """Address of an empty bucket, which this process and those it starts can reach; the server's log goes into `folder`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "log").open("w") as log, pytest.MonkeyPatch.context() as patch:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        for key, value in {**KEYS, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(key, value)
        try:
            _wait_for(url)
            urllib.request.urlopen(urllib.request.Request(f"{url}/{name}", method="PUT"))
            yield f"s3://{name}"
        finally:
            server.kill()
            server.wait()


def _wait_for(url: str) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url)
            return
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < end, "the S3 server does not answer"
            time.sleep(0.2)
