"""Asks the hubs: commit, files, sizes and config.json. Blocking SDK calls run in a thread; answers are kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from kubeinfer.weights.errors import NetworkUnreachable, WeightsError
from kubeinfer.weights.uri import ModelSource
from kubeinfer_operator import names
from kubeinfer_operator.gguf_header import HEADER_BYTES, read_header
from kubeinfer_operator.plan import Hub

KEEP_SECONDS = 3600.0
AGAIN_SECONDS = 5.0  # after a failure; twice that after the next


@dataclass(frozen=True, slots=True)
class HubError:
    """Why a hub gave no answer. ``permanent``: asking again changes nothing before the spec does."""

    reason: str
    message: str
    permanent: bool
    try_mirror: bool = True


Answer = Hub | HubError
Question = tuple[ModelSource, tuple[str, ...], tuple[str, ...], str]

PERMANENT = ("InvalidModelId", "RevisionNotFound", "FileNotFound", "NotHere")


def ask(question: Question) -> Answer:
    """One blocking question. Never raises for what a hub or a network may do."""
    from kubeinfer.weights.plan import resolve

    source, include, exclude, token = question
    try:
        found = resolve(source, include=include, exclude=exclude, token=token or None)
        config = found.config
        if config is None and any(file.path.endswith(".gguf") for file in found.files):
            config = _gguf_config(question)
        return Hub(found.revision, {file.path: file.size for file in found.files}, config)
    except WeightsError as error:
        return HubError(error.reason, error.message, error.reason in PERMANENT, error.try_mirror)
    except OSError as error:
        return HubError(NetworkUnreachable.reason, f"{source}: {error}", False)


def _gguf_config(question: Question) -> dict[str, Any] | None:
    """The shape of a GGUF model from the first bytes of its file; None where the hub does not give them."""
    import requests

    from kubeinfer.weights.download import resolve_any
    from kubeinfer.weights.request import make_request

    source, include, exclude, token = question
    request = make_request(source, include=include, exclude=exclude, token=token or None)
    hub, resolved, files = resolve_any(request)
    file = min((f for f in files if f.path.endswith(".gguf")), key=lambda f: f.path)
    wanted = hub.request_for(resolved, file)
    headers = {**wanted.headers, "Range": f"bytes=0-{HEADER_BYTES - 1}"}
    try:
        with requests.get(wanted.url, headers=headers, timeout=20, stream=True) as answer:
            if answer.status_code not in (200, 206):
                return None
            return read_header(answer.raw.read(HEADER_BYTES))
    except requests.exceptions.RequestException:
        return None


@dataclass(slots=True)
class _Kept:
    answer: Answer
    at: float
    failures: int


class HubDesk:
    """Keeps answers, asks in the background and says when one is there. Few threads: a hub must not be flooded."""

    def __init__(self, asker: Callable[[Question], Answer] = ask, threads: int = 4) -> None:
        self._ask = asker
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="hub")
        self._kept: dict[str, _Kept] = {}
        self._running: dict[str, list[Callable[[], None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @staticmethod
    def key(question: Question) -> str:
        source, include, exclude, token = question
        return names.digest([str(source), include, exclude, names.digest(token)], 20)

    def look(self, question: Question) -> Answer | None:
        """The answer that is here; None when none is, or when it is time to ask again."""
        kept = self._kept.get(self.key(question))
        if kept is None or time.monotonic() - kept.at > self._lifetime(kept):
            return None
        return kept.answer

    def last(self, question: Question) -> Answer | None:
        """The last answer, however old."""
        kept = self._kept.get(self.key(question))
        return kept.answer if kept else None

    def due_in(self, question: Question) -> float:
        """Seconds until the answer that is here is too old to go by."""
        kept = self._kept.get(self.key(question))
        return max(kept.at + self._lifetime(kept) - time.monotonic(), 0.0) if kept else 0.0

    @staticmethod
    def _lifetime(kept: _Kept) -> float:
        if isinstance(kept.answer, Hub):
            return KEEP_SECONDS
        return min(AGAIN_SECONDS * 2 ** min(kept.failures - 1, 7), 600.0)

    def request(self, question: Question, done: Callable[[], None]) -> None:
        """Ask in the background, once however many want to know, and call ``done`` of each."""
        key = self.key(question)
        waiting = self._running.setdefault(key, [])
        waiting.append(done)
        if len(waiting) == 1:
            task = asyncio.create_task(self._run(key, question))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, key: str, question: Question) -> None:
        answer = await asyncio.get_running_loop().run_in_executor(self._pool, self._ask, question)
        before = self._kept.get(key)
        failures = 0 if isinstance(answer, Hub) else (before.failures if before else 0) + 1
        if len(self._kept) > 4096:
            self._kept.clear()
        self._kept[key] = _Kept(answer, time.monotonic(), failures)
        for done in self._running.pop(key, []):
            done()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
