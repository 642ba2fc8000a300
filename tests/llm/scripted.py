"""Engines that replay tokens: real clients of the real interfaces, with a script in place of a model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kubeinfer.engine.client import AsyncEngineClient, EngineClient
from kubeinfer.engine.messages import (
    EngineInfo,
    EngineOutput,
    EngineOutputs,
    EngineRequest,
    EngineStats,
    TokenLogprobs,
)
from kubeinfer.errors import EngineDeadError

Script = Callable[[EngineRequest], list[int]]
INFO = EngineInfo(
    max_model_len=128,
    num_blocks=10,
    block_size=16,
    vocab_size=512,
    device="cpu",
    dtype="float32",
    weight_bytes=0,
    kv_cache_bytes=0,
    max_num_seqs=8,
)


def echo(request: EngineRequest) -> list[int]:
    """The prompt again and again."""
    return request.prompt_token_ids


class Replay:
    """Steps through requests' scripts, one token each a step, as the engine core does."""

    def __init__(self, script: Script):
        self.script = script
        self.running: dict[str, tuple[EngineRequest, list[int], int]] = {}
        self.seen: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.steps = 0

    def add(self, requests: list[EngineRequest]) -> None:
        for request in requests:
            assert request.request_id not in self.running
            self.running[request.request_id] = (request, self.script(request), 0)
            self.seen.append(request)

    def abort(self, request_ids: list[str]) -> list[EngineOutput]:
        self.aborted += request_ids
        known = [name for name in request_ids if self.running.pop(name, None) is not None]
        return [EngineOutput(name, [], "abort") for name in known]

    def step(self) -> EngineOutputs:
        self.steps += 1
        outputs = []
        for name, (request, tokens, at) in list(self.running.items()):
            token = tokens[at % len(tokens)]
            out = EngineOutput(name, [token])
            if at == 0:
                out.scheduled_time = request.arrival_time + 0.001
            if request.params.logprobs is not None:
                out.logprobs = [TokenLogprobs([token], [-0.5], 1)]
            if at == 0 and request.params.prompt_logprobs is not None:
                out.prompt_logprobs = [
                    None,
                    *(TokenLogprobs([i], [-1.0], 1) for i in request.prompt_token_ids[1:]),
                ]
            if not request.params.ignore_eos and token in request.eos_token_ids:
                out.finish_reason = "stop"
            elif at + 1 == request.max_tokens:
                out.finish_reason = "length"
            if out.finish_reason is None:
                self.running[name] = (request, tokens, at + 1)
            else:
                del self.running[name]
            outputs.append(out)
        return EngineOutputs(outputs, EngineStats(num_running=len(self.running), num_steps=self.steps))


class ScriptedClient(EngineClient):
    """Driven by its caller. ``fail_at`` raises at that step, as Ctrl-C or a dying engine would."""

    def __init__(self, script: Script = echo):
        self.info = INFO
        self.replay = Replay(script)
        self.fail_at: tuple[int, BaseException] | None = None
        self.resets = 0
        self.closed = 0

    def add_requests(self, requests: list[EngineRequest]) -> None:
        self.replay.add(requests)

    def abort_requests(self, request_ids: list[str]) -> None:
        self.replay.abort(request_ids)

    def step(self) -> EngineOutputs:
        if self.fail_at is not None and self.replay.steps == self.fail_at[0]:
            raise self.fail_at[1]
        return self.replay.step()

    def has_unfinished_requests(self) -> bool:
        return bool(self.replay.running)

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def shutdown(self) -> None:
        self.closed += 1


class ScriptedAsyncClient(AsyncEngineClient):
    """Runs on its own: a step whenever its outputs are asked for and a request runs. ``pause`` holds it."""

    def __init__(self, script: Script = echo):
        self.info = INFO
        self.replay = Replay(script)
        self.closed = 0
        self.resets = 0
        self._death: str | None = None
        self._wake = asyncio.Event()
        self._ended: list[EngineOutput] = []
        self.allowed: int | None = None  # steps it may still run, None: any

    async def add_requests(self, requests: list[EngineRequest]) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)
        self.replay.add(requests)
        self._wake.set()

    async def abort_requests(self, request_ids: list[str]) -> None:
        self._ended += self.replay.abort(request_ids)
        self._wake.set()

    def allow(self, steps: int | None) -> None:
        self.allowed = steps
        self._wake.set()

    async def next_outputs(self) -> EngineOutputs:
        while True:
            if self._death is not None:
                raise EngineDeadError(self._death)
            if self._ended:
                ended, self._ended = self._ended, []
                return EngineOutputs(ended, None)
            if self.replay.running and self.allowed != 0:
                if self.allowed is not None:
                    self.allowed -= 1
                return self.replay.step()
            self._wake.clear()
            await self._wake.wait()

    def die(self, reason: str) -> None:
        self._death = reason
        self._wake.set()

    @property
    def death_reason(self) -> str | None:
        return self._death

    async def reset_prefix_cache(self) -> None:
        self.resets += 1

    def shutdown(self) -> None:
        self.closed += 1
