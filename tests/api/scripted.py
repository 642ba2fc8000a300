"""An engine core that writes a known text at a known pace; all above it (text layer, streams, server) is real."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kubeinfer.async_llm import AsyncLLM
from kubeinfer.engine.client import AsyncEngineClient
from kubeinfer.engine.messages import (
    EngineInfo,
    EngineOutput,
    EngineOutputs,
    EngineRequest,
    EngineStats,
    TokenLogprobs,
)
from kubeinfer.errors import EngineDeadError
from kubeinfer.options import EngineOptions
from kubeinfer.text.tokenizer import from_folder

TEXT = " The quick brown fox jumps over the lazy dog. 你好，世界。" * 40


class ScriptedClient(AsyncEngineClient):
    """Each step gives every request the next token of :data:`TEXT`; ``delay`` seconds lie between two steps."""

    def __init__(self, folder: Path, *, delay: float = 0.0, max_model_len: int = 512):
        tokenizer = from_folder(folder)
        self.delay = delay
        self.info = EngineInfo(
            max_model_len=max_model_len, num_blocks=64, block_size=16, vocab_size=tokenizer.vocab_size, device="cpu",
            dtype="float32", weight_bytes=1, kv_cache_bytes=1, max_num_seqs=64,
        )  # fmt: skip
        self.script = tokenizer.encode(TEXT, add_special_tokens=False)
        self.live: dict[str, tuple[EngineRequest, int]] = {}
        self.requests: deque[EngineRequest] = deque(maxlen=512)  # the latest
        self.aborted: list[str] = []
        self.steps = 0
        self.closed = False
        self._reason: str | None = None
        self._stats = EngineStats()
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def die(self, reason: str) -> None:
        """From any thread."""
        self._reason = reason
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake.set)

    @property
    def death_reason(self) -> str | None:
        return self._reason

    async def add_requests(self, requests: list[EngineRequest]) -> None:
        for request in requests:
            self.requests.append(request)
            self.live[request.request_id] = (request, 0)
        self._wake.set()

    async def abort_requests(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.aborted.append(request_id)
            self.live.pop(request_id, None)

    async def next_outputs(self) -> EngineOutputs:
        self._loop = asyncio.get_running_loop()
        while not self.live and self._reason is None:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), 0.5)
        await asyncio.sleep(self.delay)
        if self._reason is not None:
            raise EngineDeadError(self._reason)
        self.steps += 1
        outputs = [self._advance(*entry) for entry in list(self.live.values())]
        stats = self._stats
        stats.num_running = len(self.live)
        stats.num_steps += 1
        stats.generation_tokens += len(outputs)
        return EngineOutputs(outputs, stats)

    def _advance(self, request: EngineRequest, position: int) -> EngineOutput:
        token = self.script[position % len(self.script)]
        output = EngineOutput(request.request_id, [token], num_cached_tokens=1)
        params = request.params
        if params.logprobs is not None:
            output.logprobs = [_logprobs(token, -0.5)]
        if position == 0:
            self._stats.prompt_tokens += len(request.prompt_token_ids)
            if params.prompt_logprobs is not None:
                output.prompt_logprobs = [None, *(_logprobs(i, -0.25) for i in request.prompt_token_ids[1:])]
        if position + 1 >= request.max_tokens:
            output.finish_reason = "length"
            del self.live[request.request_id]
        else:
            self.live[request.request_id] = (request, position + 1)
        return output

    async def reset_prefix_cache(self) -> None:
        pass

    def shutdown(self) -> None:
        self.closed = True


def _logprobs(token: int, value: float) -> TokenLogprobs:
    other = 7 if token != 7 else 8
    return TokenLogprobs([token, token, other], [value, value, -1.5], 1)


def scripted_engine(
    folder: Path,
    *,
    change: Callable[[AsyncLLM], None] | None = None,
    max_waiting: int | None = None,
    **client: Any,
) -> AsyncLLM:
    """A real :class:`AsyncLLM` over a :class:`ScriptedClient`."""
    engine = AsyncLLM(
        EngineOptions(model=str(folder)), ScriptedClient(folder, **client), max_waiting_requests=max_waiting
    )
    if change is not None:
        change(engine)
    return engine
