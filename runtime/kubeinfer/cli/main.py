"""``kubeinfer``: the command. Sub-commands load on use, so that ``--help`` is quick, and all else too: Ctrl-C ends the command
without a trace from its first moments on."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from kubeinfer import __version__

_COMMANDS = {
    "serve": ("kubeinfer.cli.serve", "Serve a model over HTTP (OpenAI's API)."),
    "pull": ("kubeinfer.cli.pull", "Download a model's weights."),
    "bench": ("kubeinfer.cli.bench", "Measure throughput and latency."),
    "up": ("kubeinfer.cli.up", "Run an InferenceModel manifest on this machine."),
}


def _load(name: str) -> Any | None:
    module = _COMMANDS[name][0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        if exc.name == module:
            return None  # this build does not have it
        raise


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; only ``command``'s own flags are built."""
    from kubeinfer.cli.flags import Parser

    parser = Parser(prog="kubeinfer", description="LLM serving with an inference engine of its own.")
    parser.add_argument("--version", action="version", version=f"kubeinfer {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, (_, summary) in _COMMANDS.items():
        if command is None:
            if importlib.util.find_spec(_COMMANDS[name][0]) is not None:
                commands.add_parser(name, help=summary)
        elif name == command:
            module = _load(name)
            if module is not None:
                module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return 130


def _run(arguments: Sequence[str] | None) -> int:
    from kubeinfer.errors import KubeinferError

    args = list(sys.argv[1:] if arguments is None else arguments)
    command = next((arg for arg in args if not arg.startswith("-")), None)
    parser = _parser(command if command in _COMMANDS else None)
    parsed = parser.parse_args(args)
    if parsed.command is None:
        parser.print_help()
        return 2
    module = _load(parsed.command)
    assert module is not None
    try:
        return int(module.run(parsed) or 0)
    except KubeinferError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("kubeinfer"):
            raise
        print(
            f"error: the package {exc.name!r} is not installed; 'kubeinfer {parsed.command}' needs "
            "pip install 'kubeinfer[runtime]'.",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
