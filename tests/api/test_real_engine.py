"""The server over a real engine core in its own process: greedy answers, faults, and what is left behind."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


class Server:
    def __init__(self, folder: Path, *flags: str, own_group: bool = False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        environment = os.environ | {"PYTHONPATH": str(ROOT / "runtime"), "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable, "-m", "kubeinfer.cli.main", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port),
            "--device", "cpu", "--dtype", "float32", "--cpu-kvcache-space", "0.05", "--served-model-name", "tiny",
            "--max-num-batched-tokens", "64", *flags,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
            start_new_session=own_group,
        )  # fmt: skip
        deadline = time.monotonic() + 90
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/health").status_code == 200:
                    return
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def metric(self, name: str) -> float:
        found = re.search(
            rf'^kubeinfer:{name}{{model_name="tiny"}} (\S+)$', httpx.get(self.url + "/metrics").text, re.M
        )
        assert found is not None, name
        return float(found[1])


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    result = Server(folder)
    try:
        yield result
    finally:
        if result.process.poll() is None:
            result.process.kill()
        result.process.communicate()


def complete(server: Server, **body: Any) -> Any:
    response = httpx.post(server.url + "/v1/completions", json={"temperature": 0, **body}, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def rest_of_stream(server: Server, tokens: int, interrupt: Callable[[], None]) -> list[str]:
    """What comes of a stream of so many tokens after its first line and ``interrupt``."""
    body = {"prompt": "Hello", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(timeout=20) as client,
        client.stream("POST", server.url + "/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        interrupt()
        return [line for line in lines if line]


def test_an_answer_does_not_depend_on_what_runs_beside_it(server: Server) -> None:
    prompts = [f"Once upon a time there were {count} words" for count in range(12)]
    alone = [complete(server, prompt=prompt, max_tokens=24)["choices"][0]["text"] for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(
            pool.map(lambda p: complete(server, prompt=p, max_tokens=24)["choices"][0]["text"], prompts)
        )
    batch = complete(server, prompt=prompts, max_tokens=24)["choices"]
    assert together == alone
    assert [choice["text"] for choice in batch] == alone


def test_sampling_with_a_seed_repeats(server: Server) -> None:
    body = {"prompt": "Hello", "max_tokens": 16, "temperature": 1.0, "seed": 7, "n": 3}
    first, second = complete(server, **body)["choices"], complete(server, **body)["choices"]
    assert [choice["text"] for choice in first] == [choice["text"] for choice in second]
    assert len({choice["text"] for choice in first}) == 3


def test_logprobs_and_echo(server: Server) -> None:
    choice = complete(server, prompt="Hello there", max_tokens=4, logprobs=3, echo=True, ignore_eos=True)[
        "choices"
    ][0]
    values = choice["logprobs"]["token_logprobs"]
    assert values[0] is None
    assert all(value <= 0 for value in values[1:])
    assert all(len(top) >= 3 for top in choice["logprobs"]["top_logprobs"][1:])


def test_parameters_far_out(server: Server) -> None:
    greedy = complete(server, prompt="Hello", max_tokens=8, ignore_eos=True)["choices"][0]["text"]
    cold = complete(server, prompt="Hello", max_tokens=8, ignore_eos=True, temperature=1e-40)["choices"][0][
        "text"
    ]
    assert cold == greedy
    for top_k in (2**31, 2**40, 2**63 - 1):
        body = {"prompt": "Hello", "max_tokens": 8, "temperature": 1.0, "seed": 3, "ignore_eos": True}
        assert (
            complete(server, **body, top_k=top_k)["choices"] == complete(server, **body, top_k=0)["choices"]
        )


def test_clients_that_leave_free_their_blocks(server: Server) -> None:
    def leave(_: int) -> None:
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(
                server.url + "/v1/completions",
                json={"prompt": "word " * 50, "max_tokens": 400, "ignore_eos": True, "n": 2},
                timeout=0.4,
            )

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(8)))
    deadline = time.monotonic() + 5
    while server.metric("num_requests_running") or server.metric("num_requests_waiting"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert server.metric("kv_cache_usage_perc") == 0


def test_a_killed_engine_core(server: Server) -> None:
    (core,) = (
        child
        for child in psutil.Process(server.process.pid).children()
        if "core_process" in " ".join(child.cmdline())
    )
    rest = rest_of_stream(server, 450, lambda: core.send_signal(signal.SIGKILL))
    assert rest[-1] == "data: [DONE]"
    assert "SIGKILL" in json.loads(rest[-2][6:])["error"]["message"]
    assert httpx.get(server.url + "/health").status_code == 503
    output, _ = server.process.communicate(timeout=10)
    assert server.process.returncode == 1
    assert "SIGKILL" in output.strip().splitlines()[-1]


def test_sigterm_to_all_processes_ends_streams_in_order(folder: Path) -> None:
    """As systemd, timeout and dumb-init send it."""
    server = Server(folder, own_group=True)
    try:
        rest = rest_of_stream(server, 300, lambda: os.killpg(server.process.pid, signal.SIGTERM))
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        output, _ = server.process.communicate(timeout=15)
        assert server.process.returncode == 0, output
    finally:
        server.process.kill()
        server.process.communicate()


def test_sigterm_while_the_model_loads(folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "runtime"), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "kubeinfer.cli.main",
        "serve",
        str(folder),
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        deadline = time.monotonic() + 30
        while not (children := psutil.Process(process.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 128 + signal.SIGTERM, output
        assert "Traceback" not in output
        assert not any(child.is_running() for child in children)
    finally:
        process.kill()
        process.communicate()
