"""From MODEL to a path: what is on this machine, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hub import HubServer
from kubeinfer.weights import errors
from kubeinfer.weights.locate import resolve_model_path

from .conftest import MODEL, write_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1500000\n"


def test_a_folder_as_it_is(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", 1, 1000)
    assert resolve_model_path(str(folder)) == folder
    assert resolve_model_path(folder.as_uri()) == folder


def test_a_gguf_file_and_a_folder_with_one(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model_path(str(file)) == file
    assert resolve_model_path(str(tmp_path)) == file
    (tmp_path / "y.gguf").write_bytes(b"GGUF")
    with pytest.raises(errors.FileNotFound, match="2 GGUF files"):
        resolve_model_path(str(tmp_path))


@pytest.mark.parametrize("text", ["/none/here", "./none", "../none", "none.gguf", "file:///none"])
def test_a_missing_path_is_never_asked_of_a_hub(hub: HubServer, text: str) -> None:
    with pytest.raises(errors.ModelNotFound) as caught:
        resolve_model_path(text)
    assert text.removeprefix("file://") in caught.value.message
    assert hub.stats["requests"] == 0


def test_git_lfs_pointers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", 1, 1000)
    (folder / "model-00002-of-00002.safetensors").write_text(POINTER)
    with pytest.raises(errors.WeightsIncomplete, match="git lfs pull"):
        resolve_model_path(str(folder))
    (tmp_path / "x.gguf").write_text(POINTER)
    with pytest.raises(errors.WeightsIncomplete, match="git lfs pull"):
        resolve_model_path(str(tmp_path / "x.gguf"))


def test_missing_shards_and_no_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", 1, 1000)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(errors.WeightsIncomplete, match=r"lacks 1 of .* model-00002-of-00002\.safetensors"):
        resolve_model_path(str(folder))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    with pytest.raises(errors.WeightsIncomplete, match="no weights"):
        resolve_model_path(str(bare))
    assert resolve_model_path(str(bare), weights=False) == bare


def test_an_unfinished_download_in_a_mount_point(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", 1, 1000)
    (folder / ".incomplete" / "objects").mkdir(parents=True)
    with pytest.raises(errors.WeightsIncomplete, match="unfinished download"):
        resolve_model_path(str(folder))


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(errors.ModelNotFound, match="give the folder"):
        resolve_model_path(str(tmp_path / "model.safetensors"))


def test_pvc() -> None:
    with pytest.raises(errors.NotHere, match="operator"):
        resolve_model_path("pvc://claim/x")


def test_download_dir_is_the_cache(hub: HubServer, uri: str, tmp_path: Path) -> None:
    path = resolve_model_path(uri, download_dir=str(tmp_path / "dl"), revision="v2")
    assert path.is_relative_to(tmp_path / "dl")
    assert json.loads((path / "config.json").read_text())["seed"] == 2
    hub.stats.clear()
    assert resolve_model_path(uri, "v2", str(tmp_path / "dl")) == path
    assert hub.stats["requests"] <= 2
    assert hub.stats["bytes"] == 0


def test_configuration_only(hub: HubServer, uri: str) -> None:
    path = resolve_model_path(uri, weights=False)
    assert (path / "config.json").exists()
    assert list(path.glob("*.safetensors")) == []
    assert hub.stats["bytes"] < 1000
    # A later call that wants the weights completes the folder.
    whole = resolve_model_path(uri)
    assert len(list(whole.glob("*.safetensors"))) == 2


def test_modelscope_by_environment(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBEINFER_USE_MODELSCOPE", "True")
    assert resolve_model_path(MODEL).is_relative_to(tmp_path / "ms")
    monkeypatch.delenv("KUBEINFER_USE_MODELSCOPE")
    assert resolve_model_path(MODEL).is_relative_to(tmp_path / "hf")
