"""A server on loopback in a thread of the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvloop

from kubeinfer.api.launch import bind
from kubeinfer.api.server import ApiServer
from kubeinfer.options import ServeOptions


class Running:
    """``url`` answers; ``server`` and ``engine`` are the objects behind it."""

    def __init__(self, server: ApiServer, engine: Any):
        self.server = server
        self.engine = engine
        self.url = server.base_url()
        self.exit_code: int | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    @property
    def core(self) -> Any:
        """The scripted client under the engine."""
        return self.engine._client

    def wait_until(self, what: Any, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, "it did not come about in time"
            time.sleep(0.005)


@contextlib.contextmanager
def running(engine: Any, **options: Any) -> Iterator[Running]:
    values: dict[str, Any] = {
        "model": "/models/scripted",
        "served_model_name": ["scripted"],
        "host": "127.0.0.1",
    }
    serve_options = ServeOptions(**(values | {"port": 0} | options))
    listener = bind(serve_options)
    try:
        server = ApiServer(serve_options, engine, listener)
    except BaseException:
        listener.close()
        raise
    result = Running(server, engine)

    def work() -> None:
        async def serve() -> int:
            result.loop = asyncio.get_running_loop()
            return await server.serve()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result.exit_code = runner.run(serve())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.uvicorn.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline, "the server did not start in time"
        time.sleep(0.005)
    try:
        yield result
    finally:
        server.uvicorn.should_exit = True
        thread.join(15)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"
