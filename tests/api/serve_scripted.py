"""A server process over the scripted engine, for tests of signals and exit codes: FOLDER DELAY [flags of serve]."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path

from api.scripted import scripted_engine
from kubeinfer.api.launch import run_server
from kubeinfer.async_llm import AsyncLLM
from kubeinfer.cli.serve import add_arguments, serve_options
from kubeinfer.options import ServeOptions


def main() -> int:
    folder, delay = Path(sys.argv[1]), float(sys.argv[2])
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = serve_options(parser.parse_args([str(folder), *sys.argv[3:]]))

    def make_engine(options: ServeOptions) -> AsyncLLM:
        engine = scripted_engine(folder, delay=delay)

        def wait_for_death() -> None:
            # the test writes the cause to this process's standard input
            reason = sys.stdin.readline().strip()
            if reason:
                engine._client.die(reason)  # type: ignore[attr-defined]

        threading.Thread(target=wait_for_death, daemon=True).start()
        return engine

    return run_server(options, make_engine)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the thread above may still be reading
