from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from api.running import Running, running
from api.scripted import scripted_engine
from fixtures.tiny_models import tiny_model


@pytest.fixture(scope="session")
def folder() -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    """One server a module, whose engine writes a known text at once."""
    with running(scripted_engine(folder), served_model_name=["scripted", "second:name"]) as result:
        yield result


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as result:
        yield result
