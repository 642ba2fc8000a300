"""``kubeinfer pull`` as processes: killed, stopped, and several at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hub import Fault, HubServer

from .conftest import MODEL, WEIGHTS_SIZE

Same = Callable[[Path, Path], None]
SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
MAIN = (
    "import argparse, sys\n"
    "from kubeinfer.cli import pull\n"
    "parser = argparse.ArgumentParser()\n"
    "pull.add_parser(parser.add_subparsers())\n"
    "args = parser.parse_args()\n"
    "sys.exit(args.func(args))\n"
)


def start(*args: str | Path, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAIN, "pull", *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env}
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def wait_for_bytes(hub: HubServer, n: int, path: str) -> None:
    deadline = time.monotonic() + 30
    while hub.bytes_sent(path) < n:
        assert time.monotonic() < deadline, "the download did not get going"
        time.sleep(0.01)


def lines(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


def test_kill_9_then_resume(
    hub: HubServer, uri: str, models: Path, tmp_path: Path, assert_same: Same
) -> None:
    hub.faults.add(Fault("slow", path=SHARD, rate=1_500_000))
    first = start(uri, "--local-dir", tmp_path / "out")
    wait_for_bytes(hub, 600_000, SHARD)
    first.kill()
    finish(first)
    assert not (tmp_path / "out").exists()
    had = hub.bytes_sent(SHARD)
    hub.faults.set([])
    hub.stats.clear()
    code, out, err = finish(start(uri, "--local-dir", tmp_path / "out", "--progress", "json"))
    assert code == 0, err
    assert_same(tmp_path / "out", models / MODEL)
    # Lost is only what the kill caught between the server and the file: buffers of sockets on both sides.
    again = hub.bytes_sent(SHARD) - (WEIGHTS_SIZE - had)
    assert again <= 512 * 1024
    assert hub.bytes_sent(OTHER) == 0
    done = lines(out)[-1]
    assert done["event"] == "done"
    assert 0 < int(str(done["bytesReceived"])) < WEIGHTS_SIZE


def test_two_at_once_load_once(
    hub: HubServer, uri: str, models: Path, tmp_path: Path, assert_same: Same
) -> None:
    hub.faults.add(Fault("slow", path=SHARD, rate=2_000_000))
    both = [start(uri, "--local-dir", tmp_path / "out", "--progress", "json") for _ in range(2)]
    ends = [finish(p) for p in both]
    assert [code for code, _, _ in ends] == [0, 0]
    assert hub.bytes_sent(SHARD) == WEIGHTS_SIZE
    assert_same(tmp_path / "out", models / MODEL)
    done = [lines(out)[-1] for _, out, _ in ends]
    assert sorted(bool(d["bytesReceived"]) for d in done) == [False, True]


def test_the_lock_of_a_dead_process_does_not_block(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.add(Fault("slow", path=SHARD, rate=500_000))
    first = start(f"hf://{MODEL}", "--local-dir", tmp_path / "out")
    wait_for_bytes(hub, 100_000, SHARD)
    waiting = start(f"hf://{MODEL}", "--local-dir", tmp_path / "out", "--progress", "json")
    time.sleep(0.8)
    first.kill()
    finish(first)
    hub.faults.set([])
    code, out, err = finish(waiting)
    assert code == 0, err
    assert lines(out)[-1]["event"] == "done"


def test_sigterm_and_ctrl_c_leave_a_resumable_state(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.add(Fault("slow", path=SHARD, rate=1_000_000))
    kept = [0]
    for number, expected in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        hub.stats.clear()
        process = start(
            f"hf://{MODEL}", "--local-dir", tmp_path / "out", "--termination-log", tmp_path / "log"
        )
        wait_for_bytes(hub, 200_000, SHARD)
        process.send_signal(number)
        code, _, err = finish(process)
        assert code == expected
        assert err.splitlines()[-1].startswith("Interrupted: ")
        assert json.loads((tmp_path / "log").read_text())["reason"] == "Interrupted"
        kept.append(sum(p.stat().st_size for p in tmp_path.rglob("*.part")))
    assert kept[0] < kept[1] < kept[2]


def test_progress_as_json_lines(hub: HubServer, tmp_path: Path) -> None:
    hub.faults.add(Fault("slow", path=SHARD, rate=500_000))
    code, out, err = finish(
        start(
            f"hf://{MODEL}",
            "--local-dir",
            tmp_path / "out",
            "--progress",
            "json",
            "--termination-log",
            tmp_path / "log",
        )
    )
    assert code == 0, err
    events = lines(out)
    loading = [e for e in events if e.get("phase") == "downloading"]
    assert 2 <= len(loading) <= 4
    assert float(str(loading[-1]["rate"])) > 100_000
    assert loading[-1]["eta"] is not None
    assert events[-1]["event"] == "done"
    assert events[-1]["bytesReceived"] == events[-1]["bytesTotal"]
    assert json.loads((tmp_path / "log").read_text()) == events[-1]


def test_errors_come_last_with_their_exit_code(hub: HubServer, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code, out, err = finish(start(f"{MODEL}@none", "--progress", "json", "--termination-log", log))
    assert code == 12
    last = lines(out)[-1]
    assert last["event"] == "error"
    assert last["reason"] == "RevisionNotFound"
    assert json.loads(log.read_text()) == last
    code, out, err = finish(start("acme/none"))
    assert code == 11
    assert out == ""
    assert err.splitlines()[-1].startswith("ModelNotFound: ")
    assert "Traceback" not in err


def test_a_quota_is_a_full_disk(hub: HubServer, tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the write itself fail, as a quota does: no check beforehand can see it."""
    command = [sys.executable, "-c", MAIN, "pull", f"hf://{MODEL}", "--local-dir", str(tmp_path / "out")]
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 700; exec "$@"', "-", *command], capture_output=True, text=True, check=False
    )
    assert limited.returncode == 19
    assert limited.stderr.splitlines()[-1].startswith("DiskFull: ")
    assert finish(start(f"hf://{MODEL}", "--local-dir", tmp_path / "out"))[0] == 0


def test_the_hub_as_a_process(models: Path, tmp_path: Path) -> None:
    import urllib.request

    tests = str(Path(__file__).parents[2])
    hub = subprocess.Popen(
        [sys.executable, "-m", "hub", "--models", str(models), "--fault", "break:after=100000,times=1"],
        cwd=tests,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert hub.stdout is not None
        url = json.loads(hub.stdout.readline())["url"]
        post = urllib.request.Request(f"{url}/_admin/faults", b'["corrupt:after=9,times=1,path=config.json"]')
        with urllib.request.urlopen(post) as response:
            assert len(json.load(response)["faults"]) == 2
        env = {"HF_ENDPOINT": url, "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
        code, _, err = finish(start(f"hf://{MODEL}", "--local-dir", tmp_path / "out", **env))
        assert code == 0, err
        with urllib.request.urlopen(f"{url}/_admin/stats") as response:
            stats = json.load(response)["stats"]
        assert stats["requests config.json"] >= 2
    finally:
        hub.terminate()
        hub.communicate()


def test_a_user_without_a_home(hub: HubServer, uri: str, tmp_path: Path) -> None:
    """As in a container whose user id has no entry in /etc/passwd."""
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "HF_HOME", "MODELSCOPE_CACHE")}
    command = [sys.executable, "-c", MAIN, "pull", uri, "--local-dir", str(tmp_path / "out")]
    if subprocess.run(
        ["unshare", "-U", "--map-user=12345", "true"], capture_output=True, check=False
    ).returncode:
        pytest.skip("may not make a user namespace here")
    ended = subprocess.run(
        ["unshare", "-U", "--map-user=12345", *command], env=env, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
