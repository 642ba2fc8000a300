"""The HTTP server of the loopback hub."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub.faults import Fault, Faults
from hub.repos import HubFile, Repo, Repos, Revision

_RANGE = re.compile(r"bytes=(\d+)-(\d*)\Z")
_CHUNK = 1 << 16


class HubServer(ThreadingHTTPServer):
    """Serves the models below ``models``; ``url`` is what HF_ENDPOINT and MODELSCOPE_ENDPOINT are set to."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, models: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), _Handler)
        self.repos = Repos(models)
        self.faults = Faults()
        self.stats: Counter[str] = Counter()
        self.closing = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def start(self) -> HubServer:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
        if self._thread is not None:
            self._thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is part of the job."""

    def bytes_sent(self, path: str) -> int:
        """Bytes of the file ``path`` (its name in the model) sent since the last reset."""
        return self.stats[f"bytes {path}"]


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    server_version = "loopback-hub"
    disable_nagle_algorithm = True  # head and body are two writes

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the statistics tell what was asked."""

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_DELETE(self) -> None:
        self._route()

    # -- routes ---------------------------------------------------------------------------------------------

    def _route(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {k: v[-1] for k, v in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        if path.startswith("/_admin/"):
            self._admin(path.removeprefix("/_admin/"), body)
            return
        self.server.stats["requests"] += 1
        if self.server.faults.take("down", "all", path):
            self._hang_up()
            return
        if path.startswith("/_storage/"):
            self._storage(path.removeprefix("/_storage/"), query.get("name", ""), query.get("commit", ""))
        elif path.startswith("/api/v1/models/"):
            self._modelscope(path.removeprefix("/api/v1/models/"), query)
        elif path.startswith("/openapi/v1/models/"):
            self._modelscope(path.removeprefix("/openapi/v1/models/"), query)
        elif path.startswith("/api/models/"):
            self._huggingface(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            self._hf_file(path)
        else:
            self._json({"error": f"no route {path}"}, 404)

    def _admin(self, what: str, body: bytes) -> None:
        server = self.server
        if what == "stats" and self.command == "DELETE":
            server.stats.clear()
        elif what == "faults" and self.command == "POST":
            wanted = json.loads(body)
            for item in wanted if isinstance(wanted, list) else [wanted]:
                server.faults.add(Fault.parse(item) if isinstance(item, str) else Fault(**item))
        elif what == "faults" and self.command == "DELETE":
            server.faults.set([])
        elif what not in ("stats", "faults", "health"):
            self._json({"error": "unknown"}, 404)
            return
        self._json({"faults": server.faults.to_list(), "stats": dict(server.stats)})

    def _api_fault(self, path: str) -> bool:
        if fault := self.server.faults.take("429", "api", path):
            self._json({"error": "rate limit"}, 429, {"Retry-After": f"{fault.seconds:g}"})
            return True
        if self.server.faults.take("500", "api", path):
            self._json({"error": "internal"}, 500)
            return True
        if fault := self.server.faults.take("stall", "api", path):
            self.server.closing.wait(fault.seconds)
            self._hang_up()
            return True
        return False

    # -- Hugging Face ---------------------------------------------------------------------------------------

    def _huggingface(self, rest: str) -> None:
        parts = rest.split("/")
        name, action = "/".join(parts[:2]), parts[2:3]
        if self._api_fault(rest):
            return
        repo = self._hf_repo(name)
        if repo is None:
            return
        wanted = parts[3] if len(parts) > 3 else "main"
        revision = repo.find(wanted)
        if revision is None:
            self._json({"error": f"Invalid rev id: {wanted}"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif action == ["tree"]:
            self._json([self._hf_entry(f) for f in revision.files.values()])
        elif action in ([], ["revision"]):
            siblings = [{"rfilename": p, **self._hf_entry(f)} for p, f in revision.files.items()]
            self._json(
                {"id": name, "modelId": name, "sha": revision.commit, "private": False, "siblings": siblings}
            )
        else:
            self._json({"error": "not here"}, 404)

    def _hf_entry(self, file: HubFile) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "type": "file",
            "path": file.path,
            "size": file.size,
            "oid": file.git_sha1,
            "blobId": file.git_sha1,
        }
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "sha256": file.sha256, "size": file.size, "pointerSize": 134}
        return entry

    def _hf_repo(self, name: str) -> Repo | None:
        repo = self.server.repos.get(name)
        if repo is None:
            code = 404 if self._token() else 401
            self._json({"error": "Repository not found"}, code, {"X-Error-Code": "RepoNotFound"})
            return None
        if not self._allowed(repo):
            gated = repo.settings.get("gated")
            header = {"X-Error-Code": "GatedRepo"} if gated else {"X-Error-Message": "Invalid credentials"}
            self._json({"error": "Access refused"}, 403, header)
            return None
        return repo

    def _hf_file(self, path: str) -> None:
        found = re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)\Z", path)
        repo = self._hf_repo(found[1]) if found else None
        if found is None or repo is None:
            return
        revision = repo.find(found[2])
        file = revision.files.get(found[3]) if revision else None
        if revision is None or file is None:
            code = "EntryNotFound" if revision else "RevisionNotFound"
            self._json({"error": "not found"}, 404, {"X-Error-Code": code})
            return
        headers = {"X-Repo-Commit": revision.commit, "ETag": f'"{file.etag}"'}
        if file.lfs:
            headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
            self._redirect(file, headers)
        else:
            self._send_file(file, headers)

    # -- ModelScope -----------------------------------------------------------------------------------------

    def _modelscope(self, rest: str, query: dict[str, str]) -> None:
        parts = rest.split("/")
        name, action = "/".join(parts[:2]), "/".join(parts[2:])
        if action != "repo" and self._api_fault(rest):
            return
        repo = self.server.repos.get(name)
        if repo is None:
            self._ms_error(404, 10010205001, f"model {name} not found")
        elif not self._allowed(repo):
            self._ms_error(403 if self._token() else 401, 10010101003, "access denied")
        elif action == "":
            branches = self._ms_branches(repo)
            self._ms_data({"Name": parts[1], "Path": parts[0], "Visibility": 5, "Revisions": branches})
        elif action == "revisions":
            self._ms_data({"RevisionMap": {"Branches": self._ms_branches(repo), "Tags": []}})
        elif (revision := repo.find(query.get("Revision", "master"))) is None:
            self._ms_error(404, 10010205002, f"revision {query.get('Revision')} not found")
        elif action == "repo/files":
            self._ms_data({"Files": [self._ms_entry(f, revision) for f in revision.files.values()]})
        elif action == "repo" and (file := revision.files.get(query.get("FilePath", ""))) is not None:
            if file.lfs:
                self._redirect(file, {"X-Linked-ETag": f'"{file.sha256}"'})
            else:
                self._send_file(file, {})
        else:
            self._ms_error(404, 10010205003, "file not found")

    def _ms_branches(self, repo: Repo) -> list[dict[str, Any]]:
        return [{"Revision": r.name or "master", "CreatedAt": 1700000000} for r in repo.revisions.values()]

    def _ms_entry(self, file: HubFile, revision: Revision) -> dict[str, Any]:
        return {
            "Path": file.path,
            "Name": file.path.rpartition("/")[2],
            "Type": "blob",
            "Size": file.size,
            "Sha256": file.sha256,
            "IsLFS": file.lfs,
            "Revision": revision.commit,
            "CommittedDate": 1700000000,
        }

    def _ms_data(self, data: Any) -> None:
        self._json({"Code": 200, "Success": True, "Message": "", "Data": data, "data": data})

    def _ms_error(self, status: int, code: int, message: str) -> None:
        self._json({"Code": code, "Success": False, "Message": message, "RequestId": "loopback"}, status)

    # -- bytes ----------------------------------------------------------------------------------------------

    def _storage(self, sha256: str, name: str, commit: str) -> None:
        file = self.server.repos.by_hash(sha256)
        if file is None:
            self._json({"error": "gone"}, 404)
        else:
            # huggingface_hub follows a redirect on the same host and wants the hub's headers there too.
            headers = {"X-Repo-Commit": commit} if commit else {}
            self._send_file(
                HubFile(name or file.path, file.disk, file.size, file.sha256, file.git_sha1), headers
            )

    def _redirect(self, file: HubFile, headers: dict[str, str]) -> None:
        host = self.headers.get("Host") or urlsplit(self.server.url).netloc
        location = f"http://{host}/_storage/{file.sha256}?name={quote(file.path)}"
        location += f"&commit={headers.get('X-Repo-Commit', '')}"
        self._head(302, {**headers, "Location": location, "Content-Length": "0"})

    def _send_file(self, file: HubFile, headers: dict[str, str]) -> None:
        faults, stats = self.server.faults, self.server.stats
        if fault := faults.take("429", "files", file.path):
            self._json({"error": "rate limit"}, 429, {"Retry-After": f"{fault.seconds:g}"})
            return
        if faults.take("500", "files", file.path):
            self._json({"error": "internal"}, 500)
            return
        start, status, size = 0, 200, file.size
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        headers.setdefault("ETag", f'"{file.etag}"')
        wanted = _RANGE.match(self.headers.get("Range", ""))
        end = size - 1
        if wanted and not faults.take("no-range", "files", file.path):
            start, end = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
            if start >= size:
                self._head(416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        headers["Content-Length"] = str(end - start + 1)
        self._head(status, headers)
        if self.command == "HEAD":
            return
        stats[f"requests {file.path}"] += 1
        try:
            for data in self._faulty(file, start, end):
                self.wfile.write(data)
                stats[f"bytes {file.path}"] += len(data)
                stats["bytes"] += len(data)
        except _HangUp:
            self._hang_up()

    def _faulty(self, file: HubFile, start: int, end: int) -> Iterator[bytes]:
        """The bytes from ``start`` to ``end`` with the faults that are on."""
        take = self.server.faults.take
        breaks, stalls = take("break", "files", file.path), take("stall", "files", file.path)
        corrupts, slow = take("corrupt", "files", file.path), take("slow", "files", file.path)
        sent, left, position = 0, end - start + 1, start
        with open(file.disk, "rb") as stream:
            stream.seek(start)
            while left:
                step = min(_CHUNK if slow is None else max(1, slow.rate // 20), left)
                for fault in (breaks, stalls):
                    if fault is not None and sent < fault.after:
                        step = min(step, fault.after - sent)
                if breaks is not None and sent >= breaks.after:
                    raise _HangUp
                if stalls is not None and sent >= stalls.after:
                    self.server.closing.wait(stalls.seconds)
                    raise _HangUp
                data = stream.read(step)
                if corrupts is not None and position <= corrupts.after < position + len(data):
                    at = corrupts.after - position
                    data = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
                yield data
                sent, left, position = sent + len(data), left - len(data), position + len(data)
                if slow is not None and self.server.closing.wait(len(data) / slow.rate):
                    raise _HangUp

    # -- answers --------------------------------------------------------------------------------------------

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ").strip()

    def _allowed(self, repo: Repo) -> bool:
        return not repo.settings.get("token") or repo.settings["token"] == self._token()

    def _json(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        base = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        self._head(status, {**base, **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        # Shut down rather than close: the client sees the end at once, as when a proxy drops it.
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


class _HangUp(Exception):
    """This response ends here."""


def serve(models: Path, host: str, port: int, faults: list[Fault]) -> None:
    """Run until interrupted."""
    server = HubServer(models, host, port)
    for fault in faults:
        server.faults.add(fault)
    print(json.dumps({"url": server.url, "faults": [asdict(f) for f in faults]}), flush=True)
    started = time.monotonic()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        print(
            json.dumps({"stats": dict(server.stats), "seconds": round(time.monotonic() - started)}),
            flush=True,
        )
