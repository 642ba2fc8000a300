"""What a download does when the network, the hub or the disk misbehaves."""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from hub import Fault, HubServer
from kubeinfer.weights import errors
from kubeinfer.weights.download import fetch, fetch_result
from kubeinfer.weights.progress import ProgressEvent
from kubeinfer.weights.request import make_request
from kubeinfer.weights.transfer import TransferOptions
from kubeinfer.weights.verify import verify

from .conftest import MODEL, WEIGHTS_SIZE, write_model

Same = Callable[[Path, Path], None]
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(autouse=True)
def _quick(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits between attempts, a fraction of what a person wants."""
    monkeypatch.setattr("kubeinfer.weights.request.TransferOptions", partial(TransferOptions, backoff=0.01))
    monkeypatch.setenv("KUBEINFER_STALL_TIMEOUT", "0.4")


def test_broken_connections_are_resumed(
    hub: HubServer, uri: str, models: Path, tmp_path: Path, assert_same: Same
) -> None:
    hub.faults.add(Fault("break", path="*.safetensors", after=200_000, times=7))
    assert_same(fetch(uri, local_dir=tmp_path / "out"), models / MODEL)
    assert hub.stats[f"requests {SHARD}"] >= 4
    # What a break loses is at most what was on its way.
    assert hub.bytes_sent(SHARD) < WEIGHTS_SIZE + 7 * (1 << 17)


def test_a_link_that_never_holds_is_given_up(hub: HubServer, uri: str, tmp_path: Path) -> None:
    hub.faults.add(Fault("break", path=SHARD, after=0))
    with pytest.raises(errors.NetworkUnreachable, match="keeps breaking off"):
        fetch(uri, local_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hub.faults.set([])
    hub.stats.clear()
    fetch(uri, local_dir=tmp_path / "out")
    assert hub.bytes_sent("model-00002-of-00002.safetensors") == 0


def test_server_without_ranges(
    hub: HubServer, uri: str, models: Path, tmp_path: Path, assert_same: Same
) -> None:
    hub.faults.add(Fault("no-range"))
    hub.faults.add(Fault("break", path=SHARD, after=300_000, times=2))
    assert_same(fetch(uri, local_dir=tmp_path / "out"), models / MODEL)


def test_corrupted_bytes_once_are_healed(
    hub: HubServer, uri: str, models: Path, tmp_path: Path, assert_same: Same
) -> None:
    hub.faults.add(Fault("corrupt", path=SHARD, after=1000, times=1))
    hub.faults.add(Fault("corrupt", path="config.json", after=3, times=1))
    assert_same(fetch(uri, local_dir=tmp_path / "out"), models / MODEL)
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_corrupted_bytes_twice_are_an_error(hub: HubServer, uri: str, tmp_path: Path, name: str) -> None:
    hub.faults.add(Fault("corrupt", path=name, after=5))
    with pytest.raises(errors.HashMismatch) as caught:
        fetch(uri, local_dir=tmp_path / "out")
    assert name in caught.value.message
    assert "expected" in caught.value.message
    assert "got" in caught.value.message
    assert caught.value.details["file"] == name
    assert not (tmp_path / "out").exists()


def test_a_file_that_shrank_at_the_hub(hub: HubServer, tmp_path: Path, models: Path) -> None:
    from kubeinfer.weights.sources.huggingface import HuggingFaceSource

    original = HuggingFaceSource.request_for

    def elsewhere(self: HuggingFaceSource, resolved: object, file: object) -> object:
        request = original(self, resolved, file)  # type: ignore[arg-type]
        url = request.url.replace(SHARD, "pytorch_model.bin")
        return type(request)(url, request.headers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HuggingFaceSource, "request_for", elsewhere)
        with pytest.raises(errors.HashMismatch, match=f"{WEIGHTS_SIZE} bytes listed, 2000 bytes served"):
            fetch(f"hf://{MODEL}", local_dir=tmp_path / "out")


def test_a_stall_is_noticed(hub: HubServer, uri: str, tmp_path: Path) -> None:
    hub.faults.add(Fault("stall", path=SHARD, after=0, seconds=30))
    started = time.monotonic()
    with pytest.raises(errors.DownloadStalled, match=r"no byte of .* for 0\.05 s"):
        fetch(uri, local_dir=tmp_path / "out", stall_timeout=0.05)
    assert time.monotonic() - started < 5


def test_a_stall_that_ends_is_resumed(
    hub: HubServer, uri: str, models: Path, tmp_path: Path, assert_same: Same
) -> None:
    hub.faults.add(Fault("stall", path=SHARD, after=500_000, seconds=30, times=1))
    assert_same(fetch(uri, local_dir=tmp_path / "out"), models / MODEL)
    assert hub.bytes_sent(SHARD) < WEIGHTS_SIZE + (1 << 17)


def test_retry_after_is_honoured(
    hub: HubServer, uri: str, models: Path, tmp_path: Path, assert_same: Same
) -> None:
    hub.faults.add(Fault("429", path="*.safetensors", seconds=1, times=2))
    started = time.monotonic()
    assert_same(fetch(uri, local_dir=tmp_path / "out"), models / MODEL)
    assert time.monotonic() - started >= 1.0


def test_a_retry_after_of_an_hour_is_for_the_caller(hub: HubServer, uri: str, tmp_path: Path) -> None:
    hub.faults.add(Fault("429", path="*.safetensors", seconds=3600))
    with pytest.raises(errors.TooManyRequests) as caught:
        fetch(uri, local_dir=tmp_path / "out")
    assert caught.value.details["retryAfter"] == 3600


def test_server_errors_pass(
    hub: HubServer, uri: str, models: Path, tmp_path: Path, assert_same: Same
) -> None:
    hub.faults.add(Fault("500", times=4))
    assert_same(fetch(uri, local_dir=tmp_path / "out"), models / MODEL)


def test_mirrors_are_tried_in_order(hub: HubServer, models: Path, tmp_path: Path, assert_same: Same) -> None:
    result = fetch_result(
        make_request(
            f"modelscope://{MODEL}@nope",
            mirrors=["hf://acme/nope", f"hf://{MODEL}"],
            local_dir=tmp_path / "out",
        )
    )
    assert result.source == f"hf://{MODEL}"
    assert_same(result.path, models / MODEL)


def test_the_first_reason_is_kept_when_mirrors_fail_too(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(errors.RevisionNotFound) as caught:
        fetch(f"modelscope://{MODEL}@nope", mirrors=["hf://acme/nope"], local_dir=tmp_path / "out")
    assert "no branch, tag or commit 'nope'" in caught.value.message
    assert "hf://acme/nope: ModelNotFound" in caught.value.message


def test_a_mirror_goes_on_with_the_bytes_of_the_first(
    hub: HubServer, models: Path, tmp_path: Path, assert_same: Same
) -> None:
    hub.faults.add(Fault("corrupt", path="tokenizer.json", after=0, times=2))
    assert_same(
        fetch(f"modelscope://{MODEL}", mirrors=[f"hf://{MODEL}"], local_dir=tmp_path / "out", max_workers=1),
        models / MODEL,
    )
    assert hub.bytes_sent(SHARD) == WEIGHTS_SIZE


def test_second_pull_moves_no_file(hub: HubServer, uri: str, tmp_path: Path) -> None:
    fetch(uri, local_dir=tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    hub.stats.clear()
    result = fetch_result(make_request(uri, local_dir=tmp_path / "out"))
    assert result.bytes_received == 0
    assert hub.stats["bytes"] == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert sorted(p.name for p in tmp_path.iterdir() if "incomplete" in p.name) == []


def test_without_a_hub_the_published_copy_serves(
    hub: HubServer, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cached = fetch(uri, local_dir=tmp_path / "out"), fetch(f"{uri}@v2")
    hub.faults.add(Fault("down"))
    assert fetch(uri, local_dir=tmp_path / "out") == folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(f"{uri}@v2") == cached
    assert fetch(uri, local_dir=tmp_path / "out") == folder
    with pytest.raises(errors.NetworkUnreachable, match="HF_HUB_OFFLINE"):
        fetch(f"{uri}@v3")
    with pytest.raises(errors.NetworkUnreachable):
        fetch(f"{uri}@v2", local_dir=tmp_path / "out")


def test_a_silent_hub_does_not_hold_up_what_is_here(
    hub: HubServer, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kubeinfer.weights.download.PATIENCE", 0.3)
    folder = fetch(uri)
    hub.faults.add(Fault("stall", scope="api", seconds=20))
    started = time.monotonic()
    result = fetch_result(make_request(uri))
    assert time.monotonic() - started < 3
    assert result.path == folder
    assert result.offline


def test_a_commit_that_is_here_is_asked_of_nobody(hub: HubServer, uri: str, tmp_path: Path) -> None:
    commit = fetch_result(make_request(f"{uri}@v2")).revision
    first = fetch(f"{uri}@{commit}")
    hub.stats.clear()
    assert fetch(f"{uri}@{commit}") == first
    assert hub.stats["requests"] == 0
    out = fetch(f"{uri}@{commit}", local_dir=tmp_path / "out")
    hub.stats.clear()
    assert fetch(f"{uri}@{commit}", local_dir=tmp_path / "out") == out
    assert hub.stats["requests"] == 0
    (out / SHARD).unlink()
    fetch(f"{uri}@{commit}", local_dir=tmp_path / "out")
    assert verify(out) == []


def test_a_part_of_a_commit_is_not_taken_for_all_of_it(hub: HubServer, uri: str, tmp_path: Path) -> None:
    commit = fetch_result(
        make_request(uri, local_dir=tmp_path / "out", include=["*00001*", "config.json"])
    ).revision
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == [SHARD]
    fetch(f"{uri}@{commit}", local_dir=tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2


def test_a_new_revision_leaves_no_old_shard(hub: HubServer, uri: str, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fetch(uri, local_dir=out)
    new = models / f"{MODEL}@v2"
    for name in (SHARD, "model-00002-of-00002.safetensors", "model.safetensors.index.json"):
        (new / name).unlink()
    (new / "model.safetensors").write_bytes(b"x" * 5000)
    hub.stats.clear()
    fetch(f"{uri}@v2", local_dir=out)
    assert sorted(p.name for p in out.glob("*.safetensors*")) == ["model.safetensors"]
    assert hub.bytes_sent("tokenizer.json") == 0
    assert verify(out) == []


def test_a_publication_cut_short_is_done_again(
    hub: HubServer, uri: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = fetch(uri, local_dir=tmp_path / "out")
    (models / f"{MODEL}@v2" / SHARD).unlink()
    real = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == SHARD and path.parent == out:
            raise KeyboardInterrupt
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{uri}@v2", local_dir=out)
    monkeypatch.setattr(Path, "unlink", real)
    assert (out / SHARD).exists()
    fetch(f"{uri}@v2", local_dir=out)
    assert not (out / SHARD).exists()
    assert verify(out) == []


@pytest.mark.parametrize("seed", range(4))
def test_any_faults_give_the_right_bytes_or_a_reason(
    hub: HubServer, uri: str, models: Path, tmp_path: Path, assert_same: Same, seed: int
) -> None:
    rng = random.Random(f"{seed} {uri}")
    for _ in range(4):
        hub.faults.set(
            [
                Fault(
                    rng.choice(["break", "corrupt", "stall", "500", "429", "no-range", "down"]),
                    path=rng.choice(["*", "*.safetensors", "*.json"]),
                    times=rng.randrange(1, 9),
                    after=rng.randrange(0, 400_000),
                    seconds=rng.choice([0, 0.3]),
                    scope=rng.choice(["files", "files", "all"]),
                )
                for _ in range(rng.randrange(1, 5))
            ]
        )
        try:
            fetch(uri, local_dir=tmp_path / "out", stall_timeout=0.2)
        except errors.WeightsError:
            continue
        finally:
            if (tmp_path / "out").exists():
                assert_same(tmp_path / "out", models / MODEL)
    hub.faults.set([])
    assert_same(fetch(uri, local_dir=tmp_path / "out"), models / MODEL)
    assert verify(tmp_path / "out") == []


def test_a_disk_without_hard_links(
    hub: HubServer, uri: str, models: Path, tmp_path: Path, assert_same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (models / MODEL / "special_tokens_map.json").write_bytes((models / MODEL / "tokenizer.json").read_bytes())
    assert_same(fetch(uri, local_dir=tmp_path / "out"), models / MODEL)
    fetch(f"{uri}@v2", local_dir=tmp_path / "out")
    assert verify(tmp_path / "out") == []


def test_damage_on_disk_is_found_and_mended(
    hub: HubServer, uri: str, models: Path, tmp_path: Path, assert_same: Same
) -> None:
    out = fetch(uri, local_dir=tmp_path / "out")
    (out / SHARD).write_bytes((out / SHARD).read_bytes()[:-1])
    (out / "tokenizer.json").unlink()
    assert [line.partition(":")[0] for line in verify(out)] == [SHARD, "tokenizer.json"]
    hub.stats.clear()
    assert_same(fetch(uri, local_dir=tmp_path / "out"), models / MODEL)
    assert hub.bytes_sent("model-00002-of-00002.safetensors") == 0


def test_two_threads_share_one_download(hub: HubServer, uri: str, models: Path, assert_same: Same) -> None:
    hub.faults.add(Fault("slow", path=SHARD, rate=3_000_000))
    events: list[ProgressEvent] = []
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(uri, progress=events.append))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 3
    assert hub.bytes_sent(SHARD) == WEIGHTS_SIZE
    assert_same(found[0], models / MODEL)
    assert any(e.phase == "waiting" for e in events)


def test_progress_adds_up(hub: HubServer, uri: str, tmp_path: Path) -> None:
    hub.faults.add(Fault("slow", path=SHARD, rate=2_000_000))
    hub.faults.add(Fault("corrupt", path="model-00002*", after=100, times=1))
    events: list[ProgressEvent] = []
    fetch(uri, local_dir=tmp_path / "out", progress=events.append)
    loading = [e for e in events if e.phase == "downloading"]
    assert loading[-1].bytes_done == loading[-1].bytes_total
    assert loading[-1].files_done == loading[-1].files_total == 6
    assert all(0 <= e.bytes_done <= e.bytes_total + 1 for e in loading)
    middle = [e for e in loading if 0 < e.bytes_done < e.bytes_total and e.rate > 0]
    assert middle
    assert all(e.eta is not None for e in middle)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_without_room_is_known_beforehand(
    hub: HubServer, uri: str, small_disk: Path, models: Path
) -> None:
    (small_disk / "other").write_bytes(b"x" * 2_000_000)
    hub.stats.clear()
    with pytest.raises(errors.DiskFull) as caught:
        fetch(uri, local_dir=small_disk / "out")
    assert caught.value.details["neededBytes"] >= 2_000_000
    assert caught.value.details["freeBytes"] < 2_000_000
    assert str(caught.value.details["neededBytes"]) in caught.value.message
    assert hub.stats["bytes"] == 0


def test_a_disk_that_fills_up_while_loading(
    hub: HubServer, uri: str, small_disk: Path, models: Path, assert_same: Same
) -> None:
    hub.faults.add(Fault("slow", path=SHARD, rate=2_500_000))
    filler = small_disk / "filler"

    def fill(event: ProgressEvent) -> None:
        if event.bytes_done > 600_000 and not filler.exists():
            try:
                filler.write_bytes(b"x" * 4_000_000)
            except OSError:
                pass

    with pytest.raises(errors.DiskFull, match=r"bytes .* are free"):
        fetch(uri, local_dir=small_disk / "out", progress=fill)
    filler.unlink()
    hub.faults.set([])
    hub.stats.clear()
    assert_same(fetch(uri, local_dir=small_disk / "out"), models / MODEL)
    assert hub.stats["bytes"] < 2_000_000


def test_a_mount_point_is_filled_in_place(
    hub: HubServer, uri: str, small_disk: Path, models: Path, assert_same: Same
) -> None:
    assert_same(fetch(uri, local_dir=small_disk), models / MODEL)
    assert sorted(p.name for p in small_disk.iterdir() if p.name.startswith(".")) == [
        ".kubeinfer.json",
        ".kubeinfer.lock",
    ]
    assert verify(small_disk) == []


def test_a_folder_that_may_not_be_written(hub: HubServer, uri: str, small_disk: Path, models: Path) -> None:
    out = fetch(uri, local_dir=small_disk / "out")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert fetch(uri, local_dir=small_disk / "out") == out
    with pytest.raises(errors.StorageError, match="Read-only file system"):
        fetch(f"{uri}@v2", local_dir=small_disk / "out")


def test_two_names_of_the_same_bytes(
    hub: HubServer, uri: str, models: Path, tmp_path: Path, assert_same: Same
) -> None:
    (models / MODEL / "special_tokens_map.json").write_bytes((models / MODEL / "tokenizer.json").read_bytes())
    assert_same(fetch(uri, local_dir=tmp_path / "out"), models / MODEL)
    assert_same(fetch(uri), models / MODEL)
    assert (tmp_path / "out" / "special_tokens_map.json").read_text() == "{}"


def test_empty_files(hub: HubServer, uri: str, models: Path, tmp_path: Path) -> None:
    (models / MODEL / "empty.txt").touch()
    out = fetch(uri, local_dir=tmp_path / "out")
    assert (out / "empty.txt").stat().st_size == 0
    assert verify(out) == []


def test_the_manifest_names_commit_and_hashes(hub: HubServer, uri: str, models: Path, tmp_path: Path) -> None:
    out = fetch(f"{uri}@v2", local_dir=tmp_path / "out", include=["config.json"])
    manifest = json.loads((out / ".kubeinfer.json").read_text())
    assert manifest["source"] == uri
    assert manifest["requested"] == "v2"
    assert len(manifest["revision"]) == 40
    assert [f["path"] for f in manifest["files"]] == ["config.json"]
    assert len(manifest["files"][0]["sha256"]) == 64
    fetch(f"{uri}@{manifest['revision']}", local_dir=out, include=["tokenizer.json"])
    manifest = json.loads((out / ".kubeinfer.json").read_text())
    assert {f["path"] for f in manifest["files"]} == {"config.json", "tokenizer.json"}
    assert os.listdir(out).count("config.json") == 1


def test_a_gguf_repository(hub: HubServer, models: Path, uri: str) -> None:
    repo = models / "acme" / "tiny-gguf"
    repo.mkdir()
    for name in ("m-q4-00001-of-00002.gguf", "m-q4-00002-of-00002.gguf", "m-q8.gguf"):
        (repo / name).write_bytes(name.encode() * 50)
    scheme = uri.partition(":")[0]
    with pytest.raises(errors.FileNotFound, match="2 GGUF files"):
        fetch(f"{scheme}://acme/tiny-gguf")
    path = fetch(f"{scheme}://acme/tiny-gguf/m-q8.gguf")
    assert path.name == "m-q8.gguf"
    assert path.read_bytes() == (repo / "m-q8.gguf").read_bytes()
    first = fetch(f"{scheme}://acme/tiny-gguf", include=["*q4*"])
    assert first.name == "m-q4-00001-of-00002.gguf"
    assert (first.parent / "m-q4-00002-of-00002.gguf").exists()


def test_write_model_is_reproducible(tmp_path: Path) -> None:
    a, b = write_model(tmp_path / "a", 7), write_model(tmp_path / "b", 7)
    assert (a / SHARD).read_bytes() == (b / SHARD).read_bytes()
