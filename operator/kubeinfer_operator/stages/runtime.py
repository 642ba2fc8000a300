"""The runtime: which template, how many replicas, and do they serve?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kubeinfer_operator import names
from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec
from kubeinfer_operator.builders import policy
from kubeinfer_operator.builders import runtime as build
from kubeinfer_operator.conditions import RUNTIME_READY, Finding, no, unknown, yes
from kubeinfer_operator.kube import DEPLOYMENTS, REVISIONS, Manifest
from kubeinfer_operator.outcome import Apply, Outcome
from kubeinfer_operator.pods import is_leaving, is_ready, why_ended
from kubeinfer_operator.stages import revisions
from kubeinfer_operator.stages.accept import owned_by
from kubeinfer_operator.stages.weights import WeightsState
from kubeinfer_operator.store import key_of
from kubeinfer_operator.world import World


@dataclass(frozen=True, slots=True)
class RuntimeState:
    """``wanted`` replicas, ``ready`` pods, all of them of the wanted revision (``complete``) or not; whether that one ``has_served``, which is
    complete and has answered."""

    wanted: int
    pods: int
    ready: int
    complete: bool
    rolled_back: str | None = None
    revision: str | None = None
    has_served: bool = False


def wanted_replicas(model: Manifest, spec: InferenceModelSpec, world: World) -> int:
    """How many replicas there should be. With autoscaling the Deployment itself is the memory."""
    key = key_of(model)
    if spec.suspend:
        return 0
    scaling = spec.autoscaling
    if scaling is None:
        return spec.replicas
    deployment = world.get(DEPLOYMENTS, *key)
    now = max(1, scaling.min_replicas)
    if deployment is not None:
        now = int(deployment["spec"].get("replicas", now))
        if now == 0 and scaling.min_replicas == 0 and key not in world.decisions:
            return 0
    wanted = world.decisions.get(key, now)
    return min(max(wanted, scaling.min_replicas), scaling.max_replicas)


def run_runtime(
    model: Manifest, spec: InferenceModelSpec, world: World, weights: WeightsState, out: Outcome
) -> RuntimeState:
    """The stage: writes what runs the model, adds the finding RuntimeReady."""
    namespace, name = key_of(model)
    deployment = world.get(DEPLOYMENTS, namespace, name)
    records = revisions.records_of(world, model)
    deployed = revisions.revision_of(deployment)
    replicas = wanted_replicas(model, spec, world)
    generation = int(model["metadata"].get("generation", 1))
    owner = names.owner_reference(model)

    if not (weights.planned and weights.ready):
        record = world.get(REVISIONS, namespace, names.revision_name(name, deployed)) if deployed else None
        if deployed is not None and record is not None:
            # The spec has moved on, its weights are not here: what serves goes on serving.
            out.actions.append(
                Apply(
                    build.deployment(
                        name,
                        namespace,
                        spec,
                        record["data"]["template"],
                        deployed,
                        replicas,
                        owner,
                        weights.bytes_total,
                    )
                )
            )
        return observe(model, world, out, replicas, deployed, held=True)

    if spec.suspend and deployment is None:
        out.findings.append(
            unknown(RUNTIME_READY, "Suspended", "nothing is started while spec.suspend is true")
        )
        return observe(model, world, out, replicas, None, held=True)

    wanted = build.template_key(name, spec, weights.wanted)
    record = world.get(REVISIONS, namespace, names.revision_name(name, wanted))
    if record is not None and not owned_by(record, model):
        record = None
    out.actions += [
        Apply(policy.service_account(name, namespace, owner)),
        Apply(policy.network_policy(name, namespace, spec, owner)),
        Apply(build.service(name, namespace, owner)),
    ]
    if world.capabilities.disruption_budgets:
        out.actions.append(Apply(policy.disruption_budget(name, namespace, owner)))
    if record is None:
        template = build.pod_template(
            name, spec, weights.wanted, world.settings, weight_bytes=weights.bytes_total
        )
        out.actions.append(Apply(build.revision_record(name, namespace, template, wanted, generation, owner)))
    else:
        template = record["data"]["template"]

    failure = revisions.failure_of(record)
    good = revisions.last_good(records, wanted)
    if (
        failure is None
        and deployment is not None
        and deployed == wanted
        and record is not None
        # A pod that crashes later is no failed change; going back to what has served once is a change.
        and (not revisions.has_served(record) or revisions.rolls_out(deployment))
        and good is not None
    ):
        failure = _check_failed(model, world, deployment, record, out)
    rolled_back = None
    runs = wanted
    if failure is not None and good is not None:
        rolled_back, runs = failure.message, str(revisions.revision_of(good))
        template = good["data"]["template"]
    out.actions.append(
        Apply(build.deployment(name, namespace, spec, template, runs, replicas, owner, weights.bytes_total))
    )
    state = observe(model, world, out, replicas, runs, rolled_back=rolled_back)
    if (
        record is not None
        and state.complete
        and state.ready
        and rolled_back is None
        and _answered(model, world)
    ):
        state = replace(state, has_served=True)
        revisions.mark(record, revisions.GOOD, out)
        kept = {wanted, str(deployed)}
        if good is not None:
            kept.add(str(revisions.revision_of(good)))
        revisions.prune(records, kept, out)
    return state


def _answered(model: Manifest, world: World) -> bool:
    probe = world.probes.get(key_of(model))
    return probe is not None and probe.ok


def _check_failed(
    model: Manifest, world: World, deployment: Manifest, record: Manifest, out: Outcome
) -> revisions.Failure | None:
    """Whether the revision that is being rolled out has to be taken back now."""
    pods = revisions.runtime_pods(world, model, revisions.revision_of(record))
    gone = revisions.given_up(deployment)
    if not gone and not revisions.crashing(pods):
        return None
    found = revisions.pods_problem(pods)
    why = found.message if found else "its pods did not become ready within spec.rollout.progressDeadline"
    revisions.mark(record, revisions.FAILED, out, message=why)
    return revisions.Failure(why)


def observe(
    model: Manifest,
    world: World,
    out: Outcome,
    wanted: int,
    revision: str | None,
    *,
    held: bool = False,
    rolled_back: str | None = None,
) -> RuntimeState:
    """What the pods say. Adds RuntimeReady and the figures of the status; writes nothing."""
    namespace, name = key_of(model)
    deployment = world.get(DEPLOYMENTS, namespace, name)
    pods = revisions.runtime_pods(world, model)
    staying = [pod for pod in pods if not is_leaving(pod)]
    ready = [pod for pod in staying if is_ready(pod)]
    current = [pod for pod in ready if revisions.revision_of(pod) == revision]
    ended = sorted(
        revisions.runtime_pods(world, model, revision, ended=True),
        key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")),
    )
    complete = len(current) >= wanted and len(staying) == len(current) and not held
    out.status |= {
        "replicas": len(staying),
        "readyReplicas": len(ready),
        "ready": f"{len(ready)}/{wanted}",
        "selector": names.selector_text(name),
    }
    if deployment is not None or not held:
        out.status["endpoint"] = build.endpoint(name, namespace)
    if revision is not None:
        out.status["revision"] = revision
    out.findings.append(
        _finding(deployment, staying, current, ready, wanted, complete, revision, held, rolled_back, ended)
    )
    return RuntimeState(wanted, len(staying), len(ready), complete, rolled_back, revision)


def _finding(
    deployment: Manifest | None,
    staying: list[Manifest],
    current: list[Manifest],
    ready: list[Manifest],
    wanted: int,
    complete: bool,
    revision: str | None,
    held: bool,
    rolled_back: str | None,
    ended: list[Manifest],
) -> Finding:
    if rolled_back is not None:
        return no(
            RUNTIME_READY,
            "RolledBack",
            f"the change failed and was taken back, the revision before serves: {rolled_back}. "
            "Change the spec, or set another spec.rollout.restartedAt to try the same again.",
        )
    if deployment is None and held:
        return unknown(RUNTIME_READY, "Pending", "waiting for the weights")
    if held:
        text = "the wanted revision waits for its plan and weights"
        return no(RUNTIME_READY, "Updating", text + (", the one before serves" if ready else ""))
    if wanted == 0:
        return yes(RUNTIME_READY, "ScaledToZero", "no replica is wanted")
    if complete:
        return yes(RUNTIME_READY, "Running", f"{len(current)} of {wanted} replicas are ready")
    new = [pod for pod in staying if revisions.revision_of(pod) == revision]
    found = revisions.pods_problem(new)
    if found is not None:
        return no(RUNTIME_READY, found.reason, found.message)
    quota = _replica_failure(deployment)
    if quota is not None and len(new) < wanted:
        return no(RUNTIME_READY, "PodCreationFailed", quota)
    figures = f"{len(current)} of {wanted} replicas are ready"
    if ended and not ready:
        figures += f"; {why_ended(ended[-1])}"
    if len(ready) > len(current):
        return no(RUNTIME_READY, "Updating", figures + ", the revision before serves meanwhile")
    if deployment is not None and revisions.given_up(deployment):
        return no(
            RUNTIME_READY,
            "ProgressDeadlineExceeded",
            figures
            + ": not ready within spec.rollout.progressDeadline; the pods' logs say what they wait for",
        )
    return no(RUNTIME_READY, "Starting" if not current else "Scaling", figures)


def _replica_failure(deployment: Manifest | None) -> str | None:
    conditions: list[dict[str, Any]] = ((deployment or {}).get("status") or {}).get("conditions") or []
    for condition in conditions:
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            return str(condition.get("message", ""))
    return None
