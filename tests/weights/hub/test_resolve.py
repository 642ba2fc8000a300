"""What the hubs say, turned into a revision and a list of files, or into a reason."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from hub import Fault, HubServer
from kubeinfer.weights import errors
from kubeinfer.weights.download import fetch
from kubeinfer.weights.plan import resolve

from .conftest import MODEL, WEIGHTS_SIZE


def test_revision_files_and_config(hub: HubServer, uri: str, models: Path) -> None:
    plan = resolve(uri)
    original = hub.repos.get(MODEL)
    assert original is not None
    assert plan.revision == original.revisions[""].commit
    assert plan.config == {"model_type": "llama", "seed": 1}
    weights = [f for f in plan.files if f.path.endswith(".safetensors")]
    assert sum(f.size for f in weights) == WEIGHTS_SIZE + WEIGHTS_SIZE // 3
    assert all(f.sha256 == original.revisions[""].files[f.path].sha256 for f in weights)
    assert not any(f.path.endswith((".bin", ".onnx")) for f in plan.files)
    assert json.loads(json.dumps(plan.to_dict()))["totalBytes"] == plan.total_bytes
    assert resolve(f"{uri}@v2").revision == original.revisions["v2"].commit
    assert resolve(f"{uri}@{plan.revision}").revision == plan.revision
    assert resolve(uri, revision="v2").config == {"model_type": "llama", "seed": 2}


def test_a_folder_resolves_too(models: Path) -> None:
    plan = resolve(str(models / MODEL))
    assert plan.revision == "local"
    assert plan.config == {"model_type": "llama", "seed": 1}


@pytest.mark.parametrize("scheme", ["hf", "modelscope"])
@pytest.mark.parametrize(
    ("rest", "error", "part"),
    [
        ("acme/none", errors.ModelNotFound, "no model 'acme/none'"),
        (f"{MODEL}@none", errors.RevisionNotFound, "'none'"),
        (f"{MODEL}@{'0' * 40}", errors.RevisionNotFound, "0000"),
        (f"{MODEL}/x.gguf", errors.FileNotFound, "has no file 'x.gguf'"),
    ],
)
def test_what_does_not_exist(
    hub: HubServer, scheme: str, rest: str, error: type[errors.WeightsError], part: str
) -> None:
    with pytest.raises(error) as caught:
        resolve(f"{scheme}://{rest}")
    assert part in caught.value.message
    assert caught.value.to_dict()["reason"] == error.__name__


def test_a_token_is_wanted(
    hub: HubServer, uri: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (models / MODEL / ".hub.json").write_text(json.dumps({"token": "s3cret"}))
    with pytest.raises(errors.Forbidden, match="it wants a token"):
        resolve(uri)
    with pytest.raises(errors.Forbidden, match="token in use"):
        resolve(uri, token="wrong")
    assert fetch(uri, token="s3cret", local_dir=tmp_path / "a").exists()
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "s3cret")
    assert fetch(uri, local_dir=tmp_path / "b").exists()


def test_a_gated_model(hub: HubServer, models: Path) -> None:
    (models / MODEL / ".hub.json").write_text(json.dumps({"token": "s3cret", "gated": True}))
    with pytest.raises(errors.Forbidden, match=r"gated .* accept its terms"):
        resolve(f"hf://{MODEL}")


def test_no_hub(hub: HubServer, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
        with pytest.raises(errors.NetworkUnreachable) as caught:
            resolve(uri)
    assert "(Connection refused)" in caught.value.message
    assert "local folder" in caught.value.message


def test_a_hub_with_troubles(hub: HubServer, uri: str) -> None:
    hub.faults.add(Fault("500", scope="api"))
    with pytest.raises(errors.HubUnavailable, match="HTTP 500"):
        resolve(uri)
    hub.faults.set([Fault("429", scope="api", seconds=0)])
    with pytest.raises(errors.TooManyRequests):
        resolve(uri)


@pytest.mark.parametrize("kind", ["500", "429", "down"])
def test_a_hub_that_recovers(hub: HubServer, uri: str, kind: str) -> None:
    hub.faults.add(Fault(kind, scope="api", times=1, seconds=0))
    assert resolve(uri).revision


def test_a_page_that_is_no_hub(hub: HubServer, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/portal")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"{hub.url}/portal")
    with pytest.raises((errors.ModelNotFound, errors.HubUnavailable)):
        resolve(uri)


def test_modelscope_domain_is_honoured(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELSCOPE_ENDPOINT")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", hub.url)
    assert resolve(f"modelscope://{MODEL}").revision


def test_pvc_is_for_the_operator() -> None:
    with pytest.raises(errors.NotHere, match=r"spec\.model\.uri"):
        resolve("pvc://claim/x")


def test_reasons_and_exit_codes_are_distinct() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.WeightsError)]
    assert len({k.reason for k in kinds}) == len({k.exit_code for k in kinds}) == len(kinds)
    assert all(k.exit_code not in (0, 2) for k in kinds)


def test_no_torch() -> None:
    import subprocess

    code = (
        "import sys, kubeinfer.cli.pull, kubeinfer.weights.plan, kubeinfer.weights.locate\n"
        "assert not {'huggingface_hub', 'modelscope_hub', 'requests'} & set(sys.modules), 'hub SDK loaded early'\n"
        "import kubeinfer.weights.sources.modelscope as m, kubeinfer.weights.sources.huggingface as h\n"
        "from kubeinfer.weights.uri import parse\n"
        "m.ModelScopeSource(parse('modelscope://a/b'))._api(); h.HuggingFaceSource(parse('a/b'))\n"
        "assert not {'torch', 'transformers', 'modelscope'} & set(sys.modules), 'torch loaded'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
