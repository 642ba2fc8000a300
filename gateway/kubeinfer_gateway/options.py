"""Every option of the gateway, defined once: command-line flag, environment variable, default, unit and help."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ENV_PREFIX = "KUBEINFER_GATEWAY_"
_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP)(_\w+)?)?)\Z")


def _opt(
    default: Any, help: str, *, choices: Sequence[str] | None = None, minimum: float | None = None
) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum})


@dataclass(frozen=True)
class GatewayOptions:
    """Options of one gateway process. Sizes in bytes, times in seconds."""

    host: str = _opt("0.0.0.0", "address to listen on")
    port: int = _opt(8080, "port of the OpenAI API", minimum=0)
    internal_port: int = _opt(
        8081, "port of /metrics, /healthz, /readyz and /demand; keep it inside the cluster", minimum=0
    )

    discovery: str = _opt("kubernetes", "where models come from", choices=("kubernetes", "static"))
    namespaces: str = _opt("", "kubernetes: namespaces to serve, comma separated (default: all)")
    upstream: tuple[str, ...] = _opt((), "static: NAME=URL[,URL...], once a model")
    upstream_file: str = _opt(
        "", "static: YAML or JSON file {models: [{name, served_names, urls}]}, read again on change"
    )

    routing: str = _opt(
        "prefix",
        "prefix: equal prompt beginnings (or x-session-id) go to the same replica while its load is near the mean; least-load: the replica with the fewest requests",
        choices=("prefix", "least-load"),
    )
    prefix_bytes: int = _opt(1024, "prefix routing: bytes of the prompt that count", minimum=1)
    load_factor: float = _opt(
        1.25, "prefix routing: highest load of a replica, as a multiple of the mean", minimum=1
    )
    load_floor: int = _opt(
        4, "prefix routing: requests in flight below which a replica is never passed over", minimum=1
    )

    connect_timeout: float = _opt(2.0, "time to connect to a replica before the next is tried", minimum=0.01)
    first_byte_timeout: float = _opt(600.0, "time a replica may take to begin its answer", minimum=0.01)
    idle_timeout: float = _opt(120.0, "longest silence within an answer", minimum=0.1)
    write_timeout: float = _opt(
        120.0, "longest time that a client may read nothing of an answer that is ready", minimum=0.1
    )
    body_timeout: float = _opt(60.0, "time a client may take to send its request", minimum=0.1)
    retries: int = _opt(3, "further replicas tried when one breaks off before its first byte", minimum=0)
    eject_after: int = _opt(3, "failures in a row after which a replica is left out for a while", minimum=1)
    eject_seconds: float = _opt(2.0, "first time left out; doubles each time", minimum=0)
    eject_max_seconds: float = _opt(60.0, "longest time left out", minimum=0)
    upstream_keepalive: float = _opt(4.0, "how long an unused connection to a replica is kept", minimum=0)
    upstream_max_idle: int = _opt(128, "unused connections kept to each replica", minimum=0)

    queue_size: int = _opt(
        256, "requests that may wait for a model without a ready replica; more get 429", minimum=0
    )
    queue_total: int = _opt(2048, "requests that may wait over all models", minimum=0)
    queue_timeout: float = _opt(300.0, "how long a request waits for a ready replica before 503", minimum=0)
    sse_keepalive: float = _opt(
        10.0, "streaming requests that wait get a comment this often (0: never)", minimum=0
    )

    max_body_bytes: int = _opt(16 << 20, "largest request body; larger get 413", minimum=1)
    max_buffered_bytes: int = _opt(128 << 20, "request bodies held at once, together; beyond: 429", minimum=1)
    max_header_bytes: int = _opt(64 << 10, "largest request header; larger get 431", minimum=1024)
    max_requests: int = _opt(8192, "requests handled at once; beyond: 429", minimum=1)
    max_connections: int = _opt(16384, "client connections; more are closed at once", minimum=1)
    keepalive_timeout: float = _opt(75.0, "how long an unused client connection is kept", minimum=1)

    api_keys_dir: str = _opt(
        "", "file or folder of API key entries (JSON), such as mounted Secrets; read again on change"
    )
    api_keys_secret: str = _opt("", "NAME or NAMESPACE/NAME of a Secret of API key entries, watched")
    upstream_api_key_file: str = _opt("", "file with the key that the gateway itself sends to the replicas")

    shutdown_delay: float = _opt(5.0, "after SIGTERM: time to go on serving while /readyz says no", minimum=0)
    shutdown_timeout: float = _opt(600.0, "after that: time for open streams to finish", minimum=0)

    access_log: bool = _opt(True, "one JSON line a request on standard output")
    log_format: str = _opt("json", "format of other messages, on standard error", choices=("json", "text"))
    log_level: str = _opt("info", "least level of messages", choices=("debug", "info", "warning", "error"))


class OptionError(ValueError):
    """An option's value cannot be used; the message names the option."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each option."""
    for item in dataclasses.fields(GatewayOptions):
        flag = "--" + item.name.replace("_", "-")
        default = "" if item.default in ("", ()) else f" (default: {item.default})"
        text = f"{item.metadata['help']}{default} [{ENV_PREFIX}{item.name.upper()}]".replace("%", "%%")
        if isinstance(item.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif isinstance(item.default, tuple):
            parser.add_argument(flag, action="append", default=None, metavar="NAME=URL", help=text)
        else:
            parser.add_argument(
                flag,
                default=None,
                choices=item.metadata["choices"],
                metavar=None if item.metadata["choices"] else type(item.default).__name__.upper(),
                help=text,
            )


def from_arguments(arguments: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> GatewayOptions:
    """Options from flags, then the environment, then defaults. Raises OptionError."""
    known = {ENV_PREFIX + item.name.upper() for item in dataclasses.fields(GatewayOptions)}
    for name in environ:
        if name.startswith(ENV_PREFIX) and name not in known and not _is_service_link(name):
            raise OptionError(f"unknown environment variable {name}; --help lists those that exist")
    values: dict[str, Any] = {}
    for item in dataclasses.fields(GatewayOptions):
        given: Any = getattr(arguments, item.name, None)
        source = "--" + item.name.replace("_", "-")
        if given is None:
            source = ENV_PREFIX + item.name.upper()
            if source not in environ or _is_service_link_value(item.name, environ[source]):
                continue
            given = environ[source]
            if isinstance(item.default, tuple):
                given = tuple(part for part in given.split() if part)
        values[item.name] = _convert(source, given, item)
    return GatewayOptions(**values)


def _is_service_link(name: str) -> bool:
    """Kubernetes puts KUBEINFER_GATEWAY_SERVICE_HOST and the like into pods beside a Service of such a name."""
    return _SERVICE_LINK.search(name) is not None


def _is_service_link_value(option: str, value: str) -> bool:
    return option in ("port", "internal_port") and value.startswith("tcp://")


def _convert(source: str, given: Any, item: dataclasses.Field[Any]) -> Any:
    default = item.default
    value: Any = given
    if isinstance(default, bool):
        if not isinstance(given, bool):
            lowered = str(given).lower()
            if lowered not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
                raise OptionError(f"{source}: '{given}' is neither true nor false")
            value = lowered in ("1", "true", "yes", "on")
    elif isinstance(default, int | float):
        try:
            value = int(given) if isinstance(default, int) else float(given)
        except ValueError:
            kind = "a whole number" if isinstance(default, int) else "a number"
            raise OptionError(f"{source}: '{given}' is not {kind}") from None
        minimum = item.metadata["minimum"]
        if value != value or (minimum is not None and value < minimum):
            raise OptionError(f"{source}: {given} is below the least that is allowed, {minimum:g}")
    elif isinstance(default, tuple):
        value = tuple(given)
    elif item.metadata["choices"] and given not in item.metadata["choices"]:
        raise OptionError(f"{source}: '{given}' is none of {', '.join(item.metadata['choices'])}")
    return value
