"""One gateway process: its two servers, discovery, keys, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
from collections.abc import Generator
from pathlib import Path
from time import monotonic
from typing import Any

import uvicorn
from prometheus_client import disable_created_metrics

from kubeinfer_gateway.access_log import AccessLog
from kubeinfer_gateway.app import create_internal_app, create_public_app
from kubeinfer_gateway.connection import GatewayProtocol, Limits
from kubeinfer_gateway.discovery import Discovery, DiscoveryError
from kubeinfer_gateway.keys import KeyStore, parse_entries, read_directory
from kubeinfer_gateway.metrics import Metrics
from kubeinfer_gateway.options import GatewayOptions, OptionError
from kubeinfer_gateway.proxy import Proxy
from kubeinfer_gateway.registry import Registry, RoutingPolicy

logger = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: the gateway decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class Gateway:
    """`start`, then `stop`; `port` and `internal_port` are those really bound."""

    def __init__(self, options: GatewayOptions, discovery: Discovery | None = None) -> None:
        self.options = options
        self.registry = Registry(
            RoutingPolicy(
                method=options.routing,
                factor=options.load_factor,
                floor=options.load_floor,
                eject_after=options.eject_after,
                eject_seconds=options.eject_seconds,
                eject_max_seconds=options.eject_max_seconds,
            )
        )
        self.metrics = Metrics()
        self.keys = KeyStore(required=bool(options.api_keys_dir or options.api_keys_secret))
        self.access_log = AccessLog(options.access_log)
        self.proxy = Proxy(
            options,
            self.registry,
            self.keys,
            self.metrics,
            self.access_log,
            _read_key(options.upstream_api_key_file),
        )
        self.discovery = discovery or self._make_discovery()
        self.port = 0
        self.internal_port = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._servers: list[tuple[_Server, asyncio.Task[None]]] = []
        self._key_files: dict[str, bytes] | None = None

    def _make_discovery(self) -> Discovery:
        options = self.options
        if options.discovery == "static":
            from kubeinfer_gateway.discovery.static import StaticDiscovery

            return StaticDiscovery(
                self.registry,
                options.upstream,
                Path(options.upstream_file) if options.upstream_file else None,
            )
        if options.upstream or options.upstream_file:
            raise OptionError("--upstream and --upstream-file need --discovery static")
        from kubeinfer_gateway.discovery.kubernetes import KubernetesDiscovery

        return KubernetesDiscovery(self.registry, namespaces(options.namespaces), self.metrics)

    async def start(self) -> None:
        """Binds both ports and serves. Raises OSError where a port is taken, DiscoveryError where nothing is to serve."""
        options = self.options
        limits = Limits()
        limits.max_header_bytes = options.max_header_bytes
        limits.max_connections = options.max_connections
        protocol = type("BoundGatewayProtocol", (GatewayProtocol,), {"limits": limits})
        public = _bind(options.host, options.port, "--port")
        internal = _bind(options.host, options.internal_port, "--internal-port")
        self.port = public.getsockname()[1]
        self.internal_port = internal.getsockname()[1]
        if options.api_keys_dir:
            self._read_keys(Path(options.api_keys_dir))
            self._spawn("API keys", self._watch_keys(Path(options.api_keys_dir)))
        if options.api_keys_secret:
            from kubeinfer_gateway.discovery.kubernetes import watch_secret

            self._spawn("API keys", watch_secret(options.api_keys_secret, self._put_keys, self.metrics))
        self._spawn("discovery", self.discovery.run())
        self._spawn("housekeeping", self._housekeeping())
        await self._serve(create_public_app(self.proxy), public, protocol)
        await self._serve(create_internal_app(self.proxy, self.problem), internal, "httptools")

    async def _serve(self, app: Any, sock: socket.socket, protocol: Any) -> None:
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            backlog=4096,
            timeout_keep_alive=int(self.options.keepalive_timeout),
            timeout_graceful_shutdown=max(1, int(self.options.shutdown_timeout)),
        )
        server = _Server(config)
        task = asyncio.create_task(server.serve(sockets=[sock]))
        self._servers.append((server, task))
        while not server.started:
            if task.done():
                task.result()
                raise RuntimeError("the server ended while starting")
            await asyncio.sleep(0.005)

    def _spawn(self, name: str, work: Any) -> None:
        self._tasks[name] = asyncio.create_task(work, name=name)

    def problem(self) -> str | None:
        """What keeps this process from doing its work until it is restarted, or None."""
        for name, task in self._tasks.items():
            if task.done() and not task.cancelled():
                return f"{name} ended: {task.exception()}"
        return None

    async def failed(self) -> None:
        """Returns when a part that must run for ever has ended."""
        await asyncio.wait(list(self._tasks.values()), return_when=asyncio.FIRST_COMPLETED)

    async def stop(self, delay: float = 0.0, timeout: float | None = None) -> None:
        """Says not ready, serves on for `delay` seconds, then finishes open requests for at most `timeout` seconds."""
        self.proxy.stopping.set()
        if delay:
            await asyncio.sleep(delay)
        if self._servers:
            server, task = self._servers[0]
            if timeout is not None:
                server.config.timeout_graceful_shutdown = max(1, int(timeout))
            server.should_exit = True
            await asyncio.gather(task, return_exceptions=True)
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for server, task in self._servers[1:]:
            server.config.timeout_graceful_shutdown = 1
            server.should_exit = True
            await asyncio.gather(task, return_exceptions=True)
        self.registry.close()
        self.access_log.flush()

    # Housekeeping

    async def _housekeeping(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            now = monotonic()
            self.proxy.sweep(now)
            for connection in list(self._servers[0][0].server_state.connections) if self._servers else ():
                if isinstance(connection, GatewayProtocol):
                    connection.sweep(now)
            self.access_log.flush()

    async def _watch_keys(self, path: Path) -> None:
        while True:
            await asyncio.sleep(2.0)
            self._read_keys(path)

    def _read_keys(self, path: Path) -> None:
        try:
            files = read_directory(path)
        except OSError as error:
            if self._key_files is None:
                logger.error(
                    "--api-keys-dir %s: %s; every request is refused until it can be read", path, error
                )
                self._key_files = {}
            return
        if files != self._key_files:
            self._key_files = files
            self._put_keys(files)

    def _put_keys(self, sources: dict[str, bytes]) -> None:
        entries, problems = parse_entries(sources)
        for problem in problems:
            logger.error("API key entry not understood, and not in force: %s", problem)
        self.keys.replace(entries)
        logger.info("%d API keys in force", len(self.keys))


def namespaces(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _read_key(path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes().strip()
    except OSError as error:
        raise OptionError(f"--upstream-api-key-file {path}: {error.strerror}") from None


def _bind(host: str, port: int, flag: str) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=4096, dualstack_ipv6=host == "::")
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {host}:{port} ({flag}): {error.strerror}") from None


def _raise_file_limit() -> None:
    """Every stream takes two descriptors; the soft limit that shells and units set is for programs with few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError) as error:
            logger.warning("at most %d open files: %s", soft, error)


async def run(options: GatewayOptions) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status. A second signal ends at once."""
    gateway = Gateway(options)
    loop = asyncio.get_running_loop()
    signalled = asyncio.Event()

    def on_signal() -> None:
        if signalled.is_set():
            raise SystemExit(1)
        signalled.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    _raise_file_limit()
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody reads
    await gateway.start()
    gc.freeze()  # what is here by now stays; the collector need not look at it again and again
    logger.info("listening on %s:%d, internal port %d", options.host, gateway.port, gateway.internal_port)
    waits = [asyncio.create_task(signalled.wait()), asyncio.create_task(gateway.failed())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    problem = gateway.problem()
    if signalled.is_set():
        logger.info("stopping: %d requests under way", gateway.proxy.active)
        await gateway.stop(options.shutdown_delay, options.shutdown_timeout)
    else:
        await gateway.stop(0, 5)
    for wait in waits:
        wait.cancel()
    if problem is not None and not signalled.is_set():
        logger.error("%s", problem)
        return 1
    return 0


__all__ = ["DiscoveryError", "Gateway", "run"]
