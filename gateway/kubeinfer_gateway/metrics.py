"""Prometheus metrics. Labels take values from the cluster's objects only (models, key names), never from requests."""

from __future__ import annotations

from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kubeinfer_gateway.registry import Registry

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
UNKNOWN = "unknown"


class Metrics:
    """All of the gateway's series, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kubeinfer_gateway:{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"kubeinfer_gateway:{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(
                f"kubeinfer_gateway:{name}", text, labels, registry=self.registry, buckets=_LATENCY
            )

        self.requests = counter(
            "requests", "Requests by the answer's status (499: the client left).", "model", "status"
        )
        self.retries = counter("retries", "Requests sent again to another endpoint.", "model")
        self.upstream_errors = counter("upstream_errors", "Failures of endpoints by kind.", "model", "kind")
        self.ejections = counter("ejections", "Endpoints taken out for a while after failures.", "model")
        self.tokens = counter("tokens", "Tokens by API key.", "key", "model", "kind")
        self.key_requests = counter("key_requests", "Requests by API key and status.", "key", "status")
        self.limited = counter("rate_limited", "Requests refused by a key's limits.", "key", "limit")
        self.duration = histogram(
            "request_duration_seconds", "From the request's head to the last byte.", "model"
        )
        self.first_byte = histogram(
            "time_to_first_byte_seconds", "From the request's head to the first byte.", "model"
        )
        self.queue_time = histogram("queue_time_seconds", "Waiting for a ready endpoint.", "model")
        self.inflight = gauge("requests_inflight", "Requests with an endpoint now.", "model")
        self.waiting = gauge("requests_waiting", "Requests waiting for a ready endpoint now.", "model")
        self.endpoints = gauge("endpoints", "Endpoints that take requests.", "model")
        self.ejected = gauge("endpoints_ejected", "Endpoints taken out now.", "model")
        self.active = gauge("requests_active", "Requests being handled now, of all kinds.")
        self.buffered = gauge("buffered_bytes", "Request bodies held now.")
        self.synced = gauge("discovery_synced", "1 once every model and endpoint was listed.")
        self.discovery_errors = counter("discovery_errors", "Lists and watches that failed.", "resource")
        self._models: set[str] = set()

    def collect(self, registry: Registry) -> None:
        """Reads the gauges off the registry, and drops the series of models that are gone."""
        now_models = set(registry.models)
        for gone in self._models - now_models:
            for series in (self.inflight, self.waiting, self.endpoints, self.ejected):
                series.remove(gone)
            for family in (self.duration, self.first_byte, self.queue_time, self.retries, self.ejections):
                try:
                    family.remove(gone)
                except KeyError:
                    pass
            for many in (self.requests, self.upstream_errors, self.tokens):
                many.remove_by_labels({"model": gone})
        self._models = now_models
        now = monotonic()
        for key, model in registry.models.items():
            self.inflight.labels(key).set(model.inflight)
            self.waiting.labels(key).set(model.waiting)
            self.endpoints.labels(key).set(len(model.endpoints))
            self.ejected.labels(key).set(sum(e.ejected_until > now for e in model.endpoints.values()))
        self.synced.set(registry.synced)

    def render(self) -> bytes:
        """The exposition text. May run in a thread: with a thousand models it takes a while."""
        return generate_latest(self.registry)
