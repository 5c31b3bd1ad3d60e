"""What a tracking address says by itself, before MLflow is asked: its kind, its lock, and the page a person opens."""

from __future__ import annotations

import contextlib
import fcntl
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

_SQLITE = "sqlite:///"
_USER = re.compile(r"(?<=://)[^/\s]*@")
_SECRET = re.compile(r"(?<=[?&])((?:password|passwd|pwd|sslpassword|odbc_connect)=)[^&\s]*", re.IGNORECASE)


def absolute(uri: str) -> str:
    """The same address from every working folder; only sqlite paths depend on it."""
    path = sqlite_path(uri)
    return uri if path is None else f"{_SQLITE}{path.absolute()}"


def sqlite_path(uri: str) -> Path | None:
    """The database file; None for servers and other stores."""
    path = uri.removeprefix(_SQLITE)
    return Path(path) if path != uri and path not in ("", ":memory:") else None


def artifact_location(uri: str) -> str | None:
    """Where a new experiment keeps its artifacts: beside a sqlite file (MLflow would take the working folder), else the server's choice."""
    path = sqlite_path(uri)
    return None if path is None else path.with_name("mlartifacts").absolute().as_uri()


def page(uri: str, experiment_id: str, run_id: str) -> str:
    """What a person opens: an address, or the command that serves one, without a password."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return f"mlflow ui --backend-store-uri {shlex.quote(without_password(uri))}"
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/") + "/", "", f"/experiments/{experiment_id}/runs/{run_id}"))


def without_password(text: str) -> str:
    """An address, or a sentence with addresses in it, without their user names and passwords."""
    return _SECRET.sub(r"\1...", _USER.sub("", text))


def of_record(recorded: str | None, configured: str) -> str:
    """Where a run goes on: where it began, with the password of `configured` where that is the same address."""
    return configured if recorded is None or recorded == without_password(configured) else recorded


@contextlib.contextmanager
def first_contact(uri: str) -> Iterator[None]:
    """One process at a time: two that create the tables of one sqlite file break each other's migration."""
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
