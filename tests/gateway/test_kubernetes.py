"""Discovery through the real Kubernetes client, against an API server that fails as real ones do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.fake_kubernetes import FakeKubernetes
from gateway.helpers import eventually
from kubeinfer_gateway.discovery.kubernetes import KubernetesDiscovery, watch_secret
from kubeinfer_gateway.registry import Registry


@pytest.fixture
async def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeKubernetes]:
    fake = await FakeKubernetes().start()
    monkeypatch.setenv("KUBECONFIG", str(fake.write_kubeconfig(tmp_path / "kubeconfig")))
    # The client library reads the variable when it is imported.
    monkeypatch.setattr(
        "kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig")
    )
    yield fake
    await fake.stop()
    await asyncio.sleep(0.05)


@pytest.fixture
async def registry(kube: FakeKubernetes) -> AsyncIterator[Registry]:
    registry = Registry()
    task = asyncio.create_task(KubernetesDiscovery(registry, watch_seconds=2).run())
    await eventually(lambda: registry.synced)
    yield registry
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def addresses(registry: Registry, name: str) -> list[int]:
    model = registry.find(name)
    return sorted(endpoint.spec.port for endpoint in model.endpoints.values()) if model else []


async def test_follows_models_and_pods(kube: FakeKubernetes, registry: Registry) -> None:
    assert registry.names() == []
    await kube.put("inferencemodels", kube.model("a", servedNames=["a", "alias"]))
    await kube.put("pods", kube.pod("a-1", "a", 9001))
    await kube.put("pods", kube.pod("a-2", "a", 9002, ready=False))
    await kube.put("pods", kube.pod("a-pull", "a", 9003, component="puller"))
    await eventually(lambda: registry.names() == ["a", "alias"] and addresses(registry, "alias") == [9001])
    await kube.put("pods", kube.pod("a-2", "a", 9002))
    await eventually(lambda: addresses(registry, "a") == [9001, 9002])
    await kube.put("pods", kube.pod("a-1", "a", 9001, leaving=True))
    await eventually(lambda: addresses(registry, "a") == [9002])
    await kube.delete("pods", "a-2")
    await eventually(lambda: addresses(registry, "a") == [])
    assert registry.find("a") is not None
    await kube.delete("inferencemodels", "a")
    await eventually(lambda: registry.names() == [])


async def test_names_of_pods_come_from_their_command_line(kube: FakeKubernetes, registry: Registry) -> None:
    await kube.put("inferencemodels", kube.model("a", servedNames=["new"]))
    for name, port, served in (("a-1", 9001, ["old", "both"]), ("a-2", 9002, ["new", "both"])):
        pod = kube.pod(name, "a", port)
        arguments = ["/models/x", "--served-model-name", *served, "--shutdown-timeout", "120"]
        pod["spec"]["containers"][0]["args"] = arguments
        await kube.put("pods", pod)
    await eventually(lambda: registry.names() == ["both", "new", "old"])

    def port(name: str) -> int | None:
        endpoint = registry.models["default/a"].pick(name, b"")
        return endpoint.spec.port if endpoint is not None else None

    assert (port("old"), port("new")) == (9001, 9002)
    assert port("both") in (9001, 9002)


async def test_a_name_belongs_to_the_oldest(kube: FakeKubernetes, registry: Registry) -> None:
    young = kube.model("young", servedNames=["name"])
    young["metadata"]["creationTimestamp"] = "2026-03-01T00:00:00Z"
    old = kube.model("old", servedNames=["name"])
    old["metadata"]["creationTimestamp"] = "2026-02-01T00:00:00Z"
    await kube.put("inferencemodels", young)
    await eventually(lambda: registry.find("name") is not None)
    await kube.put("inferencemodels", old)
    await eventually(lambda: registry.find("name").key == "default/old")  # type: ignore[union-attr]
    await kube.delete("inferencemodels", "old")
    await eventually(lambda: registry.find("name").key == "default/young")  # type: ignore[union-attr]
    await kube.put("inferencemodels", young | {"spec": {"servedNames": ["other"]}})
    await eventually(lambda: registry.names() == ["other"])


@pytest.mark.parametrize("as_status", [False, True])
async def test_gone_lists_again(kube: FakeKubernetes, registry: Registry, as_status: bool) -> None:
    await kube.put("inferencemodels", kube.model("before"))
    await eventually(lambda: registry.names() == ["before"])
    kube.gone_as_status = as_status
    await kube.stop()
    await kube.delete("inferencemodels", "before")
    await kube.put("inferencemodels", kube.model("after"))
    await kube.put("pods", kube.pod("after-1", "after", 9001))
    kube.compact()
    assert registry.names() == ["before"]  # what was known stays in force
    await kube.start()
    await eventually(lambda: registry.names() == ["after"] and addresses(registry, "after") == [9001], 10)
    lists = kube.requests["list pods"]
    await asyncio.sleep(0.5)
    assert kube.requests["list pods"] == lists  # and it settles


async def test_dropped_watches_miss_nothing(kube: FakeKubernetes, registry: Registry) -> None:
    for number in range(30):
        await kube.put("inferencemodels", kube.model(f"m{number}"))
        if number % 5 == 0:
            kube.drop_watches()
        await asyncio.sleep(0.01)
    await eventually(lambda: len(registry.names()) == 30)
    assert kube.requests["list inferencemodels"] == 1


async def test_a_silent_watch_is_given_up(kube: FakeKubernetes, registry: Registry) -> None:
    kube.stall = True
    await kube.put("inferencemodels", kube.model("m"))
    await asyncio.sleep(0.2)
    assert registry.names() == []
    before = kube.requests["watch inferencemodels"]
    await eventually(lambda: kube.requests["watch inferencemodels"] > before, 8)
    kube.stall = False
    await eventually(lambda: registry.names() == ["m"])


async def test_api_server_restart(kube: FakeKubernetes, registry: Registry) -> None:
    await kube.put("inferencemodels", kube.model("m"))
    await kube.put("pods", kube.pod("m-1", "m", 9001))
    await eventually(lambda: addresses(registry, "m") == [9001])
    await kube.stop()
    await asyncio.sleep(0.5)
    assert addresses(registry, "m") == [9001]
    await kube.start()
    await kube.put("pods", kube.pod("m-2", "m", 9002))
    await eventually(lambda: addresses(registry, "m") == [9001, 9002], 8)


async def test_long_lists_come_in_pages(kube: FakeKubernetes) -> None:
    kube.page = 7
    for number in range(50):
        await kube.put("inferencemodels", kube.model(f"m{number}"))
    registry = Registry()
    task = asyncio.create_task(KubernetesDiscovery(registry).run())
    await eventually(lambda: registry.synced)
    assert len(registry.names()) == 50
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_only_the_namespaces_asked_for(kube: FakeKubernetes) -> None:
    for namespace in ("one", "two", "three"):
        model = kube.model("m", servedNames=[namespace])
        model["metadata"]["namespace"] = namespace
        await kube.put("inferencemodels", model)
    registry = Registry()
    task = asyncio.create_task(KubernetesDiscovery(registry, ("one", "two")).run())
    await eventually(lambda: registry.synced)
    assert registry.names() == ["one", "two"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_odd_object_harms_no_other(kube: FakeKubernetes, registry: Registry) -> None:
    await kube.put("inferencemodels", kube.model("odd", servedNames="not a list"))
    await kube.put("inferencemodels", kube.model("m"))
    await eventually(lambda: registry.names() == ["m"])


async def test_forbidden_is_not_ready_and_mends(kube: FakeKubernetes) -> None:
    kube.forbidden.add("pods")
    registry = Registry()
    task = asyncio.create_task(KubernetesDiscovery(registry).run())
    await asyncio.sleep(0.5)
    assert not registry.synced
    kube.forbidden.clear()
    await eventually(lambda: registry.synced)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_watches_one_secret(kube: FakeKubernetes) -> None:
    seen: list[dict[str, bytes]] = []
    await kube.put("secrets", kube.secret("other", x="y"))
    task = asyncio.create_task(watch_secret("default/keys", seen.append))
    await eventually(lambda: seen == [{}])
    await kube.put("secrets", kube.secret("keys", a="1", b="2"))
    await eventually(lambda: seen[-1] == {"a": b"1", "b": b"2"})
    await kube.delete("secrets", "keys")
    await eventually(lambda: seen[-1] == {})
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_requests_follow_the_cluster(kube: FakeKubernetes, bench: Any) -> None:
    runtime = await bench.runtime()
    await kube.put("inferencemodels", kube.model("m", servedNames=["served"]))
    await bench.start(kubernetes=True)
    await eventually(lambda: bench.gateway.registry.synced)
    waiting = asyncio.create_task(bench.chat(model="served").__aenter__())
    await eventually(lambda: bench.gateway.registry.waiting() == 1)
    async with bench.client.get(bench.internal + "/demand") as response:
        demand = await response.json()
    assert demand["models"]["default/m"]["waiting"] == 1
    assert demand["models"]["default/m"]["inflight"] == 0
    assert demand["models"]["default/m"]["last_request"] > 1.7e9
    await kube.put("pods", kube.pod("m-1", "m", runtime.port))
    response = await waiting
    assert response.status == 200
    response.release()
