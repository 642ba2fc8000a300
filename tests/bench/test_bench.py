"""The three benchmarks as a user runs them, on a tiny model and a real server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures.tiny_models import tiny_model
from kubeinfer.cli.main import main

ENGINE = ["--dtype", "float32", "--max-model-len", "256", "--kv-cache-memory-bytes", str(16 << 20)]


def test_throughput(tmp_path, capsys):
    result = tmp_path / "out" / "throughput.json"
    model = str(tiny_model("llama"))
    flags = ["--num-prompts", "7", "--input-len", "20", "--output-len", "6", "--output-json", str(result)]
    assert main(["bench", "throughput", "--model", model, *flags, *ENGINE]) == 0
    found = json.loads(result.read_text())
    assert (found["num_requests"], found["total_input_tokens"], found["total_output_tokens"]) == (7, 140, 42)
    assert found["output_tokens_per_second"] == pytest.approx(42 / found["elapsed_time"])
    assert "Output tokens/s:" in capsys.readouterr().out


def test_throughput_of_sharegpt(tmp_path):
    data, result = tmp_path / "talks.json", tmp_path / "result.json"
    talk = {
        "conversations": [
            {"value": "Please write a short story."},
            {"value": "Once upon a time there was a sea."},
        ]
    }
    data.write_text(json.dumps([talk] * 3))
    flags = [
        "--dataset-name",
        "sharegpt",
        "--dataset-path",
        str(data),
        "--num-prompts",
        "3",
        "--output-json",
        str(result),
    ]
    assert main(["bench", "throughput", "--model", str(tiny_model("llama")), *flags, *ENGINE]) == 0
    found = json.loads(result.read_text())
    assert found["total_input_tokens"] > 15
    assert found["total_output_tokens"] > 15


def test_latency(tmp_path, capsys):
    result = tmp_path / "latency.json"
    flags = [
        "--input-len", "12", "--output-len", "5", "--batch-size", "3", "--num-iters-warmup", "1", "--num-iters", "4",
        "--output-json", str(result),
    ]  # fmt: skip
    assert main(["bench", "latency", "--model", str(tiny_model("qwen2")), *flags, *ENGINE]) == 0
    found = json.loads(result.read_text())
    assert len(found["latencies"]) == 4
    assert min(found["latencies"]) <= found["percentiles"]["50"] <= max(found["latencies"])
    assert "P99 (s):" in capsys.readouterr().out


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable, "-m", "kubeinfer.cli.main", "serve", str(tiny_model("llama")), "--port", str(port),
            "--host", "127.0.0.1", "--served-model-name", "tiny", "--api-key", "secret", *ENGINE,
        ],
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def serve_bench(server: str, *flags: str) -> int:
    return main(["bench", "serve", "--base-url", server, "--api-key", "secret", "--disable-tqdm", *flags])


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_serve(server, backend, tmp_path, capsys):
    code = serve_bench(
        server, "--backend", backend, "--num-prompts", "9", "--random-input-len", "16", "--random-output-len", "8",
        "--vocab-size", "512", "--max-concurrency", "3", "--num-warmups", "1", "--save-result", "--result-dir",
        str(tmp_path), "--result-filename", "r.json", "--goodput", "ttft:60000",
        "--percentile-metrics", "ttft,tpot,itl,e2el",
    )  # fmt: skip
    assert code == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["model_id"], found["completed"], found["failed"]) == ("tiny", 9, 0)
    assert found["total_output_tokens"] == 72
    if backend == "openai":
        assert found["total_input_tokens"] == 144
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    assert 0 < found["p50_ttft_ms"] <= found["p99_ttft_ms"]
    assert found["median_e2el_ms"] > found["median_ttft_ms"] > 0
    assert found["mean_tpot_ms"] > 0
    table = capsys.readouterr().out
    for text in ("Output tokens/s:", "P99 TTFT (ms):", "P90 ITL (ms):", "Mean E2EL (ms):"):
        assert text in table


def test_serve_at_a_rate(server, tmp_path):
    start = time.perf_counter()
    code = serve_bench(
        server, "--num-prompts", "20", "--random-input-len", "5", "--random-output-len", "2", "--vocab-size", "512",
        "--request-rate", "20", "--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json",
    )  # fmt: skip
    assert code == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["request_rate"] == 20.0
    # 19 gaps of 50 ms on the average
    assert 0.4 < found["duration"] < time.perf_counter() - start


def test_serve_tells_what_failed(server, capsys):
    code = serve_bench(
        server,
        "--model",
        "absent",
        "--num-prompts",
        "2",
        "--random-input-len",
        "5",
        "--random-output-len",
        "2",
    )
    assert code == 1
    out = capsys.readouterr().out
    assert "HTTP 404" in out
    assert "absent" in out


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--goodput", "speed:3"], "goodput: 'speed:3' is not"),
        (["--percentile-metrics", "ttft,foo"], "percentile_metrics: 'foo'"),
        (["--metric-percentiles", "50,x"], "metric_percentiles"),
        (["--extra-body", "[1]"], "extra_body"),
        (["--header", "X"], "header"),
        (["--dataset-name", "sharegpt"], "dataset_path"),
        ([], "does not answer with a model"),
    ],
)
def test_mistakes_are_named(flags, what, capsys):
    assert main(["bench", "serve", "--base-url", "http://127.0.0.1:9", *flags]) == 1
    assert what in capsys.readouterr().err


def test_a_model_is_needed(capsys):
    assert main(["bench", "throughput"]) == 1
    assert "no model is given" in capsys.readouterr().err


def test_clients_that_leave_hold_nothing(server):
    """A third of 150 streams are cut off by their clients; every block comes back (benchmarks/soak.py)."""
    script = Path(__file__).parents[2] / "benchmarks" / "soak.py"
    done = subprocess.run(
        [sys.executable, script, "server", "--url", server, "--api-key", "secret", "--requests", "150"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'failed': 0}; still held: nothing" in done.stdout
    assert "'cut': 0" not in done.stdout.splitlines()[-1]
