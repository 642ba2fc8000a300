"""Puts the operator together and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from contextlib import suppress
from typing import Any

import kopf
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from kubeinfer_operator import names
from kubeinfer_operator.capabilities import discover
from kubeinfer_operator.config import Settings
from kubeinfer_operator.controller import Controller
from kubeinfer_operator.handlers import make_registry, make_settings
from kubeinfer_operator.kube import (
    ACCOUNTS,
    BUDGETS,
    CLAIMS,
    CLASSES,
    DEPLOYMENTS,
    JOBS,
    MODELS,
    PODS,
    POLICIES,
    REVISIONS,
    SERVICES,
    Kube,
    KubeError,
)
from kubeinfer_operator.loads import Reader
from kubeinfer_operator.metrics import Metrics
from kubeinfer_operator.scaling import Autoscaler
from kubeinfer_operator.store import WATCH_SECONDS, Cache, Reflector, key_of, silent_for
from kubeinfer_operator.world import World

logger = logging.getLogger("kubeinfer.operator")

SILENCE_SECONDS = WATCH_SECONDS + 120
STUCK_SECONDS = 300.0


def stop_on_signals(stop: asyncio.Event) -> None:
    """SIGTERM and SIGINT set ``stop``, in place of whatever they did before."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


class Operator:
    """One process: kopf for the models, reflectors for their children, the controller between them."""

    def __init__(self, settings: Settings, kube: Kube) -> None:
        self.settings, self.kube = settings, kube
        self.world = World(settings=settings)
        self.metrics = Metrics()
        self.metrics.count_calls(lambda: kube.calls)
        self.reader = Reader()
        self.controller = Controller(kube, self.world, self.reader, self.metrics)
        self.gateways = Cache(names.LABEL_MODEL)
        self.autoscaler = Autoscaler(self.controller, self.gateways)
        self.reflectors: list[Reflector] = []
        self.synced = False

    def _reflect(self) -> None:
        ours = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"
        kinds = [DEPLOYMENTS, REVISIONS, JOBS, PODS, SERVICES, ACCOUNTS, POLICIES]
        if self.world.capabilities.disruption_budgets:
            kinds.append(BUDGETS)
        namespaces: tuple[str | None, ...] = self.settings.watch_namespaces or (None,)
        for namespace in namespaces:
            for kind in kinds:
                self.reflectors.append(
                    Reflector(
                        self.kube,
                        kind,
                        self.world.caches[kind],
                        self.controller.changed,
                        namespace=namespace,
                        selector=ours,
                    )
                )
            # Claims of others, too: a model may name one that is there already.
            self.reflectors.append(
                Reflector(
                    self.kube, CLAIMS, self.world.caches[CLAIMS], self.controller.changed, namespace=namespace
                )
            )
        own = os.environ.get("POD_NAMESPACE")
        watched = {*namespaces, own} if own and namespaces != (None,) else set(namespaces)
        for namespace in watched:
            self.reflectors.append(
                Reflector(
                    self.kube,
                    PODS,
                    self.gateways,
                    lambda kind, obj, deleted: None,
                    namespace=namespace,
                    selector=self.settings.gateway_selector,
                )
            )
        if self.world.capabilities.storage_classes:
            self.reflectors.append(
                Reflector(self.kube, CLASSES, self.world.caches[CLASSES], self.controller.changed)
            )

    async def _resync(self) -> None:
        """A slow second look: finds models that were deleted while the watch was down, and wakes whatever was missed."""
        while True:
            await asyncio.sleep(self.settings.resync_seconds)
            try:
                await self.resync_models()
            except KubeError as error:
                logger.warning("resync: %s", error)

    async def resync_models(self) -> None:
        """Compare the models with a list of the API server's."""
        seen = set()
        known_before = self.world.caches[MODELS].keys()  # one that is made meanwhile is in no list
        for namespace in self.settings.watch_namespaces or (None,):
            listed = await self.kube.list(MODELS, namespace, cached=True)
            for model in listed["items"]:
                seen.add(key_of(model))
                known = self.world.get(MODELS, *key_of(model))
                if (
                    known is None
                    or known["metadata"]["resourceVersion"] != model["metadata"]["resourceVersion"]
                ):
                    self.controller.seen(model)
        for key in known_before - seen:
            try:
                await self.kube.get(MODELS, *key)  # the list may be of a server that is behind
            except KubeError as error:
                if not error.not_found:
                    raise
                self.controller.gone(key)

    def health(self) -> str | None:
        """What is wrong, if anything: the operator's liveness tells the truth."""
        silence = silent_for(self.reflectors)
        oldest = self.controller.queue.oldest()
        self.metrics.watch_silence.set(silence)
        self.metrics.queue_depth.set(self.controller.queue.depth())
        self.metrics.queue_oldest.set(oldest)
        if silence > SILENCE_SECONDS:
            return f"a watch has been silent for {silence:.0f} s"
        if oldest > STUCK_SECONDS:
            return f"a model has been due for {oldest:.0f} s"
        return None

    def _count_models(self) -> None:
        phases: dict[str, int] = {}
        for model in self.world.caches[MODELS]:
            phase = (model.get("status") or {}).get("phase") or "Pending"
            phases[phase] = phases.get(phase, 0) + 1
        self.metrics.models.clear()
        for phase, count in phases.items():
            self.metrics.models.labels(phase).set(count)

    async def _serve(self) -> web.AppRunner:
        async def healthz(_: web.Request) -> web.Response:
            wrong = self.health()
            return web.Response(status=500 if wrong else 200, text=wrong or "ok")

        async def readyz(_: web.Request) -> web.Response:
            return web.Response(
                status=200 if self.synced else 503, text="ok" if self.synced else "caches are being filled"
            )

        async def metrics(_: web.Request) -> web.Response:
            self.health()
            self._count_models()
            body = generate_latest(self.metrics.registry)
            return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

        app = web.Application()
        app.router.add_get("/healthz", healthz)
        app.router.add_get("/readyz", readyz)
        app.router.add_get("/metrics", metrics)
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        await web.TCPSite(runner, port=self.settings.health_port).start()
        return runner

    async def _wait_for_server(self) -> None:
        """The API server may start after the operator, and the CRD after both."""
        said = ""
        while True:
            try:
                self.world.capabilities = await discover(self.kube)
                for namespace in self.settings.watch_namespaces or (None,):
                    await self.kube.list(MODELS, namespace, limit=1)
                return
            except KubeError as error:
                text = (
                    "the CRD inferencemodels.kubeinfer.io is not installed" if error.not_found else str(error)
                )
                if text != said:
                    logger.warning("waiting: %s", text)
                    said = text
                await asyncio.sleep(1.0)

    async def _all_synced(self) -> bool:
        for reflector in self.reflectors:
            await reflector.synced.wait()
        return True

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop``, which signals set too. A part that ends early ends the process: Kubernetes starts it anew."""
        runner = await self._serve()
        tasks: list[asyncio.Task[Any]] = []
        try:
            waiting = asyncio.create_task(self._wait_for_server())
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait([waiting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                waiting.cancel()
                return
            await waiting
            self._reflect()
            tasks += [asyncio.create_task(r.run()) for r in self.reflectors]
            # Nothing is decided on half a picture.
            synced = asyncio.create_task(self._all_synced())
            await asyncio.wait([synced, stopping], return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                synced.cancel()
                return
            ready = asyncio.Event()
            namespaces = self.settings.watch_namespaces
            others = asyncio.all_tasks()
            of_kopf = await kopf.spawn_tasks(
                registry=make_registry(self.controller),
                settings=make_settings(),
                standalone=True,
                clusterwide=not namespaces,
                namespaces=namespaces,
                ready_flag=ready,
                stop_flag=stop,
            )
            # kopf takes the signals, and at the end waits for all tasks of the loop and cancels them: neither is its own here.
            stop_on_signals(stop)
            tasks.append(asyncio.create_task(kopf.run_tasks(of_kopf, ignored=others)))
            await self.resync_models()
            for part in (self._resync(), self.controller.run(), self.autoscaler.run()):
                tasks.append(asyncio.create_task(part))
            others.update(tasks)
            self.synced = True
            logger.info("watching %s", ", ".join(namespaces) or "all namespaces")
            done, _ = await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set():
                for task in done:
                    task.result()
                raise RuntimeError("a part of the operator ended by itself")
        finally:
            stop.set()
            for task in tasks:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)
            self.world.desk.close()
            await self.reader.close()
            await self.kube.close()
            await runner.cleanup()
