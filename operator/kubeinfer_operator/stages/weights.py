"""Weights: which hub, which commit, does it fit, and is it here? Everything follows from objects and answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kubeinfer.weights.errors import format_bytes
from kubeinfer.weights.uri import ModelSource
from kubeinfer_operator import names
from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec
from kubeinfer_operator.builders.job import job_name, pull_job
from kubeinfer_operator.builders.weights import (
    Artifact,
    artifact_of,
    claim_of,
    excluded,
    owns_claim,
    placement,
    sources_of,
    storage_kind,
)
from kubeinfer_operator.conditions import (
    PLANNED,
    WEIGHTS_READY,
    find,
    no,
    read_stamp,
    unknown,
    yes,
)
from kubeinfer_operator.hub import HubError, Question
from kubeinfer_operator.kube import CLAIMS, DEPLOYMENTS, JOBS, MODELS, PODS, Manifest
from kubeinfer_operator.outcome import Annotate, Apply, Delete, Follow, Outcome
from kubeinfer_operator.plan import Hub, plan
from kubeinfer_operator.pods import container_status, has_ended, is_leaving, problem
from kubeinfer_operator.stages.jobs import conditions_of, others_jobs, why_failed
from kubeinfer_operator.stages.revisions import folder_of, has_served, records_of, revision_of
from kubeinfer_operator.stages.storage import ensure_claim
from kubeinfer_operator.store import key_of
from kubeinfer_operator.world import Token, World

RETRY_SECONDS = 120.0
RETRY_PERMANENT_SECONDS = 600.0
NO_POD_SECONDS = 30.0  # in which the Job controller has made one, if it may


@dataclass
class WeightsState:
    """What the runtime stage needs to know. ``wanted``: the artifact to serve; ``ready``: it is there."""

    wanted: Artifact | None = None
    ready: bool = False
    planned: bool = False
    bytes_total: int | None = None
    jobs: set[str] = field(default_factory=set)


@dataclass
class _Stage:
    model: Manifest
    spec: InferenceModelSpec
    world: World
    now: datetime
    out: Outcome

    def __post_init__(self) -> None:
        self.namespace, self.name = key_of(self.model)
        before: dict[str, Any] = (self.model.get("status") or {}).get("weights") or {}
        self.request = names.digest(
            self.spec.model.model_dump(exclude={"token_secret_ref"}) | {"excluded": excluded(self.spec)}
        )
        self.plan_key = names.digest(
            [self.request, self.spec.engine.model_dump(exclude_none=True), self.spec.resources.model_dump()]
        )
        self.before = before if before.get("request") == self.request else {}
        self.state = WeightsState()
        self.weights: dict[str, Any] = {"request": self.request}

    def token(self, source: ModelSource) -> Token | None:
        """The token for ``source``, if the spec names one now, it is for that hub, and has been read."""
        ref, first = self.spec.model.token_secret_ref, sources_of(self.spec.model)[0]
        known = self.world.tokens.get((self.namespace, self.name))
        if ref is None or known is None or source.scheme != first.scheme:
            return None
        return known if (known.secret, known.key) == (ref.name, ref.key) else None

    def question(self, source: ModelSource) -> Question:
        token = self.token(source)
        include = tuple(sorted(self.spec.model.include))
        return source, include, excluded(self.spec), token.value if token else ""

    def refused(self, source: ModelSource, error: HubError) -> tuple[ModelSource, str, str]:
        """Why a source has failed: the hub's word, and what is wrong with the token."""
        token, said = self.token(source), error.message
        if token is not None and token.problem and error.reason in ("Forbidden", "ModelNotFound"):
            said += f"; {token.problem}"
        return source, error.reason, said

    def pinned(self, source: ModelSource) -> str | None:
        """The commit that an earlier look resolved this source to: branches may move, a served model does not."""
        if self.before.get("source") == source.repo_uri:
            return self.before.get("revision")
        return None

    def run(self) -> WeightsState:
        sources = sources_of(self.spec.model)
        if not sources[0].is_hub:
            return self.given()
        if self.spec.model.token_secret_ref and self.token(sources[0]) is None:
            self.out.token_needed = True
        failures: list[tuple[ModelSource, str, str]] = []
        if self.before.get("progress") == "100%":
            # What has been fetched stays, also when a source before it answers again.
            sources.sort(key=lambda source: self.pinned(source) is None)
        for source in sources:
            revision = self.pinned(source)
            if revision is None or not self.was_planned():
                asked = source if revision is None else _at(source, revision)
                answer = self.world.hub(self.question(asked))
                if answer is None:
                    self.out.questions.append(self.question(asked))
                    last = self.world.desk.last(self.question(asked))
                    if not isinstance(last, HubError):
                        return self.asking(source, failures)
                    answer = last
                if isinstance(answer, HubError):
                    failures.append(self.refused(source, answer))
                    if revision is None:
                        # An answer that is too old has been asked for again above; its arrival wakes us.
                        if due := self.world.desk.due_in(self.question(asked)):
                            self.out.look_again(due + 0.1)
                        if answer.try_mirror:
                            continue
                        break
                    # Resolved before: a hub that is away now must not stop a model whose weights may be here.
                    self.keep_planned()
                else:
                    revision = answer.revision
                    if not self.fits(answer):
                        self.weights |= {
                            "source": source.repo_uri,
                            "revision": revision,
                            "total": answer.total,
                        }
                        self.state.wanted = artifact_of(source, revision, self.spec)
                        return self.state
                    self.weights["total"] = answer.total
            else:
                self.keep_planned()
            if revision is None:
                continue
            artifact = artifact_of(source, revision, self.spec)
            self.weights |= {"source": source.repo_uri, "revision": revision}
            self.weights.setdefault("total", self.before.get("total"))
            failure = self.fetch(artifact)
            if failure is None:
                return self.state
            failures.append((source, *failure))
        return self.failed(failures)

    def given(self) -> WeightsState:
        """pvc:// and file://: nothing is fetched, and nothing is known before the engine looks."""
        text = "the files are where the engine reads them; it checks the fit itself"
        self.out.findings.append(yes(PLANNED, "NotComputed", text))
        self.out.status["plan"] = text
        claim = claim_of(self.name, self.spec)
        self.state.planned = True
        if (
            claim is not None
            and ensure_claim(self.model, self.spec, self.world, self.now, self.out, None) is None
        ):
            return self.state
        self.out.findings.append(yes(WEIGHTS_READY, "Given", f"served from {self.spec.model.uri}"))
        self.out.status["weights"] = {"source": self.spec.model.uri, "progress": "-"}
        self.state.ready = True
        return self.state

    def was_planned(self) -> bool:
        """Whether the plan was made for just this, so that no hub is needed to go on."""
        status = self.model.get("status") or {}
        condition = find(status.get("conditions") or [], PLANNED)
        return (
            condition is not None
            and condition["status"] == "True"
            and self.before.get("planned") == self.plan_key
        )

    def keep_planned(self) -> None:
        status = self.model.get("status") or {}
        condition = find(status.get("conditions") or [], PLANNED)
        if condition is None or condition["status"] != "True":
            condition = {
                "reason": "NotComputed",
                "message": "the hub cannot be asked; the engine checks the fit itself",
            }
        self.out.findings.append(yes(PLANNED, condition["reason"], condition.get("message", "")))
        self.weights["planned"] = self.plan_key
        if status.get("plan"):
            self.out.status["plan"] = status["plan"]
        self.state.planned = True

    def fits(self, hub: Hub) -> bool:
        found = plan(self.spec, hub, labelled_memory=self.world.device_memory)
        self.out.status["plan"] = found.line
        self.state.planned = found.fits
        if found.fits:
            self.weights["planned"] = self.plan_key
            self.out.findings.append(yes(PLANNED, found.reason, found.message))
        else:
            self.out.findings.append(no(PLANNED, found.reason, found.message))
            self.out.findings.append(
                unknown(WEIGHTS_READY, "NotPlanned", "nothing is fetched before the plan fits")
            )
        return found.fits

    def asking(self, source: ModelSource, failures: list[tuple[ModelSource, str, str]]) -> WeightsState:
        text = f"asking {source} for its revision and files"
        if failures:
            text += "; " + "; ".join(f"{s}: {why}: {said}" for s, why, said in failures)
        self.out.findings.append(unknown(PLANNED, "Resolving", text))
        self.out.findings.append(unknown(WEIGHTS_READY, "Resolving", text))
        if self.before:
            self.weights = dict(self.before)
        return self.state

    def failed(self, failures: list[tuple[ModelSource, str, str]]) -> WeightsState:
        """No source is left to try now."""
        _, reason, said = failures[0]
        if len(failures) > 1:
            said = "; ".join(f"{source}: {why}: {text}" for source, why, text in failures)
        if not any(f.type == PLANNED for f in self.out.findings):
            self.out.findings.append(no(PLANNED, reason, said))
        self.out.findings.append(no(WEIGHTS_READY, reason, said))
        return self.state

    def fetch(self, artifact: Artifact) -> tuple[str, str] | None:
        """Go on with one source. None: under way or there; else why this source has failed for now."""
        self.state.planned = True
        self.state.wanted = artifact
        if storage_kind(self.spec) != "claim":
            self.by_pods(artifact)
            return None
        if self.spec.suspend and not self.here(artifact):
            self.out.findings.append(
                unknown(WEIGHTS_READY, "Suspended", "nothing is fetched while spec.suspend is true")
            )
            return None
        copies = len({artifact.folder, *self.in_use()})
        total = self.weights.get("total")
        claim = ensure_claim(self.model, self.spec, self.world, self.now, self.out, total, copies)
        if claim is None:
            return None
        name = self.job_name(claim, artifact)
        self.state.jobs.add(name)
        job = self.world.get(JOBS, self.namespace, name)
        if self.spec.suspend and job is not None and "Complete" not in conditions_of(job):
            if not is_leaving(job):
                self.out.actions.append(Delete(JOBS, self.namespace, name, job["metadata"]["uid"]))
            self.out.findings.append(
                unknown(WEIGHTS_READY, "Suspended", "the download is broken off while spec.suspend is true")
            )
            return None
        owners = self.owners(artifact)
        if job is None:
            manifest = pull_job(
                name,
                self.name,
                self.namespace,
                self.spec,
                artifact,
                owners,
                self.world.settings,
                keep=self.kept(artifact),
            )
            self.out.actions.append(Apply(manifest))
            self.under_way("the download begins")
            return None
        if job["metadata"].get("deletionTimestamp"):
            self.under_way("the download begins anew")
            self.out.look_again(2.0)
            return None
        mine = {ref["uid"] for ref in job["metadata"].get("ownerReferences") or []}
        if not {ref["uid"] for ref in owners} <= mine:
            merged = [
                *(job["metadata"].get("ownerReferences") or []),
                *(o for o in owners if o["uid"] not in mine),
            ]
            self.out.actions.append(Annotate(JOBS, self.namespace, name, {"ownerReferences": merged}))
        return self.look_at(job)

    def stop_others(self, artifact: Artifact) -> None:
        """Take away this model's Jobs that the spec no longer asks for, if they still fetch, or if what they fetched need not stay."""
        kept = self.kept(artifact)
        for job in others_jobs(self.model, self.world, self.state.jobs):
            folder = job["metadata"]["labels"].get(names.LABEL_ARTIFACT)
            if not conditions_of(job) or (kept and folder not in kept):
                meta = job["metadata"]
                self.out.actions.append(Delete(JOBS, self.namespace, meta["name"], meta["uid"]))

    def in_use(self) -> list[str]:
        """Folders of the model's own claim that pods read, or may go back to."""
        if not owns_claim(self.spec):
            return []
        deployed = revision_of(self.world.get(DEPLOYMENTS, self.namespace, self.name))
        kept = [r for r in records_of(self.world, self.model) if has_served(r) or revision_of(r) == deployed]
        return [folder for record in kept if (folder := folder_of(record))]

    def kept(self, artifact: Artifact) -> list[str]:
        """Folders that stay on the model's own claim when ``artifact`` comes; none: nothing else can be there."""
        in_use = self.in_use()
        edited = int(self.model["metadata"].get("generation", 1)) > 1
        return [artifact.folder, *in_use] if in_use or (edited and owns_claim(self.spec)) else []

    def here(self, artifact: Artifact) -> bool:
        """Whether a Job for the artifact is there already, done or not."""
        claim = self.world.get(CLAIMS, self.namespace, str(claim_of(self.name, self.spec)))
        return (
            claim is not None
            and self.world.get(JOBS, self.namespace, self.job_name(claim, artifact)) is not None
        )

    def job_name(self, claim: Manifest, artifact: Artifact) -> str:
        """All that a Job cannot change later is part of its name: a new token or node selector makes a new Job."""
        extra = [
            self.spec.model.token_secret_ref.model_dump() if self.spec.model.token_secret_ref else None,
            placement(self.spec),
            self.spec.template.run_as_user,
            self.spec.template.fs_group,
        ]
        uid = claim["metadata"]["uid"] + names.digest(extra)
        return job_name(claim["metadata"]["name"], uid, artifact)

    def owners(self, artifact: Artifact) -> list[dict[str, Any]]:
        """This model, and all others that share the claim and the artifact."""
        own = [names.owner_reference(self.model, controller=False)]
        if owns_claim(self.spec):
            return own
        for other in self.world.caches[MODELS]:
            storage = (other.get("spec") or {}).get("storage") or {}
            shares = storage.get("existingClaim") == self.spec.storage.existing_claim
            if other is self.model or other["metadata"].get("namespace") != self.namespace or not shares:
                continue
            weights = (other.get("status") or {}).get("weights") or {}
            if (weights.get("source"), weights.get("revision")) == (artifact.source, artifact.revision):
                own.append(names.owner_reference(other, controller=False))
        return own

    def job_pods(self, job: Manifest) -> list[Manifest]:
        made_for = job["metadata"].get("labels", {}).get(names.LABEL_MODEL, self.name)
        pods = [
            pod
            for pod in self.world.of_model(PODS, self.namespace, made_for)
            if pod["metadata"].get("labels", {}).get("job-name") == job["metadata"]["name"]
        ]
        return sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))

    def look_at(self, job: Manifest) -> tuple[str, str] | None:
        """What a Job that exists has come to."""
        conditions = conditions_of(job)
        total = self.weights.get("total")
        if "Complete" in conditions:
            self.weights |= {"bytes": total, "progress": "100%"}
            # What was found of the claim on the way no longer matters.
            self.out.findings = [f for f in self.out.findings if f.type != WEIGHTS_READY]
            said = f"{self.weights['source']} at {self.weights['revision'][:12]}"
            if total:
                said += f", {format_bytes(total)}"
            self.out.findings.append(yes(WEIGHTS_READY, "Downloaded", said))
            self.state.ready = True
            return None
        pods = self.job_pods(job)
        newest = pods[-1] if pods else None
        if "Failed" in conditions:
            reason, said = why_failed(pods, conditions["Failed"])
            wait = (
                RETRY_PERMANENT_SECONDS
                if reason in ("Forbidden", "ModelNotFound", "RevisionNotFound")
                else RETRY_SECONDS
            )
            since = (self.now - read_stamp(conditions["Failed"]["lastTransitionTime"])).total_seconds()
            if since >= wait:
                meta = job["metadata"]
                self.out.actions.append(Delete(JOBS, self.namespace, meta["name"], meta["uid"]))
                self.under_way("the download is tried again")
                self.out.look_again(2.0)
                return None
            self.out.look_again(wait - since + 1)
            return reason, f"{said} (tried again in {round(wait - since)} s)"
        image = job["spec"]["template"]["spec"]["containers"][0].get("image")
        found = problem(newest, "pull") if newest is not None else None
        if (
            found is not None
            and found.reason == "ImagePullFailed"
            and image != self.world.settings.puller_image
        ):
            # A Job's image cannot be changed; the administrator has set another one since.
            meta = job["metadata"]
            self.out.actions.append(Delete(JOBS, self.namespace, meta["name"], meta["uid"]))
            found = None
        self.follow(newest, "pull")
        if found is not None:
            self.out.findings.append(no(WEIGHTS_READY, found.reason, found.message))
            self.add_progress()
            return None
        age = (self.now - read_stamp(job["metadata"]["creationTimestamp"])).total_seconds()
        if newest is None and not job.get("status", {}).get("failed"):
            if age > NO_POD_SECONDS:
                name = job["metadata"]["name"]
                text = f"Job {name} has no pod: `kubectl describe job -n {self.namespace} {name}` says why"
                self.out.findings.append(no(WEIGHTS_READY, "PodCreationFailed", text))
                return None
            self.out.look_again(NO_POD_SECONDS - age + 1)
        earlier = why_failed(pods, None) if job.get("status", {}).get("failed") else None
        self.under_way(f"trying again after {earlier[0]}: {earlier[1]}" if earlier else "", earlier)
        return None

    def by_pods(self, artifact: Artifact) -> None:
        """hostPath and ephemeral: each pod's init container fetches."""
        self.state.ready = True
        pods = [
            pod
            for pod in self.world.of_model(PODS, self.namespace, self.name)
            if container_status(pod, "weights") is not None and not is_leaving(pod) and not has_ended(pod)
        ]
        waiting = [pod for pod in pods if not (container_status(pod, "weights") or {}).get("ready")]
        for pod in waiting:
            found = problem(pod, "weights")
            if found is not None and found.reason not in ("InsufficientResources", "Unschedulable"):
                self.out.findings.append(no(WEIGHTS_READY, found.reason, found.message))
                return
        if waiting:
            self.follow(waiting[0], "weights")
            self.under_way("")
        elif pods:
            self.weights |= {"bytes": self.weights.get("total"), "progress": "100%"}
            self.out.findings.append(yes(WEIGHTS_READY, "Downloaded", f"fetched by each pod: {artifact.uri}"))
        else:
            self.out.findings.append(
                unknown(WEIGHTS_READY, "FetchedAtStart", "each pod fetches the weights when it starts")
            )

    def follow(self, pod: Manifest | None, container: str) -> None:
        status = container_status(pod, container) if pod is not None else None
        if pod is not None and status is not None and status.get("state", {}).get("running") is not None:
            self.out.follow = Follow(self.namespace, pod["metadata"]["name"], container)
            self.out.look_again(self.world.settings.progress_seconds)

    def add_progress(self) -> None:
        seen = self.world.progress.get((self.namespace, self.name))
        if seen is None or not seen.total:
            return
        self.weights |= {"bytes": seen.done, "total": seen.total, "rate": seen.rate, "eta": seen.eta}
        self.weights["progress"] = f"{min(100 * seen.done // seen.total, 99)}%"

    def under_way(self, said: str, earlier: tuple[str, str] | None = None) -> None:
        self.weights.setdefault("progress", "0%")
        self.add_progress()
        if not said:
            total = self.weights.get("total")
            said = f"fetching {format_bytes(total) if total else 'the weights'} from {self.weights['source']}"
        reason = earlier[0] if earlier else "Downloading"
        self.out.findings.append(no(WEIGHTS_READY, reason, said))


def _at(source: ModelSource, revision: str) -> ModelSource:
    return ModelSource(source.scheme, repo=source.repo, revision=revision, file=source.file)


def fetch_weights(
    model: Manifest, spec: InferenceModelSpec, world: World, now: datetime, out: Outcome
) -> WeightsState:
    """The stage: adds findings Planned and WeightsReady, ``status.weights``, and the writes that bring them about."""
    stage = _Stage(model, spec, world, now, out)
    state = stage.run()
    if state.jobs and state.wanted is not None:
        stage.stop_others(state.wanted)
    # From the status, so that it is the same before and after a restart.
    state.bytes_total = stage.weights.get("total")
    out.status.setdefault("weights", {k: v for k, v in stage.weights.items() if v is not None})
    if not any(f.type == WEIGHTS_READY for f in out.findings):
        out.findings.append(unknown(WEIGHTS_READY, "Pending", "waiting for the plan"))
    return state
