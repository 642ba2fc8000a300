"""``python -m hub``: the loopback hub as a process of its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from hub.faults import KINDS, Fault
from hub.server import serve


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="hub", description="A hub for tests, on this machine or in a cluster."
    )
    parser.add_argument("--models", type=Path, required=True, help="folder with ORG/NAME[@REV] folders")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument(
        "--port", type=int, default=0, help="0: any free port, printed as JSON on the first line"
    )
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        type=Fault.parse,
        metavar="KIND[:name=value,...]",
        help=f"{', '.join(KINDS)}; settings: path, times, after, seconds, rate, scope. While it runs: "
        "POST /_admin/faults, DELETE /_admin/faults, GET /_admin/stats, DELETE /_admin/stats",
    )
    args = parser.parse_args()
    serve(args.models, args.host, args.port, args.fault)


if __name__ == "__main__":
    main()
