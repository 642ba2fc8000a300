"""The operator's questions to a real hub server on loopback, through the runtime's own weights code."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub import Fault, HubServer
from kubeinfer.weights.uri import parse
from kubeinfer_operator.hub import HubDesk, HubError, Question, ask
from kubeinfer_operator.plan import Hub

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    folder = tmp_path / "models" / "acme" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(b"x" * 5000)
    (folder / "notes.onnx").write_bytes(b"x" * 100)
    server = HubServer(tmp_path / "models").start()
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, server.url)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "MODELSCOPE_DOMAIN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "HF_HOME", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr("kubeinfer.weights.sources.huggingface.HuggingFaceSource.backoff", 0.01)
    yield server
    server.stop()


def question(uri: str, *, exclude: tuple[str, ...] = ()) -> Question:
    return parse(uri), (), exclude, ""


@pytest.mark.parametrize("scheme", ["hf", "modelscope"])
def test_commit_files_and_config(hub: HubServer, scheme: str) -> None:
    found = ask(question(f"{scheme}://acme/tiny"))
    assert isinstance(found, Hub), found
    assert len(found.revision) == 40
    assert found.config == CONFIG
    assert found.weight_bytes == 5000
    assert "notes.onnx" not in found.sizes
    again = ask(question(f"{scheme}://acme/tiny@{found.revision}"))
    assert isinstance(again, Hub)
    assert again.revision == found.revision
    without = ask(question(f"{scheme}://acme/tiny", exclude=("*.safetensors",)))
    assert isinstance(without, Hub)
    assert without.weight_bytes == 0


@pytest.mark.parametrize(
    ("uri", "reason"),
    [("hf://acme/nothing", "ModelNotFound"), ("modelscope://acme/tiny@v9", "RevisionNotFound")],
)
def test_what_is_not_there(hub: HubServer, uri: str, reason: str) -> None:
    found = ask(question(uri))
    assert isinstance(found, HubError)
    assert found.reason == reason


def test_a_hub_that_is_not_there(hub: HubServer) -> None:
    hub.stop()
    found = ask(question("hf://acme/tiny"))
    assert isinstance(found, HubError)
    assert (found.reason, found.permanent) == ("NetworkUnreachable", False)


def test_a_hub_with_errors(hub: HubServer) -> None:
    hub.faults.add(Fault.parse("500"))
    found = ask(question("hf://acme/tiny"))
    assert isinstance(found, HubError)
    assert found.reason in ("HubUnavailable", "NetworkUnreachable")


async def test_one_question_is_asked_once(hub: HubServer) -> None:
    asked = []
    told = []

    def counting(q: Question) -> Hub | HubError:
        asked.append(q)
        return ask(q)

    desk = HubDesk(counting)
    q = question("hf://acme/tiny")
    assert desk.look(q) is None
    for number in range(50):
        desk.request(q, lambda n=number: told.append(n))  # type: ignore[misc]
    while len(told) < 50:
        await asyncio.sleep(0.01)
    assert len(asked) == 1
    assert isinstance(desk.look(q), Hub)
    missing = question("hf://acme/nothing")
    done = asyncio.Event()
    desk.request(missing, done.set)
    await done.wait()
    assert isinstance(desk.look(missing), HubError)
    assert desk.last(missing) == desk.look(missing)
    desk.close()
