"""The models that exist, the endpoints that serve them, and the requests that wait for one.

Everything here belongs to one event loop, and counts only what this gateway itself has in flight.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from kubeinfer_gateway.errors import GatewayError
from kubeinfer_gateway.routing import Ring, choose_by_key, choose_least_loaded

if TYPE_CHECKING:
    from kubeinfer_gateway.upstream import UpstreamConnection


@dataclass(frozen=True)
class EndpointSpec:
    """One ready runtime. `id` must differ between a pod and its replacement at the same address."""

    id: str
    host: str
    port: int
    tls: bool = False
    names: tuple[str, ...] = ()  # that it answers to; none: not known, and taken to be all

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class ModelSpec:
    """One model as discovery sees it. `key` is "namespace/name"; `created` is in seconds since 1970.

    `note` says how the model is doing, for the errors of those who wait for it. A name that only endpoints have, which
    the model no longer asks for, is its own until they are gone, unless another model asks for it.
    """

    key: str
    served_names: tuple[str, ...]
    created: float
    endpoints: tuple[EndpointSpec, ...] = ()
    suspended: bool = False
    note: str = ""

    @property
    def all_names(self) -> frozenset[str]:
        return frozenset(self.served_names).union(*(endpoint.names for endpoint in self.endpoints))


@dataclass(frozen=True)
class RoutingPolicy:
    """`method`: "prefix" or "least-load". `factor`: how far over the mean load an endpoint may go, at least 1.
    `floor`: load below which an endpoint is never passed over."""

    method: str = "prefix"
    factor: float = 1.25
    floor: int = 4
    eject_after: int = 3
    eject_seconds: float = 2.0
    eject_max_seconds: float = 60.0


class Endpoint:
    """A runtime that takes requests now, and what this gateway has seen of it."""

    __slots__ = (
        "__weakref__",
        "draining_until",
        "ejected_until",
        "ejections",
        "failures",
        "gone",
        "idle",
        "inflight",
        "spec",
    )

    def __init__(self, spec: EndpointSpec) -> None:
        self.spec = spec
        self.inflight = 0
        self.failures = 0
        self.ejections = 0
        self.ejected_until = 0.0
        self.draining_until = 0.0
        self.gone = False
        self.idle: list[UpstreamConnection] = []

    @property
    def id(self) -> str:
        return self.spec.id

    def close_idle(self) -> None:
        for connection in self.idle:
            connection.abort()
        self.idle.clear()


class Model:
    """A model, its endpoints and its queue."""

    def __init__(self, spec: ModelSpec, policy: RoutingPolicy) -> None:
        self.spec = spec
        self.policy = policy
        self.endpoints: dict[str, Endpoint] = {}
        self.ring: Ring[Endpoint] = Ring()
        # Those that left with requests in flight are known again when they come back (readiness may flap).
        self._known: WeakValueDictionary[str, Endpoint] = WeakValueDictionary()
        self.waiting = 0
        self._waiters: set[asyncio.Future[None]] = set()
        self.inflight = 0
        self.last_request: float | None = None
        self.gone = False

    @property
    def key(self) -> str:
        return self.spec.key

    def update(self, spec: ModelSpec) -> None:
        self.spec = spec
        wanted = {endpoint.id: endpoint for endpoint in spec.endpoints}
        if wanted.keys() != self.endpoints.keys():
            for name in self.endpoints.keys() - wanted.keys():
                leaving = self.endpoints.pop(name)
                leaving.gone = True
                leaving.close_idle()
            for name in wanted.keys() - self.endpoints.keys():
                endpoint = self._known.get(name)
                if endpoint is None:
                    endpoint = self._known[name] = Endpoint(wanted[name])
                endpoint.gone = False
                self.endpoints[name] = endpoint
            self.ring = Ring(self.endpoints.values())
        if self.endpoints or spec.suspended:
            self.wake()

    def claim_on(self, name: str) -> tuple[object, ...]:
        """The least has the name: who asks for it before who only still has it, the oldest, and of one second as the operator has it."""
        return name not in self.spec.served_names, self.spec.created, self.key.split("/")

    def wake(self) -> None:
        """Lets every waiting request look again."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def pick(self, name: str, key: bytes, exclude: Collection[Endpoint] = ()) -> Endpoint | None:
        """An endpoint for a request for `name` whose routing key is `key` (may be empty), or None where none takes requests."""
        now = time.monotonic()
        serving = [
            e
            for e in self.endpoints.values()
            if e.draining_until <= now and e not in exclude and (not e.spec.names or name in e.spec.names)
        ]
        usable = [e for e in serving if e.ejected_until <= now] or serving
        if len(usable) < 2:
            return usable[0] if usable else None
        if self.policy.method == "prefix" and key:
            chosen = set(usable)
            return choose_by_key(
                self.ring, key, chosen.__contains__, usable, self.policy.factor, self.policy.floor
            )
        return choose_least_loaded(usable)

    def succeeded(self, endpoint: Endpoint) -> None:
        endpoint.failures = 0
        endpoint.ejections = 0

    def failed(self, endpoint: Endpoint) -> bool:
        """Counts a failure; True where the endpoint is now ejected for a while. The last one left never is."""
        endpoint.failures += 1
        now = time.monotonic()
        if endpoint.gone or endpoint.failures < self.policy.eject_after:
            return False
        others = [
            e
            for e in self.endpoints.values()
            if e is not endpoint and max(e.ejected_until, e.draining_until) <= now
        ]
        if not others:
            return False
        pause = min(self.policy.eject_seconds * 2**endpoint.ejections, self.policy.eject_max_seconds)
        endpoint.ejected_until = now + pause
        endpoint.ejections = min(endpoint.ejections + 1, 16)
        # One more failure after the pause ejects it again, for longer.
        endpoint.failures = self.policy.eject_after - 1
        endpoint.close_idle()
        return True

    def pause(self, endpoint: Endpoint, seconds: float) -> None:
        """The endpoint said that it takes no requests, mostly since it is leaving; discovery may be late to say so."""
        endpoint.draining_until = time.monotonic() + seconds
        endpoint.close_idle()
        asyncio.get_running_loop().call_later(seconds + 0.01, self.wake)

    def enter(self, limit: int) -> None:
        """Takes a place in the queue. Raises GatewayError 429 where `limit` requests have one already."""
        if self.waiting >= limit:
            raise GatewayError(
                429,
                f"The model '{self.spec.served_names[0]}' has no ready replica, and {self.waiting} requests wait "
                "for one already.",
                code="queue_full",
                retry_after=5,
            )
        self.waiting += 1

    def leave(self) -> None:
        self.waiting -= 1

    async def changed(self, timeout: float) -> None:
        """Returns when the endpoints have changed, or after `timeout` seconds."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            async with asyncio.timeout(timeout):
                await waiter
        except TimeoutError:
            pass
        finally:
            self._waiters.discard(waiter)


@dataclass
class Registry:
    """All models by key and by served name."""

    policy: RoutingPolicy = field(default_factory=RoutingPolicy)
    models: dict[str, Model] = field(default_factory=dict)
    synced: bool = False
    _claims: dict[str, dict[str, Model]] = field(default_factory=dict)
    _winners: dict[str, Model] = field(default_factory=dict)

    def put(self, spec: ModelSpec) -> None:
        """Adds or replaces a model."""
        model = self.models.get(spec.key)
        old_names: frozenset[str] = frozenset()
        if model is None:
            model = self.models[spec.key] = Model(spec, self.policy)
        else:
            old_names = model.spec.all_names
        model.update(spec)
        names = spec.all_names
        for name in names | old_names:
            claims = self._claims.setdefault(name, {})
            if name in names:
                claims[spec.key] = model
            else:
                claims.pop(spec.key, None)
            self._settle(name)

    def remove(self, key: str) -> None:
        model = self.models.pop(key, None)
        if model is None:
            return
        for name in model.spec.all_names:
            self._claims.get(name, {}).pop(key, None)
            self._settle(name)
        model.update(ModelSpec(key, model.spec.served_names, model.spec.created))
        model.gone = True
        model.wake()

    def _settle(self, name: str) -> None:
        """A name that several objects claim belongs to one of them."""
        claims = self._claims.get(name)
        if not claims:
            self._claims.pop(name, None)
            self._winners.pop(name, None)
            return
        self._winners[name] = min(claims.values(), key=lambda model: model.claim_on(name))

    def find(self, name: str) -> Model | None:
        return self._winners.get(name)

    def names(self) -> list[str]:
        return sorted(self._winners)

    def served(self) -> Iterator[tuple[str, Model]]:
        for name in sorted(self._winners):
            yield name, self._winners[name]

    def waiting(self) -> int:
        return sum(model.waiting for model in self.models.values())

    def demand(self) -> dict[str, object]:
        """What the operator reads to wake and to scale models: those asked for since this gateway started."""
        return {
            "models": {
                model.key: {
                    "waiting": model.waiting,
                    "inflight": model.inflight,
                    "last_request": round(model.last_request, 3),
                }
                for model in self.models.values()
                if model.last_request is not None
            }
        }

    def close(self) -> None:
        for model in self.models.values():
            for endpoint in model.endpoints.values():
                endpoint.close_idle()
