"""``kubeinfer serve MODEL``."""

from __future__ import annotations

import argparse
from typing import Any

from kubeinfer.cli.flags import Parser, add_config_flag, add_model_argument, add_option_flags, options_from
from kubeinfer.errors import OptionError
from kubeinfer.options import ServeOptions

_EPILOG = """examples:
  kubeinfer serve ./models/Qwen2-0.5B-Instruct --port 8080
  kubeinfer serve ./qwq-32b-q5_k_m.gguf --served-model-name QwQ:32B --max-model-len 4096
  kubeinfer serve Qwen/Qwen2.5-7B-Instruct -tp 2 --config serve.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a server."""
    add_model_argument(parser)
    add_config_flag(parser)
    add_option_flags(parser, ServeOptions)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="Serve a model over HTTP.",
        description="Serve a model over HTTP (OpenAI's API).",
        epilog=_EPILOG,
    )
    parser.formatter_class = _Raw
    add_arguments(parser)


class _Raw(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)


def serve_options(arguments: argparse.Namespace) -> ServeOptions:
    """Checked options. Raises :class:`OptionError`."""
    options = options_from(arguments, ServeOptions)
    if not options.model:
        hint = ""
        names = options.served_model_name or []
        if len(names) > 1:
            hint = f" (--served-model-name took {names[-1]!r}; put the model first)"
        raise OptionError(f"no model is given; say 'kubeinfer serve MODEL'{hint}.", "model")
    if not all(options.served_model_name or ["-"]):
        raise OptionError(
            "served_model_name: a name is empty; leave the option out to serve by the model's own.",
            "served_model_name",
        )
    if options.runner == "pooling" or options.convert not in ("auto", "none"):
        raise OptionError(
            "--runner pooling and --convert are not supported yet: this version serves generative models only.",
            "runner",
        )
    return options


def run(arguments: argparse.Namespace, *, legacy_only: bool = False) -> int:
    options = serve_options(arguments)
    from kubeinfer.api.launch import run_server

    return run_server(options, legacy_only=legacy_only)


def run_module(prog: str, *, legacy_only: bool = False) -> int:
    """``python -m prog``: the flags of ``kubeinfer serve`` without the sub-command."""
    import sys

    from kubeinfer.errors import KubeinferError

    parser = Parser(prog=prog, description="Serve a model over HTTP.")
    add_arguments(parser)
    try:
        return run(parser.parse_args(), legacy_only=legacy_only)
    except KubeinferError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
