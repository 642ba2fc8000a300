"""Tuned launch configurations, one JSON file an operation; keys are ``/``-joined shape properties."""

from __future__ import annotations

import functools
import json
from importlib import resources


@functools.cache
def _table(operation: str) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = json.loads(
        (resources.files(__name__) / f"{operation}.json").read_text()
    )
    return table


def lookup(operation: str, *keys: str) -> dict[str, int] | None:
    """The first of ``keys`` that ``operation``'s table holds, most specific first."""
    table = _table(operation)
    return next((table[key] for key in keys if key in table), None)
