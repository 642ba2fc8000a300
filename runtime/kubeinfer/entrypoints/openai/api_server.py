"""``python -m kubeinfer.entrypoints.openai.api_server --model PATH``: the tutorials' way to say ``kubeinfer serve``."""

from __future__ import annotations

import sys

from kubeinfer.cli.serve import run_module

if __name__ == "__main__":
    sys.exit(run_module("python -m kubeinfer.entrypoints.openai.api_server"))
