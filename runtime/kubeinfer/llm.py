"""The offline API: ``LLM(model).generate(prompts, SamplingParams(...))``."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import msgspec
from tqdm import tqdm

from kubeinfer.collector import no_full_collections
from kubeinfer.engine.client import EngineClient, make_client
from kubeinfer.engine.environment import prepare_this_process
from kubeinfer.errors import KubeinferError, NotSupportedError, RequestError
from kubeinfer.interrupts import HeldInterrupts
from kubeinfer.options import EngineOptions, read_options, target_device
from kubeinfer.outputs import RequestOutput
from kubeinfer.sampling_params import SamplingParams
from kubeinfer.text.chat_template import ChatTemplate, ContentFormat
from kubeinfer.text.input_processor import (
    InputProcessor,
    ProcessedRequest,
    Prompt,
    check_overrides,
    default_sampling_params,
)
from kubeinfer.text.output_processor import OutputProcessor, RequestState
from kubeinfer.text.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

Message = Mapping[str, Any]
_BAR_INTERVAL = 0.1  # seconds between two looks at the progress bar
_AT_FIRST = 256  # requests that the engine begins with


class LLM:
    """A model in this process, for batches of prompts.

    Keywords are the fields of :class:`kubeinfer.options.EngineOptions`; ``model`` is a folder, a GGUF file or
    ORG/NAME. Raises TypeError for an unknown keyword, :class:`OptionError` for a value that cannot work,
    :class:`ModelLoadError` for a model that cannot be loaded. Calls from several threads wait for each other.
    """

    def __init__(self, model: str, tokenizer: str | None = None, **options: Any):
        prepare_this_process()
        _refuse_lora(options.pop("enable_lora", False), "enable_lora")
        values = {"model": str(model), **options}
        if tokenizer is not None:
            values["tokenizer"] = str(tokenizer)
        if "device" not in values and (device := target_device()) is not None:
            values["device"] = device
        self.options: EngineOptions = read_options(EngineOptions, values)
        _refuse_pooling(self.options)

        from kubeinfer.model_config import load_model_config

        check_overrides(self.options.override_generation_config)
        self.model_config = load_model_config(self.options)
        self._tokenizer: Tokenizer = load_tokenizer(self.options, self.model_config.path)
        check_vocabulary(self._tokenizer, self.model_config.vocab_size)
        self._default_params = default_sampling_params(self.model_config.generation_config)
        self._client: EngineClient | None = make_client(self.options)
        self._input = InputProcessor(
            self._tokenizer,
            max_model_len=self._client.info.max_model_len,
            vocab_size=self.model_config.vocab_size,
            eos_token_ids=self.model_config.eos_token_ids,
            max_logprobs=self.options.max_logprobs,
            by_priority=self.options.scheduling_policy == "priority",
            base_seed=self.options.seed,
        )
        self._output = OutputProcessor(self._tokenizer, streaming=False)
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._hf_tokenizer: Any = None

    # ---- generation ----

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        lora_request: None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; outputs come in the prompts' order.

        A prompt is a text, a list of token ids, or ``{"prompt": ...}`` / ``{"prompt_token_ids": [...]}``.
        ``sampling_params`` is one for all or one a prompt; None takes the model's defaults. Raises
        :class:`RequestError` before anything runs where a request cannot be served.
        """
        _refuse_lora(lora_request, "lora_request")
        items = _prompt_list(prompts)
        params = self._params_list(sampling_params, len(items))
        if priority is not None and len(priority) != len(items):
            raise RequestError(f"priority has {len(priority)} entries for {len(items)} prompts.", "priority")
        if any(type(value) is not int for value in priority or ()):
            raise RequestError(f"priority must be integers, got {list(priority or ())[:8]}.", "priority")
        ids = [str(next(self._ids)) for _ in items]
        with no_full_collections():
            return self._run(self._input.process_batch(items, params, ids, priority), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        chat_template_content_format: ContentFormat = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora_request: None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or several, by the model's chat template."""
        _refuse_lora(lora_request, "lora_request")
        if isinstance(messages, (str, Mapping)):
            raise RequestError("messages must be a list of messages, or a list of such lists.", "messages")
        template = ChatTemplate.for_tokenizer(self._tokenizer, chat_template, chat_template_content_format)
        if tools and "tools" not in (template.source or ""):
            raise NotSupportedError("The model's chat template has no place for tools.", "tools")
        single = not messages or isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if single else messages
        prompts: list[Prompt] = [
            {
                "prompt": template.render(
                    conversation,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tools=tools,
                    chat_template_kwargs=chat_template_kwargs,
                ),
                "add_special_tokens": False,
            }
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def _params_list(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * count
        if isinstance(sampling_params, Mapping) or any(
            not isinstance(params, SamplingParams) for params in sampling_params
        ):
            raise RequestError(
                "sampling_params must be a SamplingParams, or a list of such.", "sampling_params"
            )
        if len(sampling_params) != count:
            raise RequestError(
                f"sampling_params has {len(sampling_params)} entries for {count} prompts; give one, or one a prompt.",
                "sampling_params",
            )
        return list(sampling_params)

    def _run(self, requests: Sequence[ProcessedRequest], use_tqdm: bool) -> list[RequestOutput]:
        client = self._engine()
        states: list[RequestState] = []
        with self._lock:
            try:
                with HeldInterrupts() as interrupts:
                    self._loop(client, requests, states, use_tqdm, interrupts)
            except BaseException:
                self._abandon(client, states)
                raise
        for state in states:
            if state.error is not None:
                raise KubeinferError(f"request {state.request_id} failed: {state.error}")
        return [state.whole() for state in states]

    def _loop(
        self,
        client: EngineClient,
        requests: Sequence[ProcessedRequest],
        states: list[RequestState],
        use_tqdm: bool,
        interrupts: HeldInterrupts,
    ) -> None:
        """Run ``requests``, of each of which the engine has been told once its state is in ``states``."""
        process = self._output.process
        remaining = len(requests)
        # The others come while a device has its first step. By priority the engine must know all to choose.
        first = remaining if self.options.scheduling_policy == "priority" else _AT_FIRST
        coming = [part for part in (requests[:first], requests[first:]) if part]
        bar = _ProgressBar(remaining) if use_tqdm else None
        try:
            while remaining:
                interrupts.check()
                if coming:
                    part = coming.pop(0)
                    states.extend(map(self._output.add, part))
                    client.add_requests([engine for request in part for engine in request.engine_requests])
                outputs = client.step().outputs
                if not outputs and not client.has_unfinished_requests():
                    raise KubeinferError(
                        f"the engine has no work left, but {remaining} requests have not finished."
                    )
                finished, aborts = process(outputs, 0.0)
                if aborts:
                    client.abort_requests(aborts)
                if finished:
                    remaining -= len(finished)
                    if bar is not None:
                        bar.add(finished)
        finally:
            if bar is not None:
                bar.close()

    def _abandon(self, client: EngineClient, states: Iterable[RequestState]) -> None:
        """Free what a broken-off call holds in the engine, so that the next call finds it clean."""
        running = [engine_id for state in states for engine_id in self._output.remove(state)]
        try:
            client.abort_requests(running)
        except KubeinferError:
            pass  # a dead engine holds nothing; the first error is the one that tells why

    # ---- what is not there yet ----

    def encode(self, *args: Any, **kwargs: Any) -> None:
        """Refused: pooling models are not supported yet."""
        raise _no_pooling("pooling (encode)")

    def embed(self, *args: Any, **kwargs: Any) -> None:
        """Refused: pooling models are not supported yet."""
        raise _no_pooling("Embeddings")

    def classify(self, *args: Any, **kwargs: Any) -> None:
        """Refused: pooling models are not supported yet."""
        raise _no_pooling("Classification")

    def reward(self, *args: Any, **kwargs: Any) -> None:
        """Refused: pooling models are not supported yet."""
        raise _no_pooling("Reward")

    def score(self, *args: Any, **kwargs: Any) -> None:
        """Refused: pooling models are not supported yet."""
        raise _no_pooling("Score")

    # ---- the model's own things ----

    def get_tokenizer(self) -> Any:
        """The tokenizer as a transformers object (``apply_chat_template``, ``decode``...)."""
        if self._hf_tokenizer is None:
            self._hf_tokenizer = self._tokenizer.to_transformers()
        return self._hf_tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Sampling parameters as the model's generation_config.json wants them."""
        return msgspec.structs.replace(SamplingParams(), **self._default_params)

    def reset_prefix_cache(self) -> None:
        """Forget the KV blocks kept for reuse."""
        self._engine().reset_prefix_cache()

    # ---- end ----

    def _engine(self) -> EngineClient:
        if self._client is None:
            raise KubeinferError("this LLM was shut down; make a new one.")
        return self._client

    def shutdown(self) -> None:
        """Free the engine. The LLM cannot be used afterwards; calling it twice is fine."""
        client, self._client = getattr(self, "_client", None), None
        if client is not None:
            client.shutdown()

    close = shutdown

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


class _ProgressBar:
    """Prompts done, with the rates of prompt and output tokens so far."""

    def __init__(self, total: int):
        self._bar = tqdm(
            total=total,
            desc="Processed prompts",
            dynamic_ncols=True,
            postfix=f"est. speed input: {0:.2f} toks/s, output: {0:.2f} toks/s",
        )
        self._start = time.perf_counter()
        self._done = 0
        self._input = 0
        self._generated = 0
        self._shown = 0.0

    def add(self, finished: Sequence[RequestState]) -> None:
        for state in finished:
            self._input += len(state.prompt_token_ids)
            self._generated += sum(len(sample.token_ids) for sample in state.samples)
        self._done += len(finished)
        now = time.perf_counter()
        if now - self._shown >= _BAR_INTERVAL:
            self._show(now)

    def _show(self, now: float) -> None:
        self._shown = now
        seconds = max(now - self._start, 1e-9)
        self._bar.postfix = f"est. speed input: {self._input / seconds:.2f} toks/s, output: {self._generated / seconds:.2f} toks/s"
        self._bar.update(self._done)
        self._done = 0

    def close(self) -> None:
        self._show(time.perf_counter())
        self._bar.close()


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (bytes, bytearray)):
        raise RequestError("prompt must be a text, token ids or a mapping, not bytes.", "prompt")
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise RequestError(
            f"prompts must be a text, token ids, a mapping or a list of such, not {type(prompts).__name__}.",
            "prompts",
        )
    items = list(prompts)
    if items and all(type(item) is int for item in items):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]


def _refuse_lora(asked: object, param: str) -> None:
    if asked is not None and asked is not False:
        raise NotSupportedError("LoRA adapters are not supported by this version.", param)


def _no_pooling(api: str) -> NotSupportedError:
    return NotSupportedError(
        f"The model does not support {api} API: it was loaded to generate text. Pooling models (--runner pooling) are "
        "not supported by this version.",
        "runner",
    )


def _refuse_pooling(options: EngineOptions) -> None:
    if options.runner == "pooling" or options.convert not in ("auto", "none"):
        raise NotSupportedError(
            f"runner {options.runner!r} with convert {options.convert!r}: pooling models are not supported by this "
            "version; leave out --runner and --convert to generate text.",
            "runner",
        )
