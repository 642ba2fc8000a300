"""Errors of fetching weights, each with a stable ``reason`` that conditions, exit codes and logs share."""

from __future__ import annotations

from typing import Any, ClassVar

from kubeinfer.errors import KubeinferError


def format_bytes(n: float) -> str:
    """A size in the binary unit that reads best, for example ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


class WeightsError(KubeinferError):
    """Base of everything that stops weights from being resolved, fetched or found.

    ``reason`` is CamelCase and never changes its meaning; ``exit_code`` is what ``kubeinfer pull`` ends with;
    ``try_mirror`` says whether another hub could help.
    """

    reason: ClassVar[str] = "WeightsError"
    exit_code: ClassVar[int] = 1
    try_mirror: ClassVar[bool] = True

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = {key: value for key, value in details.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """``{"reason", "message", ...}`` with the error's own fields, fit for JSON."""
        return {"reason": self.reason, "message": self.message, **self.details}


class InvalidModelId(WeightsError, ValueError):
    """The text given as MODEL names nothing that could exist."""

    reason = "InvalidModelId"
    exit_code = 10


class ModelNotFound(WeightsError):
    """The hub, or this machine, has no such model (or hides it from this token)."""

    reason = "ModelNotFound"
    exit_code = 11


class RevisionNotFound(WeightsError):
    """The model exists, the branch, tag or commit does not."""

    reason = "RevisionNotFound"
    exit_code = 12


class FileNotFound(WeightsError):
    """No file of the model matches the name or the patterns that were asked for."""

    reason = "FileNotFound"
    exit_code = 13


class Forbidden(WeightsError):
    """The hub refuses this token, or wants one."""

    reason = "Forbidden"
    exit_code = 14


class NetworkUnreachable(WeightsError):
    """The hub cannot be reached, or every connection to it breaks."""

    reason = "NetworkUnreachable"
    exit_code = 15


class HubUnavailable(WeightsError):
    """The hub answers, but with errors of its own (5xx) or with something that is no answer."""

    reason = "HubUnavailable"
    exit_code = 16


class TooManyRequests(WeightsError):
    """The hub limits the rate of requests and kept doing so after waiting as it asked."""

    reason = "TooManyRequests"
    exit_code = 17


class DownloadStalled(WeightsError):
    """A connection stayed open without sending a byte, again and again."""

    reason = "DownloadStalled"
    exit_code = 18


class DiskFull(WeightsError):
    """The folder for the weights has no room for them."""

    reason = "DiskFull"
    exit_code = 19
    try_mirror = False


class HashMismatch(WeightsError):
    """A file's bytes (size or hash) are not the ones that the hub lists for it."""

    reason = "HashMismatch"
    exit_code = 20


class StorageError(WeightsError):
    """The folder for the weights cannot be written or read."""

    reason = "StorageError"
    exit_code = 21
    try_mirror = False


class WeightsIncomplete(WeightsError):
    """A folder on this machine lacks weights, or has git-lfs pointers in their place."""

    reason = "WeightsIncomplete"
    exit_code = 22
    try_mirror = False


class NotHere(WeightsError):
    """The URI means something only elsewhere (``pvc://`` outside a cluster)."""

    reason = "NotHere"
    exit_code = 23
