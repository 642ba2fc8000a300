"""What both kinds of completion share: running prompts, joining their streams, counting tokens."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kubeinfer.api.middleware import REQUEST_ID
from kubeinfer.api.responses import ClientGone, Items, next_item, until_disconnect
from kubeinfer.api.state import ServerState
from kubeinfer.errors import RequestError
from kubeinfer.outputs import CompletionOutput, RequestOutput
from kubeinfer.sampling_params import SamplingParams

Outputs = Items[RequestOutput]


def request_id_of(request: Request, given: str | None) -> str:
    """The id in the request's body, its ``x-request-id`` header, or a new one."""
    if given and not REQUEST_ID.fullmatch(given.encode()):
        raise RequestError(
            "request_id must be 1 to 128 printable ASCII characters without spaces.", "request_id"
        )
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


class MergedOutputs:
    """Several prompts' streams as one, in order of arrival; output ``j`` of stream ``i`` becomes index ``i * n + j``.

    The first error of any stream ends all. Each stream holds at most one output here at a time, so that further ones
    merge where they come from.
    """

    def __init__(self, streams: list[Outputs], n: int):
        self._streams = streams
        self._n = n
        self._pending: dict[asyncio.Task[RequestOutput | None], int] = {}
        self._ready: deque[RequestOutput] = deque()
        self._started = False

    def __aiter__(self) -> MergedOutputs:
        return self

    async def __anext__(self) -> RequestOutput:
        if not self._started:
            self._started = True
            for index in range(len(self._streams)):
                self._ask(index)
        while not self._ready:
            if not self._pending:
                raise StopAsyncIteration
            done, _ = await asyncio.wait(self._pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = self._pending.pop(task)
                output = task.result()
                if output is None:
                    continue
                for choice in output.outputs:
                    choice.index += index * self._n
                self._ready.append(output)
                self._ask(index)
        return self._ready.popleft()

    def _ask(self, index: int) -> None:
        self._pending[asyncio.ensure_future(next_item(self._streams[index]))] = index

    def close(self) -> None:
        for task in self._pending:
            task.cancel()
        for stream in self._streams:
            stream.close()


async def submit(
    state: ServerState,
    prompts: Sequence[Any],
    params: SamplingParams,
    base_id: str,
    *,
    priority: int | None,
    cache_salt: str | None,
) -> Outputs:
    """Start the prompts. An error of any of them is raised before the others' outputs are read, and ends all."""
    streams: list[Outputs] = []
    most = state.options.max_waiting_requests
    if len(prompts) > most:
        raise RequestError(
            f"prompt has {len(prompts)} entries, and max_waiting_requests lets {most} be in flight; send them in several requests.",
            "prompt",
        )
    try:
        for prompt in prompts:
            stream: Outputs = await state.engine.submit(
                prompt, params, state.unique(base_id), priority=priority or 0, cache_salt=cache_salt
            )
            streams.append(stream)
    except BaseException:
        for started in streams:
            started.close()
        raise
    return streams[0] if len(streams) == 1 else MergedOutputs(streams, params.n)


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
            outputs.close()
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
