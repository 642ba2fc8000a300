"""The loopback hub is a hub to the real SDKs, and what they leave on disk is served as it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hub import Fault, HubServer
from kubeinfer.weights.download import fetch
from kubeinfer.weights.locate import check_folder, resolve_model_path

from .conftest import MODEL

Same = Callable[[Path, Path], None]


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def huggingface_snapshot(hub: HubServer, **kwargs: str) -> Path:
    from huggingface_hub import snapshot_download

    if "local_dir" not in kwargs:
        kwargs["cache_dir"] = os.path.join(os.environ["HF_HOME"], "hub")
    return Path(snapshot_download(MODEL, endpoint=hub.url, token=False, **kwargs))


def modelscope_snapshot(hub: HubServer, **kwargs: str) -> Path:
    from modelscope_hub.compat.snapshot_download import snapshot_download

    if "local_dir" not in kwargs:
        kwargs["cache_dir"] = os.environ["MODELSCOPE_CACHE"]
    return Path(snapshot_download(MODEL, endpoint=hub.url, token="", **kwargs))


SNAPSHOTS = {"hf": huggingface_snapshot, "modelscope": modelscope_snapshot}


def test_snapshot_download(hub: HubServer, uri: str, models: Path, assert_same: Same) -> None:
    folder = SNAPSHOTS[uri.partition(":")[0]](hub)
    assert_same(folder, models / MODEL)
    assert check_folder(folder) == folder


def test_sdk_resumes_here_too(hub: HubServer, uri: str, models: Path, assert_same: Same) -> None:
    hub.faults.add(Fault("break", path="model-00001*", after=700_000, times=1))
    assert_same(SNAPSHOTS[uri.partition(":")[0]](hub), models / MODEL)
    assert hub.stats["requests model-00001-of-00002.safetensors"] >= 2


def test_sdk_cache_is_served_as_it_is(hub: HubServer, uri: str) -> None:
    folder = SNAPSHOTS[uri.partition(":")[0]](hub)
    hub.stats.clear()
    assert fetch(uri) == folder
    assert resolve_model_path(uri) == folder
    assert hub.stats["bytes"] == 0
    hub.faults.add(Fault("down"))
    assert resolve_model_path(uri) == folder


def test_sdk_local_dir_is_not_fetched_again(hub: HubServer, uri: str, tmp_path: Path) -> None:
    SNAPSHOTS[uri.partition(":")[0]](hub, local_dir=str(tmp_path / "out"))
    hub.stats.clear()
    assert fetch(uri, local_dir=tmp_path / "out") == tmp_path / "out"
    assert hub.stats["bytes"] == 0


def test_incomplete_sdk_cache_is_completed(hub: HubServer, uri: str, models: Path, assert_same: Same) -> None:
    scheme = uri.partition(":")[0]
    folder = SNAPSHOTS[scheme](hub)
    victim = folder / "model-00001-of-00002.safetensors"
    victim.resolve().unlink()
    victim.unlink(missing_ok=True)
    hub.stats.clear()
    fetched = fetch(uri)
    assert_same(fetched, models / MODEL)
    size = (models / MODEL / victim.name).stat().st_size
    assert size <= hub.stats["bytes"] < size + 1000


def test_what_is_fetched_serves_the_sdk(hub: HubServer, models: Path, assert_same: Same) -> None:
    from huggingface_hub import snapshot_download

    folder = fetch(f"hf://{MODEL}")
    cache = os.path.join(os.environ["HF_HOME"], "hub")
    again = snapshot_download(MODEL, cache_dir=cache, local_files_only=True, endpoint=hub.url)
    assert Path(again) == folder
    assert_same(folder, models / MODEL)
    assert all(p.is_symlink() for p in folder.rglob("*") if not p.is_dir())
