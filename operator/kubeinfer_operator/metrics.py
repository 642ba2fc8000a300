"""The operator's own metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily


class _ApiCalls:
    def __init__(self, read: Callable[[], dict[tuple[str, str], int]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Any]:
        family = CounterMetricFamily(
            "kubeinfer_operator_api_calls", "Requests to the API server.", labels=["verb", "kind"]
        )
        for (verb, kind), count in sorted(self._read().items()):
            family.add_metric([verb, kind], count)
        yield family


class Metrics:
    """One registry an operator."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconcile_seconds = Histogram(
            "kubeinfer_operator_reconcile_seconds",
            "Time of one reconcile, writes included.",
            registry=self.registry,
            buckets=(0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )
        self.queue_seconds = Histogram(
            "kubeinfer_operator_queue_seconds",
            "Time from a change to the reconcile that sees it.",
            registry=self.registry,
            buckets=(0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )
        self.reconcile_errors = Counter(
            "kubeinfer_operator_reconcile_errors",
            "Reconciles that ended in an error.",
            ["reason"],
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "kubeinfer_operator_queue_depth", "Models that are due.", registry=self.registry
        )
        self.queue_oldest = Gauge(
            "kubeinfer_operator_queue_oldest_seconds",
            "For how long the oldest is due.",
            registry=self.registry,
        )
        self.watch_silence = Gauge(
            "kubeinfer_operator_watch_silence_seconds",
            "Seconds since the least lively watch was heard.",
            registry=self.registry,
        )
        self.models = Gauge(
            "kubeinfer_operator_models", "Models by phase.", ["phase"], registry=self.registry
        )
        self.scalings = Counter(
            "kubeinfer_operator_scalings",
            "Changes of replicas by the autoscaler.",
            ["direction"],
            registry=self.registry,
        )
        self.silent_gateways = Gauge(
            "kubeinfer_operator_silent_gateways",
            "Ready gateways that do not tell their demand to the autoscaler.",
            registry=self.registry,
        )

    def count_calls(self, read: Callable[[], dict[tuple[str, str], int]]) -> None:
        """Export the client's own count of requests."""
        self.registry.register(_ApiCalls(read))
