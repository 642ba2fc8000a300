"""The autoscaler's errand: samples from pods and gateways every few seconds, decisions into the world."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from kubeinfer_operator import names
from kubeinfer_operator.api.v1alpha1 import AutoscalingSpec
from kubeinfer_operator.autoscale import Demand, History, Load, decide
from kubeinfer_operator.controller import Controller
from kubeinfer_operator.kube import DEPLOYMENTS, MODELS, Manifest
from kubeinfer_operator.pods import is_leaving, is_ready
from kubeinfer_operator.stages.revisions import runtime_pods
from kubeinfer_operator.store import Cache, Key, key_of

logger = logging.getLogger("kubeinfer.operator.autoscale")


class Autoscaler:
    """Decides for every model with ``spec.autoscaling``. Its memory is only the stabilization window."""

    def __init__(self, controller: Controller, gateways: Cache) -> None:
        self._controller = controller
        self._gateways = gateways
        self._history: dict[Key, History] = {}
        self._silent: set[str] = set()  # gateways that did not answer last time

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._controller.settings.autoscale_seconds)
            try:
                await self.step(time.monotonic())
            except Exception:
                self._controller.metrics.reconcile_errors.labels("autoscale").inc()
                logger.exception("autoscaling failed; again shortly")

    async def step(self, now: float) -> None:
        """One round over all models that are scaled."""
        world = self._controller.world
        scaled: dict[Key, tuple[Manifest, AutoscalingSpec]] = {}
        for model in world.caches[MODELS]:
            spec = _autoscaling(model)
            if spec is not None:
                scaled[key_of(model)] = (model, spec)
        for key in set(self._history) - set(scaled):
            self._history.pop(key, None)
            world.decisions.pop(key, None)
        if not scaled:
            self._tell({})
            return
        addresses = [ip for pod in self._gateways if is_ready(pod) and (ip := pod["status"].get("podIP"))]
        demand, silent = await self._controller.reader.demand(addresses, world.settings.gateway_port)
        self._tell(silent)
        await asyncio.gather(
            *(
                self._one(
                    key, model, spec, replace(demand.get("/".join(key), Demand()), silent=len(silent)), now
                )
                for key, (model, spec) in scaled.items()
            )
        )

    def _tell(self, silent: dict[str, str]) -> None:
        """Of gateways that no longer answer, once each."""
        for address in silent.keys() - self._silent:
            logger.warning(
                "a gateway does not tell what waits there: %s. Until it does, no model is scaled to zero, and requests that "
                "wait at it wake none; does a NetworkPolicy keep the operator from it?",
                silent[address],
            )
        for address in self._silent - silent.keys():
            logger.info("the gateway at %s tells its demand again, or is no longer asked", address)
        self._silent = set(silent)
        self._controller.metrics.silent_gateways.set(len(silent))

    async def _one(
        self, key: Key, model: Manifest, spec: AutoscalingSpec, demand: Demand, now: float
    ) -> None:
        world = self._controller.world
        deployment = world.get(DEPLOYMENTS, *key)
        if deployment is None:
            return
        current = int(deployment["spec"].get("replicas", 0))
        pods = [pod for pod in runtime_pods(world, model) if not is_leaving(pod)]
        ready = [pod for pod in pods if is_ready(pod)]
        samples = await asyncio.gather(*(self._sample(pod) for pod in ready))
        loads = [load for load in samples if load is not None]
        starting = max(current - len(ready), 0)
        history = self._history.setdefault(key, History())
        wanted = decide(spec, current, loads, len(ready) - len(loads), starting, demand, history, now)
        if world.decisions.get(key) != wanted or wanted != current:
            world.decisions[key] = wanted
            if wanted != current:
                logger.info("%s/%s: %d -> %d replicas", *key, current, wanted)
                self._controller.metrics.scalings.labels("up" if wanted > current else "down").inc()
            self._controller.queue.add(key)

    async def _sample(self, pod: Manifest) -> Load | None:
        address = pod["status"].get("podIP")
        return await self._controller.reader.load(address, names.RUNTIME_PORT) if address else None


def _autoscaling(model: Manifest) -> AutoscalingSpec | None:
    spec: dict[str, Any] = model.get("spec") or {}
    if spec.get("autoscaling") is None or spec.get("suspend"):
        return None
    try:
        return AutoscalingSpec.model_validate(spec["autoscaling"])
    except ValidationError:
        return None  # Accepted=False says so
