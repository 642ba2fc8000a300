"""One JSON object a line on standard output: the access log, and what else the gateway has to say."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO


class AccessLog:
    """Writes one line a finished request."""

    def __init__(self, enabled: bool = True, stream: TextIO | None = None) -> None:
        self.enabled = enabled
        self._stream = stream

    def write(self, record: dict[str, Any]) -> None:
        if self.enabled:
            (self._stream or sys.stdout).write(
                json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"
            )

    def flush(self) -> None:
        if self.enabled:
            (self._stream or sys.stdout).flush()


class JsonFormatter(logging.Formatter):
    """Log records as JSON lines."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up_logging(level: str, fmt: str) -> None:
    """Sends the gateway's and uvicorn's messages to standard error. `fmt`: "json" or "text"."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if fmt == "json" else text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # uvicorn warns of each odd request; whoever can send requests could fill the log.
    logging.getLogger("uvicorn").setLevel("ERROR")
    logging.getLogger("uvicorn.access").disabled = True
