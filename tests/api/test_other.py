"""The legacy endpoint, TLS, metrics and log lines by themselves."""

from __future__ import annotations

import json
import logging
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.running import Running, running
from api.scripted import scripted_engine
from kubeinfer.api.launch import bind
from kubeinfer.engine.messages import EngineStats
from kubeinfer.errors import OptionError
from kubeinfer.logs import JsonFormatter, StatsLine, TextFormatter
from kubeinfer.metrics import Histogram
from kubeinfer.options import ServeOptions


def test_generate(server: Running, client: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": "Hello", "max_tokens": 30, "n": 2, "stop": ["dog"]}
    whole = client.post("/generate", json=body).json()
    assert whole == {"text": ["Hello The quick brown fox jumps over the lazy "] * 2}
    response = client.post("/generate", json={**body, "stream": True})
    chunks = response.content.split(b"\0")
    assert chunks[-1] == b""
    assert json.loads(chunks[-2]) == whole
    for bad, param in (({"prompt": 5}, "prompt"), ({"prompt": "x", "echo": True}, "echo"), ({}, "prompt")):
        answer = client.post("/generate", json=bad)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


def test_tls(folder: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    with running(scripted_engine(folder), ssl_keyfile=str(key), ssl_certfile=str(certificate)) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        body = {"prompt": "Hi", "max_tokens": 3, "stream": True}
        answer = httpx.post(server.url + "/v1/completions", json=body, verify=context)
        assert answer.text.endswith("data: [DONE]\n\n")


def test_listening_on_every_address() -> None:
    listener = bind(ServeOptions(model="m", port=0))
    port = listener.getsockname()[1]
    try:
        listener.listen()
        with pytest.raises(OptionError, match="in use"):
            bind(ServeOptions(model="m", port=port))
    finally:
        listener.close()


def test_memory_does_not_grow_with_requests(server: Running, client: httpx.Client) -> None:
    import gc

    def alive() -> int:
        gc.collect()
        return len(gc.get_objects())

    def ask(count: int) -> None:
        for index in range(count):
            body = {"prompt": f"Hello {index}", "max_tokens": 3, "stream": index % 2 == 0}
            assert client.post("/v1/completions", json=body).status_code == 200

    ask(50)
    server.core.requests.clear()
    before = alive()
    ask(300)
    server.core.requests.clear()
    assert alive() - before < 300
    assert server.engine.num_unfinished == 0


def test_the_stats_line() -> None:
    line = StatsLine()
    assert line.next(EngineStats()) is None
    busy = EngineStats(
        num_running=3, num_waiting=1, kv_cache_usage=0.25, prefix_cache_queries=100, prefix_cache_hits=40,
        prompt_tokens=1000, generation_tokens=50,
    )  # fmt: skip
    line._time -= 10
    found = line.next(busy)
    assert found is not None
    text, fields = found
    assert text.startswith("running 3, waiting 1, prompt ")
    assert "KV cache 25.0%" in text
    assert "prefix hits 40.0%" in text
    assert fields["generation_tokens_per_second"] == pytest.approx(5, rel=0.1)
    idle = EngineStats(prompt_tokens=1000, generation_tokens=50)
    assert line.next(idle) is not None
    assert line.next(idle) is None


def test_formats() -> None:
    record = logging.LogRecord("kubeinfer.server", logging.INFO, "f", 1, "at %s", ("once",), None)
    record.fields = {"running": 2}
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["level"], line["running"]) == ("at once", "info", 2)
    assert TextFormatter().format(record).endswith("[server] at once")


def test_histograms() -> None:
    histogram = Histogram("x", "y", (0.1, 1))
    for value, times in ((0.05, 1), (0.1, 2), (0.5, 1), (9.0, 1)):
        histogram.observe(value, times)
    samples = {
        (sample.name, sample.labels.get("le")): sample.value for sample in histogram.family("m").samples
    }
    assert samples[("x_bucket", "0.1")] == 3
    assert samples[("x_bucket", "1.0")] == 4
    assert samples[("x_bucket", "+Inf")] == samples[("x_count", None)] == 5
    assert samples[("x_sum", None)] == pytest.approx(9.75)
