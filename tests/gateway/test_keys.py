"""API keys: from files and from a Secret, allow-lists, limits, and what is counted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.fake_kubernetes import FakeKubernetes
from kubeinfer_gateway.cli import main
from kubeinfer_gateway.keys import ApiKey, Bucket, KeyEntry, KeyStore, generate_key, read_directory

ROOT = Path(__file__).resolve().parent.parent.parent


def make(
    folder: Path,
    name: str,
    models: list[str] | None = None,
    requests: float | None = None,
    tokens: float | None = None,
) -> dict[str, str]:
    """Writes an entry; returns the header to send."""
    key, entry = generate_key(name, models or ["*"], requests, tokens)
    (folder / name).write_text(entry)
    return {"authorization": f"Bearer {key}"}


async def ask(
    bench: Any, headers: dict[str, str] | None = None, **body: Any
) -> tuple[int, str | None, str | None]:
    async with bench.chat(headers=headers, **body) as response:
        data = await response.read()
        code = json.loads(data)["error"].get("code") if response.status != 200 else None
        return response.status, code, response.headers.get("retry-after")


async def test_who_may_call_what(bench: Any, tmp_path: Path) -> None:
    alice = make(tmp_path, "alice", ["m", "q*"])
    runtime = await bench.runtime()
    await bench.start(api_keys_dir=str(tmp_path))
    for name in ("m", "qwen", "other"):
        bench.serve(name, runtime)
    assert await ask(bench) == (401, "missing_api_key", None)
    assert await ask(bench, {"authorization": "Bearer ki-wrong"}) == (401, "invalid_api_key", None)
    assert await ask(bench, alice) == (200, None, None)
    assert await ask(bench, alice, model="qwen") == (200, None, None)
    assert await ask(bench, alice, model="other") == (403, "model_not_allowed", None)
    assert await ask(bench, alice, model="absent") == (403, "model_not_allowed", None)
    assert await ask(bench, {"x-api-key": alice["authorization"][7:]}) == (200, None, None)
    # The key stays here: no runtime sees it.
    assert not any(
        "key" in name.lower() or name.lower() == "authorization"
        for r in runtime.requests
        for name in r["headers"]
    )
    async with bench.client.get(bench.url + "/v1/models", headers=alice) as response:
        assert [model["id"] for model in (await response.json())["data"]] == ["m", "qwen"]
    async with bench.client.get(bench.url + "/v1/models/other", headers=alice) as response:
        assert response.status == 404
        assert "other" not in (await response.json())["error"]["message"].partition(". ")[2]
    async with bench.client.get(bench.url + "/v1/models") as response:
        assert response.status == 401
        assert response.headers["www-authenticate"] == "Bearer"


async def test_requests_a_minute(bench: Any, tmp_path: Path) -> None:
    limited, free = make(tmp_path, "limited", requests=3), make(tmp_path, "free")
    await bench.start(api_keys_dir=str(tmp_path))
    bench.serve("m", await bench.runtime())
    answers = [await ask(bench, limited) for _ in range(5)]
    assert [status for status, _, _ in answers] == [200, 200, 200, 429, 429]
    assert answers[3][1] == "requests_per_minute"
    assert 15 <= int(answers[3][2] or 0) <= 20
    assert (await ask(bench, free))[0] == 200
    async with bench.client.get(bench.internal + "/metrics") as response:
        text = await response.text()
    assert 'kubeinfer_gateway:rate_limited_total{key="limited",limit="requests_per_minute"} 2.0' in text
    assert 'kubeinfer_gateway:key_requests_total{key="limited",status="200"} 3.0' in text


@pytest.mark.parametrize(
    ("body", "spent"),
    [
        ({}, 27),
        ({"stream": True, "stream_options": {"include_usage": True}}, 27),
        ({"stream": True}, 20),  # an estimate from the events and the request's size, at least
    ],
)
async def test_tokens_a_minute(bench: Any, tmp_path: Path, body: dict[str, Any], spent: int) -> None:
    key = make(tmp_path, "k", tokens=20)
    await bench.start(api_keys_dir=str(tmp_path))
    bench.serve("m", await bench.runtime(tokens=20))
    assert (await ask(bench, key, **body))[0] == 200
    status, code, retry = await ask(bench, key, **body)
    assert (status, code) == (429, "tokens_per_minute")
    assert int(retry or 0) >= 3
    (bucket,) = [k.tokens for k in bench.gateway.keys._keys.values()]
    assert -60 < bucket.level < 20.5 - spent


async def test_leaving_early_does_not_save_tokens(bench: Any, tmp_path: Path) -> None:
    key = make(tmp_path, "k", tokens=1000)
    runtime = await bench.runtime(tokens=1000, pause=0.002)
    await bench.start(api_keys_dir=str(tmp_path))
    bench.serve("m", runtime)
    async with bench.chat(headers=key, stream=True, text="x" * 400) as response:
        got = 0
        while got < 50:
            got += (await response.content.readuntil(b"\n\n")).count(b"data")
    await asyncio.sleep(0.2)
    (bucket,) = [k.tokens for k in bench.gateway.keys._keys.values()]
    assert 1000 - 600 < bucket.level < 1000 - 100 - 45


async def test_what_is_refused_costs_no_tokens(bench: Any, tmp_path: Path) -> None:
    key = make(tmp_path, "k", tokens=1000)
    await bench.start(api_keys_dir=str(tmp_path))
    bench.serve("m", await bench.runtime(status=400))
    assert [(await ask(bench, key, text="x" * 2000))[0] for _ in range(5)] == [400] * 5
    (bucket,) = [k.tokens for k in bench.gateway.keys._keys.values()]
    assert bucket.level > 999


async def test_entries_are_read_again(bench: Any, tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    await bench.start(api_keys_dir=str(folder))
    bench.serve("m", await bench.runtime())
    assert (await ask(bench))[0] == 401  # no entry yet: closed, not open
    key = make(folder, "late", requests=2)
    for _ in range(100):
        if len(bench.gateway.keys):
            break
        await asyncio.sleep(0.05)
    assert (await ask(bench, key))[0] == 200
    (folder / "another").write_text("{broken")
    make(folder, "more")
    await asyncio.sleep(2.2)
    assert len(bench.gateway.keys) == 2
    assert [(await ask(bench, key))[0] for _ in range(2)] == [200, 429]  # what was used stays used
    (folder / "late").unlink()
    await asyncio.sleep(2.2)
    assert (await ask(bench, key))[0] == 401


async def test_a_missing_folder_refuses_all(bench: Any, tmp_path: Path) -> None:
    await bench.start(api_keys_dir=str(tmp_path / "absent"))
    bench.serve("m", await bench.runtime())
    assert (await ask(bench))[0] == 401


async def test_keys_from_a_secret(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kube = await FakeKubernetes().start()
    bench.stack.push_async_callback(kube.stop)
    monkeypatch.setattr(
        "kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION",
        str(kube.write_kubeconfig(tmp_path / "config")),
    )
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    key, entry = generate_key("alice", ["*"], None, None)
    await bench.start(api_keys_secret="default/keys")
    bench.serve("m", await bench.runtime())
    assert (await ask(bench))[0] == 401
    await kube.put("secrets", kube.secret("keys", alice=entry))
    for _ in range(100):
        if len(bench.gateway.keys):
            break
        await asyncio.sleep(0.05)
    assert (await ask(bench, {"authorization": f"Bearer {key}"}))[0] == 200
    assert set(kube.requests) == {"list secrets", "watch secrets"}


async def test_the_gateways_own_key_for_the_runtimes(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("inner\n")
    runtime = await bench.runtime()
    await bench.start(upstream_api_key_file=str(tmp_path / "key"))
    bench.serve("m", runtime)
    assert (await ask(bench, {"authorization": "Bearer outer"}))[0] == 200
    got = {name.lower(): value for name, value in runtime.requests[0]["headers"].items()}
    assert got["authorization"] == "Bearer inner"


def test_projected_volumes(tmp_path: Path) -> None:
    """The kubelet keeps the data in a hidden folder and links to it."""
    data = tmp_path / "..2026"
    data.mkdir()
    (data / "a").write_text("1")
    (tmp_path / "..data").symlink_to(data)
    (tmp_path / "a").symlink_to("..data/a")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_text("2")
    assert read_directory(tmp_path) == {"a": b"1", "sub/b": b"2"}
    assert read_directory(tmp_path / "a") == {"a": b"1"}


def test_buckets_refill() -> None:
    bucket = Bucket(60, 0.0)
    bucket.level = -30.0
    assert bucket.wait(1, 0.0) == 31
    assert bucket.wait(1, 31.0) == 0
    assert bucket.refill(1000.0) == 60
    assert Bucket(0.5, 0.0).wait(1, 0.0) == 0  # a limit below one a request lets one through when full


def test_only_hashes_are_kept() -> None:
    key, entry = generate_key("a", ["m"], 1, 2)
    assert key not in entry
    store = KeyStore(required=True)
    store.replace([KeyEntry(**json.loads(entry))])
    found = store.authenticate([(b"authorization", f"bearer {key}".encode())])
    assert isinstance(found, ApiKey)
    assert found.allows("m")
    assert not found.allows("n")


def test_keygen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keygen", "bob", "--model", "q*", "--tokens-per-minute", "1000"]) == 0
    printed = capsys.readouterr()
    entry = json.loads(printed.out)
    key = printed.err.split()[-1]
    assert entry["sha256"] == hashlib.sha256(key.encode()).hexdigest()
    assert entry.items() >= {"name": "bob", "models": ["q*"], "tokens_per_minute": 1000}.items()
    with pytest.raises(SystemExit):
        main(["keygen", "bob", "--tokens-per-minute", "-1"])


@pytest.mark.parametrize(
    ("arguments", "environment", "text"),
    [
        (["--bogus"], {}, "unrecognized arguments: --bogus"),
        (["--port", "many"], {}, "--port: 'many' is not a whole number"),
        (["--load-factor", "0.5"], {}, "--load-factor: 0.5 is below the least that is allowed, 1"),
        ([], {"KUBEINFER_GATEWAY_PROT": "1"}, "unknown environment variable KUBEINFER_GATEWAY_PROT"),
        (
            [],
            {"KUBEINFER_GATEWAY_ROUTING": "random"},
            "KUBEINFER_GATEWAY_ROUTING: 'random' is none of prefix, least-load",
        ),
        (["--discovery=static"], {}, "needs --upstream NAME=URL or --upstream-file FILE"),
        (["--discovery=static", "--upstream=x"], {}, "write NAME=URL[,URL...]"),
        (["--discovery=static", "--upstream=x=ftp://y"], {}, "'ftp://y' is not the address of a runtime"),
        (["--upstream=x=http://y"], {}, "need --discovery static"),
        (
            ["--discovery=static", "--upstream=x=http://y", "--host=203.0.113.1"],
            {},
            "cannot listen on 203.0.113.1:8080 (--port)",
        ),
        (["--upstream-api-key-file=/absent"], {}, "--upstream-api-key-file /absent: No such file"),
        ([], {"KUBECONFIG": "/absent"}, "no cluster to talk to"),
    ],
)
def test_mistakes_are_named(arguments: list[str], environment: dict[str, str], text: str) -> None:
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "kubeinfer_gateway",
            "--internal-port=0",
            *arguments,
        ],
        env={
            "PYTHONPATH": str(ROOT / "gateway"),
            "PATH": "/usr/bin:/bin",
            "KUBECONFIG": "/absent",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert ran.returncode != 0
    assert text in ran.stderr
    assert "Traceback" not in ran.stderr


def test_help_and_service_links() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "kubeinfer_gateway", "--help"],
        env={"PYTHONPATH": str(ROOT / "gateway")},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert ran.returncode == 0
    assert "--queue-timeout" in ran.stdout
    assert "KUBEINFER_GATEWAY_QUEUE_TIMEOUT" in ran.stdout

    import argparse

    from kubeinfer_gateway.options import add_arguments, from_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    links = {
        "KUBEINFER_GATEWAY_SERVICE_HOST": "10.0.0.1",
        "KUBEINFER_GATEWAY_SERVICE_PORT_HTTP": "80",
        "KUBEINFER_GATEWAY_PORT": "tcp://10.0.0.1:80",
        "KUBEINFER_GATEWAY_PORT_80_TCP_ADDR": "10.0.0.1",
        "KUBEINFER_GATEWAY_OTHER_SERVICE_HOST": "10.0.0.2",
        "KUBEINFER_GATEWAY_QUEUE_SIZE": "7",
        "KUBEINFER_GATEWAY_ACCESS_LOG": "no",
        "KUBEINFER_GATEWAY_UPSTREAM": "a=http://x b=http://y",
    }
    options = from_arguments(parser.parse_args(["--retries", "5"]), links)
    assert (options.port, options.queue_size, options.access_log, options.retries) == (8080, 7, False, 5)
    assert options.upstream == ("a=http://x", "b=http://y")
