"""Token counts, read from the last bytes of a response."""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

_USAGE = re.compile(rb'"usage"\s*:\s*\{')


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens. `exact` is False where the response carried no usage and the counts are estimates."""

    prompt: int
    completion: int
    exact: bool = True

    @property
    def total(self) -> int:
        return self.prompt + self.completion


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None


_decoder = msgspec.json.Decoder(_Usage)


def read_usage(tail: bytes) -> Usage | None:
    """The last `usage` object in the end of a response (JSON or server-sent events), or None."""
    found = None
    for found in _USAGE.finditer(tail):  # noqa: B007 - the last one counts
        pass
    if found is None:
        return None
    text = _object_at(tail, found.end() - 1)
    if text is None:
        return None
    try:
        usage = _decoder.decode(text)
    except msgspec.DecodeError:
        return None
    prompt = usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens
    completion = usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens
    if prompt is None and completion is None:
        if usage.total_tokens is None:
            return None
        prompt = usage.total_tokens
    return Usage(max(prompt or 0, 0), max(completion or 0, 0))


def _object_at(data: bytes, start: int) -> bytes | None:
    """The JSON object that begins at `start`; usage objects hold only numbers, nulls and objects of them."""
    depth = 0
    for index in range(start, min(len(data), start + 4096)):
        byte = data[index]
        if byte == 0x7B:
            depth += 1
        elif byte == 0x7D:
            depth -= 1
            if not depth:
                return data[start : index + 1]
    return None
