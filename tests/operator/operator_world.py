"""A cluster without a server: the world that reconcile looks at, and the few controllers that act on what it writes."""

from __future__ import annotations

import copy
import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

from kubeinfer_operator import names
from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec
from kubeinfer_operator.config import Settings
from kubeinfer_operator.hub import Answer, HubDesk, Question
from kubeinfer_operator.kube import (
    CLAIMS,
    CLASSES,
    DEPLOYMENTS,
    JOBS,
    KINDS,
    MODELS,
    PODS,
    REVISIONS,
    SERVICES,
    Kind,
    Manifest,
)
from kubeinfer_operator.outcome import Annotate, Apply, Delete, Outcome
from kubeinfer_operator.plan import Hub
from kubeinfer_operator.reconcile import reconcile
from kubeinfer_operator.world import Probe, World
from kubeinfer_operator.writer import difference, is_so_already, stamped

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
HUB = Hub(COMMIT, {"model.safetensors": 270_000_000, "config.json": 700}, CONFIG)


class ScriptedDesk(HubDesk):
    """Answers by repository, at once."""

    def __init__(self, answers: dict[str, Answer | None]) -> None:
        super().__init__(lambda question: HUB)
        self.answers = answers
        self.asked: list[Question] = []

    def look(self, question: Question) -> Answer | None:
        self.asked.append(question)
        return self.answers.get(question[0].repo_uri, HUB)

    def last(self, question: Question) -> Answer | None:
        return self.look(question)


def with_defaults(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec as the API server stores it."""
    return InferenceModelSpec.model_validate(spec).model_dump(by_alias=True, exclude_none=True)


class Cluster:
    """Objects in a :class:`World`, a clock, and hands that do what kubelet and controllers would."""

    def __init__(
        self, settings: Settings | None = None, answers: dict[str, Answer | None] | None = None
    ) -> None:
        self.desk = ScriptedDesk(answers if answers is not None else {})
        self.world = World(settings=settings or Settings(), desk=self.desk)
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self._uids = itertools.count(1)
        self._versions = itertools.count(1)
        self.writes: list[tuple[str, str]] = []
        self.add(CLASSES, {"metadata": {"name": "standard", "annotations": {
            "storageclass.kubernetes.io/is-default-class": "true"}}, "volumeBindingMode": "WaitForFirstConsumer"})  # fmt: skip

    def add(self, kind: Kind, obj: Manifest) -> Manifest:
        obj = copy.deepcopy(obj)
        obj.setdefault("kind", kind.kind)
        meta = obj["metadata"]
        meta.setdefault("uid", f"uid-{next(self._uids)}")
        meta.setdefault("creationTimestamp", self.now.strftime("%Y-%m-%dT%H:%M:%SZ"))
        meta["resourceVersion"] = str(next(self._versions))
        if kind is MODELS:
            self.world.put_model(obj)
        else:
            self.world.caches[kind].put(obj)
        return obj

    def model(self, name: str = "smol", namespace: str = "default", **spec: Any) -> Manifest:
        spec.setdefault("model", {"uri": "hf://acme/smol"})
        spec.setdefault("resources", {"device": "cpu"})
        meta = {"name": name, "namespace": namespace, "generation": 1}
        return self.add(MODELS, {"metadata": meta, "spec": with_defaults(spec)})

    def current(self, name: str = "smol", namespace: str = "default") -> Manifest:
        found = self.world.get(MODELS, namespace, name)
        assert found is not None
        return found

    def edit(self, name: str = "smol", **spec: Any) -> None:
        """Change fields of the spec, as ``kubectl apply`` would."""
        model = copy.deepcopy(self.current(name))
        model["spec"] = with_defaults({**model["spec"], **spec})
        model["metadata"]["generation"] += 1
        self.add(MODELS, model)

    def reconcile(self, name: str = "smol", stop_after: int | None = None) -> Outcome:
        """Once; ``stop_after`` writes the operator is killed."""
        model = self.current(name)
        out = reconcile(copy.deepcopy(model), self.world, self.now)
        budget = len(out.actions) + 1 if stop_after is None else stop_after
        for action in out.actions[:budget]:
            self._perform(action)
        if budget > len(out.actions):
            model = copy.deepcopy(model)
            if difference(model.get("status") or {}, out.status):
                model["status"] = {k: v for k, v in out.status.items() if v is not None}
                self.writes.append(("status", name))
                self.add(MODELS, model)
        return out

    def _perform(self, action: Apply | Delete | Annotate) -> None:
        if isinstance(action, Apply):
            kind = KINDS[action.manifest["kind"]]
            wanted = stamped(copy.deepcopy(action.manifest))
            live = self.world.get(kind, wanted["metadata"]["namespace"], wanted["metadata"]["name"])
            if live is not None and (kind in (JOBS, REVISIONS) or is_so_already(wanted, live)):
                return
            if live is not None:
                wanted["status"] = live.get("status", {})
                wanted["metadata"] = {**live["metadata"], **wanted["metadata"]}
                for label in ("generation",):
                    wanted["metadata"][label] = live["metadata"].get(label, 1) + 1
            if kind is SERVICES:
                wanted["spec"]["clusterIP"] = "10.0.0.7"
            self.writes.append(("apply", f"{wanted['kind']}/{wanted['metadata']['name']}"))
            self.add(kind, wanted)
        elif isinstance(action, Delete):
            self.writes.append(("delete", f"{action.kind.kind}/{action.name}"))
            self.world.caches[action.kind].drop((action.namespace, action.name))
        else:
            live = copy.deepcopy(self.world.get(action.kind, action.namespace, action.name))
            assert live is not None
            for key, value in action.metadata.items():
                if isinstance(value, dict):
                    merged = {**(live["metadata"].get(key) or {}), **value}
                    live["metadata"][key] = {k: v for k, v in merged.items() if v is not None}
                else:
                    live["metadata"][key] = value
            self.writes.append(("annotate", f"{action.kind.kind}/{action.name}"))
            self.add(action.kind, live)

    def settle(self, name: str = "smol", rounds: int = 12) -> Outcome:
        """Reconcile until nothing is written any more."""
        for _ in range(rounds):
            before = len(self.writes)
            out = self.reconcile(name)
            if len(self.writes) == before:
                return out
        raise AssertionError(f"does not settle: {self.writes[-10:]}")

    # The other controllers

    def jobs(self) -> list[Manifest]:
        return list(self.world.caches[JOBS])

    def finish_job(self, job: Manifest | None = None) -> None:
        job = copy.deepcopy(job or self.jobs()[0])
        job["status"] = {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}
        self.add(JOBS, job)

    def fail_job(self, reason: str, message: str = "no", job: Manifest | None = None) -> None:
        """The last of a Job's pods fails with the puller's reason."""
        job = copy.deepcopy(job or self.jobs()[0])
        stamp = self.now.strftime("%Y-%m-%dT%H:%M:%SZ")
        job["status"] = {
            "failed": 3,
            "conditions": [
                {
                    "type": "Failed",
                    "status": "True",
                    "lastTransitionTime": stamp,
                    "message": "BackoffLimitExceeded",
                }
            ],
        }
        self.add(JOBS, job)
        self.puller_pod(job, {"terminated": {"exitCode": 20, "message": f'{{"event": "error", "reason": "{reason}", "message": "{message}"}}'}})  # fmt: skip

    def puller_pod(self, job: Manifest, state: dict[str, Any]) -> Manifest:
        labels = {**job["metadata"]["labels"], "job-name": job["metadata"]["name"]}
        meta = {
            "name": job["metadata"]["name"] + "-x",
            "namespace": job["metadata"]["namespace"],
            "labels": labels,
        }
        status = {
            "containerStatuses": [{"name": "pull", "state": state, "restartCount": 0, "image": "puller"}]
        }
        return self.add(PODS, {"metadata": meta, "status": status})

    def deployment(self, name: str = "smol") -> Manifest | None:
        return self.world.get(DEPLOYMENTS, "default", name)

    def run_pods(self, name: str = "smol", *, state: str = "ready") -> None:
        """What the Deployment controller and the kubelet make of the Deployment; a failing rollout keeps the old pods."""
        deployment = self.deployment(name)
        assert deployment is not None
        template = deployment["spec"]["template"]
        revision = template["metadata"]["labels"][names.LABEL_REVISION]
        wanted = deployment["spec"]["replicas"]
        old = [
            p
            for p in self.world.of_model(PODS, "default", name)
            if "runtime" in p["metadata"]["labels"].values()
        ]
        for pod in old:
            if state == "ready" or pod["metadata"]["labels"][names.LABEL_REVISION] == revision:
                self.world.caches[PODS].drop(("default", pod["metadata"]["name"]))
        for number in range(wanted):
            meta = {
                "name": f"{name}-{revision}-{number}",
                "namespace": "default",
                "labels": template["metadata"]["labels"],
            }
            self.add(PODS, {"metadata": meta, "status": pod_status(state)})

    def answers(self, ok: bool = True, name: str = "smol") -> None:
        self.world.probes[("default", name)] = Probe(ok, "answers" if ok else "refused", 0.0)

    def serve(self, name: str = "smol") -> None:
        """All the way from what there is to an answering model."""
        self.settle(name)
        for job in self.jobs():
            if not job.get("status"):
                self.finish_job(job)
        self.settle(name)
        self.run_pods(name)
        self.answers(name=name)
        self.settle(name)

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def pod_status(state: str) -> dict[str, Any]:
    ready = {"type": "Ready", "status": "True" if state == "ready" else "False"}
    runtime: dict[str, Any] = {
        "name": "runtime",
        "restartCount": 0,
        "image": "runtime:1",
        "ready": state == "ready",
    }
    if state == "ready":
        runtime["state"] = {"running": {}}
    elif state == "crash":
        runtime |= {
            "restartCount": 4,
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {
                "terminated": {"exitCode": 1, "message": "loading\nOptionError: max_model_len is too large\n"}
            },
        }
    elif state == "image":
        runtime["state"] = {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}
    elif state == "unschedulable":
        scheduled = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/1 nodes: Insufficient cpu.",
        }
        return {"conditions": [ready, scheduled]}
    else:
        runtime["state"] = {"running": {}}
    return {"conditions": [ready], "containerStatuses": [runtime], "podIP": "10.1.0.1"}


def condition(model: Manifest, kind: str) -> dict[str, Any]:
    found = [c for c in model["status"]["conditions"] if c["type"] == kind]
    assert len(found) == 1, model["status"]
    return found[0]


def claim(name: str, phase: str = "Bound") -> Manifest:
    return {
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"resources": {"requests": {"storage": "10Gi"}}},
        "status": {"phase": phase},
    }


__all__ = [
    "CLAIMS",
    "COMMIT",
    "CONFIG",
    "HUB",
    "Cluster",
    "claim",
    "condition",
    "pod_status",
    "with_defaults",
]
