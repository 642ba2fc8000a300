"""The whole operator in this process, and what stands in for the rest of a cluster: the kubelet's pods and their Service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from fake_api import FakeApi
from operator_world import HUB, pod_status, with_defaults

from kubeinfer_operator.app import Operator
from kubeinfer_operator.config import Settings
from kubeinfer_operator.hub import Answer, HubDesk, Question
from kubeinfer_operator.kube import Kube

IM = ("kubeinfer.io/v1alpha1", "inferencemodels")
MODEL = {
    "metadata": {"name": "smol"},
    "spec": with_defaults({"model": {"uri": "hf://acme/smol"}, "resources": {"device": "cpu"}}),
}


class Runtime:
    """The pods behind the Service: one server that lists a model, reports load, and stands in for a gateway."""

    def __init__(self) -> None:
        self.names = ["smol"]
        self.running = 0
        self.waiting = 0
        self.port = 0

    async def __aenter__(self) -> Runtime:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/demand", self._demand)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in self.names]})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            text=f"kubeinfer:num_requests_running {self.running}\nkubeinfer:num_requests_waiting 0\n"
        )

    async def _demand(self, _: web.Request) -> web.Response:
        entry = {"waiting": self.waiting, "inflight": 0, "last_request": time.time() - 100}
        return web.json_response({"models": {"default/smol": entry}})


@asynccontextmanager
async def running(
    answers: Callable[[Question], Answer] = lambda q: HUB, **settings: Any
) -> AsyncIterator[Operator]:
    """An operator in this process. Leaving ends it in order; ``crash`` inside is for the tests."""
    operator = Operator(
        Settings(
            health_port=0,
            workers=4,
            probe_seconds=0.5,
            progress_seconds=0.1,
            autoscale_seconds=0.1,
            **settings,
        ),
        await Kube.connect(),
    )
    operator.world.desk = HubDesk(answers)
    stop = asyncio.Event()
    task = asyncio.create_task(operator.run(stop))
    try:
        await until(lambda: operator.synced or task.done())
        if task.done():
            task.result()
        yield operator
    finally:
        stop.set()
        await asyncio.wait_for(task, 10)


async def until(look: Callable[[], Any], timeout: float = 8.0) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := look()):
        if time.monotonic() > deadline:
            raise TimeoutError("it does not come to that")
        await asyncio.sleep(0.02)
    return found


def status(api: FakeApi, kind: str) -> str | None:
    model = api.get("inferencemodels", "smol")
    for condition in ((model or {}).get("status") or {}).get("conditions", []):
        if condition["type"] == kind:
            return f"{condition['status']} {condition['reason']}"
    return None


def finish_job(api: FakeApi) -> None:
    (job,) = api.all("jobs")
    api.patch("batch/v1", "jobs", job["metadata"]["name"], {
        "status": {"conditions": [{"type": "Complete", "status": "True"}]}
    })  # fmt: skip


def kubelet(api: FakeApi) -> None:
    """Pods for the Deployment, ready."""
    deployment = api.get("deployments", "smol")
    assert deployment is not None
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for pod in api.all("pods"):
        if pod["metadata"]["name"].startswith("smol-"):
            api.remove("v1", "pods", pod["metadata"]["name"])
    for number in range(deployment["spec"]["replicas"]):
        ready = {**pod_status("ready"), "podIP": "127.0.0.1"}
        owner = [{"kind": "ReplicaSet", "name": "rs", "uid": deployment["metadata"]["uid"]}]
        api.put(
            "v1",
            "pods",
            {
                "metadata": {"name": f"smol-{number}", "labels": labels, "ownerReferences": owner},
                "status": ready,
            },
        )


async def bring_up(api: FakeApi) -> None:
    await until(lambda: api.all("jobs"))
    finish_job(api)
    await until(lambda: api.get("deployments", "smol"))
    kubelet(api)
    await until(lambda: status(api, "Ready") == "True Answering")
