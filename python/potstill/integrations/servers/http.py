"""One JSON request after another to a server that may be busy, slow or restarting."""

from __future__ import annotations

import email.utils
import http.client
import json
import random
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


class ServerError(OSError):
    """The server refused a request for good, or did not answer in all attempts; one line."""


class Stopped(Exception):
    """The client was told to stop while a request waited."""


@dataclass(frozen=True)
class Retry:
    """attempts in all; the wait before attempt n + 1 is first * 2^(n-1) seconds, at most `longest`, with a random half.

    A Retry-After of the server is kept where it is longer, unless it is above `patience` seconds: then the request
    fails.
    """

    attempts: int = 8
    first: float = 0.5
    longest: float = 60.0
    patience: float = 600.0

    def delay(self, failures: int) -> float:
        """Seconds to wait after so many failures."""
        return min(self.longest, self.first * 2.0 ** (failures - 1)) * (0.5 + random.random() / 2)


@dataclass
class Client:
    """Posts JSON to `url` + path. Safe to use from several threads.

    timeout: seconds that a connection may stay silent. A request is tried again after a refused or broken connection, a
    timeout, a body that is cut or no JSON, and the statuses 408, 425, 429, 500, 502, 503 and 504; any other status is
    final.
    """

    url: str
    timeout: float = 600.0
    retry: Retry = field(default_factory=Retry)
    headers: Mapping[str, str] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    requests: int = 0  # sent, retries included
    retries: int = 0
    received: int = 0  # bytes of the bodies

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the server's address is {self.url!r}: http://HOST:PORT or https://HOST is accepted")
        self.url = self.url.rstrip("/").removesuffix("/v1")
        self._lock = threading.Lock()

    def post(self, path: str, body: Any, read: Callable[[Any], Any] = lambda answer: answer) -> Any:
        """`read` of the JSON that the server answers; raises ServerError, or Stopped once `stop` is set."""
        content = json.dumps(body).encode()
        for failures in range(1, self.retry.attempts + 1):
            if self.stop.is_set():
                raise Stopped
            problem, asked = "", 0.0
            try:
                return read(self._once(path, content))
            except urllib.error.HTTPError as e:
                problem = f"{e.code} {e.reason}{_said(e)}"
                if e.code not in RETRIED:
                    raise ServerError(f"{self.url}{path} answered {problem}") from None
                asked = _retry_after(e.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as e:
                problem = _first_line(getattr(e, "reason", None) or e)
                if isinstance(getattr(e, "reason", None), ssl.SSLCertVerificationError):
                    raise ServerError(f"{self.url}{path}: {problem}") from None
            except (json.JSONDecodeError, UnicodeDecodeError) as e:
                problem = f"a body that is no JSON ({_first_line(e)})"
            if asked > self.retry.patience:
                raise ServerError(f"{self.url}{path} answered {problem} and asks to wait {asked:,.0f} s")
            if failures < self.retry.attempts:
                with self._lock:
                    self.retries += 1
                self._wait(max(asked, self.retry.delay(failures)))
        raise ServerError(f"{self.url}{path} failed {self.retry.attempts} times, the last with: {problem}")

    def _once(self, path: str, content: bytes) -> Any:
        request = urllib.request.Request(
            self.url + path, content, {"Content-Type": "application/json", "Accept": "application/json", **self.headers}
        )
        with self._lock:
            self.requests += 1
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            body = answer.read()
        with self._lock:
            self.received += len(body)
        return json.loads(body)

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise Stopped


def _said(error: urllib.error.HTTPError) -> str:
    """What the server says of an error, on one line."""
    try:
        text = error.read(4096).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
    try:
        value = json.loads(text)
        while isinstance(value, dict):
            value = value.get("message") or value.get("error") or value.get("detail") or json.dumps(value)
        text = value if isinstance(value, str) else json.dumps(value)
    except ValueError:
        pass
    text = " ".join(text.split())
    return f": {text[:300]}" if text else ""


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, given as seconds or as a date; 0 where there is none."""
    if not value:
        return 0.0
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
