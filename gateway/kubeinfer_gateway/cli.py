"""The command line: `python -m kubeinfer_gateway [options]`, and `keygen`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from kubeinfer_gateway.options import OptionError, add_arguments, from_arguments

_ABOUT = """One OpenAI-compatible address for all models of a cluster.

Serves /v1/models and passes the OpenAI routes on to the runtime pods of InferenceModels (--discovery kubernetes), or to
fixed addresses (--discovery static --upstream NAME=http://HOST:PORT). `python -m kubeinfer_gateway keygen --help`
makes API keys. Each option may also come from the environment variable named in brackets."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["keygen"]:
        return _keygen(words[1:])
    parser = argparse.ArgumentParser(
        prog="python -m kubeinfer_gateway",
        usage="%(prog)s [options] | %(prog)s keygen NAME",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    try:
        options = from_arguments(parser.parse_args(words))
    except OptionError as error:
        parser.error(str(error))

    from kubeinfer_gateway.access_log import set_up_logging
    from kubeinfer_gateway.discovery import DiscoveryError
    from kubeinfer_gateway.server import run

    set_up_logging(options.log_level, options.log_format)
    try:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run(options))
    except (OptionError, DiscoveryError, OSError) as error:
        print(f"kubeinfer_gateway: {error}", file=sys.stderr)
        return 2


def _keygen(words: Sequence[str]) -> int:
    from kubeinfer_gateway.keys import generate_key

    parser = argparse.ArgumentParser(
        prog="python -m kubeinfer_gateway keygen",
        description="Makes an API key: prints the key itself on standard error, and on standard output the entry to put "
        "into the Secret or folder of API keys in its place.",
        allow_abbrev=False,
    )
    parser.add_argument("name", help="whose key it is; appears in logs and metrics")
    parser.add_argument(
        "--model", action="append", help="served name, or pattern such as 'qwen*' (default: all; repeatable)"
    )
    parser.add_argument("--requests-per-minute", type=float)
    parser.add_argument("--tokens-per-minute", type=float)
    given = parser.parse_args(words)
    for flag in ("requests_per_minute", "tokens_per_minute"):
        value = getattr(given, flag)
        if value is not None and not value > 0:
            parser.error(f"--{flag.replace('_', '-')} must be above 0")
    key, entry = generate_key(
        given.name, given.model or ["*"], given.requests_per_minute, given.tokens_per_minute
    )
    print(f"The key, shown this once: {key}", file=sys.stderr)
    print(entry)
    return 0
