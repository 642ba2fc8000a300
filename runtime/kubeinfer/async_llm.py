"""The engine for a server: requests come and go one by one, each a stream of what is new."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from array import array
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from kubeinfer.engine.client import AsyncEngineClient, make_async_client
from kubeinfer.engine.messages import EngineInfo, EngineOutput, EngineStats
from kubeinfer.errors import EngineDeadError, KubeinferError, QueueFullError, RequestError
from kubeinfer.options import EngineOptions
from kubeinfer.outputs import RequestOutput
from kubeinfer.sampling_params import SamplingParams
from kubeinfer.text.input_processor import (
    InputProcessor,
    ProcessedRequest,
    Prompt,
    check_overrides,
    default_sampling_params,
)
from kubeinfer.text.output_processor import OutputProcessor, RequestState
from kubeinfer.text.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

logger = logging.getLogger(__name__)

# Engine outputs handled before the event loop gets a turn, in which their bytes leave and new requests come in.
_CHUNK = 32


@dataclass(slots=True)
class RequestRecord:
    """What is known of a request once it is over. Times are ``time.time()``, 0.0 where it never came to that."""

    request_id: str
    finish_reason: str  # of the first output: "stop", "length", "abort" or "error"
    finish_reasons: list[str]  # of all ``n`` outputs
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    arrival_time: float
    scheduled_time: float
    first_token_time: float
    last_token_time: float
    finished_time: float
    inter_token_times: array[float] = field(default_factory=lambda: array("d"))  # seconds


class RequestStream:
    """One request's outputs, as they come. Iterate it, and close it (:meth:`close`) where it is left early."""

    def __init__(self, llm: AsyncLLM, state: RequestState):
        self._llm = llm
        self._state = state
        self._news = False
        self._over = False
        self._failure: str | None = None  # why the engine died while the request ran
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        """What is new since the last call: one call may bring several tokens where the caller is slow.

        Raises :class:`EngineDeadError` once the engine has died.
        """
        while not self._news:
            if self._over:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._news = False
        if self._failure is not None:
            self._over = True
            raise EngineDeadError(self._failure)
        state = self._state
        if state.unfinished == 0:
            self._over = True
            if state.error is not None:
                raise KubeinferError(f"request {state.request_id} failed: {state.error}")
        return state.take()

    def notify(self) -> None:
        """There is news."""
        self._news = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def fail(self, reason: str) -> None:
        """The engine died."""
        self._failure = reason
        self.notify()

    def close(self) -> None:
        """Abort the request if it still runs; later calls of ``__anext__`` end the iteration."""
        if not self._over:
            self._over = True
            self._news = False
            self._llm.drop(self._state)


class AsyncLLM:
    """One model's engine, tokenizer and requests in flight. Lives on one event loop.

    Making it blocks until the engine is ready (do it before the loop, or in a thread). ``tokenizer``,
    ``model_config`` and ``default_sampling_params`` (a dict, from the model's generation_config.json) are for
    whoever serves it. ``on_stats`` is called with the engine's state after each step, ``on_request_finished`` once
    a request; both run on the event loop and must be quick.

    Raises what :class:`kubeinfer.llm.LLM` does, and :class:`EngineDeadError` if the engine does not start.
    """

    def __init__(
        self,
        options: EngineOptions,
        client: AsyncEngineClient | None = None,
        *,
        max_waiting_requests: int | None = None,
        log_format: str = "text",
    ):
        from kubeinfer.model_config import load_model_config

        self.options = options
        check_overrides(options.override_generation_config)
        self.model_config = load_model_config(options)
        self.max_waiting_requests = max_waiting_requests
        self._waiting_since: float | None = (
            None  # when a message last came, or the first request of a quiet time
        )
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
        loading = self._threads.submit(self._load_tokenizer)

        def check() -> None:
            if loading.done():
                loading.result()  # a model whose tokenizer cannot be read need not be loaded

        self._client = client if client is not None else make_async_client(options, log_format, check)
        try:
            self.tokenizer: Tokenizer = loading.result()
        except BaseException:
            self._client.shutdown()
            raise
        self.default_sampling_params = default_sampling_params(self.model_config.generation_config)
        self.input_processor = InputProcessor(
            self.tokenizer,
            max_model_len=self.info.max_model_len,
            vocab_size=self.model_config.vocab_size,
            eos_token_ids=self.model_config.eos_token_ids,
            max_logprobs=options.max_logprobs,
            by_priority=options.scheduling_policy == "priority",
        )
        self.stats = EngineStats()
        self.on_stats: Callable[[EngineStats], None] | None = None
        self.on_request_finished: Callable[[RequestRecord], None] | None = None
        self._output = OutputProcessor(self.tokenizer, streaming=True)
        self._streams: dict[str, RequestStream] = {}
        self._admitted = 0  # requests that are being tokenized
        self._death_reason: str | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self._sends: set[asyncio.Task[None]] = set()
        # What was loaded stays: without this, the collector walks over it while streams wait.
        gc.collect()
        gc.freeze()

    def _load_tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self.options, self.model_config.path)
        check_vocabulary(tokenizer, self.model_config.vocab_size)
        return tokenizer

    @property
    def info(self) -> EngineInfo:
        return self._client.info

    @property
    def num_unfinished(self) -> int:
        """Requests that were taken in and are not over."""
        return len(self._streams) + self._admitted

    @property
    def silent_for(self) -> float:
        """Seconds since the engine was last heard of while it has requests; 0 while it has none."""
        if not self.num_unfinished or self._waiting_since is None:
            return 0.0
        return time.monotonic() - self._waiting_since

    @property
    def death_reason(self) -> str | None:
        """Why the engine died, None while it lives."""
        return self._death_reason or self._client.death_reason

    def start(self) -> None:
        """Start taking in the engine's outputs, on the running event loop. The first request does it too."""
        if self._loop_task is None:
            self._loop_task = asyncio.get_running_loop().create_task(self._take_in_outputs())

    # ---- requests ----

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> RequestStream:
        """Send a request to the engine. The caller closes the stream where it does not read it to its end.

        Raises :class:`RequestError` (it cannot be served as asked, or its id is in use), :class:`QueueFullError`
        and :class:`EngineDeadError`, all before the engine sees the request.
        """
        if self.death_reason is not None:
            raise EngineDeadError(self.death_reason)
        bound = self.max_waiting_requests
        if bound is not None and self.num_unfinished >= bound:
            raise QueueFullError(
                f"{self.num_unfinished} requests are in flight or waiting, as many as max_waiting_requests allows; try again soon."
            )
        self.start()
        if not self.num_unfinished:
            self._waiting_since = time.monotonic()
        processed = await self._process(prompt, params, request_id, priority, cache_salt)
        if request_id in self._streams:
            raise RequestError(f"request_id {request_id!r} is in use by a request in flight.", "request_id")
        try:
            state = self._output.add(processed)
        except ValueError as exc:
            raise RequestError(f"{exc}.", "request_id") from None
        stream = self._streams[request_id] = RequestStream(self, state)
        try:
            await self._client.add_requests(processed.engine_requests)
        except BaseException:
            stream.close()
            raise
        return stream

    async def _process(
        self, prompt: Prompt, params: SamplingParams, request_id: str, priority: int, cache_salt: str | None
    ) -> ProcessedRequest:
        arrival = time.time()

        def process() -> ProcessedRequest:
            return self.input_processor.process(
                prompt, params, request_id, priority=priority, cache_salt=cache_salt, arrival_time=arrival
            )

        if not self.input_processor.is_long(prompt):
            return process()
        self._admitted += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, process)
        finally:
            self._admitted -= 1

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The request's outputs as deltas: of the outputs that have news, what came since the last yield.

        The first carries prompt logprobs, the last has ``finished``. Closing or cancelling the generator aborts the
        request. Raises as :meth:`submit` does, at the first step.
        """
        stream = await self.submit(prompt, params, request_id, priority=priority, cache_salt=cache_salt)
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def abort(self, request_id: str) -> None:
        """End a request now; its stream gets a last output with finish_reason "abort". Unknown ids are fine."""
        self._abort_streams([self._streams[request_id]] if request_id in self._streams else [])

    async def abort_all(self) -> None:
        """:meth:`abort` of every request."""
        self._abort_streams(list(self._streams.values()))

    def _abort_streams(self, streams: Iterable[RequestStream]) -> None:
        for stream in streams:
            self.drop(stream._state)
            stream.notify()

    def drop(self, state: RequestState) -> None:
        """Take a request out of the engine, whose stream nobody reads any more."""
        running = self._output.remove(state)
        self._finished(state)
        if running:
            self._send_abort(running)

    def _send_abort(self, engine_ids: list[str]) -> None:
        if self.death_reason is not None:
            return
        # A task of its own: the caller may be a generator that is being closed, or a task that is being cancelled.
        task = asyncio.get_running_loop().create_task(self._abort(engine_ids))
        self._sends.add(task)
        task.add_done_callback(self._sends.discard)

    async def _abort(self, engine_ids: list[str]) -> None:
        try:
            await self._client.abort_requests(engine_ids)
        except EngineDeadError:
            pass  # a dead engine holds nothing

    async def reset_prefix_cache(self) -> None:
        """Forget the KV blocks kept for reuse."""
        await self._client.reset_prefix_cache()

    # ---- the engine's outputs ----

    async def _take_in_outputs(self) -> None:
        try:
            while True:
                message = await self._client.next_outputs()
                self._waiting_since = time.monotonic()
                if message.stats is not None:
                    self.stats = message.stats
                    if self.on_stats is not None:
                        self.on_stats(message.stats)
                now = time.time()
                for outputs in _portions(message.outputs):
                    touched, aborts = self._output.process(outputs, now)
                    for state in touched:
                        stream = self._streams.get(state.request_id)
                        if stream is not None:
                            stream.notify()
                        if state.unfinished == 0:
                            self._finished(state)
                    if aborts:
                        self._send_abort(aborts)
                    # The next message may be there already; the streams' readers come first.
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            raise
        except EngineDeadError as exc:
            self._die(str(exc))
        except Exception as exc:
            logger.exception("taking in the engine's outputs failed")
            self._die(f"taking in the engine's outputs failed: {type(exc).__name__}: {exc}")

    def _die(self, reason: str) -> None:
        self._death_reason = reason
        for stream in list(self._streams.values()):
            self._output.remove(stream._state, "error")
            self._finished(stream._state)
            stream.fail(reason)

    def _finished(self, state: RequestState) -> None:
        if self._streams.pop(state.request_id, None) is None or self.on_request_finished is None:
            return
        reasons = [sample.finish_reason or "abort" for sample in state.samples]
        self.on_request_finished(
            RequestRecord(
                request_id=state.request_id,
                finish_reason=reasons[0],
                finish_reasons=reasons,
                num_prompt_tokens=len(state.prompt_token_ids),
                num_cached_tokens=state.num_cached_tokens,
                num_output_tokens=state.num_output_tokens,
                arrival_time=state.arrival_time,
                scheduled_time=state.scheduled_time,
                first_token_time=state.first_token_time,
                last_token_time=state.last_token_time,
                finished_time=time.time(),
                inter_token_times=state.inter_token_times,
            )
        )

    # ---- end ----

    def shutdown(self) -> None:
        """Stop the engine (blocks for a moment). Streams still open raise :class:`EngineDeadError`."""
        task, self._loop_task = self._loop_task, None
        if task is not None and not task.get_loop().is_closed():
            task.cancel()
            self._die(self._death_reason or "the engine was shut down")
        self._client.shutdown()
        self._threads.shutdown(wait=False)


def _portions(outputs: list[EngineOutput]) -> Iterator[list[EngineOutput]]:
    """A step's outputs in the order they are handled: first tokens ahead of all others, which their readers wait for less."""
    firsts = [output for output in outputs if output.scheduled_time]
    if firsts and len(firsts) < len(outputs):
        yield firsts
        outputs = [output for output in outputs if not output.scheduled_time]
    for start in range(0, len(outputs), _CHUNK):
        yield outputs[start : start + _CHUNK]
