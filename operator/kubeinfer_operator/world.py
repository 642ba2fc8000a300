"""Everything the reconcile function may look at: copies of objects, and what probes, logs and hubs said last."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kubeinfer_operator import names
from kubeinfer_operator.capabilities import Capabilities
from kubeinfer_operator.config import Settings
from kubeinfer_operator.hub import Answer, HubDesk, Question
from kubeinfer_operator.kube import (
    ACCOUNTS,
    BUDGETS,
    CLAIMS,
    CLASSES,
    DEPLOYMENTS,
    JOBS,
    MODELS,
    PODS,
    POLICIES,
    REVISIONS,
    SERVICES,
    Kind,
    Manifest,
)
from kubeinfer_operator.store import Cache, Key, is_older, key_of


@dataclass(frozen=True, slots=True)
class Progress:
    """The puller's last word. Bytes, bytes a second, seconds."""

    done: int
    total: int
    rate: int
    eta: int | None


@dataclass(frozen=True, slots=True)
class Probe:
    """What the model's Service answered. ``at``: seconds of the monotonic clock."""

    ok: bool
    message: str
    at: float


@dataclass(frozen=True, slots=True)
class Token:
    """What a Secret's ``key`` held when it was last read; else why that is nothing, in ``problem``."""

    secret: str
    key: str
    value: str = ""
    problem: str = ""


@dataclass
class World:
    """A snapshot as far as one reconcile is concerned: nothing in it changes while the (synchronous) function runs."""

    settings: Settings = field(default_factory=Settings)
    capabilities: Capabilities = field(default_factory=Capabilities)
    caches: dict[Kind, Cache] = field(
        default_factory=lambda: {
            kind: Cache(names.LABEL_MODEL)
            for kind in (
                MODELS, DEPLOYMENTS, REVISIONS, JOBS, PODS, SERVICES, CLAIMS, ACCOUNTS, POLICIES, BUDGETS, CLASSES
            )
        }
    )  # fmt: skip
    desk: HubDesk = field(default_factory=HubDesk)
    tokens: dict[Key, Token] = field(default_factory=dict)
    progress: dict[Key, Progress] = field(default_factory=dict)
    probes: dict[Key, Probe] = field(default_factory=dict)
    decisions: dict[Key, int] = field(default_factory=dict)
    device_memory: int | None = None
    _served: dict[str, dict[Key, Manifest]] = field(default_factory=dict)

    def get(self, kind: Kind, namespace: str, name: str) -> Manifest | None:
        return self.caches[kind].get(namespace, name)

    def of_model(self, kind: Kind, namespace: str, model: str) -> list[Manifest]:
        """Objects of one kind that were made for a model."""
        return self.caches[kind].labelled(namespace, model)

    def hub(self, question: Question) -> Answer | None:
        return self.desk.look(question)

    def put_model(self, model: Manifest) -> set[Key]:
        """Take in a model; returns others that want one of its served names, before or now.

        An older version than the one that is here is left out.
        """
        if is_older(model, self.caches[MODELS].get(*key_of(model))):
            return set()
        touched = self.drop_model(key_of(model))
        self.caches[MODELS].put(model)
        for name in served_by(model):
            claimants = self._served.setdefault(name, {})
            claimants[key_of(model)] = model
            touched |= set(claimants)
        touched.discard(key_of(model))
        return touched

    def drop_model(self, key: Key) -> set[Key]:
        """Forget a model; returns others that want one of its served names."""
        old = self.caches[MODELS].drop(key)
        touched: set[Key] = set()
        for name in served_by(old) if old is not None else ():
            claimants = self._served.get(name, {})
            claimants.pop(key, None)
            touched |= set(claimants)
            if not claimants:
                self._served.pop(name, None)
        return touched

    def claimants(self, name: str) -> list[Manifest]:
        """Models that want ``name`` in the API, the oldest first: it is the one that has it."""
        return sorted(self._served.get(name, {}).values(), key=age_order)


def served_by(model: Manifest) -> set[str]:
    """Names a raw model wants in the OpenAI API."""
    wanted: Any = (model.get("spec") or {}).get("servedNames")
    if isinstance(wanted, list) and wanted:
        return {str(name) for name in wanted}
    return {model["metadata"]["name"]}


def age_order(model: Manifest) -> tuple[str, str, str]:
    meta = model["metadata"]
    return str(meta.get("creationTimestamp", "")), meta.get("namespace", ""), meta["name"]
