"""The client's pod: it talks to the gateway from inside the cluster, so that the tests run the same on any cluster."""

from __future__ import annotations

import contextlib
import json
import pathlib
import subprocess
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from .kube import Kube, poll, ready

LOAD = pathlib.Path(__file__).with_name("load.py")

REQUEST = """
import json, sys, urllib.request, urllib.error
call = json.loads(sys.argv[1])
data = None if call["body"] is None else json.dumps(call["body"]).encode()
request = urllib.request.Request(call["url"], data, {"Content-Type": "application/json", **call["headers"]}, method=call["method"])
try:
    response = urllib.request.urlopen(request, timeout=call["timeout"])
except urllib.error.HTTPError as error:
    response = error
except OSError as error:
    print(json.dumps({"status": 0, "headers": {}, "text": str(error)}))
    sys.exit()
print(json.dumps({"status": response.status, "headers": {k.lower(): v for k, v in response.headers.items()},
                  "text": response.read().decode(errors="replace")}))
"""


class Load:
    """A running load. Leave the `with` block to stop it; then `report` holds its figures."""

    def __init__(self, command: list[str]) -> None:
        self.report: dict[str, Any] = {}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def finish(self, timeout: float = 330.0) -> dict[str, Any]:
        """Stop, wait for the streams in flight, and give the figures."""
        if not self.report:
            out, err = self._process.communicate(timeout=timeout)
            if not out.strip():
                raise RuntimeError(f"the load printed no report: {err[-2000:]}")
            self.report = json.loads(out.strip().splitlines()[-1])
        return self.report


class Client:
    """Requests to the gateway at `url` from a pod."""

    def __init__(self, kube: Kube, image: str, url: str) -> None:
        self.kube = kube
        self.image = image
        self.url = url

    def start(self) -> None:
        self.kube.apply(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "client"},
                "data": {"load.py": LOAD.read_text()},
            },
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "client"},
                "spec": {
                    "terminationGracePeriodSeconds": 0,
                    "containers": [
                        {
                            "name": "client",
                            "image": self.image,
                            "imagePullPolicy": "IfNotPresent",
                            "command": ["sleep", "infinity"],
                            "volumeMounts": [{"name": "source", "mountPath": "/source"}],
                        }
                    ],
                    "volumes": [{"name": "source", "configMap": {"name": "client"}}],
                },
            },
        )
        poll("the client's pod is ready", lambda: (pod := self.kube.get("pod", "client")) and ready(pod), 60)

    def call(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        url: str | None = None,
        timeout: float = 60.0,
    ) -> dict[str, Any]:
        """One request. Returns status (0: no answer), headers (lower case) and text."""
        call = {
            "url": (url or self.url) + path,
            "body": body,
            "headers": headers or {},
            "method": method or ("GET" if body is None else "POST"),
            "timeout": timeout,
        }
        # As an argument: an exec that also streams standard input has been seen to hang at its end.
        command = ("exec", "client", "--", "python", "-c", REQUEST, json.dumps(call))
        answer: dict[str, Any] = json.loads(self.kube.run(*command, timeout=timeout + 30))
        return answer

    def chat(self, model: str, prompt: str = "Say hello.", **fields: Any) -> dict[str, Any]:
        """One chat completion, not streamed."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 8, **fields}
        return self.call("/v1/chat/completions", body)

    def load(self, model: str, *flags: str, streams: int = 2, tokens: int = 32) -> Load:
        """Start a load of streams; see load.py."""
        kubectl = [
            "kubectl",
            "-n",
            self.kube.namespace,
            "exec",
            "-i",
            "client",
            "--",
            "python",
            "/source/load.py",
        ]
        return Load(
            [
                *kubectl,
                "--url",
                self.url,
                "--model",
                model,
                "--streams",
                str(streams),
                "--tokens",
                str(tokens),
                *flags,
            ]
        )

    @contextlib.contextmanager
    def detached_load(self, model: str, *, streams: int = 2, tokens: int = 32) -> Iterator[dict[str, Any]]:
        """A load that does not hang on a connection through the API server; filled with its report at the end."""
        load = (
            f"python /source/load.py --url {self.url} --model {model} --streams {streams} --tokens {tokens}"
        )
        script = (
            f"rm -f /tmp/stop /tmp/report; nohup {load} --stop-file /tmp/stop >/tmp/report 2>&1 </dev/null &"
        )
        self.kube.run("exec", "client", "--", "sh", "-c", script)
        report: dict[str, Any] = {}
        try:
            yield report
        finally:
            self.kube.run("exec", "client", "--", "touch", "/tmp/stop")
            read = lambda: json.loads(self.kube.run("exec", "client", "--", "cat", "/tmp/report"))  # noqa: E731
            report |= poll("the load's report", read, 330)
