"""The serving and asking rows of the tutorials that people follow, with ``vllm`` replaced by ``kubeinfer``."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import requests

from fixtures.smollm2 import needs_smollm2
from fixtures.tiny_models import smollm2_gguf, tiny_model

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{ROOT / 'runtime'}:{ROOT / 'tests'}",
    "OMP_NUM_THREADS": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Serving:
    """A server started as a tutorial says. ``PORT`` in its arguments stands for a free port."""

    def __init__(self, *arguments: str, cwd: Path):
        port = free_port()
        command = [sys.executable, "-m", *(argument.replace("PORT", str(port)) for argument in arguments)]
        self.process = subprocess.Popen(
            command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.url = f"http://localhost:{port}"

    def ready(self) -> str:
        """Its address, once it serves."""
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/health").status_code == 200:
                    return self.url
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "the server did not become ready"
            time.sleep(0.05)

    def stop(self) -> None:
        """Ctrl-C, after which it ends in order."""
        self.process.send_signal(signal.SIGINT)
        output, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, output

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def refused(*arguments: str, cwd: Path) -> str:
    """The last line of a command that must not start a server."""
    command = [sys.executable, "-m", "kubeinfer.cli.main", *arguments, "--port", "0"]
    found = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=90)
    assert found.returncode != 0
    return found.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder that holds ``models/Qwen2-0.5B-Instruct`` (a tiny one of that kind) and a template."""
    folder = tmp_path_factory.mktemp("tutorial")
    shutil.copytree(tiny_model("qwen2"), folder / "models" / "Qwen2-0.5B-Instruct")
    (folder / "template_chatml.jinja").write_text(TEMPLATE)
    return folder


ROWS = {
    "serve": (
        "kubeinfer.cli.main", "serve", "./models/Qwen2-0.5B-Instruct", "--tensor-parallel-size", "1", "--port", "PORT",
        "--device", "cpu", "--cpu-kvcache-space", "0.1",
    ),
    "openai": (
        "kubeinfer.entrypoints.openai.api_server", "--model", "models/Qwen2-0.5B-Instruct", "--host", "0.0.0.0", "--port",
        "PORT", "--dtype", "auto", "--max-num-seqs", "32", "--max-model-len", "256", "--tensor-parallel-size", "1",
        "--trust-remote-code", "--served-model-name", "Qwen2-0.5B-Instruct", "--chat-template",
        "template_chatml.jinja", "--cpu-kvcache-space", "0.1",
    ),
    "legacy": (
        "kubeinfer.entrypoints.api_server", "--model", "models/Qwen2-0.5B-Instruct", "--tensor-parallel-size", "1",
        "--port", "PORT", "--cpu-kvcache-space", "0.1",
    ),
    "gguf": (
        "kubeinfer.cli.main", "serve", "GGUF", "--served-model-name", "QwQ:32B", "--max-model-len", "1024",
        "--gpu-memory-utilization", "0.8", "--max-num-seqs", "2", "--enforce-eager", "--port", "PORT",
        "--cpu-kvcache-space", "0.2",
    ),
    "tp2": (
        "kubeinfer.cli.main", "serve", "./models/Qwen2-0.5B-Instruct", "--served-model-name", "qwen", "--max-model-len",
        "256", "--gpu-memory-utilization", "0.8", "--max-num-seqs", "2", "--tensor-parallel-size", "2",
        "--enforce-eager", "--swap-space=1", "--cpu-kvcache-space", "0.1", "--port", "PORT",
    ),
}  # fmt: skip
GGUF = smollm2_gguf()


@pytest.fixture(scope="module")
def servers(here: Path) -> Iterator[dict[str, Serving]]:
    """All of :data:`ROWS`, started together."""
    rows = {name: row for name, row in ROWS.items() if name != "gguf" or GGUF is not None}
    found = {
        name: Serving(*(str(GGUF) if part == "GGUF" else part for part in row), cwd=here)
        for name, row in rows.items()
    }
    try:
        yield found
        for server in found.values():
            server.stop()
    finally:
        for server in found.values():
            server.kill()


@pytest.fixture
def qwen(servers: dict[str, Serving]) -> str:
    return servers["serve"].ready()


@pytest.fixture
def module_server(servers: dict[str, Serving]) -> str:
    return servers["openai"].ready()


@pytest.fixture
def legacy(servers: dict[str, Serving]) -> str:
    return servers["legacy"].ready()


def curl(url: str, body: dict[str, Any], *flags: str) -> str:
    found = subprocess.run(
        ["curl", "-sS", *flags, url, "-H", "Content-Type: application/json", "-d", json.dumps(body)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return found.stdout


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@needs_curl
def test_curl_completions_with_a_path_as_the_models_name(qwen: str) -> None:
    body = {
        "model": "./models/Qwen2-0.5B-Instruct", "prompt": "你好，你是谁？", "max_tokens": 20, "temperature": 0.7,
        "top_p": 0.8, "top_k": 40, "repetition_penalty": 1.05,
    }  # fmt: skip
    answer = json.loads(curl(qwen + "/v1/completions", body))
    assert answer["model"] == "./models/Qwen2-0.5B-Instruct"
    assert isinstance(answer["choices"][0]["text"], str)
    assert 1 <= answer["usage"]["completion_tokens"] <= 20


@needs_curl
def test_curl_chat_with_and_without_streaming(qwen: str) -> None:
    body: dict[str, Any] = {
        "model": "./models/Qwen2-0.5B-Instruct",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "法国的首都在哪里？"},
        ],
        "temperature": 0,
        "max_tokens": 24,
    }
    whole = json.loads(curl(qwen + "/v1/chat/completions", body))["choices"][0]["message"]["content"]
    streamed = curl(qwen + "/v1/chat/completions", {**body, "stream": True}, "-N")
    events = [line[6:] for line in streamed.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    parts = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(parts) == whole
    assert whole


def test_the_openai_client(module_server: str) -> None:
    with openai.OpenAI(api_key="EMPTY", base_url=module_server + "/v1") as client:
        model = client.models.list().data[0].id
        assert model == "Qwen2-0.5B-Instruct"
        completion = client.completions.create(model=model, prompt="San Francisco is a", max_tokens=7)
        assert completion.usage is not None
        assert completion.usage.completion_tokens <= 7
        chat = client.chat.completions.create(
            model=model,
            messages=[
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": "Tell me a joke."},
            ],
            max_tokens=12,
        )
        assert chat.choices[0].message.role == "assistant"


def test_langchain(module_server: str) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.ChatOpenAI(
        base_url=module_server + "/v1", api_key="EMPTY", model="Qwen2-0.5B-Instruct", max_tokens=16
    )
    answer = model.invoke("你可以做什么？")
    assert isinstance(answer.content, str)
    assert answer.usage_metadata["output_tokens"] <= 16
    assert "".join(str(chunk.content) for chunk in model.stream("Hello")) is not None


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/score", "/rerank"])
def test_pooling_calls_to_a_generative_model(module_server: str, path: str) -> None:
    answer = requests.post(
        module_server + path, json={"model": "Qwen2-0.5B-Instruct", "input": "retrieval.query: x"}
    )
    assert answer.status_code == 400
    assert "The model does not support" in answer.json()["error"]["message"]
    assert "--runner pooling" in answer.json()["error"]["message"]


def test_generate(legacy: str) -> None:
    body = {"prompt": "San Francisco is a", "max_tokens": 16, "temperature": 0}
    whole = requests.post(legacy + "/generate", json=body).json()["text"]
    assert len(whole) == 1
    assert whole[0].startswith("San Francisco is a")
    response = requests.post(legacy + "/generate", json={**body, "stream": True}, stream=True)
    chunks = [
        json.loads(chunk)["text"]
        for chunk in response.iter_lines(chunk_size=8192, decode_unicode=False, delimiter=b"\0")
        if chunk
    ]
    assert chunks[-1] == whole
    assert len(chunks) > 1
    assert all(later[0].startswith(earlier[0]) for earlier, later in pairwise(chunks))
    several = requests.post(legacy + "/generate", json={**body, "n": 3, "temperature": 0.9}).json()["text"]
    assert len(several) == 3
    assert requests.get(legacy + "/health").status_code == 200


def test_a_gradio_page_before_generate(legacy: str) -> None:
    pytest.importorskip("gradio")
    pytest.importorskip("gradio_client")
    found = subprocess.run(
        [sys.executable, "-m", "api.gradio_front", legacy, "Once upon a time"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    answer = json.loads(next(line for line in found.stdout.splitlines() if line.startswith("{")))
    assert answer["result"].startswith("Once upon a time")
    assert len(answer["result"]) > len("Once upon a time")
    assert answer["steps"] > 1


@needs_smollm2
def test_a_gguf_file_and_a_name_with_a_colon(servers: dict[str, Serving]) -> None:
    body = {
        "model": "QwQ:32B",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 12,
    }
    answer = httpx.post(servers["gguf"].ready() + "/v1/chat/completions", json=body, timeout=60).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_two_way_tensor_parallel_with_every_flag_of_the_row(servers: dict[str, Serving]) -> None:
    body = {
        "model": "qwen",
        "prompt": "Once upon a time",
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = httpx.post(servers["tp2"].ready() + "/v1/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--runner", "pooling", "--convert", "embed"], ["--runner pooling", "not supported"]),
        (["--convert", "reward"], ["--convert", "not supported"]),
        (["--quantization", "awq", "--device", "cpu"], ["awq"]),
        (["--distributed-executor-backend", "ray", "-tp", "1"], ["ray"]),
    ],
)
def test_what_is_not_supported_yet_says_so(here: Path, flags: list[str], words: list[str]) -> None:
    last = refused("serve", "./models/Qwen2-0.5B-Instruct", *flags, cwd=here)
    assert last.startswith("error: ")
    for word in words:
        assert word.lower() in last.lower(), last
