"""The whole operator where the API server refuses, fails or answers late."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from fake_api import FakeApi
from operator_running import IM, MODEL, Runtime, finish_job, running, status, until
from operator_world import HUB, with_defaults

from kubeinfer_operator.hub import Answer, HubError, Question
from kubeinfer_operator.kube import MODELS


def hold_back(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, plural: str, method: str, sub: str
) -> tuple[asyncio.Event, asyncio.Event]:
    """The next answer of a kind is made, and waits; events that it does, and that it may go."""
    made, go, verb = asyncio.Event(), asyncio.Event(), api._verb

    async def slow(request: web.Request, *which: Any) -> web.StreamResponse:
        answer = await verb(request, *which)
        _, kind, _, name, below = which
        listing = method == "GET" and (name or request.query.get("watch"))
        if (kind, request.method, below) == (plural, method, sub) and not listing and not made.is_set():
            made.set()
            await go.wait()
        return answer

    monkeypatch.setattr(api, "_verb", slow)
    return made, go


def told(api: FakeApi, kind: str) -> dict[str, Any]:
    model = api.get("inferencemodels", "smol") or {}
    return next(c for c in model["status"]["conditions"] if c["type"] == kind)


async def test_a_quota_is_told_once_and_asked_now_and_then(
    api: FakeApi, runtime: Runtime, kubeconfig: None
) -> None:
    api.deny["persistentvolumeclaims"] = (403, "exceeded quota: storage")
    async with running() as operator:
        api.put(*IM, MODEL)
        await until(lambda: status(api, "WeightsReady") == "False ApplyRefused")
        before = api.get("inferencemodels", "smol")
        assert before is not None
        assert before["status"]["phase"] == "Failed"
        assert "exceeded quota" in told(api, "Ready")["message"]
        await asyncio.sleep(5)
        assert api.get("inferencemodels", "smol") == before, "said once"
        assert operator.kube.calls["apply", "PersistentVolumeClaim"] < 7
        del api.deny["persistentvolumeclaims"]
        await until(lambda: api.all("jobs"), 15)


async def test_a_write_that_fails_for_long_is_told(api: FakeApi, runtime: Runtime, kubeconfig: None) -> None:
    async with running():
        api.put(*IM, MODEL)
        await until(lambda: api.all("jobs"))
        api.deny["deployments"] = (500, "failed calling webhook policy.acme.io: no endpoints available")
        finish_job(api)
        await until(lambda: status(api, "RuntimeReady") == "False ApplyRefused", 20)
        assert "policy.acme.io" in told(api, "Ready")["message"]
        api.deny.clear()
        await until(lambda: api.get("deployments", "smol"), 30)


async def test_a_model_made_while_the_list_is_on_its_way_is_known(
    api: FakeApi, runtime: Runtime, kubeconfig: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as operator:
        made, go = hold_back(api, monkeypatch, "inferencemodels", "GET", "")
        resync = asyncio.create_task(operator.resync_models())
        await made.wait()
        api.put(*IM, MODEL)
        await until(lambda: status(api, "Accepted"))
        go.set()
        await resync
        assert operator.world.get(MODELS, "default", "smol") is not None


async def test_an_answer_that_comes_after_the_deletion_brings_nothing_back(
    api: FakeApi, runtime: Runtime, kubeconfig: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as operator:
        api.put(*IM, MODEL)
        await until(lambda: api.all("jobs"))
        made, go = hold_back(api, monkeypatch, "inferencemodels", "PATCH", "status")
        finish_job(api)
        await made.wait()
        api.remove(*IM, "smol")
        await until(lambda: operator.world.get(MODELS, "default", "smol") is None)
        go.set()
        await asyncio.sleep(0.5)
        assert operator.world.get(MODELS, "default", "smol") is None
        assert not [o for o in api.objects.values() if o["kind"] not in ("Event", "StorageClass")]


async def test_what_is_wrong_with_the_token_is_told(api: FakeApi, runtime: Runtime, kubeconfig: None) -> None:
    def gated(question: Question) -> Answer:
        return HUB if question[3] else HubError("Forbidden", "hf://acme/smol is gated", False)

    api.put("v1", "secrets", {"metadata": {"name": "hub"}, "data": {"TOKEN": ""}})
    async with running(gated):
        for name, what in (("hub", "has no key 'token' (there are: TOKEN)"), ("else", "does not exist")):
            model = {"uri": "hf://acme/smol", "tokenSecretRef": {"name": name}}
            api.put(*IM, {**MODEL, "spec": with_defaults({**MODEL["spec"], "model": model})})  # type: ignore[dict-item]
            await until(lambda: status(api, "WeightsReady") == "False Forbidden")
            await until(lambda: what in told(api, "WeightsReady")["message"])  # noqa: B023
