"""What the routers share: the engine, the options, the served names, and whether new requests are taken."""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.requests import Request

from kubeinfer.api.errors import ApiError
from kubeinfer.async_llm import AsyncLLM
from kubeinfer.errors import RequestError
from kubeinfer.metrics import Metrics
from kubeinfer.options import ServeOptions
from kubeinfer.sampling_params import SamplingParams
from kubeinfer.text.chat_template import ChatTemplate

_logger = logging.getLogger("kubeinfer.api")

_LONG_TEXT = 4096  # characters

# Far beyond the longest step (the core also speaks between steps that bring no token): a probe may restart the pod then.
HUNG_AFTER = 300.0


class ServerState:
    """One a server. ``in_flight`` counts requests that generate, from their first byte in to their last out."""

    def __init__(self, engine: AsyncLLM, options: ServeOptions, metrics: Metrics, chat: ChatTemplate):
        self.engine = engine
        self.options = options
        self.metrics = metrics
        self.chat = chat
        self.served_names = options.served_model_name or [options.model]
        self.created = int(time.time())
        self.draining = False
        self.in_flight = 0
        self._sequence = 0

    @property
    def model_name(self) -> str:
        """The name shown in answers."""
        return self.served_names[0]

    @property
    def max_model_len(self) -> int:
        return self.engine.info.max_model_len

    def refusal(self) -> ApiError | None:
        """Why no request can be taken now, or None."""
        reason = self.engine.death_reason
        if reason is not None:
            return ApiError(
                503, f"The engine has stopped: {reason}", code="engine_dead", headers={"retry-after": "10"}
            )
        silent = self.engine.silent_for
        if silent > HUNG_AFTER:
            return ApiError(
                503,
                f"The engine has requests but has finished no step for {silent:.0f} s: it hangs.",
                code="engine_hung",
                headers={"retry-after": "10"},
            )
        if self.draining:
            return ApiError(
                503, "The server is shutting down.", code="shutting_down", headers={"retry-after": "5"}
            )
        return None

    def check_model(self, name: str | None) -> str:
        """The name to answer with. An unknown name is a 404 that lists the known ones."""
        if name is None or name == "":
            return self.model_name
        if name not in self.served_names:
            known = ", ".join(f"'{known}'" for known in self.served_names)
            raise ApiError(
                404,
                f"The model '{name}' does not exist; this server has {known}.",
                param="model",
                code="model_not_found",
            )
        return name

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``; a long one is encoded in a thread, so that streams go on meanwhile."""
        encode = self.engine.tokenizer.encode
        try:
            if len(text) > _LONG_TEXT:
                return await asyncio.to_thread(encode, text, add_special_tokens)
            return encode(text, add_special_tokens)
        except UnicodeEncodeError:
            raise RequestError("prompt holds a lone surrogate, which is no text.", "prompt") from None

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``, special tokens included."""
        return self.engine.tokenizer.decode(ids, skip_special_tokens=False)

    def text_of(self, prompt: str | list[int]) -> str:
        """A prompt as text."""
        return prompt if isinstance(prompt, str) else self.decode(prompt)

    def token_strings(self, ids: list[int]) -> list[str]:
        """Each token as the vocabulary spells it."""
        return [self.engine.tokenizer.id_to_token(token_id) or "" for token_id in ids]

    def log_request(self, request_id: str, params: SamplingParams, prompts: int) -> None:
        """One line a request, where ``--enable-log-requests`` asks for it."""
        if self.options.enable_log_requests:
            _logger.info("Request %s: %d prompt(s), %s", request_id, prompts, params)

    def unique(self, request_id: str) -> str:
        """An id for the engine: unique even where two clients send the same ``x-request-id``."""
        self._sequence += 1
        return f"{request_id}-{self._sequence}"


def state_of(request: Request) -> ServerState:
    state = request.app.state.server
    assert isinstance(state, ServerState)
    return state
