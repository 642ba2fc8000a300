"""A loopback hub with one small model, and an environment in which only that hub exists."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hub import HubServer

# Read by the ModelScope SDK when it is first imported: fewer and shorter waits than a person would want.
os.environ.setdefault("MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS", "2")
os.environ.setdefault("MODELSCOPE_REPO_TREE_PAGE_RETRY_MAX_DELAY_SECONDS", "1")

MODEL = "acme/tiny-1.5"
WEIGHTS_SIZE = 1_500_000

_CLEARED = (
    "HF_TOKEN",
    "HF_HUB_OFFLINE",
    "HF_HUB_CACHE",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_HUB_CACHE",
    "KUBEINFER_OFFLINE",
    "KUBEINFER_STALL_TIMEOUT",
    "KUBEINFER_USE_MODELSCOPE",
    "MODELSCOPE_API_TOKEN",
    "MODELSCOPE_DOMAIN",
    "MODELSCOPE_SDK_TOKEN",
    "http_proxy",
    "https_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
)


def write_model(folder: Path, seed: int, size: int = WEIGHTS_SIZE) -> Path:
    """A folder that looks like a model: two shards with an index, a second format, tokenizer and configuration."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / shards[0]).write_bytes(rng.randbytes(size))
    (folder / shards[1]).write_bytes(rng.randbytes(size // 3))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}})
    )
    (folder / "pytorch_model.bin").write_bytes(rng.randbytes(2000))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "seed": seed}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text(f"seed {seed}")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(rng.randbytes(1000))
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    write_model(root / MODEL, 1)
    write_model(root / f"{MODEL}@v2", 2)
    return root


@pytest.fixture
def hub(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer(models).start()
    for name in _CLEARED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setattr("kubeinfer.weights.sources.huggingface.HuggingFaceSource.backoff", 0.01)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(params=["hf", "modelscope"])
def uri(request: pytest.FixtureRequest) -> str:
    """The model at each hub."""
    return f"{request.param}://{MODEL}"


@pytest.fixture
def assert_same() -> Callable[[Path, Path], None]:
    """Every file of the first folder has the bytes of its namesake in the second."""

    def check(fetched: Path, original: Path) -> None:
        names = [p.relative_to(fetched).as_posix() for p in fetched.rglob("*") if p.is_file()]
        names = [n for n in names if not n.startswith(".kubeinfer")]
        assert "config.json" in names
        assert "model-00002-of-00002.safetensors" in names
        for name in names:
            assert (fetched / name).read_bytes() == (original / name).read_bytes(), name

    return check
