"""The loop around the pure reconcile: a queue of models, workers, and the errands that a reconcile asks for."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
import time
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any

from kubeinfer_operator import names
from kubeinfer_operator.conditions import ACCEPTED, READY, find, transitions
from kubeinfer_operator.config import Settings
from kubeinfer_operator.hub import Question
from kubeinfer_operator.kube import CLASSES, MODELS, NODES, SECRETS, Kind, Kube, KubeError, Manifest
from kubeinfer_operator.loads import Reader
from kubeinfer_operator.metrics import Metrics
from kubeinfer_operator.outcome import Follow, Outcome
from kubeinfer_operator.reconcile import reconcile, refused
from kubeinfer_operator.store import Key, key_of, slim
from kubeinfer_operator.workqueue import WorkQueue
from kubeinfer_operator.world import Probe, Progress, Token, World
from kubeinfer_operator.writer import Refusal, Writer

logger = logging.getLogger("kubeinfer.operator")

DELETED_SECONDS = 0.5
PROBE_AGAIN_SECONDS = 1.0
PATIENCE = 4  # failures in a row, of some seconds in all, that may pass by themselves
PROBE_FAILURES = 3
NODE_SECONDS = 300.0
EVENTS_WAITING = 10_000
QUIET_REASONS = ("Resolving", "Pending", "NotPlanned", "Probing", "ClaimPending", "Scaling")


class Controller:
    """One operator's control loop. Handlers and reflectors only call :meth:`seen`, :meth:`gone` and :meth:`changed`."""

    def __init__(self, kube: Kube, world: World, reader: Reader, metrics: Metrics) -> None:
        self.kube, self.world, self.reader, self.metrics = kube, world, reader, metrics
        self.queue = WorkQueue()
        self._writer = Writer(kube, world)
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures: dict[Key, int] = {}
        self._probing: set[Key] = set()
        self._probe_failures: dict[Key, int] = {}
        self._followed: dict[Key, float] = {}
        self._memory_at = float("-inf")
        self._events: asyncio.Queue[tuple[Manifest, str, str, str]] = asyncio.Queue(maxsize=EVENTS_WAITING)

    @property
    def settings(self) -> Settings:
        return self.world.settings

    # What has changed

    def seen(self, model: Manifest) -> None:
        """A model is new or different."""
        for key in self.world.put_model(slim(model)):
            self.queue.add(key)
        self.queue.add(key_of(model))

    def gone(self, key: Key) -> None:
        """A model is no more: its children are the garbage collector's, its name is free."""
        for other in self.world.drop_model(key):
            self.queue.add(other)
        for kept in (self.world.progress, self.world.probes, self.world.decisions, self.world.tokens):
            kept.pop(key, None)
        for own in (self._failures, self._probe_failures, self._followed):
            own.pop(key, None)

    def changed(self, kind: Kind, obj: Manifest, deleted: bool = False) -> None:
        """A child has changed: look at its owners again."""
        # Of a model that is deleted with its children, news of a child may come first: it is not to be made again.
        delay = DELETED_SECONDS if deleted else 0.0
        if kind is CLASSES:
            for model in self.world.caches[MODELS]:
                self.queue.add(key_of(model), random.uniform(0.0, 2.0))
            return
        namespace = obj["metadata"].get("namespace", "")
        owners = {
            ref["name"]
            for ref in obj["metadata"].get("ownerReferences") or []
            if ref.get("kind") == names.KIND and ref.get("apiVersion", "").startswith(names.GROUP)
        }
        label = (obj["metadata"].get("labels") or {}).get(names.LABEL_MODEL)
        for name in owners | ({label} if label else set()):
            if self.world.get(MODELS, namespace, name) is not None:
                self.queue.add((namespace, name), delay)
        job = (obj["metadata"].get("labels") or {}).get("job-name")
        if job:
            for model in self.world.caches[MODELS]:
                if model["metadata"].get("namespace") == namespace and _shares(model):
                    self.queue.add(key_of(model))

    # The loop

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.settings.workers):
                    group.create_task(self._work())
                group.create_task(self._post_events())
        finally:
            for task in self._tasks:
                task.cancel()

    async def _work(self) -> None:
        while True:
            key, waited = await self.queue.take()
            self.metrics.queue_seconds.observe(waited)
            try:
                with self.metrics.reconcile_seconds.time():
                    done = await self._reconcile(key)
                if done:
                    self._failures.pop(key, None)
            except KubeError as error:
                # A conflict or a server that restarts: what is cached is old, look again shortly.
                self._retry(key, f"api-{error.status}")
                passing = error.status in (0, 404, 409, 429, 500, 503)
                if not passing or self._failures[key] == PATIENCE:
                    logger.warning("%s/%s: %s", *key, error)
            except Exception:
                self._retry(key, "bug")
                logger.exception("%s/%s: reconcile failed", *key)
            finally:
                self.queue.done(key)

    def _retry(self, key: Key, reason: str) -> None:
        self.metrics.reconcile_errors.labels(reason).inc()
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        self.queue.add(key, min(0.5 * 2 ** min(failures - 1, 8), 60.0) * random.uniform(0.8, 1.2))

    async def _reconcile(self, key: Key) -> bool:
        """Once; whether all that was to be written was."""
        model = self.world.get(MODELS, *key)
        if model is None:
            self.queue.forget(key)
            return True
        await self._device_memory(model)
        now = datetime.now(UTC)
        outcome = reconcile(model, self.world, now)
        if model["metadata"].get("deletionTimestamp"):
            return True
        refusal = await self._perform(key, outcome)
        if refusal is not None:
            refused(model, outcome, refusal.kind, str(refusal), now)
            self._retry(key, f"refused-{refusal.status}")
        await self._write_status(model, outcome)
        self._errands(key, outcome)
        if outcome.again is not None:
            self.queue.add(key, outcome.again)
        return refusal is None

    async def _perform(self, key: Key, outcome: Outcome) -> Refusal | None:
        """Make the writes; what the API server refuses for good, or has failed at for a while."""
        try:
            await self._writer.perform(outcome.actions)
        except Refusal as refusal:
            if refusal.status >= 500 and self._failures.get(key, 0) < PATIENCE:
                raise refusal.error from None
            return refusal
        return None

    async def _write_status(self, model: Manifest, outcome: Outcome) -> None:
        before = (model.get("status") or {}).get("conditions") or []
        written = await self._writer.status(model, outcome.status)
        if written is None:
            return
        known = self.world.get(MODELS, *key_of(written))
        # It may have been deleted since, and made again.
        if known is not None and known["metadata"]["uid"] == written["metadata"]["uid"]:
            self.world.put_model(slim(written))
        for condition in transitions(before, outcome.status["conditions"]):
            if not worth_telling(condition, find(before, condition["type"])):
                continue
            normal = condition["status"] == "True" or condition["reason"] in (
                "Downloading",
                "Starting",
                "Updating",
                "ScaledToZero",
            )
            text = condition["message"] or f"{condition['type']} is {condition['status']}"
            try:
                self._events.put_nowait((model, "Normal" if normal else "Warning", condition["reason"], text))
            except asyncio.QueueFull:
                logger.warning("too many events; one of %s/%s is left out", *key_of(model))

    async def _post_events(self) -> None:
        """One at a time, beside the work: an Event is for people and must not hold up a reconcile."""
        while True:
            model, kind, reason, text = await self._events.get()
            try:
                await self._writer.event(model, kind, reason, text)
            except KubeError as error:
                logger.info("event of %s/%s is lost: %s", *key_of(model), error)

    # Errands: their answers come back through the queue

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.metrics.reconcile_errors.labels("errand").inc()
            logger.error("errand failed", exc_info=task.exception())

    def _errands(self, key: Key, outcome: Outcome) -> None:
        if outcome.token_needed or outcome.questions:
            self._start(self._ask(key, outcome.questions))
        if outcome.follow is not None:
            due = self._followed.get(key, float("-inf")) + self.settings.progress_seconds - 0.2
            if time.monotonic() >= due:
                self._followed[key] = time.monotonic()
                self._start(self._follow(key, outcome.follow))
        else:
            self.world.progress.pop(key, None)
        if outcome.probe is None:
            self.world.probes.pop(key, None)
            self._probe_failures.pop(key, None)
        elif key not in self._probing:
            last = self.world.probes.get(key)
            pause = self.settings.probe_seconds if last is not None and last.ok else PROBE_AGAIN_SECONDS
            if self._probe_failures.get(key):
                pause = PROBE_AGAIN_SECONDS
            left = 0.0 if last is None else last.at + pause - time.monotonic()
            if left > 0:
                self.queue.add(key, left)
            else:
                self._probing.add(key)
                self._start(self._probe(key, outcome.probe, outcome.probe_names))

    async def _ask(self, key: Key, questions: list[Question]) -> None:
        model = self.world.get(MODELS, *key)
        ref = ((model or {}).get("spec") or {}).get("model", {}).get("tokenSecretRef")
        if ref is None:
            self.world.tokens.pop(key, None)
        elif self.world.tokens.get(key) != (token := await self._token(key[0], ref)):
            self.world.tokens[key] = token
            self.queue.add(key)
            return
        for question in questions:
            self.world.desk.request(question, lambda: self.queue.add(key))

    async def _token(self, namespace: str, ref: dict[str, str]) -> Token:
        """The token, or nothing and why: what needs none is fetched all the same, and a hub's refusal is told with it."""
        name, key = ref["name"], ref.get("key", "token")
        try:
            secret = await self.kube.get(SECRETS, namespace, name)
        except KubeError as error:
            logger.warning("secret %s/%s cannot be read: %s", namespace, name, error)
            what = {
                403: "may not be read by the operator: name it in the chart's tokenSecrets",
                404: "does not exist",
            }.get(error.status, f"could not be read: {error}")
            return Token(name, key, problem=f"Secret {name!r} of tokenSecretRef {what}")
        data = secret.get("data") or {}
        if not data.get(key):
            there = ", ".join(sorted(data)) or "none"
            return Token(name, key, problem=f"Secret {name!r} has no key {key!r} (there are: {there})")
        return Token(name, key, base64.b64decode(data[key]).decode("utf-8", "replace").strip())

    async def _follow(self, key: Key, follow: Follow) -> None:
        try:
            text = await self.kube.logs(follow.namespace, follow.pod, follow.container, 5)
        except KubeError:
            return  # the pod is just starting or just gone
        progress = read_progress(text)
        if progress is not None and progress != self.world.progress.get(key):
            self.world.progress[key] = progress
            self.queue.add(key)

    async def _probe(self, key: Key, url: str, served: tuple[str, ...]) -> None:
        try:
            ok, message = await self.reader.answers(url, served)
        finally:
            self._probing.discard(key)
        last = self.world.probes.get(key)
        now = time.monotonic()
        failures = self._probe_failures[key] = 0 if ok else self._probe_failures.get(key, 0) + 1
        if not ok and last is not None and last.ok and failures < PROBE_FAILURES:
            # One answer lost on the way is no outage.
            self.world.probes[key] = Probe(True, last.message, now)
        else:
            self.world.probes[key] = Probe(ok, message, now)
        if last is None or (last.ok, last.message) != (ok, message):
            self.queue.add(key)
        else:
            pause = self.settings.probe_seconds if ok else PROBE_AGAIN_SECONDS
            self.queue.add(key, pause * random.uniform(0.9, 1.1))

    async def _device_memory(self, model: Manifest) -> None:
        """Memory of the largest GPU that the nodes tell of, asked for only where a GPU model needs it."""
        resources = (model.get("spec") or {}).get("resources") or {}
        if (
            resources.get("device", "gpu") != "gpu"
            or resources.get("memoryPerDevice")
            or not self.world.capabilities.nodes
        ):
            return
        if time.monotonic() - self._memory_at < NODE_SECONDS:
            return
        self._memory_at = time.monotonic()
        try:
            listed = await self.kube.list(NODES, selector="nvidia.com/gpu.memory", cached=True)
        except KubeError as error:
            logger.info("nodes cannot be listed: %s", error)
            return
        sizes = [item["metadata"]["labels"].get("nvidia.com/gpu.memory", "") for item in listed["items"]]
        known = [int(size) << 20 for size in sizes if size.isdigit()]
        self.world.device_memory = max(known, default=None)


def _shares(model: Manifest) -> bool:
    return bool(((model.get("spec") or {}).get("storage") or {}).get("existingClaim"))


def worth_telling(condition: dict[str, Any], before: dict[str, Any] | None) -> bool:
    """Whether a transition makes an Event: steps on the way are left out, and Ready=False that another one explains."""
    if condition["status"] == "Unknown" or condition["reason"] in QUIET_REASONS:
        return False
    if condition["type"] == ACCEPTED and condition["status"] == "True" and before is None:
        return False
    if condition["type"] == READY and condition["status"] == "False":
        return before is not None and before["status"] == "True"
    return True


def read_progress(text: str) -> Progress | None:
    """The last progress line of the puller's log."""
    for line in reversed(text.splitlines()):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "progress" and event.get("bytesTotal"):
            eta = event.get("eta")
            return Progress(
                int(event.get("bytesDone", 0)),
                int(event["bytesTotal"]),
                int(event.get("rate", 0)),
                None if eta is None else int(eta),
            )
    return None
