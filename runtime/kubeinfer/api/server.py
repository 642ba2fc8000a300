"""A running server: HTTP over an engine, signals, draining, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import uvicorn

from kubeinfer import logs
from kubeinfer.api.app import build_app
from kubeinfer.api.launch import kill_children
from kubeinfer.api.observe import attach_metrics, current_stats
from kubeinfer.api.state import ServerState
from kubeinfer.async_llm import AsyncLLM
from kubeinfer.options import ServeOptions
from kubeinfer.text.chat_template import ChatTemplate

_logger = logging.getLogger("kubeinfer.server")
_FLUSH_SECONDS = 3.0  # for aborted streams to reach their clients
_DEATH_GRACE = 1.0  # in which /health says 503 and streams get their error, before the process exits


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are ours


class ApiServer:
    """HTTP over one engine, from ready to gone. Its address is the bound ``listener``'s."""

    def __init__(
        self,
        options: ServeOptions,
        engine: AsyncLLM,
        listener: socket.socket,
        *,
        legacy_only: bool = False,
        started: float | None = None,
    ):
        self.options = options
        self.engine = engine
        self.listener = listener
        self.started = started
        self.legacy_only = legacy_only
        chat = ChatTemplate.for_tokenizer(
            engine.tokenizer, options.chat_template, options.chat_template_content_format
        )
        metrics = attach_metrics(engine, (options.served_model_name or [options.model])[0])
        self.state = ServerState(engine, options, metrics, chat)
        self.uvicorn = _Uvicorn(
            uvicorn.Config(
                build_app(self.state, legacy_only=legacy_only),
                http="httptools",
                ws="none",
                lifespan="off",
                interface="asgi3",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=75,  # longer than a proxy keeps an idle connection
                timeout_graceful_shutdown=5,
                ssl_keyfile=options.ssl_keyfile,
                ssl_certfile=options.ssl_certfile,
                ssl_ca_certs=options.ssl_ca_certs,
                ssl_cert_reqs=2 if options.ssl_ca_certs else 0,
            )
        )
        self.cause: str | None = None  # of the engine's death
        self._signals = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self) -> int:
        """Serve; 0 after a signal's orderly end, 1 when the engine died."""
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(self.serve())

    async def serve(self) -> int:
        self.engine.start()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, RuntimeError):  # not the main thread
                loop.add_signal_handler(number, self._on_signal, number)
        for work in (self._announce(), self._watch_engine(), self._log_stats()):
            self._spawn(work)
        try:
            await self.uvicorn.serve(sockets=[self.listener])
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self.cause = self.engine.death_reason
            self.engine.shutdown()
        return 0 if self.cause is None else 1

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        if self._signals > 1:
            _logger.warning("Second signal: leaving at once.")
            kill_children()
            os._exit(128 + number)
        self._spawn(self.drain())

    async def drain(self) -> None:
        """Refuse new requests, let running ones finish up to the deadline, abort the rest, and stop."""
        state = self.state
        state.draining = True
        if state.in_flight:
            _logger.info(
                "Shutting down: %d requests in flight have %g s to finish.",
                state.in_flight,
                self.options.shutdown_timeout,
            )
        if not await self._idle(self.options.shutdown_timeout):
            _logger.warning("Aborting %d requests that are still in flight.", state.in_flight)
            await self.engine.abort_all()
            await self._idle(_FLUSH_SECONDS)
        self.uvicorn.should_exit = True

    async def _idle(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.state.in_flight:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    async def _watch_engine(self) -> None:
        while self.engine.death_reason is None:
            await asyncio.sleep(0.1)
        _logger.error("The engine has stopped: %s", self.engine.death_reason)
        await asyncio.sleep(_DEATH_GRACE)
        await self._idle(_FLUSH_SECONDS)
        self.uvicorn.should_exit = True

    async def _log_stats(self) -> None:
        line = logs.StatsLine()
        while not self.options.disable_log_stats:
            await asyncio.sleep(logs.LOG_INTERVAL)
            found = line.next(current_stats(self.engine))
            if found is not None:
                _logger.info(found[0], extra={"fields": found[1]})

    async def _announce(self) -> None:
        while not self.uvicorn.started:
            await asyncio.sleep(0.005)
        took = f" after {time.monotonic() - self.started:.1f} s" if self.started is not None else ""
        base = self.base_url()
        _logger.info("Ready%s: %s serves %s", took, base, ", ".join(self.state.served_names))
        if self.options.log_format == "text":  # what collects JSON lines has no use for it
            print(self.greeting(base), flush=True)

    def base_url(self) -> str:
        """The address as a person on this machine would type it."""
        host, port = self.listener.getsockname()[:2]
        if host in ("0.0.0.0", "::", ""):
            host = "localhost"
        elif ":" in host:
            host = f"[{host}]"
        scheme = "https" if self.options.ssl_certfile else "http"
        return f"{scheme}://{host}:{port}{(self.options.root_path or '').rstrip('/')}"

    def greeting(self, base: str) -> str:
        """What to try first."""
        import json

        body: dict[str, Any]
        if self.legacy_only:
            path, body = "/generate", {"prompt": "Hello!", "max_tokens": 32}
        else:
            path = "/v1/chat/completions"
            body = {"model": self.state.model_name, "messages": [{"role": "user", "content": "Hello!"}]}
        key = " -H 'Authorization: Bearer KEY'" if self.options.api_key else ""
        data = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
        lines = ["", f"Listening on {base}"]
        lines += [
            "Try:",
            f"  curl {base}{path} -H 'Content-Type: application/json'{key} -d '{data}'",
        ]
        if not self.options.disable_chat_page and not self.legacy_only:
            lines.append(f"Chat page: {base}/")
        return "\n".join(lines) + "\n"
