"""How many replicas the load calls for. Pure: samples and a history in, a number and the history out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kubeinfer_operator.api.v1alpha1 import AutoscalingSpec


@dataclass(frozen=True, slots=True)
class Load:
    """What one runtime pod said: requests, and the share of its KV cache in use."""

    running: float
    waiting: float
    kv_usage: float


@dataclass(frozen=True, slots=True)
class Demand:
    """What the gateways said of a model: held and passed requests, seconds since the last one (None: never).

    Attributes:
        silent: ready gateways that did not answer; requests may wait there.
    """

    waiting: int = 0
    inflight: int = 0
    idle_for: float | None = None
    silent: int = 0


@dataclass
class History:
    """Recommendations by time, and when the model was last in use."""

    recommended: list[tuple[float, int]] = field(default_factory=list)
    active_at: float | None = None


def recommend(spec: AutoscalingSpec, current: int, loads: list[Load], unread: int, demand: Demand) -> int:
    """Replicas for the load of this moment, within the spec's bounds. ``unread``: ready pods that gave no answer."""
    requests = sum(load.running + load.waiting for load in loads) + demand.waiting
    wanted = math.ceil(requests / spec.target_requests)
    if loads:
        mean = sum(load.kv_usage for load in loads) / len(loads)
        # A short prompt fills a little of the cache; that alone is no reason for a replica.
        if mean > spec.target_kv_usage:
            wanted = max(wanted, math.ceil(len(loads) * mean / spec.target_kv_usage))
    if demand.waiting or demand.inflight:
        wanted = max(wanted, 1)
    if unread:
        wanted = max(wanted, current)
    return min(max(wanted, spec.min_replicas), spec.max_replicas)


def decide(
    spec: AutoscalingSpec,
    current: int,
    loads: list[Load],
    unread: int,
    starting: int,
    demand: Demand,
    history: History,
    now: float,
) -> int:
    """The number of replicas to have now. Appends to ``history``, in seconds of any steady clock.

    Up when all recommendations of ``scale_up_delay`` call for it, down when all of ``scale_down_delay`` allow it, to zero
    only when idle for ``scale_to_zero_delay`` and every gateway says so, and never while a pod that was asked for is still
    ``starting``.
    """
    wanted = recommend(spec, current, loads, unread, demand)
    busy = (
        sum(load.running + load.waiting for load in loads) + demand.waiting + demand.inflight > 0
        or unread > 0
        or demand.silent > 0
    )
    if busy or history.active_at is None or starting:
        history.active_at = now
    if demand.idle_for is not None:
        history.active_at = max(history.active_at, now - demand.idle_for)
    history.recommended.append((now, wanted))
    longest = max(spec.scale_up_delay, spec.scale_down_delay)
    history.recommended = [(at, n) for at, n in history.recommended if now - at <= longest + 60]

    if current == 0:
        # Waking: somebody is waiting, or there must be a replica anyway.
        return min(max(wanted, spec.min_replicas), spec.max_replicas)
    up = [n for at, n in history.recommended if now - at <= spec.scale_up_delay]
    down = [n for at, n in history.recommended if now - at <= spec.scale_down_delay]
    settled = now - history.recommended[0][0] >= spec.scale_down_delay
    if min(up) > current and now - history.recommended[0][0] >= spec.scale_up_delay:
        return min(min(up), spec.max_replicas)
    if current > spec.max_replicas:
        return spec.max_replicas
    lower = max(down)
    if lower >= current or not settled or starting:
        return max(current, spec.min_replicas)
    if lower == 0 and (demand.silent or now - history.active_at < spec.scale_to_zero_delay):
        lower = 1
    return max(lower, spec.min_replicas)
