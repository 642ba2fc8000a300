"""One model, once: from what is wanted and what is observed to writes and a status. Pure, idempotent, level-triggered."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from kubeinfer_operator import names
from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec
from kubeinfer_operator.builders.arguments import names_in
from kubeinfer_operator.builders.weights import owns_claim
from kubeinfer_operator.conditions import (
    ACCEPTED,
    PLANNED,
    READY,
    RUNTIME_READY,
    WEIGHTS_READY,
    Finding,
    find,
    merge,
    no,
    yes,
)
from kubeinfer_operator.kube import CLAIMS, DEPLOYMENTS, JOBS, REVISIONS, SERVICES, Kind, Manifest
from kubeinfer_operator.outcome import Delete, Outcome
from kubeinfer_operator.pods import is_ready
from kubeinfer_operator.stages.accept import accept, owned_by
from kubeinfer_operator.stages.jobs import others_jobs
from kubeinfer_operator.stages.revisions import revision_of, runtime_pods
from kubeinfer_operator.stages.runtime import RuntimeState, observe, run_runtime
from kubeinfer_operator.stages.weights import WeightsState, fetch_weights
from kubeinfer_operator.store import key_of
from kubeinfer_operator.world import World


def reconcile(model: Manifest, world: World, now: datetime) -> Outcome:
    """What to write and what the status is. Writes that change nothing are the writer's to skip."""
    out = Outcome()
    if model["metadata"].get("deletionTimestamp"):
        return out
    namespace, name = key_of(model)
    spec, accepted = accept(model, world)
    out.findings.append(accepted)
    out.spec = spec
    if spec is None:
        # Nothing is written for a spec that cannot be understood; what serves goes on serving.
        deployment = world.get(DEPLOYMENTS, namespace, name)
        mine = deployment if deployment is not None and owned_by(deployment, model) else None
        wanted = int(mine["spec"].get("replicas", 0)) if mine else 0
        revision = (mine["metadata"].get("labels") or {}).get(names.LABEL_REVISION) if mine else None
        runtime = observe(model, world, out, wanted, revision, held=True)
        _ready(model, world, runtime, out)
    else:
        weights = fetch_weights(model, spec, world, now, out)
        runtime = run_runtime(model, spec, world, weights, out)
        _ready(model, world, runtime, out)
        # What was rolled back to, and what has never served, may need what an earlier spec asked for.
        if runtime.has_served:
            _collect(model, spec, world, weights, out)
    _finish(model, out, now)
    return out


def refused(model: Manifest, out: Outcome, kind: Kind, message: str, now: datetime) -> None:
    """Say in the status what the API server will not have (a quota, a policy, an admission webhook)."""
    stage = WEIGHTS_READY if kind in (CLAIMS, JOBS) else RUNTIME_READY
    out.findings.insert(0, no(stage, "ApplyRefused", message))
    ready = next(finding for finding in out.findings if finding.type == READY)
    blocking = _blocking(out.findings)
    if ready.status != "True" and blocking is not None:
        out.findings.remove(ready)
        out.findings.append(no(READY, blocking.reason, blocking.message))
    _finish(model, out, now)


def _names_served(model: Manifest, world: World) -> tuple[str, ...]:
    """Names that all pods answer to which are ready: while names change, not those that the spec asks for."""
    namespace, name = key_of(model)
    revisions = {revision_of(pod) for pod in runtime_pods(world, model) if is_ready(pod)}
    records = [world.get(REVISIONS, namespace, names.revision_name(name, str(found))) for found in revisions]
    served = [
        set(names_in(record["data"]["template"]["spec"]["containers"][0]["args"]))
        for record in records
        if record is not None
    ]
    return tuple(sorted(set.intersection(*served))) if served else ()


def _ready(model: Manifest, world: World, runtime: RuntimeState, out: Outcome) -> None:
    """Ready only after the model has answered through its Service, and while it does."""
    namespace, name = key_of(model)
    if runtime.ready == 0:
        out.findings.append(_not_ready(runtime, out))
        return
    service = world.get(SERVICES, namespace, name)
    address = (service or {}).get("spec", {}).get("clusterIP")
    probe = world.probes.get((namespace, name))
    if address and address != "None":
        out.probe = f"http://{f'[{address}]' if ':' in address else address}:{names.RUNTIME_PORT}/v1/models"
        out.probe_names = _names_served(model, world)
    if probe is None:
        before = find((model.get("status") or {}).get("conditions") or [], READY)
        if before is not None and before["status"] == "True":
            out.findings.append(yes(READY, before["reason"], before.get("message", "")))
        else:
            out.findings.append(
                no(READY, "Probing", "the pods are ready, the answer through the Service is awaited")
            )
    elif not probe.ok:
        out.findings.append(
            no(READY, "NotAnswering", f"the pods are ready, but the Service does not answer: {probe.message}")
        )
    elif runtime.rolled_back is not None:
        out.findings.append(
            yes(READY, "ServingLastGood", "answers with the revision before the change that failed")
        )
    else:
        out.findings.append(yes(READY, "Answering", probe.message))


def _not_ready(runtime: RuntimeState, out: Outcome) -> Finding:
    if runtime.wanted == 0 and runtime.revision is not None:
        return no(
            READY,
            "ScaledToZero",
            "no replica runs; a request through the gateway wakes a model that is autoscaled from 0",
        )
    blocking = _blocking(out.findings)
    if blocking is not None:
        return no(READY, blocking.reason, blocking.message)
    return no(READY, "Starting", "no replica is ready yet")


def _blocking(findings: list[Finding]) -> Finding | None:
    """The first thing in a model's life that is not so."""
    for kind in (ACCEPTED, PLANNED, WEIGHTS_READY, RUNTIME_READY):
        found = next((f for f in findings if f.type == kind), None)
        if found is not None and found.status != "True" and found.reason != "FetchedAtStart":
            return found
    return None


_WAITING = (
    "Resolving",
    "Pending",
    "Downloading",
    "ClaimPending",
    "Starting",
    "Updating",
    "Scaling",
    "Probing",
    "NotPlanned",
)


def _phase(spec: InferenceModelSpec | None, findings: dict[str, Finding], *, fetching: bool) -> str:
    ready = findings[READY]
    blocking = _blocking(list(findings.values()))
    if ready.status == "True":
        if blocking is None:
            return "Ready"
        return "Updating" if blocking.reason in _WAITING else "Degraded"
    if spec is not None and spec.suspend:
        return "Suspended"
    if ready.reason == "ScaledToZero":
        return "Idle"
    if blocking is None:
        return "Starting"
    if blocking.type == WEIGHTS_READY and fetching:
        return "Downloading"  # again, perhaps; the condition says what went wrong before
    if blocking.reason not in _WAITING:
        return "Failed" if blocking.status == "False" else "Pending"
    return {PLANNED: "Planning", WEIGHTS_READY: "Downloading", RUNTIME_READY: "Starting"}.get(
        blocking.type, "Pending"
    )


def _finish(model: Manifest, out: Outcome, now: datetime) -> None:
    """Conditions, phase and message into the status; what was not looked at is kept."""
    before: dict[str, Any] = model.get("status") or {}
    generation = int(model["metadata"].get("generation", 1))
    first: dict[str, Finding] = {}
    for finding in out.findings:
        first.setdefault(finding.type, finding)
    blocking = _blocking(out.findings)
    out.status["phase"] = _phase(out.spec, first, fetching=out.follow is not None)
    if blocking is not None:
        out.status["message"] = f"{blocking.type}: {blocking.message}"[:512]
    elif first[READY].status != "True":
        out.status["message"] = first[READY].message[:512]
    out.status["observedGeneration"] = generation
    out.status["conditions"] = merge(before.get("conditions") or [], out.findings, generation, now)
    for kept in ("weights", "plan") if out.spec is None else ("plan",):
        if kept not in out.status and before.get(kept) is not None:
            out.status[kept] = before[kept]


def _collect(
    model: Manifest, spec: InferenceModelSpec, world: World, weights: WeightsState, out: Outcome
) -> None:
    """Once the wanted revision serves: take away what an earlier spec needed."""
    namespace, name = key_of(model)
    for job in others_jobs(model, world, weights.jobs):
        delete = Delete(JOBS, namespace, job["metadata"]["name"], job["metadata"]["uid"])
        if delete not in out.actions:
            out.actions.append(delete)
    claim = world.get(CLAIMS, namespace, names.claim_name(name))
    if claim is not None and not owns_claim(spec) and owned_by(claim, model):
        meta = claim["metadata"]
        if not meta.get("deletionTimestamp"):
            out.actions.append(Delete(CLAIMS, namespace, meta["name"], meta["uid"]))
