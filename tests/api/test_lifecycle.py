"""Clients that leave, servers that are told to stop, engines that die."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.running import Running, running
from api.scripted import scripted_engine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def slow(folder: Path) -> Iterator[Running]:
    """Twenty steps a second."""
    with running(scripted_engine(folder, delay=0.05)) as server:
        yield server


def body(**values: Any) -> dict[str, Any]:
    return {"prompt": "Hello", "max_tokens": 400, **values}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["Hello", ["Hello", "you"]])
def test_a_client_that_leaves_frees_its_request_within_a_step(
    slow: Running, stream: bool, prompt: str | list[str]
) -> None:
    host, port = slow.url.removeprefix("http://").split(":")
    data = json.dumps(body(prompt=prompt, stream=stream)).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        slow.wait_until(lambda: len(slow.core.live) == (1 if isinstance(prompt, str) else 2))
        time.sleep(0.1)
    steps = slow.core.steps
    slow.wait_until(lambda: not slow.core.live)
    assert slow.core.steps - steps <= 2
    slow.wait_until(lambda: slow.server.state.in_flight == 0)
    assert slow.engine.num_unfinished == 0
    metrics = httpx.get(slow.url + "/metrics").text
    assert 'kubeinfer:num_requests_running{model_name="scripted"} 0.0' in metrics
    assert 'kubeinfer:num_requests_waiting{model_name="scripted"} 0.0' in metrics


def test_a_client_that_leaves_in_the_middle_of_its_request(
    slow: Running, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = slow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
        slow.wait_until(lambda: slow.server.state.in_flight == 1)
    slow.wait_until(lambda: slow.server.state.in_flight == 0)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_clients_that_leave_at_random_leave_nothing_behind(folder: Path) -> None:
    rng = random.Random(1)
    with running(scripted_engine(folder, delay=0.002)) as server:

        def visit(seconds: float, stream: bool) -> None:
            with (
                contextlib.suppress(httpx.TimeoutException),
                httpx.Client(base_url=server.url, timeout=seconds) as client,
            ):
                if not stream:
                    client.post("/v1/completions", json=body(n=2))
                    return
                begun = time.monotonic()
                with client.stream("POST", "/v1/completions", json=body(stream=True)) as response:
                    for _ in response.iter_bytes():
                        if time.monotonic() - begun > seconds:
                            return

        visits = [
            threading.Thread(target=visit, args=(rng.uniform(0.01, 0.3), rng.random() < 0.6))
            for _ in range(40)
        ]
        for thread in visits:
            thread.start()
        for thread in visits:
            thread.join()
        server.wait_until(lambda: not server.core.live and server.server.state.in_flight == 0)
        assert server.engine.num_unfinished == 0
        assert httpx.post(server.url + "/v1/completions", json=body(max_tokens=2)).status_code == 200


def test_a_slow_client_gets_everything_in_fewer_chunks(folder: Path) -> None:
    """Tokens that come while a client does not read are merged; no other stream waits for it."""
    with running(scripted_engine(folder)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        data = json.dumps(body(prompt=["Hello"] * 256, max_tokens=450, stream=True, n=1)).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
        with connection:
            connection.sendall(head.encode() + data)
            server.wait_until(lambda: len(server.core.requests) == 256 and not server.core.live, 60)
            answer = httpx.post(server.url + "/v1/completions", json=body(max_tokens=3), timeout=5)
            assert answer.status_code == 200
            received = bytearray()
            while b"[DONE]" not in received[-60:]:
                part = connection.recv(1 << 20)
                assert part
                received += part
        texts: dict[int, str] = {}
        chunks = 0
        for line in received.decode().splitlines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
                chunks += 1
        assert len(texts) == 256
        assert len(set(texts.values())) == 1
        assert chunks < 256 * 300


class Process:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *flags: str, delay: float = 0.02):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'runtime'}:{ROOT / 'tests'}"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "api.serve_scripted", str(folder), str(delay), "--host", "127.0.0.1", "--port",
             str(port), "--served-model-name", "scripted", *flags],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/health").status_code == 200:
                    return
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self, seconds: float = 10) -> tuple[int, str]:
        """Exit code and all that was printed."""
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output


@contextlib.contextmanager
def process(folder: Path, *flags: str, **values: Any) -> Iterator[Process]:
    result = Process(folder, *flags, **values)
    try:
        yield result
    finally:
        result.process.kill()
        result.process.communicate()


def lines_of(response: httpx.Response) -> list[str]:
    return [line for line in response.iter_lines() if line]


def test_sigterm_finishes_streams_and_refuses_new_requests(folder: Path) -> None:
    with process(folder, "--shutdown-timeout", "20") as server, httpx.Client(base_url=server.url) as client:
        with client.stream("POST", "/v1/completions", json=body(max_tokens=60, stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            for path in ("/health", "/ping"):
                answer = httpx.get(server.url + path)
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "shutting_down"
            refused = httpx.post(server.url + "/v1/completions", json=body())
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert server.end()[0] == 0


def test_past_the_deadline_streams_are_ended_in_order(folder: Path) -> None:
    with process(folder, "--shutdown-timeout", "0.3") as server, httpx.Client(base_url=server.url) as client:
        with client.stream("POST", "/v1/completions", json=body(stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "abort"
        code, output = server.end()
        assert code == 0
        assert "Aborting 1 requests" in output


def test_a_second_signal_ends_at_once(folder: Path) -> None:
    with process(folder) as server, httpx.Client(base_url=server.url) as client:
        with (
            contextlib.suppress(httpx.TransportError),
            client.stream("POST", "/v1/completions", json=body(stream=True)) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert server.process.poll() is None
            begun = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(5)
            assert time.monotonic() - begun < 1
        assert server.process.returncode == 128 + signal.SIGTERM


def test_a_dead_engine_is_told_to_everyone(folder: Path) -> None:
    cause = "CUDA error: an illegal memory access was encountered"
    with process(folder) as server, httpx.Client(base_url=server.url) as client:
        with client.stream("POST", "/v1/completions", json=body(stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            assert server.process.stdin is not None
            server.process.stdin.write(cause + "\n")
            server.process.stdin.flush()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        error = json.loads(rest[-2][6:])["error"]
        assert cause in error["message"]
        assert error["code"] == "engine_dead"
        answer = httpx.get(server.url + "/health")
        assert answer.status_code == 503
        assert cause in answer.json()["error"]["message"]
        assert httpx.post(server.url + "/v1/completions", json=body()).status_code == 503
        code, output = server.end()
        assert code == 1
        assert output.strip().splitlines()[-1] == f"error: The engine has stopped: {cause}"


def test_logs_as_json(folder: Path) -> None:
    with process(folder, "--log-format", "json", "--enable-log-requests") as server:
        assert httpx.post(server.url + "/v1/completions", json=body(max_tokens=2)).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        code, output = server.end()
    assert code == 0
    logged = [json.loads(line) for line in output.splitlines()]  # all of them
    assert any("Ready" in line["message"] and line["level"] == "info" for line in logged)
    assert any("max_tokens=2" in line["message"] for line in logged)


def test_what_is_printed_at_start(folder: Path) -> None:
    with process(folder) as server:
        server.process.send_signal(signal.SIGTERM)
        code, output = server.end()
    assert code == 0
    assert f"curl {server.url}/v1/chat/completions" in output
    assert f"Chat page: {server.url}/" in output
