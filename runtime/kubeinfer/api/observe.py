"""Joins the engine's hooks to the metrics."""

from __future__ import annotations

from kubeinfer.api.state import Engine
from kubeinfer.metrics import Metrics


def attach_metrics(engine: Engine, model_name: str) -> Metrics:
    """Metrics that follow ``engine``."""
    return Metrics(model_name, lambda: engine.stats)
