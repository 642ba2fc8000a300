"""Which pod template to run: the one that the spec asks for, or the last good one after that has failed.

A ControllerRevision records each template when it is first rolled out, and what became of it. The records are all that
the operator remembers: it can be killed between any two writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kubeinfer_operator import names
from kubeinfer_operator.kube import PODS, REVISIONS, Manifest
from kubeinfer_operator.outcome import Annotate, Delete, Outcome
from kubeinfer_operator.pods import Problem, container_status, has_ended, is_leaving, is_ready, problem
from kubeinfer_operator.store import key_of
from kubeinfer_operator.world import World

GOOD = "good"
FAILED = "failed"
CRASHES = 3


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the wanted revision was taken back."""

    message: str


def revision_of(obj: Manifest | None) -> str | None:
    """The revision that an object is labelled with."""
    return (obj["metadata"].get("labels") or {}).get(names.LABEL_REVISION) if obj is not None else None


def _outcome(record: Manifest) -> str | None:
    return (record["metadata"].get("labels") or {}).get(names.LABEL_OUTCOME)


def has_served(record: Manifest | None) -> bool:
    """Whether a template has been rolled out whole, and answered."""
    return record is not None and _outcome(record) == GOOD


def records_of(world: World, model: Manifest) -> list[Manifest]:
    """Records of this model (by uid), the newest first."""
    namespace, name = key_of(model)
    uid = model["metadata"]["uid"]
    mine = [
        record
        for record in world.of_model(REVISIONS, namespace, name)
        if any(ref.get("uid") == uid for ref in record["metadata"].get("ownerReferences") or [])
    ]
    return sorted(mine, key=lambda r: (int(r.get("revision", 0)), r["metadata"]["name"]), reverse=True)


def folder_of(record: Manifest) -> str | None:
    """The folder below the models' directory that a recorded template reads."""
    arguments = record["data"]["template"]["spec"]["containers"][0]["args"]
    root = names.MODELS_DIR + "/"
    return (
        str(arguments[0]).removeprefix(root).partition("/")[0] if str(arguments[0]).startswith(root) else None
    )


def failure_of(record: Manifest | None) -> Failure | None:
    """The failure recorded for a template. It stands until the spec asks for another template and that one serves."""
    if record is None or _outcome(record) != FAILED:
        return None
    notes = record["metadata"].get("annotations") or {}
    return Failure(notes.get(names.ANNOTATION_MESSAGE, "it did not become ready"))


def last_good(records: list[Manifest], but: str) -> Manifest | None:
    """The newest record that once served, other than ``but``."""
    return next((r for r in records if has_served(r) and revision_of(r) != but), None)


def mark(record: Manifest, outcome: str, out: Outcome, *, message: str = "") -> None:
    """Write down what became of a template."""
    if _outcome(record) == outcome and outcome == GOOD:
        return
    namespace, name = key_of(record)
    notes: dict[str, Any] = {names.ANNOTATION_MESSAGE: None}
    if outcome == FAILED:
        notes = {names.ANNOTATION_MESSAGE: message[:1000]}
    out.actions.append(
        Annotate(REVISIONS, namespace, name, {"labels": {names.LABEL_OUTCOME: outcome}, "annotations": notes})
    )


def prune(records: list[Manifest], keep: set[str], out: Outcome) -> None:
    """Forget records that nothing can go back to."""
    for record in records:
        if revision_of(record) not in keep and not is_leaving(record):
            namespace, name = key_of(record)
            out.actions.append(Delete(REVISIONS, namespace, name, record["metadata"]["uid"]))


def runtime_pods(
    world: World, model: Manifest, revision: str | None = None, *, ended: bool = False
) -> list[Manifest]:
    """Runtime pods of a model, of one revision if given. Those that have ended (evicted, a node that shut down) stay listed until
    somebody deletes them, though others take their place: they are left out, or ``ended`` are the only ones."""
    namespace, name = key_of(model)
    pods = [
        pod
        for pod in world.of_model(PODS, namespace, name)
        if (pod["metadata"].get("labels") or {}).get(names.LABEL_COMPONENT) == names.COMPONENT_RUNTIME
        and has_ended(pod) == ended
    ]
    return [pod for pod in pods if revision is None or revision_of(pod) == revision]


def pods_problem(pods: list[Manifest]) -> Problem | None:
    """The problem of the first pod that has one; fatal ones first."""
    found = [p for pod in pods if not is_leaving(pod) and (p := problem(pod, "runtime")) is not None]
    return next((p for p in found if p.fatal), found[0] if found else None)


def crashing(pods: list[Manifest]) -> bool:
    """Whether a pod that is not ready has ended again and again."""
    for pod in pods:
        status = container_status(pod, "runtime")
        if (
            status is not None
            and int(status.get("restartCount", 0)) >= CRASHES
            and not is_ready(pod)
            and not is_leaving(pod)
        ):
            return True
    return False


def _progress(deployment: Manifest) -> str | None:
    """The reason of the Deployment's condition Progressing, once its controller has seen the last change."""
    status = deployment.get("status", {})
    if status.get("observedGeneration", 0) < deployment["metadata"].get("generation", 0):
        return None
    return next((c.get("reason") for c in status.get("conditions") or [] if c["type"] == "Progressing"), None)


def given_up(deployment: Manifest) -> bool:
    """Whether the Deployment controller has waited out the progress deadline."""
    return _progress(deployment) == "ProgressDeadlineExceeded"


def rolls_out(deployment: Manifest) -> bool:
    """Whether the Deployment controller has begun with the template and not yet had all its pods ready."""
    return _progress(deployment) not in (None, "NewReplicaSetAvailable")
