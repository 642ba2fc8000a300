"""From options to a serving process: port first, then the engine, with the web framework imported meanwhile."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from kubeinfer import logs
from kubeinfer.async_llm import AsyncLLM
from kubeinfer.errors import KubeinferError, OptionError
from kubeinfer.options import EngineOptions, ServeOptions

EngineFactory = Callable[[ServeOptions], AsyncLLM]

_logger = logging.getLogger("kubeinfer.server")


def default_engine(options: ServeOptions) -> AsyncLLM:
    """The engine of ``options``, in a process of its own. Blocks until it is ready."""
    names = set(EngineOptions.model_fields)
    engine_options = EngineOptions(**options.model_dump(include=names, exclude_unset=True))
    return AsyncLLM(
        engine_options, max_waiting_requests=options.max_waiting_requests, log_format=options.log_format
    )


def run_server(
    options: ServeOptions, make_engine: EngineFactory = default_engine, *, legacy_only: bool = False
) -> int:
    """Serve until told to stop; the process's exit code. The port is taken before the model is loaded."""
    logs.configure_logging(options.log_format)
    logging.getLogger("uvicorn").setLevel(options.uvicorn_log_level.upper().replace("TRACE", "DEBUG"))
    try:
        check_files(options)
        listener = bind(options)
    except OptionError as exc:
        return _fail(str(exc))
    with contextlib.closing(listener), _exit_on_signal():
        started = time.monotonic()
        threading.Thread(target=importlib.import_module, args=("kubeinfer.api.server",), daemon=True).start()
        try:
            engine = make_engine(options)
        except KubeinferError as exc:
            return _fail(str(exc))
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as exc:
            _logger.error("The engine did not start.", exc_info=exc)
            return _fail(f"The engine did not start: {type(exc).__name__}: {exc}")
        from kubeinfer.api.server import ApiServer

        try:
            server = ApiServer(options, engine, listener, legacy_only=legacy_only, started=started)
        except KubeinferError as exc:
            engine.shutdown()
            return _fail(str(exc))
        code = server.run()
    if code != 0:
        # nothing may be printed after the cause, whatever exit handlers there are
        _fail(f"The engine has stopped: {server.cause}")
        kill_children()
        os._exit(code)
    return code


def _fail(message: str) -> int:
    logging.shutdown()
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 1


def check_files(options: ServeOptions) -> None:
    """Raise :class:`OptionError` for a file option whose file is not there or not right, before the model takes its time."""
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        value = getattr(options, name)
        if value is not None and not Path(value).is_file():
            raise OptionError(f"{name}: there is no file {value!r}.", name)
    if (options.ssl_keyfile is None) != (options.ssl_certfile is None):
        raise OptionError("ssl_keyfile and ssl_certfile are needed together.", "ssl_keyfile")
    if options.chat_template is not None:
        from kubeinfer.text.chat_template import ChatTemplate, read_chat_template

        ChatTemplate(read_chat_template(options.chat_template))


def bind(options: ServeOptions) -> socket.socket:
    """The listening address, taken but not yet listening. Raises :class:`OptionError` saying what is in the way."""
    host = options.host or ""
    try:
        infos = socket.getaddrinfo(
            host or None, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as exc:
        raise OptionError(
            f"host: {host!r} is not an address of this machine ({exc.strerror}).", "host"
        ) from None
    # with no host given, one IPv6 socket that takes IPv4 too where the machine has IPv6
    infos.sort(key=lambda info: info[0] != socket.AF_INET6 if not host else 0)
    error: OSError | None = None
    for family, kind, protocol, _, address in infos:
        try:
            listener = socket.socket(family, kind, protocol)
        except OSError as exc:
            error = error or exc
            continue
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1 if host else 0)
        try:
            listener.bind(address)
            return listener
        except OSError as exc:
            listener.close()
            if exc.errno == errno.EADDRINUSE:
                raise OptionError(
                    f"port: {options.port} is in use on {host or 'this machine'}; choose another with --port.",
                    "port",
                ) from None
            if exc.errno == errno.EACCES:
                raise OptionError(
                    f"port: {options.port} needs a privilege that this process does not have; choose one from 1024 on.",
                    "port",
                ) from None
            error = exc
    raise OptionError(f"host: cannot listen on {host!r}: {error}.", "host")


@contextlib.contextmanager
def _exit_on_signal() -> Iterator[None]:
    """While the model loads, SIGTERM unwinds this process, so that the engine's own processes go with it."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread: signals are its caller's business
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def kill_children() -> None:
    """End the processes that this one started."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
