"""Server-sent events of both kinds of completion, encoded by joining bytes that are ready beforehand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec

from kubeinfer.api.errors import as_api_error, log_failure
from kubeinfer.api.generation import Usage
from kubeinfer.api.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs
from kubeinfer.outputs import CompletionOutput, RequestOutput

_json = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"
_logger = logging.getLogger("kubeinfer.api")


class _SseEncoder:
    """Common to both endpoints. ``deltas`` become one event an output of a request."""

    media_type = "text/event-stream"
    _object = ""

    def __init__(
        self,
        *,
        response_id: str,
        model: str,
        created: int,
        n: int,
        logprobs: int | None,
        include_usage: bool,
        continuous_usage: bool,
        return_token_ids: bool,
        tokens_as_ids: bool,
    ):
        self.n = n
        self.logprobs = logprobs
        self.include_usage = include_usage
        self.continuous_usage = continuous_usage
        self.return_token_ids = return_token_ids
        self.tokens_as_ids = tokens_as_ids
        self.usage = Usage()
        head = {"id": response_id, "object": self._object, "created": created, "model": model}
        self._head = b"data: " + _json(head)[:-1]
        self._openings: dict[int, bytes] = {}
        self._usage_null = b',"usage":null' if include_usage and not continuous_usage else b""
        self._plain_end = b',"logprobs":null,"finish_reason":null}]' + self._usage_null + b"}\n\n"
        self._plain = logprobs is None and not return_token_ids and not continuous_usage

    def encode(self, item: RequestOutput) -> bytes:
        parts: list[bytes] = []
        for delta in item.outputs:
            self.usage.completion_tokens += len(delta.token_ids)
            opening = self._openings.get(delta.index)
            if opening is None:
                parts.append(self._open(delta, item))
                opening = self._openings[delta.index]
            if self._plain and delta.finish_reason is None:
                if delta.text:
                    parts.append(opening + _json(delta.text) + self._text_end + self._plain_end)
            elif (
                delta.text
                or delta.finish_reason is not None
                or (delta.token_ids and (self.logprobs is not None or self.return_token_ids))
            ):
                parts.append(self._full(opening, delta))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    _text_end = b""

    def _open(self, delta: CompletionOutput, item: RequestOutput) -> bytes:
        raise NotImplementedError

    def _logprobs(self, delta: CompletionOutput) -> Any:
        raise NotImplementedError

    def _usage_part(self) -> bytes:
        if self.continuous_usage:
            return b',"usage":' + _json(self.usage.as_dict())
        return self._usage_null

    def _full(self, opening: bytes, delta: CompletionOutput) -> bytes:
        rest: dict[str, Any] = {
            "logprobs": self._logprobs(delta) if self.logprobs is not None and delta.logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            rest["stop_reason"] = delta.stop_reason
        if self.return_token_ids:
            rest["token_ids"] = delta.token_ids
        tail = _json(rest)
        return b"".join(
            (opening, _json(delta.text), self._text_end, b",", tail[1:], b"]", self._usage_part(), b"}\n\n")
        )

    def finish(self) -> bytes:
        if not self.include_usage:
            return _DONE
        return self._head + b',"choices":[],"usage":' + _json(self.usage.as_dict()) + b"}\n\n" + _DONE

    def fail(self, error: Exception) -> bytes:
        answer = as_api_error(error)
        if answer.status == 500:
            log_failure(_logger, "A stream", error)
        return b"data: " + answer.body + b"\n\n" + _DONE


class CompletionStream(_SseEncoder):
    """Events of ``/v1/completions``. ``echoes`` are the prompts' texts, where the answer starts with them."""

    _object = "text_completion"

    def __init__(
        self, *, echoes: list[str] | None, drop_output: bool, piece: Callable[[int], str], **common: Any
    ):
        super().__init__(**common)
        self.piece = piece
        self.echoes = echoes
        self.drop_output = drop_output
        self._running: dict[int, CompletionLogprobs] = {}
        if drop_output:
            self._plain = False

    def _open(self, delta: CompletionOutput, item: RequestOutput) -> bytes:
        index = delta.index
        opening = self._head + b',"choices":[{"index":%d,"text":' % index
        self._openings[index] = opening
        prompt_index = index // self.n
        first = self.usage.add_prompt(prompt_index, item)
        if self.logprobs is not None:
            self._running[index] = CompletionLogprobs(self.logprobs, self.tokens_as_ids, self.piece)
        wants_prompt = first and (self.return_token_ids or item.prompt_logprobs is not None)
        if self.echoes is None and not wants_prompt:
            return b""
        text = self.echoes[prompt_index] if self.echoes is not None else ""
        rest: dict[str, Any] = {"logprobs": None, "finish_reason": None}
        if self.echoes is not None and index in self._running and item.prompt_logprobs is not None:
            rest["logprobs"] = self._running[index].render(item.prompt_token_ids, item.prompt_logprobs)
        if item.prompt_logprobs is not None:
            rest["prompt_logprobs"] = prompt_logprobs(item.prompt_logprobs)
        if self.return_token_ids:
            rest["prompt_token_ids"] = item.prompt_token_ids
        return b"".join((opening, _json(text), b",", _json(rest)[1:], b"]", self._usage_part(), b"}\n\n"))

    def _logprobs(self, delta: CompletionOutput) -> Any:
        return self._running[delta.index].render(delta.token_ids, list(delta.logprobs or []))

    def _full(self, opening: bytes, delta: CompletionOutput) -> bytes:
        if self.drop_output:
            self.usage.completion_tokens = 0
            if delta.finish_reason is None:
                return b""
            delta = CompletionOutput(delta.index, "", [], finish_reason="length")
        return super()._full(opening, delta)


class ChatStream(_SseEncoder):
    """Events of ``/v1/chat/completions``. ``echo`` is the last message's text, where the answer starts with it."""

    _object = "chat.completion.chunk"
    _text_end = b"}"

    def __init__(self, *, role: str, echo: str, piece_bytes: Callable[[int], bytes], **common: Any):
        super().__init__(**common)
        self.role = role
        self.echo = echo
        self.piece_bytes = piece_bytes

    def _open(self, delta: CompletionOutput, item: RequestOutput) -> bytes:
        index = delta.index
        choice = self._head + b',"choices":[{"index":%d,"delta":{' % index
        self._openings[index] = choice + b'"content":'
        first = self.usage.add_prompt(0, item)
        end = b',"logprobs":null,"finish_reason":null}]'
        if first and self.return_token_ids:
            end += b',"prompt_token_ids":' + _json(item.prompt_token_ids)
        if first and item.prompt_logprobs is not None:
            end += b',"prompt_logprobs":' + _json(prompt_logprobs(item.prompt_logprobs))
        opening = {"role": self.role, "content": self.echo}
        return choice + _json(opening)[1:] + end + self._usage_part() + b"}\n\n"

    def _logprobs(self, delta: CompletionOutput) -> Any:
        return chat_logprobs(
            delta.token_ids, delta.logprobs or [], self.logprobs or 0, self.tokens_as_ids, self.piece_bytes
        )
