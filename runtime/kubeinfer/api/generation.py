"""What both kinds of completion share: running prompts, joining their streams, counting tokens."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kubeinfer.api.responses import ClientGone, EncodedStream, StreamEncoder, until_disconnect
from kubeinfer.outputs import CompletionOutput, RequestOutput

Outputs = AsyncGenerator[RequestOutput, None]


def request_id_of(request: Request, given: str | None) -> str:
    """The id in the request's body, its ``x-request-id`` header, or a new one."""
    return given or request.scope.get("kubeinfer.request_id") or uuid.uuid4().hex


class Usage:
    """Counts a request's tokens; every prompt once, whatever its ``n``."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self._counted: set[int] = set()

    def add_prompt(self, prompt_index: int, output: RequestOutput) -> bool:
        """Count the prompt; False when it has been already."""
        if prompt_index in self._counted:
            return False
        self._counted.add(prompt_index)
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens
        return True

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


async def merged(streams: list[Outputs], n: int) -> Outputs:
    """All of ``streams`` as one, in order of arrival; output ``j`` of stream ``i`` becomes index ``i * n + j``.

    The first error of any stream is raised before the outputs that wait, and closes all. Each stream holds at most
    one output here at a time, so that further ones merge where they come from.
    """
    pending: dict[asyncio.Task[RequestOutput], int] = {
        asyncio.ensure_future(_next(stream)): index for index, stream in enumerate(streams)
    }
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if error is not None and not isinstance(error, _Ended):
                    raise error
            for task in done:
                index = pending.pop(task)
                if task.exception() is not None:
                    continue
                output = task.result()
                for choice in output.outputs:
                    choice.index += index * n
                pending[asyncio.ensure_future(_next(streams[index]))] = index
                yield output
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


class _Ended(Exception):
    pass


async def _next(stream: Outputs) -> RequestOutput:
    try:
        return await anext(stream)
    except StopAsyncIteration:
        raise _Ended from None


class Collected:
    """The whole of one choice."""

    __slots__ = ("finish_reason", "logprobs", "stop_reason", "texts", "token_ids")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Any]] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def add(self, delta: CompletionOutput) -> None:
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        if delta.logprobs:
            self.logprobs += delta.logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Collection:
    """All of a request's choices and prompts."""

    def __init__(self, n: int, count: int):
        self.n = n
        self.choices = [Collected() for _ in range(n * count)]
        self.prompts: list[RequestOutput | None] = [None] * count
        self.usage = Usage()

    async def run(self, outputs: Outputs) -> Collection:
        try:
            async for output in outputs:
                for delta in output.outputs:
                    self.choices[delta.index].add(delta)
                    self.usage.completion_tokens += len(delta.token_ids)
                    prompt_index = delta.index // self.n
                    if self.usage.add_prompt(prompt_index, output):
                        self.prompts[prompt_index] = output
        finally:
            await outputs.aclose()
        return self


def gone_response() -> Response:
    """For a client that is no longer there to read it (nginx's 499)."""
    return Response(status_code=499)


async def collect(request: Request, outputs: Outputs, n: int, count: int) -> Collection | None:
    """The finished request, or None when the client left."""
    try:
        return await until_disconnect(request.receive, Collection(n, count).run(outputs))
    except ClientGone:
        return None


async def stream(request: Request, outputs: Outputs, encoder: StreamEncoder[RequestOutput]) -> Response:
    """A streamed answer. Its first output is awaited here, so that a refusal still has its own status code."""
    try:
        first = await until_disconnect(request.receive, _next(outputs))
    except ClientGone:
        await outputs.aclose()
        return gone_response()
    except BaseException:
        await outputs.aclose()
        raise
    return EncodedStream(first, outputs, encoder)
