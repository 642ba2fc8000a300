"""Every option of the engine and the server, defined once.

From these models come the keywords of ``LLM(...)``, the flags of ``kubeinfer serve`` and their help, the YAML config
file, the ``spec.engine`` fields of the custom resource (camelCase) and the options table in the docs. Names are vLLM's
wherever vLLM has the option. A field's description is its flag's help; ``json_schema_extra`` may carry ``unit``,
``short`` (a one-letter style alias of the flag), and ``pod`` = False for what the operator sets itself.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kubeinfer.errors import OptionError

DType = Literal["auto", "half", "float16", "bfloat16", "float", "float32"]
Device = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "safetensors", "pt", "gguf", "dummy"]
Quantization = Literal[
    "awq", "awq_marlin", "gptq", "gptq_marlin", "fp8", "compressed-tensors", "gguf", "squeezellm", "bitsandbytes"
]  # fmt: skip


def _extra(**values: Any) -> dict[str, Any]:
    return values


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=False)


class ModelOptions(_Options):
    """Which model, and how its numbers are held."""

    model: str = Field(
        "",
        description="A folder, a GGUF file, ORG/NAME, modelscope://ORG/NAME@REV or hf://ORG/NAME@REV.",
        json_schema_extra=_extra(pod=False),
    )
    tokenizer: str | None = Field(
        None, description="Tokenizer folder or name; the model's own when not given."
    )
    tokenizer_mode: Literal["auto", "slow"] = Field(
        "auto", description="auto uses the fast tokenizer where there is one; slow the Python one."
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of the model.", json_schema_extra=_extra(pod=False)
    )
    tokenizer_revision: str | None = Field(None, description="Branch, tag or commit of the tokenizer.")
    trust_remote_code: bool = Field(
        False, description="Let the model folder's own Python code run (tokenizers only)."
    )
    dtype: DType = Field(
        "auto",
        description="Number format of weights and activations; auto is the checkpoint's, float32 as bfloat16.",
    )
    device: Device = Field(
        "auto",
        description="Where the engine runs; auto is the GPU where there is one.",
        json_schema_extra=_extra(pod=False),
    )
    max_model_len: int | None = Field(
        None,
        ge=1,
        description="Longest prompt plus output; the model's own limit when not given.",
        json_schema_extra=_extra(unit="tokens"),
    )
    quantization: Quantization | None = Field(
        None,
        description="How the weights are quantized; read from the checkpoint when not given. fp8 quantizes unquantized weights at load.",
    )
    load_format: LoadFormat = Field(
        "auto", description="Format of the weights; dummy makes random weights for benchmarks."
    )
    download_dir: str | None = Field(
        None,
        description="Where downloaded weights are kept; the hub's own cache when not given.",
        json_schema_extra=_extra(pod=False),
    )
    hf_overrides: dict[str, Any] | None = Field(
        None, description="Entries that replace those of the model's config.json."
    )
    generation_config: str = Field(
        "auto",
        description="Where default sampling parameters come from: auto (the model's generation_config.json), vllm (none) or a folder.",
    )
    override_generation_config: dict[str, Any] | None = Field(
        None, description="Default sampling parameters that replace the model's."
    )
    seed: int = Field(
        0, ge=0, description="Seed of dummy weights and of requests that bring none (offline use)."
    )
    max_logprobs: int = Field(
        20, ge=-1, description="Most logprobs a request may ask for; -1 lifts the bound."
    )
    runner: Literal["auto", "generate", "pooling"] = Field(
        "auto", description="What the model is used for. pooling is not supported yet."
    )
    convert: Literal["auto", "none", "embed", "classify", "reward"] = Field(
        "auto", description="Turn a model into a pooling one. Not supported yet."
    )


class CacheOptions(_Options):
    """Memory: weights, KV cache."""

    block_size: Literal[8, 16, 32, 64, 128] | None = Field(
        None,
        description="Tokens in a block (page) of the KV cache; 16 on GPUs and 32 on CPUs when not given.",
        json_schema_extra=_extra(unit="tokens"),
    )
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of a GPU's memory the engine may use in all.",
        json_schema_extra=_extra(unit="share"),
    )
    cpu_kvcache_space: float | None = Field(
        None,
        gt=0,
        description="KV cache on the CPU; from the memory that is free (cgroup limit included) when not given.",
        json_schema_extra=_extra(unit="GiB"),
    )
    kv_cache_memory_bytes: int | None = Field(
        None,
        gt=0,
        description="KV cache a device, exact; gpu_memory_utilization and cpu_kvcache_space then have no say.",
        json_schema_extra=_extra(unit="bytes"),
    )
    num_gpu_blocks_override: int | None = Field(
        None, ge=2, description="Number of KV blocks, exact (for tests)."
    )
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] = Field(
        "auto", description="Number format of the KV cache; auto is the model's."
    )
    enable_prefix_caching: bool = Field(True, description="Reuse the KV blocks of prompts that begin alike.")
    swap_space: float = Field(
        0,
        ge=0,
        description="Host memory that keeps evicted KV blocks of a GPU for reuse; each GPU takes so much.",
        json_schema_extra=_extra(unit="GiB"),
    )
    cpu_offload_gb: float = Field(
        0,
        ge=0,
        description="GPU memory to free on each GPU: layers' weights stay in host memory and are streamed in every step.",
        json_schema_extra=_extra(unit="GiB"),
    )


class SchedulerOptions(_Options):
    """What runs in a step."""

    max_num_seqs: int | None = Field(
        None,
        ge=1,
        description="Most sequences that run at once; 1024 on a large GPU, 256 on others, 64 on CPUs when not given.",
    )
    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        description="Token budget of a step; 2048 when not given; offline 16384 on a large GPU and 8192 on others.",
        json_schema_extra=_extra(unit="tokens"),
    )
    long_prefill_token_threshold: int = Field(
        0,
        ge=0,
        description="Most tokens one prompt may take of a step; 0 sets no bound.",
        json_schema_extra=_extra(unit="tokens"),
    )
    enable_chunked_prefill: bool = Field(True, description="Let a prompt be computed over several steps.")
    scheduling_policy: Literal["fcfs", "priority"] = Field(
        "fcfs",
        description="Order of waiting requests: first come first served, or by the request's priority.",
    )
    async_scheduling: bool | None = Field(
        None, description="Schedule a step while the one before runs; on for GPUs when not given."
    )
    batch_invariant: bool = Field(
        False,
        description="Same request, same bits, whatever runs beside it; slower. Also KUBEINFER_BATCH_INVARIANT=1.",
    )
    enforce_eager: bool = Field(False, description="Run without CUDA graphs.")
    cudagraph_capture_sizes: list[int] | None = Field(
        None, description="Batch sizes captured as CUDA graphs."
    )


class ParallelOptions(_Options):
    """How the model is spread over devices."""

    tensor_parallel_size: int = Field(
        1, ge=1, description="GPUs each layer is split over.", json_schema_extra=_extra(short="tp")
    )
    pipeline_parallel_size: int = Field(
        1,
        ge=1,
        description="Stages the layers are spread over, each of tensor_parallel_size GPUs.",
        json_schema_extra=_extra(short="pp"),
    )
    distributed_executor_backend: Literal["mp", "ray", "uni"] | None = Field(
        None,
        description="How workers are run: uni (one process) or mp (a process each). ray is not supported.",
    )
    disable_custom_all_reduce: bool = Field(False, description="Use NCCL for every all-reduce.")


class LogOptions(_Options):
    """What an engine tells of itself."""

    disable_log_stats: bool = Field(
        False, description="No log line of throughput and cache use.", json_schema_extra=_extra(pod=False)
    )


class EngineOptions(ModelOptions, CacheOptions, SchedulerOptions, ParallelOptions, LogOptions):
    """All options of an engine: the keywords of ``LLM(...)``."""


class ServerOptions(_Options):
    """The HTTP server around an engine."""

    host: str | None = Field(None, description="Address to listen on; all when not given.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on.")
    served_model_name: list[str] | None = Field(
        None, description="Names the model answers to in the API; the first is shown in answers."
    )
    api_key: list[str] | None = Field(
        None,
        description="Keys one of which a client must send (Authorization: Bearer). Also KUBEINFER_API_KEY.",
    )
    allowed_origins: list[str] = Field(["*"], description="CORS: allowed origins.")
    allowed_methods: list[str] = Field(["*"], description="CORS: allowed methods.")
    allowed_headers: list[str] = Field(["*"], description="CORS: allowed headers.")
    allow_credentials: bool = Field(False, description="CORS: allow credentials.")
    ssl_keyfile: str | None = Field(None, description="TLS key file.")
    ssl_certfile: str | None = Field(None, description="TLS certificate file.")
    ssl_ca_certs: str | None = Field(None, description="File of CA certificates for client certificates.")
    root_path: str | None = Field(None, description="Path prefix a proxy in front takes off.")
    chat_template: str | None = Field(None, description="Chat template: a file, or the template itself.")
    chat_template_content_format: Literal["auto", "string", "openai"] = Field(
        "auto", description="How message content is given to the template."
    )
    trust_request_chat_template: bool = Field(
        False,
        description="Render chat templates that requests bring (chat_template). One that loops or grows can take the server's time "
        "and memory: for trusted clients only.",
    )
    response_role: str = Field("assistant", description="Role of the answer's message.")
    max_waiting_requests: int = Field(
        2048, ge=1, description="Most requests in flight or waiting; further ones get 429 with Retry-After."
    )
    max_request_bytes: int = Field(
        16 * 1024 * 1024,
        ge=1024,
        description="Largest request body; larger ones get 413.",
        json_schema_extra=_extra(unit="bytes"),
    )
    shutdown_timeout: float = Field(
        30.0,
        ge=0,
        description="After SIGTERM, time given to running streams.",
        json_schema_extra=_extra(unit="seconds"),
    )
    uvicorn_log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = Field(
        "warning", description="Log level of uvicorn."
    )
    enable_log_requests: bool = Field(False, description="Log each request's parameters.")
    disable_chat_page: bool = Field(False, description="No chat page at /.")
    log_format: Literal["text", "json"] = Field("text", description="Format of log lines.")


class ServeOptions(EngineOptions, ServerOptions):
    """All options of ``kubeinfer serve``."""


def read_options(cls: type[_Options], values: dict[str, Any]) -> Any:
    """Validate ``values`` into ``cls``; unknown names raise TypeError (as a call would), bad values :class:`OptionError`."""
    unknown = [name for name in values if name not in cls.model_fields]
    if unknown:
        raise TypeError(f"LLM() got an unexpected keyword argument '{unknown[0]}'")
    try:
        return cls(**values)
    except ValidationError as exc:
        first = exc.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else None
        raise OptionError(f"{name}: {first['msg']}, got {first.get('input')!r}.", name) from None


def wants_batch_invariance() -> bool:
    """Whether ``KUBEINFER_BATCH_INVARIANT`` asks for it."""
    return os.environ.get("KUBEINFER_BATCH_INVARIANT", "").lower() in ("1", "true", "yes")


def use_modelscope() -> bool:
    """Whether a plain ORG/NAME means ModelScope (``KUBEINFER_USE_MODELSCOPE``)."""
    return os.environ.get("KUBEINFER_USE_MODELSCOPE", "").lower() in ("1", "true", "yes")


def target_device() -> str | None:
    """The device that ``KUBEINFER_TARGET_DEVICE`` asks for, if any."""
    return os.environ.get("KUBEINFER_TARGET_DEVICE") or None
