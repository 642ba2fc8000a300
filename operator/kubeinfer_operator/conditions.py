"""Conditions of a status: small values that are merged into what was there."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

Truth = Literal["True", "False", "Unknown"]

ACCEPTED = "Accepted"
PLANNED = "Planned"
WEIGHTS_READY = "WeightsReady"
RUNTIME_READY = "RuntimeReady"
READY = "Ready"
ORDER = (ACCEPTED, PLANNED, WEIGHTS_READY, RUNTIME_READY, READY)

MAX_MESSAGE = 1024


@dataclass(frozen=True, slots=True)
class Finding:
    """What is true of one condition now."""

    type: str
    status: Truth
    reason: str
    message: str = ""


def yes(kind: str, reason: str, message: str = "") -> Finding:
    return Finding(kind, "True", reason, message)


def no(kind: str, reason: str, message: str) -> Finding:
    return Finding(kind, "False", reason, message)


def unknown(kind: str, reason: str, message: str) -> Finding:
    return Finding(kind, "Unknown", reason, message)


def find(conditions: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """The condition of a type in a status, if it is there."""
    return next((c for c in conditions if c.get("type") == kind), None)


def merge(
    before: list[dict[str, Any]], found: list[Finding], generation: int, now: datetime
) -> list[dict[str, Any]]:
    """The new list: a transition time moves only where the status did; types that were not looked at stay.

    Of several findings for one type the first counts: what was found first stands in the way of the rest.
    """
    new = {finding.type: finding for finding in reversed(found)}
    out = []
    for kind in ORDER:
        old = find(before, kind)
        finding = new.get(kind)
        if finding is None:
            if old is not None:
                out.append(old)
            continue
        moved = old is None or old.get("status") != finding.status
        out.append(
            {
                "type": kind,
                "status": finding.status,
                "reason": finding.reason,
                "message": finding.message[:MAX_MESSAGE] or finding.reason,
                "lastTransitionTime": stamp(now) if moved or old is None else old["lastTransitionTime"],
                "observedGeneration": generation,
            }
        )
    return out


def stamp(moment: datetime) -> str:
    """A time as Kubernetes writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read_stamp(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def transitions(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Conditions whose status or reason is not what it was."""
    out = []
    for condition in after:
        old = find(before, condition["type"])
        if old is None or (old["status"], old["reason"]) != (condition["status"], condition["reason"]):
            out.append(condition)
    return out
