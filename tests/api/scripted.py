"""An engine that writes a known text at a known pace, behind the interface that the server uses.

Prompts are checked and tokenized by the real text layer; only the model is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kubeinfer.engine.messages import EngineStats
from kubeinfer.errors import EngineDeadError
from kubeinfer.outputs import CompletionOutput, Logprob, RequestOutput
from kubeinfer.sampling_params import SamplingParams
from kubeinfer.text.detokenizer import Detokenizer
from kubeinfer.text.input_processor import InputProcessor
from kubeinfer.text.tokenizer import from_folder

TEXT = " The quick brown fox jumps over the lazy dog. 你好，世界。" * 40


class ScriptedEngine:
    def __init__(self, folder: Path, *, delay: float = 0.0, max_model_len: int = 512, **defaults: Any):
        self.tokenizer = from_folder(folder)
        self.delay = delay
        self.model_config = SimpleNamespace(
            path=str(folder), max_model_len=max_model_len, vocab_size=self.tokenizer.vocab_size
        )
        self.default_sampling_params: dict[str, Any] = defaults
        self.stats = EngineStats()
        self.death_reason: str | None = None
        self.live: set[str] = set()
        self.ended: list[str] = []
        self.params: list[SamplingParams] = []
        self.closed = False
        self._script = self.tokenizer.encode(TEXT, add_special_tokens=False)
        self._stop = asyncio.Event()
        self._input = InputProcessor(
            self.tokenizer, max_model_len=max_model_len, vocab_size=self.tokenizer.vocab_size
        )

    @property
    def num_unfinished(self) -> int:
        return len(self.live)

    async def generate(
        self,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        request = self._input.process(prompt, params, request_id, priority=priority, cache_salt=cache_salt)
        self.params.append(params)
        self.live.add(request_id)
        ids = request.prompt_token_ids
        try:
            texts = [Detokenizer(self.tokenizer, ids, params) for _ in range(params.n)]
            stopped: set[int] = set()
            for step in range(request.engine_requests[0].max_tokens):
                await asyncio.sleep(self.delay)
                if self.death_reason is not None:
                    raise EngineDeadError(self.death_reason)
                outputs = []
                token = self._script[step % len(self._script)]
                last = step == request.engine_requests[0].max_tokens - 1
                for index, detokenizer in enumerate(texts):
                    if index in stopped:
                        continue
                    if last:
                        text, _ = detokenizer.finish([token], False)
                    else:
                        text, _ = detokenizer.push([token])
                    output = CompletionOutput(index, text, [token])
                    if params.logprobs is not None:
                        output.logprobs = [
                            {
                                token: Logprob(-0.5, 1, self.tokenizer.piece(token)),
                                7: Logprob(-1.5, 2, self.tokenizer.piece(7)),
                            }
                        ]
                    if detokenizer.stop_string is not None:
                        output.finish_reason, output.stop_reason = "stop", detokenizer.stop_string
                    elif self._stop.is_set():
                        output.finish_reason = "abort"
                    elif last:
                        output.finish_reason = "length"
                    if output.finish_reason:
                        stopped.add(index)
                    outputs.append(output)
                result = RequestOutput(request_id, request.prompt, [], outputs)
                result.finished = len(stopped) == params.n
                if step == 0:
                    result.prompt_token_ids = ids
                    result.num_cached_tokens = 1
                    if params.prompt_logprobs is not None:
                        result.prompt_logprobs = [
                            None,
                            *({i: Logprob(-0.25, 1, self.tokenizer.piece(i))} for i in ids[1:]),
                        ]
                self.stats = advanced(self.stats, len(outputs), len(ids) if step == 0 else 0)
                yield result
                if result.finished:
                    return
        finally:
            self.live.discard(request_id)
            self.ended.append(request_id)

    async def abort_all(self) -> None:
        self._stop.set()

    def shutdown(self) -> None:
        self.closed = True


def advanced(stats: EngineStats, generated: int, prompt: int) -> EngineStats:
    return EngineStats(
        num_running=1,
        generation_tokens=stats.generation_tokens + generated,
        prompt_tokens=stats.prompt_tokens + prompt,
        num_steps=stats.num_steps + 1,
    )
