"""Does it fit? Figures against ones computed by hand, and advice that is true when followed."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_world import COMMIT, CONFIG

from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec
from kubeinfer_operator.gguf_header import read_header
from kubeinfer_operator.plan import GIB, Hub, kv_bytes_per_token, plan

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "hidden_size": 3584, "max_position_embeddings": 32768, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN_FILES = {f"model-{n}.safetensors": 15_231_233_024 // 4 for n in range(4)}


def spec(**fields: Any) -> InferenceModelSpec:
    return InferenceModelSpec.model_validate({"model": {"uri": "hf://a/b"}, **fields})


def test_kv_bytes() -> None:
    assert kv_bytes_per_token(QWEN_7B, "auto", "bfloat16") == 2 * 28 * 4 * 128 * 2
    assert kv_bytes_per_token(QWEN_7B, "fp8", "bfloat16") == 2 * 28 * 4 * 128
    assert kv_bytes_per_token({"hidden_size": 8}, "auto", "bfloat16") is None


def test_unsupported_architecture() -> None:
    found = plan(spec(), Hub(COMMIT, {}, {"architectures": ["MambaForCausalLM"]}))
    assert (found.fits, found.reason) == (False, "UnsupportedArchitecture")
    assert "LlamaForCausalLM" in found.message


def test_heads_that_cannot_be_shared_out() -> None:
    hub = Hub(COMMIT, {}, CONFIG)  # nine heads
    found = plan(spec(resources={"count": 4, "memoryPerDevice": "80Gi"}), hub)
    assert (found.fits, found.reason) == (False, "UnevenHeads")
    assert "to 1, 3," in found.message
    pipeline = {"tensorParallelSize": 1, "pipelineParallelSize": 4}
    assert plan(spec(resources={"count": 4, "memoryPerDevice": "80Gi"}, engine=pipeline), hub).fits
    assert plan(spec(resources={"count": 3, "memoryPerDevice": "80Gi"}), hub).fits
    # What is advised can be shared out, too.
    large = Hub(
        COMMIT,
        {"model.safetensors": 60 * GIB},
        {**CONFIG, "num_attention_heads": 12, "num_key_value_heads": 3},
    )
    advice = plan(spec(resources={"count": 1, "memoryPerDevice": "12Gi"}), large).message
    assert "resources.count to 8" not in advice


@pytest.mark.parametrize(
    ("memory", "count", "fits"), [("80Gi", 1, True), ("24Gi", 1, True), ("16Gi", 1, False), ("12Gi", 2, True)]
)
def test_seven_billion(memory: str, count: int, fits: bool) -> None:
    found = plan(
        spec(resources={"memoryPerDevice": memory, "count": count}), Hub(COMMIT, QWEN_FILES, QWEN_7B)
    )
    assert found.fits is fits, found.message
    assert "14.2 GiB of weights" in found.line


def test_float32_is_served_as_bfloat16() -> None:
    hub = Hub(COMMIT, {"pytorch_model.bin": 2 * GIB}, {**CONFIG, "torch_dtype": "float32"})
    assert "1.0 GiB of weights" in plan(spec(), hub).line
    assert "2.0 GiB of weights" in plan(spec(engine={"dtype": "float32"}), hub).line


def test_unknown_memory_is_said_and_no_obstacle() -> None:
    found = plan(spec(), Hub(COMMIT, QWEN_FILES, QWEN_7B))
    assert (found.fits, found.reason) == (True, "DeviceMemoryUnknown")
    assert "memoryPerDevice" in found.message
    mig = plan(spec(resources={"resourceName": "nvidia.com/mig-1g.10gb"}), Hub(COMMIT, QWEN_FILES, QWEN_7B))
    assert mig.reason == "InsufficientMemory"
    labelled = plan(spec(), Hub(COMMIT, QWEN_FILES, QWEN_7B), labelled_memory=80 * GIB)
    assert labelled.reason == "Fits"


def test_host_memory_for_swapping_and_streaming_counts_to_the_limit() -> None:
    hub = Hub(COMMIT, QWEN_FILES, QWEN_7B)
    engine = {"swapSpace": 8, "cpuOffloadGb": 4}

    def planned(limit: str) -> Any:
        resources = {"memoryPerDevice": "24Gi", "count": 2, "limits": {"memory": limit}}
        return plan(spec(engine=engine, resources=resources), hub)

    found = planned("24Gi")
    assert (found.fits, found.reason) == (False, "InsufficientMemory")
    assert "engine.swapSpace and engine.cpuOffloadGb ask for 24.0 GiB" in found.message
    enough = found.message.split("limits.memory to ")[1].split()[0]
    assert planned(enough).fits
    assert plan(spec(engine=engine, resources={"memoryPerDevice": "24Gi", "count": 2}), hub).fits


@given(st.integers(4, 160), st.sampled_from([1, 2, 4]), st.integers(256, 131_072), st.floats(0.3, 1))
@settings(max_examples=200, deadline=None)
def test_following_the_advice_helps(memory: int, count: int, length: int, share: float) -> None:
    """Whatever the refusal proposes as a number, doing it makes the plan fit."""
    hub = Hub(COMMIT, QWEN_FILES, QWEN_7B)
    engine = {"maxModelLen": length, "gpuMemoryUtilization": share}
    found = plan(spec(engine=engine, resources={"memoryPerDevice": f"{memory}Gi", "count": count}), hub)
    if found.fits:
        return
    if "engine.maxModelLen to " in found.message:
        shorter = int(found.message.split("engine.maxModelLen to ")[1].split()[0])
        again = plan(
            spec(
                engine={**engine, "maxModelLen": shorter},
                resources={"memoryPerDevice": f"{memory}Gi", "count": count},
            ),
            hub,
        )
        assert again.fits, (found.message, again.message)
    if "resources.count to " in found.message:
        more = int(found.message.split("resources.count to ")[1].split()[0].rstrip(",."))
        again = plan(spec(engine=engine, resources={"memoryPerDevice": f"{memory}Gi", "count": more}), hub)
        assert again.fits, (found.message, again.message)


@given(st.integers(300, 4000), st.integers(128, 8192))
@settings(max_examples=100, deadline=None)
def test_following_the_advice_helps_on_the_cpu(limit: int, length: int) -> None:
    hub = Hub(COMMIT, {"model.safetensors": 270_000_000}, CONFIG)
    resources = {"device": "cpu", "limits": {"memory": f"{limit}Mi"}}
    found = plan(spec(engine={"maxModelLen": length}, resources=resources), hub)
    if found.fits:
        return
    need = found.message.split("resources.limits.memory to ")[1].split()[0]
    resources = {"device": "cpu", "limits": {"memory": need}}
    assert plan(spec(engine={"maxModelLen": length}, resources=resources), hub).fits


def test_cache_smaller_than_a_request() -> None:
    hub = Hub(COMMIT, {"model.safetensors": 270_000_000}, CONFIG)
    found = plan(spec(resources={"device": "cpu"}, engine={"cpuKvcacheSpace": 0.05}), hub)
    assert found.reason == "InsufficientMemory"
    assert "cpuKvcacheSpace" in found.message


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def test_gguf_header() -> None:
    pairs = [
        ("general.architecture", 8, _text("llama")),
        ("general.file_type", 4, struct.pack("<I", 7)),
        ("llama.block_count", 4, struct.pack("<I", 30)),
        ("llama.embedding_length", 4, struct.pack("<I", 576)),
        ("llama.feed_forward_length", 4, struct.pack("<I", 1536)),
        ("llama.attention.head_count", 4, struct.pack("<I", 9)),
        ("llama.attention.head_count_kv", 4, struct.pack("<I", 3)),
        ("llama.context_length", 4, struct.pack("<I", 2048)),
        ("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 1000) + _text("a") * 1000),
    ]
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs))
    for key, kind, value in pairs:
        data += _text(key) + struct.pack("<I", kind) + value
    whole, cut = read_header(data), read_header(data[:-5000])
    assert whole == cut
    assert whole is not None
    assert kv_bytes_per_token(whole, "auto", "bfloat16") == 2 * 30 * 3 * 64 * 2
    found = plan(spec(resources={"device": "cpu"}), Hub(COMMIT, {"m.gguf": 85 << 20}, whole))
    assert "LlamaForCausalLM" in found.line
    assert "160.0 MiB of weights" in found.line
    # On a GPU 106 million weights of the layers keep 9 bits, and the others 16.
    found = plan(spec(), Hub(COMMIT, {"m.gguf": 136 << 20}, whole))
    layers = 30 * 576 * (2 * 12 * 64 + 3 * 1536)
    expected = (layers * 9 / 8 + ((136 << 20) * 8 / 8.5 - layers) * 2) / 2**20
    assert f"{expected:.1f} MiB of weights" in found.line
    for engine in ({"dtype": "float32"}, {"quantization": "fp8"}):
        wide = plan(spec(engine=engine), Hub(COMMIT, {"m.gguf": 136 << 20}, whole))
        assert f"{256.0 * (2 if 'dtype' in engine else 1):.1f} MiB of weights" in wide.line
    assert read_header(b"not a model") is None
    assert read_header(b"GGUF") is None
    assert read_header(data[:30]) is None
