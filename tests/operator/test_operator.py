"""The whole operator, kopf and watches and all, against an API server on loopback."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from contextlib import suppress
from typing import Any

import aiohttp
import pytest
from fake_api import FakeApi
from operator_running import IM, MODEL, Runtime, bring_up, finish_job, kubelet, running, status, until
from operator_world import COMMIT, HUB, pod_status, with_defaults

from kubeinfer_operator.app import Operator
from kubeinfer_operator.config import Settings
from kubeinfer_operator.hub import Answer, HubDesk, HubError, Question
from kubeinfer_operator.kube import Kube
from kubeinfer_operator.loads import Reader


async def test_from_apply_to_ready_to_gone(api: FakeApi, runtime: Runtime, kubeconfig: None) -> None:
    async with running() as operator:
        api.put(*IM, MODEL)
        await bring_up(api)
        model = api.get("inferencemodels", "smol")
        assert model is not None
        assert model["status"]["phase"] == "Ready"
        assert model["status"]["weights"]["revision"] == COMMIT
        assert "finalizers" not in model["metadata"], "a stopped operator must not hold up a deletion"
        assert not model["metadata"].get("annotations"), "nothing is remembered in annotations"
        told = {"Fits", "Downloading", "Downloaded", "Running", "Answering"}
        await until(lambda: told <= {event["reason"] for event in api.all("events")})
        calls = len(api.calls)
        await asyncio.sleep(1.5)
        assert len(api.calls) == calls, "a model at rest costs no call"
        assert operator.health() is None
        api.remove(*IM, "smol")
        await asyncio.sleep(0.3)
        left = [o for o in api.objects.values() if o["kind"] not in ("Event", "StorageClass")]
        assert left == []


async def test_reacts_within_a_second(api: FakeApi, runtime: Runtime, kubeconfig: None) -> None:
    async with running():
        api.put(*IM, MODEL)
        await bring_up(api)
        for replicas in (2, 3, 1):
            started = time.monotonic()
            api.patch(*IM, "smol", {"spec": {"replicas": replicas}})
            await until(lambda: (api.get("deployments", "smol") or {})["spec"]["replicas"] == replicas)  # noqa: B023
            assert time.monotonic() - started < 1


async def test_stopped_and_started_anywhere(api: FakeApi, runtime: Runtime, kubeconfig: None) -> None:
    """A new operator goes on where the old one stopped, and writes nothing when there is nothing to do."""
    api.put(*IM, MODEL)
    async with running():
        await until(lambda: api.all("jobs"))
    finish_job(api)
    async with running():
        await until(lambda: api.get("deployments", "smol"))
    kubelet(api)
    async with running():
        await until(lambda: status(api, "Ready") == "True Answering")
        await asyncio.sleep(0.3)
    written = len([c for c in api.calls if c[0] != "GET"])
    template = api.get("deployments", "smol")
    async with running(
        lambda q: HubError("NetworkUnreachable", "no hub today", False), runtime_image_cpu="other:2"
    ):
        await asyncio.sleep(1)
        assert status(api, "Ready") == "True Answering"
    assert len([c for c in api.calls if c[0] != "GET"]) == written
    assert api.get("deployments", "smol") == template


async def test_api_server_goes_and_comes_back(api: FakeApi, runtime: Runtime, kubeconfig: None) -> None:
    async with running() as operator:
        api.put(*IM, MODEL)
        await bring_up(api)
        await api.stop()
        # Gone while nobody could say so: the next list tells.
        pods = [
            pod["metadata"]["name"] for pod in api.all("pods") if pod["metadata"]["name"].startswith("smol-")
        ]
        await asyncio.sleep(0.5)
        await api.start()
        api.patch(*IM, "smol", {"spec": {"replicas": 2}})
        await until(lambda: (api.get("deployments", "smol") or {})["spec"]["replicas"] == 2, 15)
        for name in pods:
            api.remove("v1", "pods", name)
        await until(lambda: status(api, "Ready") == "False Starting", 15)
        kubelet(api)
        await until(lambda: status(api, "Ready") == "True Answering", 15)
        assert operator.health() is None


async def test_missed_models_are_found_by_the_slow_look(
    api: FakeApi, runtime: Runtime, kubeconfig: None
) -> None:
    async with running(resync_seconds=0.3) as operator:
        api.put(*IM, MODEL)
        await until(lambda: status(api, "Accepted"))
        # Deleted behind the watch's back.
        del api.objects[(*IM, "default", "smol")]
        await until(
            lambda: (
                len(operator.world.caches[next(k for k in operator.world.caches if k.plural == IM[1])]) == 0
            )
        )


async def test_progress_from_the_log(api: FakeApi, runtime: Runtime, kubeconfig: None) -> None:
    async with running():
        api.put(*IM, MODEL)
        job = (await until(lambda: api.all("jobs")))[0]
        name = job["metadata"]["name"]
        api.logs["puller"] = '{"event": "progress", "bytesDone": 27, "bytesTotal": 270, "rate": 9, "eta": 27}'
        labels = {**job["metadata"]["labels"], "job-name": name}
        pull = {"name": "pull", "state": {"running": {"startedAt": "now"}}, "restartCount": 0}
        api.put(
            "v1",
            "pods",
            {"metadata": {"name": "puller", "labels": labels}, "status": {"containerStatuses": [pull]}},
        )

        def weights() -> dict[str, Any]:
            return (api.get("inferencemodels", "smol") or {})["status"].get("weights", {})

        await until(lambda: weights().get("progress") == "10%")
        assert weights()["eta"] == 27
        api.logs["puller"] = (
            '{"event": "progress", "bytesDone": 135, "bytesTotal": 270, "rate": 9, "eta": 15}'
        )
        await until(lambda: weights().get("progress") == "50%")


async def test_children_whose_deletion_is_heard_of_first_are_not_made_again(
    api: FakeApi, runtime: Runtime, kubeconfig: None
) -> None:
    """Watches are not in step: the garbage collector's work may be heard of before the model's own deletion."""

    def children() -> list[tuple[str, str, str, str]]:
        kinds = ("InferenceModel", "Event", "StorageClass")
        return [key for key, child in api.objects.items() if child["kind"] not in kinds]

    async with running():
        api.put(*IM, MODEL)
        await bring_up(api)
        while left := children():
            version, plural, namespace, name = left[0]
            api.remove(version, plural, name, namespace)
        await asyncio.sleep(0.2)
        api.remove(*IM, "smol")
        await asyncio.sleep(1.0)
        assert children() == []


async def test_sleep_and_wake_on_the_gateways_word(api: FakeApi, runtime: Runtime, kubeconfig: None) -> None:
    gateway = {"name": "gateway", "labels": {"app.kubernetes.io/component": "gateway"}}
    api.put("v1", "pods", {"metadata": gateway, "status": {**pod_status("ready"), "podIP": "127.0.0.1"}})
    scaling = {
        "minReplicas": 0,
        "maxReplicas": 3,
        "targetRequests": 2,
        "scaleDownDelay": 0,
        "scaleToZeroDelay": 0,
    }
    model = {**MODEL, "spec": with_defaults({**MODEL["spec"], "autoscaling": scaling})}  # type: ignore[dict-item]

    def replicas() -> int:
        return int((api.get("deployments", "smol") or {})["spec"]["replicas"])

    async with running(gateway_port=runtime.port):
        api.put(*IM, model)
        runtime.running = 1
        await bring_up(api)
        runtime.running = 6
        await until(lambda: replicas() == 3)
        runtime.running = 0
        kubelet(api)
        await until(lambda: replicas() == 0)
        kubelet(api)
        await until(lambda: (api.get("inferencemodels", "smol") or {})["status"]["phase"] == "Idle")
        runtime.waiting = 1
        await until(lambda: replicas() == 1)
        runtime.waiting = 0


async def test_what_the_server_refuses_is_told(api: FakeApi, runtime: Runtime, kubeconfig: None) -> None:
    async with running():
        api.deny["deployments"] = (403, "exceeded quota: compute")
        api.put(*IM, MODEL)
        await until(lambda: api.all("jobs"))
        finish_job(api)
        await until(lambda: status(api, "RuntimeReady") == "False ApplyRefused")
        assert "exceeded quota" in (api.get("inferencemodels", "smol") or {})["status"]["message"]
        api.deny.clear()
        await until(lambda: api.get("deployments", "smol"))


async def test_own_endpoints(api: FakeApi, runtime: Runtime, kubeconfig: None, unused_tcp_port: int) -> None:
    operator = Operator(Settings(health_port=unused_tcp_port), await Kube.connect())
    operator.world.desk = HubDesk(lambda q: HUB)
    stop = asyncio.Event()
    task = asyncio.create_task(operator.run(stop))
    await until(lambda: operator.synced)
    api.put(*IM, MODEL)
    await until(lambda: api.all("jobs"))
    async with aiohttp.ClientSession(f"http://127.0.0.1:{unused_tcp_port}") as http:
        for path in ("/healthz", "/readyz"):
            async with http.get(path) as answer:
                assert answer.status == 200
        async with http.get("/metrics") as answer:
            text = await answer.text()
        assert 'kubeinfer_operator_api_calls_total{kind="Job",verb="apply"} 1.0' in text
        assert "kubeinfer_operator_reconcile_seconds_count" in text
        operator.reflectors[0].last_heard -= 3600
        async with http.get("/healthz") as answer:
            assert answer.status == 500
            assert "silent" in await answer.text()
    stop.set()
    await task


async def test_sigterm_ends_the_process_at_once_and_in_order(
    api: FakeApi, runtime: Runtime, kubeconfig: None, unused_tcp_port: int
) -> None:
    api.put(*IM, MODEL)
    command = (sys.executable, "-m", "kubeinfer_operator", f"--health-port={unused_tcp_port}")
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(20), aiohttp.ClientSession(f"http://127.0.0.1:{unused_tcp_port}") as http:

            async def ready() -> bool:
                with suppress(aiohttp.ClientError):
                    async with http.get("/readyz") as answer:
                        return answer.status == 200
                return False

            while not await ready():
                assert process.returncode is None
                await asyncio.sleep(0.1)
        await until(lambda: (api.get("inferencemodels", "smol") or {}).get("status"))
        process.terminate()
        _, printed = await asyncio.wait_for(process.communicate(), 4)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    assert "Traceback" not in printed.decode()


async def test_reader_says_what_a_service_answers(runtime: Runtime) -> None:
    reader = Reader()
    url = f"http://127.0.0.1:{runtime.port}/v1/models"
    assert (await reader.answers(url, ("smol",)))[0]
    ok, why = await reader.answers(url, ("other",))
    assert not ok
    assert "smol" in why
    assert not (await reader.answers(f"http://127.0.0.1:{runtime.port}/nothing", ()))[0]
    assert not (await reader.answers("http://127.0.0.1:9/v1/models", ()))[0]
    await reader.close()


async def test_only_the_namespaces_it_is_told(api: FakeApi, runtime: Runtime, kubeconfig: None) -> None:
    async with running(watch_namespaces=("default", "team")):
        for namespace in ("default", "team", "other"):
            meta = {"name": f"in-{namespace}", "namespace": namespace}
            api.put(*IM, {"metadata": meta, "spec": MODEL["spec"]})
        await until(lambda: len(api.all("jobs")) == 2)
        await asyncio.sleep(0.3)
        assert {job["metadata"]["namespace"] for job in api.all("jobs")} == {"default", "team"}
        assert "status" not in (api.get("inferencemodels", "in-other", "other") or {})


async def test_token_of_the_named_secret_and_no_other(
    api: FakeApi, runtime: Runtime, kubeconfig: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kubeinfer_operator.hub.AGAIN_SECONDS", 0.5)
    asked: list[str] = []

    def gated(question: Question) -> Answer:
        asked.append(question[3])
        return HUB if question[3] == "s3cret" else HubError("Forbidden", "a token is needed", False)

    model = {"uri": "hf://acme/smol", "tokenSecretRef": {"name": "hub", "key": "token"}}
    spec = with_defaults({**MODEL["spec"], "model": model})  # type: ignore[dict-item]
    async with running(gated):
        api.put(*IM, {**MODEL, "spec": spec})
        await until(lambda: status(api, "WeightsReady") == "False Forbidden")
        assert not api.all("jobs")
        api.put(
            "v1",
            "secrets",
            {"metadata": {"name": "hub"}, "data": {"token": base64.b64encode(b"s3cret\n").decode()}},
        )
        await until(lambda: api.all("jobs"), 30)
        assert asked[-1] == "s3cret"
        assert [call for call in api.calls if call == ("GET", "secrets")]
    text = json.dumps([o for o in api.objects.values() if o["kind"] != "Secret"])
    assert "s3cret" not in text, "a token is passed on by reference only"


async def test_a_hub_that_is_away_is_asked_now_and_then(
    api: FakeApi, runtime: Runtime, kubeconfig: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kubeinfer_operator.hub.AGAIN_SECONDS", 2.0)
    asked = 0

    def away(question: Question) -> Answer:
        nonlocal asked
        asked += 1
        time.sleep(0.3)
        return HubError("NetworkUnreachable", "no route to the hub", False)

    async with running(away) as operator:
        api.put(*IM, MODEL)
        await until(lambda: status(api, "Planned") == "False NetworkUnreachable")
        await asyncio.sleep(4)
        assert asked == 2, "after two seconds, then after four"
        count = operator.metrics.registry.get_sample_value("kubeinfer_operator_reconcile_seconds_count")
        assert count is not None
        assert count < 9, "waiting for a hub is not work"
