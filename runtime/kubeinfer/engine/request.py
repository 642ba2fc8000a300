"""A request as the scheduler sees it: tokens known, tokens computed, blocks held."""

from __future__ import annotations

from kubeinfer.engine.messages import EngineRequest


class Request:
    """One sequence.

    ``token_ids`` holds prompt and output as far as they are known. ``num_computed`` counts tokens whose KV is in the
    cache or will be once the steps in flight are done; ``num_in_flight`` counts tokens that are being sampled by
    those steps, so that the next step can be planned before they are known.
    """

    __slots__ = (
        "aborted",
        "arrival",
        "block_hashes",
        "block_ids",
        "engine_request",
        "eos",
        "last_step",
        "max_total",
        "needs_history",
        "num_cached",
        "num_computed",
        "num_fetched",
        "num_in_flight",
        "num_registered",
        "order",
        "params",
        "priority",
        "prompt_len",
        "request_id",
        "row",
        "scheduled_time",
        "stops",
        "token_ids",
    )

    def __init__(self, engine_request: EngineRequest, order: int, max_model_len: int):
        params = engine_request.params
        self.engine_request = engine_request
        self.request_id = engine_request.request_id
        self.params = params
        self.token_ids = list(engine_request.prompt_token_ids)
        self.prompt_len = len(self.token_ids)
        self.max_total = min(self.prompt_len + engine_request.max_tokens, max_model_len)
        self.eos = frozenset() if params.ignore_eos else frozenset(engine_request.eos_token_ids)
        self.stops = self.eos | frozenset(params.stop_token_ids or ())
        self.priority = engine_request.priority
        self.arrival = engine_request.arrival_time
        self.order = order  # of arrival in this engine; breaks ties
        self.num_computed = 0
        self.num_in_flight = 0
        self.last_step = 0  # the number of the step that last sampled for it
        self.num_cached = -1  # tokens found in the prefix cache when first scheduled; -1: not yet scheduled
        self.num_fetched = 0  # blocks brought in from the host for it while it waited
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_registered = 0  # blocks of block_ids whose hash is in the prefix cache
        self.row = -1  # in the worker's tables while running
        self.scheduled_time = 0.0
        self.aborted = False
        # Multi-token bad words look back at sampled tokens on the host, so such a request waits for each token.
        self.needs_history = any(len(ids) > 1 for ids in params.bad_words_token_ids or ())

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def sort_key(self) -> tuple[int, float, int]:
        return (self.priority, self.arrival, self.order)
