"""Log lines: text for people, JSON for machines, and one of the engine's state every ten seconds under load."""

from __future__ import annotations

import json
import logging
import sys
import time
from copy import copy
from typing import Any

from kubeinfer.engine.messages import EngineStats

LOG_INTERVAL = 10.0  # seconds


class TextFormatter(logging.Formatter):
    """``INFO 11-21 13:20:01 [api] message``"""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%m-%d %H:%M:%S", time.localtime(record.created))
        name = record.name.removeprefix("kubeinfer.")
        line = f"{record.levelname} {stamp} [{name}] {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One object a line; what is passed as ``extra={"fields": {...}}`` stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, Any] = {
            "time": stamp,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logging(log_format: str = "text", level: int = logging.INFO) -> None:
    """Send this package's and uvicorn's log lines to stderr in ``log_format``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    for name in ("kubeinfer", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    logging.getLogger("kubeinfer").setLevel(level)


class StatsLine:
    """Turns the engine's counters into rates between two calls."""

    def __init__(self) -> None:
        self._last = EngineStats()
        self._time = time.monotonic()
        self._was_busy = False

    def next(self, stats: EngineStats) -> tuple[str, dict[str, float]] | None:
        """The line and its figures; None when nothing has gone on since the last one."""
        now = time.monotonic()
        seconds = max(now - self._time, 1e-6)
        last, self._last, self._time = self._last, copy(stats), now
        moved = stats.generation_tokens != last.generation_tokens or stats.prompt_tokens != last.prompt_tokens
        busy = moved or stats.num_running > 0 or stats.num_waiting > 0
        was_busy, self._was_busy = self._was_busy, busy
        if not busy and not was_busy:
            return None
        queries = stats.prefix_cache_queries - last.prefix_cache_queries
        hits = stats.prefix_cache_hits - last.prefix_cache_hits
        fields = {
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "prompt_tokens_per_second": round((stats.prompt_tokens - last.prompt_tokens) / seconds, 1),
            "generation_tokens_per_second": round(
                (stats.generation_tokens - last.generation_tokens) / seconds, 1
            ),
            "kv_cache_usage_percent": round(100 * stats.kv_cache_usage, 1),
            "prefix_cache_hit_percent": round(100 * hits / queries, 1) if queries else 0.0,
            "preemptions": stats.num_preemptions - last.num_preemptions,
        }
        line = (
            f"running {fields['running']}, waiting {fields['waiting']}, "
            f"prompt {fields['prompt_tokens_per_second']} tok/s, "
            f"generation {fields['generation_tokens_per_second']} tok/s, "
            f"KV cache {fields['kv_cache_usage_percent']}%, "
            f"prefix hits {fields['prefix_cache_hit_percent']}%"
        )
        if fields["preemptions"]:
            line += f", preempted {fields['preemptions']}"
        return line, fields
