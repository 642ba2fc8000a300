"""What is wrong with a pod, as a reason and a sentence for the person who must act."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

Pod = dict[str, Any]

_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")


@dataclass(frozen=True, slots=True)
class Problem:
    """``fatal``: waiting does not help, the container ends again and again."""

    reason: str
    message: str
    fatal: bool = False


def is_ready(pod: Pod) -> bool:
    """Ready and not on its way out."""
    if pod["metadata"].get("deletionTimestamp"):
        return False
    conditions = pod.get("status", {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def is_leaving(pod: Pod) -> bool:
    return bool(pod["metadata"].get("deletionTimestamp"))


def has_ended(pod: Pod) -> bool:
    """Whether nothing of it will run again."""
    return pod.get("status", {}).get("phase") in ("Failed", "Succeeded")


def why_ended(pod: Pod) -> str:
    """What the kubelet says of a pod that has ended as a whole: evicted, refused, lost with its node."""
    status = pod.get("status", {})
    return f"pod {pod['metadata']['name']} ended: {status.get('reason', 'Failed')}: {status.get('message', 'no message')}"


def container_status(pod: Pod, name: str) -> dict[str, Any] | None:
    """Status of a container or init container."""
    status = pod.get("status", {})
    for item in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        if item["name"] == name:
            return dict(item)
    return None


def last_end(status: dict[str, Any]) -> dict[str, Any] | None:
    """The last termination that a container status tells of."""
    state = status.get("state", {}).get("terminated") or status.get("lastState", {}).get("terminated")
    return dict(state) if state else None


def last_line(text: str) -> str:
    """The last line that holds something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def puller_error(message: str) -> tuple[str, str] | None:
    """Reason and message of the puller's last JSON line."""
    try:
        line = json.loads(last_line(message))
    except ValueError:
        return None
    if not isinstance(line, dict) or "reason" not in line:
        return None
    return str(line["reason"]), str(line.get("message", ""))


def problem(pod: Pod, container: str) -> Problem | None:
    """What keeps ``container`` of ``pod`` from running; None when nothing is known to."""
    scheduled = next(
        (c for c in pod.get("status", {}).get("conditions") or [] if c["type"] == "PodScheduled"), None
    )
    if (
        scheduled is not None
        and scheduled["status"] == "False"
        and scheduled.get("reason") == "Unschedulable"
    ):
        text = str(scheduled.get("message", "no node fits"))
        if "unbound immediate PersistentVolumeClaims" in text:
            return Problem("ClaimPending", "the volume for the weights is being made")
        reason = "InsufficientResources" if "Insufficient" in text else "Unschedulable"
        return Problem(reason, f"pod {pod['metadata']['name']} finds no node: {text}")
    status = container_status(pod, container)
    if status is None:
        return None
    waiting = status.get("state", {}).get("waiting") or {}
    why = waiting.get("reason", "")
    said = str(waiting.get("message", ""))
    if why in _IMAGE:
        return Problem("ImagePullFailed", f"image {status.get('image')} cannot be pulled: {said or why}")
    if why in _CONFIG:
        return Problem("ContainerConfigError", f"container {container} cannot start: {said or why}")
    ended = last_end(status)
    if ended is None or status.get("ready"):
        return None
    running = status.get("state", {}).get("running") is not None
    if running or ended.get("exitCode") == 0:
        return None
    return _ended(container, status, ended)


def _ended(container: str, status: dict[str, Any], ended: dict[str, Any]) -> Problem:
    restarts = int(status.get("restartCount", 0))
    code = ended.get("exitCode")
    again = f" (exit code {code}, {restarts} restarts)" if restarts else f" (exit code {code})"
    fatal = restarts >= 3
    if ended.get("reason") == "OOMKilled":
        text = f"container {container} ran out of memory: raise resources.limits.memory, or lower engine.maxModelLen{again}"
        return Problem("OutOfMemory", text, fatal)
    said = str(ended.get("message", ""))
    told = puller_error(said)
    if told is not None and container != "runtime":
        return Problem(told[0], told[1] + again, fatal)
    line = last_line(said) or str(ended.get("reason", "Error"))
    if container != "runtime":
        return Problem("DownloadFailed", line + again, fatal)
    return Problem("EngineFailed", line + again, fatal)
