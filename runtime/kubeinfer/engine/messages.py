"""What crosses between a client and the engine core: msgspec structs, the same in one process and over a socket."""

from __future__ import annotations

import msgspec

from kubeinfer.sampling_params import SamplingParams


class EngineRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One sequence to generate. ``n`` outputs are ``n`` engine requests; they share their prompt's KV blocks.

    ``eos_token_ids`` end the sequence unless ``params.ignore_eos``; stop strings are the text layer's, which aborts.
    A lower ``priority`` value runs earlier. ``seed`` is always set: the client draws one if the user gave none.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    eos_token_ids: list[int] = []
    priority: int = 0
    cache_salt: str | None = None
    arrival_time: float = 0.0  # time.time(), seconds


class TokenLogprobs(msgspec.Struct, array_like=True, gc=False):
    """Log-probabilities of one position: the chosen token first, then the most likely ones."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int  # of the chosen token, from 1


class EngineOutput(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """What one step brought to one request."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"
    stop_reason: int | None = None  # the token id that stopped it, where it is not EOS
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, with the first token
    num_cached_tokens: int = 0
    error: str | None = None  # with finish_reason "error"
    scheduled_time: float = 0.0  # with the first token: time.time() when the request first got a token budget


class EngineStats(msgspec.Struct, array_like=True):
    """The engine's state after a step, and counters since start."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0  # share of blocks in use by requests, 0 to 1
    prefix_cache_queries: int = 0  # tokens
    prefix_cache_hits: int = 0  # tokens
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_steps: int = 0
    prefix_cache_host_hits: int = 0  # tokens of prefix_cache_hits that came back from host memory
    host_cache_usage: float = 0.0  # share of host blocks that keep a prefix, 0 to 1
    blocks_copied_out: int = 0  # KV blocks copied to host memory


class EngineOutputs(msgspec.Struct, array_like=True):
    """One message from the core: the step's outputs in one batch."""

    outputs: list[EngineOutput]
    stats: EngineStats | None = None


class EngineInfo(msgspec.Struct, kw_only=True):
    """What the core tells its client once it is ready."""

    max_model_len: int
    num_blocks: int
    block_size: int
    vocab_size: int
    device: str
    dtype: str
    weight_bytes: int
    kv_cache_bytes: int
    max_num_seqs: int
    start_seconds: dict[str, float] = {}  # time of each start-up phase


class AddRequests(msgspec.Struct, tag="add"):
    requests: list[EngineRequest]


class AbortRequests(msgspec.Struct, tag="abort"):
    request_ids: list[str]


class ResetPrefixCache(msgspec.Struct, tag="reset_prefix_cache"):
    pass


class CheckIntegrity(msgspec.Struct, tag="check_integrity"):
    pass


class Shutdown(msgspec.Struct, tag="shutdown"):
    pass


ClientMessage = AddRequests | AbortRequests | ResetPrefixCache | CheckIntegrity | Shutdown


class CoreReady(msgspec.Struct, tag="ready"):
    info: EngineInfo


class CoreStep(msgspec.Struct, tag="step"):
    outputs: EngineOutputs


class CoreDead(msgspec.Struct, tag="dead"):
    reason: str


CoreMessage = CoreReady | CoreStep | CoreDead
