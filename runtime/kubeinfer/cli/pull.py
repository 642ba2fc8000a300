"""``kubeinfer pull``: fetch a model's files, verified and resumable."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from kubeinfer.weights.download import fetch_result
from kubeinfer.weights.errors import InvalidModelId, StorageError, WeightsError, format_bytes
from kubeinfer.weights.plan import resolve
from kubeinfer.weights.progress import Bar, JsonLines, ProgressCallback, ignore_progress
from kubeinfer.weights.request import FetchResult, make_request
from kubeinfer.weights.verify import verify

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class _Terminated(BaseException):
    """SIGTERM: stop as Ctrl-C does, with everything kept for the next run."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``pull`` to ``subparsers``; the parsed arguments carry ``run`` as their ``func``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "pull",
        help="fetch a model's files, verified and resumable",
        description="Fetch a model from Hugging Face or ModelScope. Every file is checked against the hub's size "
        "and hash; an interrupted pull goes on where it stopped; the last line says where the files are, or why "
        "they are not there.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="ORG/NAME[@REV], hf://ORG/NAME[/FILE.gguf][@REV], modelscope://ORG/NAME[@REV]",
    )
    parser.add_argument("--revision", help="branch, tag or commit (default: the hub's default branch)")
    parser.add_argument("--local-dir", type=Path, help="fill this folder (default: the hub SDK's own cache)")
    parser.add_argument("--cache-dir", type=Path, help="use this folder as the cache")
    parser.add_argument(
        "--include", nargs="+", action="extend", default=[], metavar="GLOB", help="fetch only matching files"
    )
    parser.add_argument(
        "--exclude", nargs="+", action="extend", default=[], metavar="GLOB", help="leave these out"
    )
    parser.add_argument(
        "--mirror",
        action="append",
        default=[],
        metavar="URI",
        help="tried in order when MODEL fails; repeatable",
    )
    parser.add_argument("--token-file", type=Path, help="file that holds the hub's token")
    parser.add_argument(
        "--max-workers", type=_positive, default=4, help="files fetched at once (default: %(default)s)"
    )
    parser.add_argument(
        "--stall-timeout",
        type=_seconds,
        help="seconds without a byte before a connection is given up (default: 30)",
    )
    parser.add_argument(
        "--progress",
        choices=("bar", "json", "none"),
        help="a bar on stderr, JSON lines on stdout, or nothing (default: bar in a terminal, else none)",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but an error")
    parser.add_argument("--termination-log", type=Path, help="write the final JSON line to this file as well")
    parser.add_argument(
        "--resolve-only",
        action="store_true",
        help="print revision, files and config.json as JSON; fetch no weights",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read all files again after the pull and check them"
    )
    parser.set_defaults(func=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the arguments of ``pull`` say. Returns the exit code: 0, the error's own, 130 or 143."""
    output = _Output(args)
    try:
        with _sigterm_raises():
            if args.resolve_only:
                return _resolve_only(args)
            request = make_request(
                args.model,
                revision=args.revision,
                include=args.include,
                exclude=args.exclude,
                local_dir=args.local_dir,
                cache_dir=args.cache_dir,
                mirrors=args.mirror,
                token=_read_token(args.token_file),
                max_workers=args.max_workers,
                stall_timeout=args.stall_timeout,
            )
            result = fetch_result(request, output.progress)
            if args.verify and (wrong := verify(result.folder, output.progress)):
                raise StorageError(
                    f"files in {result.folder} have changed since they were fetched: {'; '.join(wrong)}"
                )
            output.done(result)
            return 0
    except WeightsError as error:
        output.failed(error.to_dict())
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        output.failed({"reason": "InternalError", "message": f"{type(error).__name__}: {error}"})
        return 1
    except KeyboardInterrupt:
        output.failed(
            {"reason": "Interrupted", "message": "stopped by Ctrl-C; run it again to go on from here"}
        )
        return EXIT_INTERRUPTED
    except _Terminated:
        output.failed(
            {"reason": "Interrupted", "message": "stopped by SIGTERM; run it again to go on from here"}
        )
        return EXIT_TERMINATED


def _resolve_only(args: argparse.Namespace) -> int:
    plan = resolve(
        args.model,
        revision=args.revision,
        include=args.include,
        exclude=args.exclude,
        mirrors=args.mirror,
        token=_read_token(args.token_file),
    )
    print(json.dumps(plan.to_dict(), indent=1))
    return 0


class _Output:
    """What ``pull`` says: progress while it runs, one line at the end."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        mode = args.progress or ("bar" if sys.stderr.isatty() else "none")
        self._json = JsonLines() if mode == "json" else None
        self._bar = Bar(args.model) if mode == "bar" and not args.quiet else None
        self.progress: ProgressCallback = self._json or self._bar or ignore_progress

    def done(self, result: FetchResult) -> None:
        line = {
            "event": "done",
            "path": str(result.path),
            "source": result.source,
            "revision": result.revision,
            "bytesTotal": result.bytes_total,
            "bytesReceived": result.bytes_received,
            "filesTotal": len(result.files),
            "seconds": round(result.seconds, 1),
            "offline": result.offline,
        }
        self._close(line)
        if self._json is None and not self._args.quiet:
            how = (
                "was already here"
                if not result.bytes_received
                else f"{format_bytes(result.bytes_received)} fetched"
            )
            if result.offline:
                how = "the hub was not reached, this copy was here"
            print(
                f"{result.source}@{result.revision[:12]}: {len(result.files)} files, "
                f"{format_bytes(result.bytes_total)}, {how} in {result.seconds:.1f} s",
                file=sys.stderr,
            )
            print(result.path)

    def failed(self, error: dict[str, Any]) -> None:
        self._close({"event": "error", **error})
        if self._json is None:
            print(f"{error['reason']}: {error['message']}", file=sys.stderr)

    def _close(self, line: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._args.termination_log is not None:
            try:
                # Kubernetes takes 4096 bytes of a termination message.
                self._args.termination_log.write_text(json.dumps(_shortened(line)))
            except OSError as error:
                print(f"cannot write {self._args.termination_log}: {error}", file=sys.stderr)
        if self._json is not None:
            self._json.write(line)


def _shortened(line: dict[str, Any], limit: int = 3500) -> dict[str, Any]:
    message = line.get("message")
    if isinstance(message, str) and len(message.encode()) > limit:
        return {**line, "message": message.encode()[:limit].decode(errors="ignore") + " ..."}
    return line


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{value:g} is not above 0")
    return value


def _read_token(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise StorageError(f"cannot read the token file {path}: {error.strerror}") from error
    if not token:
        raise InvalidModelId(f"the token file {path} is empty")
    return token


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
