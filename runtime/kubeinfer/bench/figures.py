"""Percentiles and the printed table."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_WIDTH = 58


def percentile(values: Sequence[float], percent: float) -> float:
    """The ``percent``-th percentile of ``values`` (not empty), linear between neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(name: str, seconds: Sequence[float], percents: Sequence[float]) -> dict[str, float]:
    """mean, median, standard deviation and percentiles of ``seconds``, in milliseconds; zeros where there are none."""
    values = [1000 * value for value in seconds] or [0.0]
    found = {
        f"mean_{name}_ms": statistics.fmean(values),
        f"median_{name}_ms": statistics.median(values),
        f"std_{name}_ms": statistics.pstdev(values),
    }
    for percent in percents:
        found[f"p{percent:g}_{name}_ms"] = percentile(values, percent)
    return found


def line(label: str, value: float | int | str) -> str:
    """One line of the table."""
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label + ':':<{_WIDTH - 14}}{shown:>14}"


def heading(title: str, fill: str = "-") -> str:
    return f" {title} ".center(_WIDTH, fill)


def save_json(path: str | Path, result: dict[str, Any]) -> None:
    """Write ``result`` to ``path``, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")
