"""Errors that cross layers. Each message says what was asked, what is true, and which option to change."""

from __future__ import annotations


class KubeinferError(Exception):
    """Base of every error that kubeinfer raises on purpose."""


class OptionError(KubeinferError, ValueError):
    """An engine or server option has a value that cannot work. ``option`` is its Python name."""

    def __init__(self, message: str, option: str | None = None):
        super().__init__(message)
        self.option = option


class RequestError(KubeinferError, ValueError):
    """A request cannot be served as asked (HTTP 400). ``param`` is the request's field."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """A prompt that leaves no room for a token. Clients look for the words "maximum context length", to shorten it and try again."""


class ModelLoadError(KubeinferError):
    """The model's files are missing, damaged, or of an architecture that is not supported."""


class QueueFullError(KubeinferError):
    """The waiting queue is at its bound (HTTP 429). ``retry_after`` is in seconds."""

    def __init__(self, message: str, retry_after: int = 1):
        super().__init__(message)
        self.retry_after = retry_after


class EngineDeadError(KubeinferError):
    """The engine core has stopped; the message carries the cause (HTTP 503 or an error in the stream)."""


class NotSupportedError(RequestError):
    """A field or call that vLLM has and this version does not; refused, never ignored."""


def yaml_problem(error: Exception) -> str:
    """What is wrong with a YAML file, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}: {problem}" if mark and problem else " ".join(str(error).split())
