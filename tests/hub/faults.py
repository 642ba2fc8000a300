"""What can go wrong on purpose, for which files and how often."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

KINDS = ("break", "corrupt", "stall", "429", "500", "slow", "no-range", "down")


@dataclass
class Fault:
    """One fault.

    ``kind``: ``break`` closes the connection after ``after`` bytes of a response; ``corrupt`` flips a byte at
    ``after``; ``stall`` sends nothing more for ``seconds`` once ``after`` bytes are out; ``429`` and ``500``
    answer so (429 with ``Retry-After: seconds``); ``slow`` sends ``rate`` bytes a second; ``no-range`` ignores
    Range; ``down`` closes every connection unanswered. ``path`` is a glob on the file, ``times`` how many
    responses it hits (-1: all), ``scope`` what it hits: ``files``, ``api`` or ``all``.
    """

    kind: str
    path: str = "*"
    times: int = -1
    after: int = 0
    seconds: float = 1.0
    rate: int = 1 << 20
    scope: str = "files"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown fault {self.kind!r}; known: {', '.join(KINDS)}")
        if self.kind == "down":
            self.scope = "all"

    @classmethod
    def parse(cls, text: str) -> Fault:
        """``KIND[:name=value,...]``, as in ``break:after=100000,times=3,path=*.safetensors``."""
        kind, _, rest = text.partition(":")
        values: dict[str, Any] = {}
        for pair in filter(None, rest.split(",")):
            name, _, value = pair.partition("=")
            if name not in cls.__dataclass_fields__ or name == "kind":
                raise ValueError(f"fault {text!r}: unknown setting {name!r}")
            kind_of = {"path": str, "scope": str, "seconds": float}.get(name, int)
            values[name] = kind_of(value)
        return cls(kind, **values)


class Faults:
    """The faults that are on; taking one counts it."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def set(self, faults: list[Fault]) -> None:
        with self._lock:
            self._faults = list(faults)

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def take(self, kind: str, scope: str, path: str) -> Fault | None:
        """A fault of ``kind`` for this response, or None."""
        with self._lock:
            for fault in self._faults:
                if (
                    fault.kind == kind
                    and fault.times
                    and fault.scope in (scope, "all")
                    and fnmatchcase(path, fault.path)
                ):
                    if fault.times > 0:
                        fault.times -= 1
                    return fault
        return None

    def to_list(self) -> list[dict[str, Any]]:
        with self._lock:
            return [asdict(f) for f in self._faults]
