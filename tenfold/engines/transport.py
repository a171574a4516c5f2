"""JSON over HTTP from the standard library: tried again where that may help, within rates, several at once."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

AGAIN = (408, 425, 429, 500, 502, 503, 504, 529)
"""Answers after which the same request may succeed."""


class TransportError(Exception):
    """A request that got no usable answer.

    Args:
        problem: what happened.
        again: whether trying again may help.
        after: seconds to wait first, where the server says so.
    """

    def __init__(self, problem: str, again: bool, after: float | None = None) -> None:
        super().__init__(problem)
        self.problem, self.again, self.after = problem, again, after


def post(url: str, payload: Mapping[str, Any], *, timeout: float, key: str | None = None) -> Any:
    """Send JSON and read JSON, once.

    Args:
        url: whole address.
        payload: what to send.
        timeout: seconds that the server may stay silent.
        key: sent as a bearer token.

    Raises:
        TransportError: no connection, silence, an error status, or an answer that is not JSON.
    """
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(url, json.dumps(payload).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            body = answer.read()
    except urllib.error.HTTPError as error:
        with error:
            said = error.read()[:500].decode(errors="replace").strip()
        raise TransportError(f"HTTP {error.code}: {said or error.reason}", error.code in AGAIN, _after(error)) from None
    except TimeoutError:
        raise TransportError(f"no answer within {timeout:g} s", True) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise TransportError(f"no answer within {timeout:g} s", True) from None
        raise TransportError(f"no connection: {reason or type(error).__name__}", True) from None
    try:
        return json.loads(body)
    except ValueError:
        raise TransportError(f"the answer is not JSON: {body[:80]!r}", True) from None


def _after(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the server asks for; it may name a date instead, which is not read."""
    try:
        return max(0.0, float(error.headers.get("Retry-After", "")))
    except ValueError:
        return None


class Rate:
    """At most so much within any minute; a single larger amount goes alone.

    Args:
        limit: per minute; None is no limit.
        window: seconds of a minute.

    >>> rate = Rate(2, window=0.05)
    >>> began = time.monotonic()
    >>> for _ in range(3):
    ...     _ = rate.take(1)
    >>> time.monotonic() - began >= 0.05
    True
    """

    def __init__(self, limit: float | None, window: float = 60.0) -> None:
        self.limit, self.window = limit, window
        self._lock = threading.Lock()
        self._taken: deque[list[float]] = deque()

    def take(self, amount: float) -> list[float]:
        """Wait until there is room, and take it.

        Returns:
            The entry, whose second number may be set to what it came to in the end.
        """
        while True:
            with self._lock:
                now = time.monotonic()
                while self._taken and now - self._taken[0][0] >= self.window:
                    self._taken.popleft()
                used = sum(entry[1] for entry in self._taken)
                if self.limit is None or not self._taken or used + amount <= self.limit:
                    entry = [now, amount]
                    self._taken.append(entry)
                    return entry
                wait = self.window - (now - self._taken[0][0])
            time.sleep(max(wait, 0.001))


@dataclass
class Sender:
    """Sends requests to one server, from any thread.

    Args:
        url: what paths are put behind, without a slash at its end.
        key: of the server.
        timeout: seconds that the server may stay silent.
        retries: how often to try again.
        pause: seconds before the first of these; each next one is twice as long, up to a minute, and part of it chance.
        requests: per minute, each try counted.
        tokens: per minute, read and written ones.
        at_once: requests that are under way at one time, whichever threads send them.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    retries: int = 4
    pause: float = 1.0
    requests: Rate = field(default_factory=lambda: Rate(None))
    tokens: Rate = field(default_factory=lambda: Rate(None))
    at_once: int = 8

    def __post_init__(self) -> None:
        self._room = threading.BoundedSemaphore(self.at_once)

    def send(
        self, path: str, payload: Mapping[str, Any], *, expected: float = 0, used: Callable[[Any], float] | None = None
    ) -> tuple[Any, float]:
        """One request, tried again where that may help.

        Args:
            path: behind the address.
            payload: what to send.
            expected: tokens that it may cost.
            used: from an answer to the tokens that it did cost.

        Returns:
            The answer, and when the try that gave it began (`time.perf_counter`).

        Raises:
            TransportError: the last one.
        """
        for attempt in range(self.retries + 1):
            cost = self.tokens.take(expected)
            self.requests.take(1)
            try:
                with self._room:
                    began = time.perf_counter()
                    answer = post(self.url + path, payload, timeout=self.timeout, key=self.key)
            except TransportError as error:
                cost[1] = 0.0
                if not error.again or attempt == self.retries:
                    tried = f", tried {attempt + 1} times" if attempt else ""
                    raise TransportError(error.problem + tried, error.again) from None
                wait = min(60.0, self.pause * 2**attempt)
                time.sleep(max(error.after or 0.0, wait * random.uniform(0.5, 1.0)))
                continue
            if used is not None:
                cost[1] = used(answer)
            return answer, began
        raise AssertionError("unreachable")
