"""``python -m kubeinfer.entrypoints.api_server --model PATH``: only ``POST /generate``, as vLLM's first server had it."""

from __future__ import annotations

import sys

from kubeinfer.cli.serve import run_module

if __name__ == "__main__":
    sys.exit(run_module("python -m kubeinfer.entrypoints.api_server", legacy_only=True))
