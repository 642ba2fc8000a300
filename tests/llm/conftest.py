"""A model folder for LLM and AsyncLLM: the tiny Llama with generation defaults of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fixtures.tiny_models import tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "llama"
    shutil.copytree(tiny_model("llama"), path)
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 3], "temperature": 0.6, "top_k": 20})
    )
    return path
