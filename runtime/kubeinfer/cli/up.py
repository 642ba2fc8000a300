"""``kubeinfer up -f FILE``: an InferenceModel manifest on this machine, without a cluster."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from kubeinfer.weights.errors import WeightsError
from kubeinfer.weights.progress import Bar

_EPILOG = """examples:
  kubeinfer up -f examples/smollm2.yaml
  kubeinfer up -f small.yaml -f large.yaml --device cpu --port 9000"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "up",
        help="Run an InferenceModel manifest on this machine.",
        description="Run InferenceModels of a manifest on this machine: the checks, weights and runtime arguments of a "
        "cluster, and the same gateway in front. Ctrl-C ends everything, a second one at once.",
        epilog=_EPILOG,
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "-f",
        "--filename",
        action="append",
        required=True,
        type=Path,
        metavar="FILE",
        help="Manifest; repeatable.",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="Address the gateway listens on. Default: 127.0.0.1."
    )
    parser.add_argument("--port", type=int, default=8080, help="Port of the gateway. Default: 8080.")
    parser.add_argument(
        "--device",
        choices=("cpu", "gpu"),
        default=None,
        help="Run on this device, whatever the manifest asks for.",
    )
    parser.add_argument(
        "--replicas",
        type=int,
        default=None,
        metavar="N",
        help="Processes a model, in place of the manifest's.",
    )
    parser.add_argument(
        "--claim",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="Folder that stands in for a PersistentVolumeClaim of a pvc:// URI; repeatable.",
    )


def _claims(words: list[str]) -> dict[str, Path]:
    claims = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or not name or not folder:
            raise SystemExit(f"error: --claim {word!r}: write NAME=FOLDER")
        claims[name] = Path(folder)
    return claims


def run(arguments: argparse.Namespace) -> int:
    """Run until Ctrl-C. The exit code is not 0 when a manifest is wrong, weights cannot be had or a process fails."""
    from kubeinfer_operator.local import (
        LocalError,
        free_port,
        gateway_process,
        read_files,
        runtime_processes,
        upstreams,
        weights_of,
    )
    from kubeinfer_operator.supervisor import ChildFailed, Supervisor

    try:
        models = read_files(arguments.filename, device=arguments.device, replicas=arguments.replicas)
        claims = _claims(arguments.claim)
        processes = []
        ports: dict[str, list[int]] = {}
        for model in models:
            bar = Bar(model.name)
            try:
                path = weights_of(model, claims, bar)
            finally:
                bar.close()
            ports[model.name] = [free_port() for _ in range(model.replicas)]
            processes += runtime_processes(model, path, ports[model.name])
    except LocalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WeightsError as error:
        print(f"error: {error.reason}: {error.message}", file=sys.stderr)
        return error.exit_code

    with tempfile.TemporaryDirectory(prefix="kubeinfer-up-") as folder:
        file = Path(folder) / "models.yaml"
        file.write_text(yaml.safe_dump(upstreams(models, ports)), encoding="utf-8")
        gateway = gateway_process(file, arguments.host, arguments.port, free_port())
        width = max(len(process.label) for process in [*processes, gateway])
        with Supervisor(width=width) as supervisor:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, supervisor.request_stop)
            try:
                supervisor.start([*processes, gateway])
                if supervisor.wait_healthy(lambda process: print(f"{process.label} is ready", flush=True)):
                    _say_hello(
                        arguments.host,
                        arguments.port,
                        models[0].name if not models[0].spec.served_names else models[0].spec.served_names[0],
                    )
                    supervisor.run()
            except ChildFailed as failure:
                supervisor.stop()
                print(f"error: {failure}", file=sys.stderr)
                return 1
    return 0


def _say_hello(host: str, port: int, name: str) -> None:
    shown = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::") else host
    print(
        f"""
Try it:
  curl http://{shown}:{port}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'
""",
        flush=True,
    )
