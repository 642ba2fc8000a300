"""The engine's tokens, made into what a user of the API reads.

A user's request is a :class:`RequestState` with one :class:`SampleState` for each of its ``n`` outputs. Offline,
outputs are cumulative and text is decoded once, at the end; for the server each state keeps what is new since it was
last taken. This runs for every token of every request, so the common case does as little as it can.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from kubeinfer.engine.messages import EngineOutput, TokenLogprobs
from kubeinfer.outputs import CompletionOutput, Logprob, RequestOutput
from kubeinfer.sampling_params import SamplingParams
from kubeinfer.text.detokenizer import Detokenizer
from kubeinfer.text.input_processor import ProcessedRequest
from kubeinfer.text.tokenizer import Tokenizer


def position_logprobs(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """One position's logprobs by token id: the chosen token first, then the most likely ones by rank."""
    ids, values = entry.token_ids, entry.logprobs
    piece = tokenizer.piece if tokenizer is not None else None
    chosen = ids[0]
    result = {chosen: Logprob(values[0], entry.rank, piece(chosen) if piece else None)}
    for rank in range(1, len(ids)):
        token_id = ids[rank]
        if token_id != chosen:
            result[token_id] = Logprob(values[rank], rank, piece(token_id) if piece else None)
    return result


class SampleState:
    """One output of a request, while it grows."""

    __slots__ = (
        "cumulative_logprob",
        "detokenizer",
        "engine_id",
        "finish_reason",
        "has_news",
        "index",
        "is_plain",
        "last_token_time",
        "logprobs",
        "new_ids",
        "new_logprobs",
        "new_text",
        "request",
        "stop_reason",
        "text",
        "token_ids",
    )

    def __init__(self, request: RequestState, index: int, engine_id: str):
        self.request = request
        self.index = index
        self.engine_id = engine_id
        self.token_ids: list[int] = []
        self.text = ""
        self.detokenizer: Detokenizer | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        wants_logprobs = request.params.logprobs is not None
        self.logprobs: list[dict[int, Logprob]] | None = [] if wants_logprobs else None
        self.cumulative_logprob: float | None = 0.0 if wants_logprobs else None
        self.is_plain = not wants_logprobs  # nothing is made of a token before the sequence ends
        self.last_token_time = 0.0
        # Since the last take(), for streaming.
        self.has_news = False
        self.new_ids: list[int] = []
        self.new_text = ""
        self.new_logprobs: list[dict[int, Logprob]] = []

    def take(self) -> CompletionOutput:
        """What is new since the last time."""
        self.has_news = False
        ids, self.new_ids = self.new_ids, []
        text, self.new_text = self.new_text, ""
        logprobs = None
        if self.logprobs is not None:
            logprobs, self.new_logprobs = self.new_logprobs, []
        return CompletionOutput(
            self.index, text, ids, self.cumulative_logprob, logprobs, self.finish_reason, self.stop_reason
        )

    def whole(self) -> CompletionOutput:
        """All there is so far."""
        return CompletionOutput(
            self.index,
            self.text,
            self.token_ids,
            self.cumulative_logprob,
            self.logprobs,
            self.finish_reason,
            self.stop_reason,
        )


class RequestState:
    """A user's request in flight. Times are ``time.time()`` in seconds, 0.0 where it has not come to that yet."""

    __slots__ = (
        "arrival_time",
        "error",
        "first_token_time",
        "inter_token_times",
        "last_token_time",
        "num_cached_tokens",
        "num_output_tokens",
        "params",
        "prompt",
        "prompt_logprobs",
        "prompt_token_ids",
        "request_id",
        "samples",
        "scheduled_time",
        "unfinished",
    )

    def __init__(self, processed: ProcessedRequest):
        self.request_id = processed.request_id
        self.prompt = processed.prompt
        self.prompt_token_ids = processed.prompt_token_ids
        self.params = processed.params
        self.samples = [
            SampleState(self, index, request.request_id)
            for index, request in enumerate(processed.engine_requests)
        ]
        self.unfinished = len(self.samples)
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.error: str | None = None
        self.arrival_time = processed.engine_requests[0].arrival_time
        self.scheduled_time = 0.0
        self.first_token_time = 0.0
        self.last_token_time = 0.0
        self.inter_token_times = array("d")

    @property
    def finished(self) -> bool:
        return self.unfinished == 0

    def engine_ids(self) -> list[str]:
        """The engine requests that still run."""
        return [sample.engine_id for sample in self.samples if sample.finish_reason is None]

    def take(self) -> RequestOutput:
        """What is new since the last time, of the outputs that have news; prompt logprobs come once."""
        outputs = [sample.take() for sample in self.samples if sample.has_news]
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            outputs,
            self.unfinished == 0,
            prompt_logprobs,
            self.num_cached_tokens,
        )

    def whole(self) -> RequestOutput:
        """All outputs as of now."""
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            [sample.whole() for sample in self.samples],
            self.unfinished == 0,
            self.prompt_logprobs,
            self.num_cached_tokens,
        )


class OutputProcessor:
    """Routes the engine's outputs to their requests.

    ``streaming`` keeps each request's news apart (:meth:`RequestState.take`) and decodes text at once; without it only
    the whole outputs are kept, and text is decoded when a sequence ends, or at once where it has stop strings.
    """

    def __init__(self, tokenizer: Tokenizer | None, streaming: bool):
        self._tokenizer = tokenizer
        self._streaming = streaming
        self._samples: dict[str, SampleState] = {}

    @property
    def num_unfinished(self) -> int:
        """Outputs (not requests) that still run."""
        return len(self._samples)

    def add(self, processed: ProcessedRequest) -> RequestState:
        """Expect outputs of ``processed``. Raises ValueError for an id that is in flight already."""
        state = RequestState(processed)
        params = processed.params
        for sample in state.samples:
            if sample.engine_id in self._samples:
                raise ValueError(f"request id {sample.engine_id!r} is in flight already")
        for sample in state.samples:
            if params.detokenize and self._tokenizer is not None and (self._streaming or params.stop):
                sample.detokenizer = Detokenizer(self._tokenizer, state.prompt_token_ids, params)
                sample.is_plain = False
            self._samples[sample.engine_id] = sample
        return state

    def remove(self, state: RequestState, reason: str = "abort") -> list[str]:
        """Forget a request; returns the engine's ids to abort."""
        running = [sample for sample in state.samples if sample.finish_reason is None]
        for sample in running:
            self._end(sample, reason, None)
        return [sample.engine_id for sample in running]

    def process(self, outputs: Sequence[EngineOutput], now: float) -> tuple[list[RequestState], list[str]]:
        """Take in a step's outputs at the time ``now``.

        Returns the requests with news (with ``streaming``) or that have finished (without it), and the engine's ids
        to abort, as a stop string ended them.
        """
        touched: list[RequestState] = []
        aborts: list[str] = []
        samples = self._samples
        streaming = self._streaming
        for out in outputs:
            sample = samples.get(out.request_id)
            if sample is None:
                continue  # aborted meanwhile
            if streaming:
                if self._stream(sample, out, now):
                    aborts.append(sample.engine_id)
                touched.append(sample.request)
            elif sample.is_plain and out.finish_reason is None and sample.token_ids:
                sample.token_ids += out.new_token_ids  # by far the most common case
            else:
                if self._collect(sample, out):
                    aborts.append(sample.engine_id)
                if sample.finish_reason is not None and sample.request.unfinished == 0:
                    touched.append(sample.request)
        return touched, aborts

    def _collect(self, sample: SampleState, out: EngineOutput) -> bool:
        """Add to the whole output. True where the engine must be told that it ended."""
        ids = out.new_token_ids
        reason = out.finish_reason
        detokenizer = sample.detokenizer
        if detokenizer is None:
            sample.token_ids += ids
            used = len(ids)
        else:
            if reason is None:
                text, used = detokenizer.push(ids)
            else:
                text, used = detokenizer.finish(ids, reason == "stop")
            sample.text += text
            sample.token_ids += ids if used == len(ids) else ids[:used]
        if out.logprobs is not None and sample.logprobs is not None:
            self._add_logprobs(sample, sample.logprobs, out.logprobs[:used])
        if out.prompt_logprobs is not None or out.num_cached_tokens:
            self._first_output(sample.request, out)
        if detokenizer is not None and detokenizer.stop_string is not None:
            self._end(sample, "stop", detokenizer.stop_string)
            return reason is None
        if reason is not None:
            params = sample.request.params
            if detokenizer is None and params.detokenize and self._tokenizer is not None:
                whole = Detokenizer(self._tokenizer, sample.request.prompt_token_ids, params)
                sample.text = whole.finish(sample.token_ids, reason == "stop")[0]
            sample.request.error = sample.request.error or out.error
            self._end(sample, reason, out.stop_reason)
        return False

    def _stream(self, sample: SampleState, out: EngineOutput, now: float) -> bool:
        """Add to the news. True where the engine must be told that it ended."""
        ids = out.new_token_ids
        reason = out.finish_reason
        detokenizer = sample.detokenizer
        request = sample.request
        used = len(ids)
        if detokenizer is not None:
            if reason is None:
                text, used = detokenizer.push(ids)
            else:
                text, used = detokenizer.finish(ids, reason == "stop")
            if text:
                sample.new_text += text
            if used != len(ids):
                ids = ids[:used]
        sample.new_ids += ids
        sample.has_news = True
        if used:
            request.num_output_tokens += used
            if sample.last_token_time:
                request.inter_token_times.append(now - sample.last_token_time)
            else:
                if not request.first_token_time:
                    request.first_token_time = now
                    request.scheduled_time = out.scheduled_time or now
                self._first_output(request, out)
            sample.last_token_time = request.last_token_time = now
        if out.logprobs is not None and sample.logprobs is not None:
            self._add_logprobs(sample, sample.new_logprobs, out.logprobs[:used])
        if detokenizer is not None and detokenizer.stop_string is not None:
            self._end(sample, "stop", detokenizer.stop_string)
            return reason is None
        if reason is not None:
            request.error = request.error or out.error
            self._end(sample, reason, out.stop_reason)
        return False

    def _first_output(self, request: RequestState, out: EngineOutput) -> None:
        request.num_cached_tokens = max(request.num_cached_tokens, out.num_cached_tokens)
        if out.prompt_logprobs is not None and request.prompt_logprobs is None:
            request.prompt_logprobs = [
                None if entry is None else position_logprobs(entry, self._piecer(request.params))
                for entry in out.prompt_logprobs
            ]

    def _piecer(self, params: SamplingParams) -> Tokenizer | None:
        return self._tokenizer if params.detokenize else None

    def _add_logprobs(
        self, sample: SampleState, into: list[dict[int, Logprob]], entries: Sequence[TokenLogprobs]
    ) -> None:
        tokenizer = self._piecer(sample.request.params)
        for entry in entries:
            into.append(position_logprobs(entry, tokenizer))
            sample.cumulative_logprob = (sample.cumulative_logprob or 0.0) + entry.logprobs[0]

    def _end(self, sample: SampleState, reason: str, stop_reason: int | str | None) -> None:
        sample.finish_reason = reason
        sample.stop_reason = stop_reason
        sample.has_news = True
        sample.request.unfinished -= 1
        del self._samples[sample.engine_id]
