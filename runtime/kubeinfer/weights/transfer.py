"""One file over HTTP: resumed where it broke off, watched for stalls, checked against size and hash."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kubeinfer.weights.errors import (
    DiskFull,
    DownloadStalled,
    FileNotFound,
    Forbidden,
    HashMismatch,
    HubUnavailable,
    NetworkUnreachable,
    StorageError,
    TooManyRequests,
    WeightsError,
    format_bytes,
)
from kubeinfer.weights.progress import Meter
from kubeinfer.weights.sources.base import FileRequest, RemoteFile, retry_after, root_cause

CHUNK = 1 << 16
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """Seconds and counts. ``retries`` is the number of attempts in a row that bring no new byte."""

    connect_timeout: float = 15.0
    stall_timeout: float = 30.0
    retries: int = 5
    backoff: float = 0.5
    backoff_max: float = 30.0
    retry_after_max: float = 300.0


class Stopped(Exception):
    """The download was told to stop; what has arrived stays for the next run."""


class _Again(Exception):
    """This attempt failed in a way that the next may not; ``final`` is raised when patience ends."""

    def __init__(self, final: WeightsError, wait: float | None = None) -> None:
        super().__init__(final.message)
        self.final = final
        self.wait = wait


class Digest:
    """SHA-256 (and git's blob SHA-1 where the hub lists that) over the first ``length`` bytes of a file."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self.reset()

    def reset(self) -> None:
        self.length = 0
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(f"blob {self._file.size}\0".encode(), usedforsecurity=False)

    def update(self, data: bytes) -> None:
        self.length += len(data)
        self._sha256.update(data)
        if self._file.git_sha1:
            self._git.update(data)

    def read(self, path: Path, check: Callable[[], None] = lambda: None) -> None:
        """Start over with the bytes of ``path``."""
        self.reset()
        with open(path, "rb") as stream:
            while data := stream.read(1 << 20):
                check()
                self.update(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def problem(self) -> str | None:
        """What differs from the listing, or None: every byte is as listed."""
        if self.length != self._file.size:
            return f"expected {self._file.size} bytes, got {self.length} bytes"
        if self._file.sha256 and self._file.sha256 != self.sha256:
            return f"expected sha256 {self._file.sha256}, got {self.sha256}"
        if self._file.git_sha1 and self._file.git_sha1 != self._git.hexdigest():
            return f"expected git blob sha1 {self._file.git_sha1}, got {self._git.hexdigest()}"
        return None


class Throttle:
    """A hub's 'not before' that all connections to it keep."""

    def __init__(self) -> None:
        self._until = 0.0
        self._lock = threading.Lock()

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._until = max(self._until, time.monotonic() + seconds)

    def wait(self, stop: threading.Event) -> None:
        if stop.wait(max(0.0, self._until - time.monotonic())):
            raise Stopped


class Transfer:
    """Fetches files one after the other over one connection pool; one object a thread."""

    def __init__(
        self, host: str, options: TransferOptions, meter: Meter, stop: threading.Event, throttle: Throttle
    ) -> None:
        import requests

        self._host = host
        self._options = options
        self._meter = meter
        self._stop = stop
        self._throttle = throttle
        self._session = requests.Session()
        self._session.headers["User-Agent"] = "kubeinfer"

    def close(self) -> None:
        self._session.close()

    def fetch(self, file: RemoteFile, request: Callable[[], FileRequest], target: Path) -> str:
        """Bring ``file`` to ``target`` through ``target.part`` and return its SHA-256.

        The caller has counted the bytes of an existing part as done. Raises a ``WeightsError`` or ``Stopped``.
        """
        part = part_of(target)
        digest = Digest(file)
        best, failures, wrong = _size(part), 0, False
        while True:
            self._throttle.wait(self._stop)
            try:
                with _storage_errors(part):
                    self._attempt(file, request(), part, digest)
            except _Again as again:
                size = _size(part)
                failures = 1 if size > best else failures + 1
                best = max(best, size)
                if failures > self._options.retries:
                    raise again.final from again.__cause__
                self._pause(failures, again.wait)
                continue
            problem = digest.problem()
            self._check_stop()
            if problem is None:
                with _storage_errors(part):
                    os.replace(part, target)
                self._meter.file_done()
                return digest.sha256
            self._forget(part, digest)
            best = failures = 0
            if wrong:
                raise HashMismatch(
                    f"{self._host} serves wrong bytes for {file.path}, twice: {problem}; "
                    "the file at the hub (or a proxy in between) is damaged: try a mirror or another revision",
                    file=file.path,
                )
            wrong = True

    def _attempt(self, file: RemoteFile, request: FileRequest, part: Path, digest: Digest) -> None:
        have = _size(part)
        if have > file.size:
            self._forget(part, digest)
            have = 0
        if have != digest.length:
            digest.read(part, self._check_stop) if have else digest.reset()
        if have == file.size:
            part.touch()
            return
        headers = {**request.headers, "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with contextlib.closing(self._get(request.url, headers)) as response:
            # Whoever stopped this download may have let another process at the part.
            self._check_stop()
            self._check_status(response, file, part, digest)
            if have and not self._continues(response, have):
                self._forget(part, digest)
            length = response.headers.get("Content-Length")
            encoded = response.headers.get("Content-Encoding", "identity") != "identity"
            if length and not encoded and digest.length + int(length) != file.size:
                # Not a broken connection: the server has other bytes than it lists.
                listed = f"{file.size} bytes listed, {digest.length + int(length)} bytes served"
                raise _Again(
                    HashMismatch(f"{self._host} serves wrong bytes for {file.path}: {listed}", file=file.path)
                )
            with open(part, "ab") as out:
                try:
                    self._copy(response, out, file, digest)
                finally:
                    out.flush()
            if digest.length < file.size:
                raise _Again(
                    self._broken(f"the connection closed at byte {digest.length} of {file.size}", file)
                )

    def _copy(self, response: Any, out: BinaryIO, file: RemoteFile, digest: Digest) -> None:
        chunks = self._chunks(response, file)
        for data in chunks:
            self._check_stop()
            if digest.length + len(data) > file.size:
                data = data[: file.size - digest.length + 1]
            out.write(data)
            digest.update(data)
            self._meter.received_bytes(len(data))
            if digest.length > file.size:
                return
        os.fsync(out.fileno())

    def _chunks(self, response: Any, file: RemoteFile) -> Iterator[bytes]:
        import requests
        import urllib3

        try:
            if hasattr(response.raw, "read1") and not response.headers.get("Transfer-Encoding"):
                # What one read of the socket brings, at once: a break then loses nothing that had arrived.
                while data := response.raw.read1(CHUNK, decode_content=True):
                    yield data
            else:
                yield from response.iter_content(CHUNK)
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _Again(self._network_error(error, file)) from error

    def _get(self, url: str, headers: dict[str, str]) -> Any:
        import requests

        timeout = (self._options.connect_timeout, self._options.stall_timeout)
        try:
            return self._session.get(url, headers=headers, auth=_keep_auth, timeout=timeout, stream=True)
        except requests.exceptions.RequestException as error:
            raise _Again(self._network_error(error, None)) from error

    def _continues(self, response: Any, have: int) -> bool:
        found = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
        return response.status_code == 206 and found is not None and int(found[1]) == have

    def _check_status(self, response: Any, file: RemoteFile, part: Path, digest: Digest) -> None:
        status = response.status_code
        if status in (200, 206):
            return
        redirected = bool(response.history)
        if status == 429:
            wait = retry_after(response.headers.get("Retry-After"))
            error = TooManyRequests(
                f"{self._host} limits the rate of requests (HTTP 429) and goes on doing so; try later, give a token "
                "or use a mirror",
                retryAfter=wait,
            )
            if wait is not None and wait > self._options.retry_after_max:
                raise error
            if wait is not None:
                self._throttle.hold(wait)
            raise _Again(error, wait)
        if status == 416:
            self._forget(part, digest)
            raise _Again(self._broken("the hub refused to resume (HTTP 416)", file))
        if status in (401, 403) and not redirected:
            raise Forbidden(
                f"{self._host} refuses {file.path} (HTTP {status}): the token in use (if any) may not read this model"
            )
        if status in (404, 410) and not redirected:
            raise FileNotFound(f"{self._host} lists {file.path}, but has no such file (HTTP {status})")
        # Behind a redirect, a refusal is an expired link as a rule; the next attempt asks for a new one.
        raise _Again(
            HubUnavailable(f"{self._host} answers HTTP {status} for {file.path}; try later or use a mirror")
        )

    def _network_error(self, error: Exception, file: RemoteFile | None) -> WeightsError:
        what = file.path if file else "the file"
        text = str(error)
        if "Read timed out" in text:
            return DownloadStalled(
                f"{self._host} sent no byte of {what} for {self._options.stall_timeout:g} s, "
                f"{self._options.retries + 1} times in a row; check the network, or use a mirror"
            )
        return self._broken(root_cause(error), file)

    def _broken(self, what: str, file: RemoteFile | None) -> NetworkUnreachable:
        name = f" of {file.path}" if file else ""
        return NetworkUnreachable(
            f"the download{name} from {self._host} keeps breaking off ({what}); check the network and proxy, "
            "or use a mirror; the bytes already here are kept"
        )

    def _forget(self, part: Path, digest: Digest) -> None:
        self._meter.already_here(-_size(part))
        part.unlink(missing_ok=True)
        digest.reset()

    def _pause(self, failures: int, wait: float | None) -> None:
        if wait is not None:
            return  # the throttle waits, for every connection
        delay = min(self._options.backoff_max, self._options.backoff * 2 ** (failures - 1))
        if self._stop.wait(delay * random.uniform(0.5, 1.0)):
            raise Stopped

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped


def part_of(target: Path) -> Path:
    """Where the bytes of ``target`` gather."""
    return target.with_name(target.name + ".part")


def disk_full(folder: Path, needed: int | None = None) -> DiskFull:
    """The error for a folder without room; ``needed`` bytes are still to be written."""
    free = free_bytes(folder)
    need = f"{needed} bytes ({format_bytes(needed)}) are still needed, " if needed is not None else ""
    return DiskFull(
        f"no room for the weights in {folder}: {need}{free} bytes ({format_bytes(free)}) are free; free some space, "
        "choose another folder or a larger volume (what has arrived is kept)",
        neededBytes=needed,
        freeBytes=free,
    )


def free_bytes(folder: Path) -> int:
    """Bytes that may be written below ``folder``, which need not exist yet."""
    probe = folder
    while not probe.exists() and probe != probe.parent:
        probe = probe.parent
    return shutil.disk_usage(probe).free


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(path.parent) from error
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def _keep_auth(request: Any) -> Any:
    """An auth hook that changes nothing: without one, requests puts ~/.netrc over our own header."""
    return request


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
