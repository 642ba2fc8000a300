"""The Jobs that fetch weights: which are a model's, and what has become of them."""

from __future__ import annotations

from typing import Any

from kubeinfer_operator.kube import JOBS, Manifest
from kubeinfer_operator.pods import container_status, is_leaving, last_end, problem, puller_error
from kubeinfer_operator.store import key_of
from kubeinfer_operator.world import World


def conditions_of(job: Manifest) -> dict[str, dict[str, Any]]:
    """Those that are so, by type; none while it fetches."""
    return {c["type"]: c for c in job.get("status", {}).get("conditions") or [] if c["status"] == "True"}


def others_jobs(model: Manifest, world: World, but: set[str]) -> list[Manifest]:
    """Jobs that are this model's alone, ``but`` for some, and not on their way out."""
    return [
        job
        for job in world.of_model(JOBS, *key_of(model))
        if [ref.get("uid") for ref in job["metadata"].get("ownerReferences") or []]
        == [model["metadata"]["uid"]]
        and job["metadata"]["name"] not in but
        and not is_leaving(job)
    ]


def why_failed(pods: list[Manifest], condition: dict[str, Any] | None) -> tuple[str, str]:
    """Reason and message of the last of a Job's pods that tells one, else of the Job's own condition."""
    for pod in reversed(pods):
        status = container_status(pod, "pull")
        ended = last_end(status) if status else None
        if ended is None or ended.get("exitCode") == 0:
            continue
        told = puller_error(str(ended.get("message", "")))
        if told is not None:
            return told
        found = problem(pod, "pull")
        if found is not None:
            return found.reason, found.message
    said = str((condition or {}).get("message", "")) or "its pod left no message"
    return "DownloadFailed", f"the download failed: {said}"
