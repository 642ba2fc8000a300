"""Reads what the plan needs from the beginning of a GGUF file, as the entries of a config.json.

The layout is that of the GGUF specification (ggml project, docs/gguf.md), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from typing import Any

HEADER_BYTES = 256 << 10

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
# Bits a weight takes, by general.file_type; what is not listed counts as 4.5, the common case of the small ones.
_BITS = {
    0: 32.0, 1: 16.0, 2: 4.5, 3: 5.0, 7: 8.5, 8: 5.5, 9: 6.0, 10: 2.96, 11: 3.44, 12: 3.89, 13: 4.25, 14: 4.58,
    15: 4.85, 16: 5.54, 17: 5.69, 18: 6.56, 32: 16.0,
}  # fmt: skip
# And in a GPU's memory, where the layers' matrices stay quantized. Those not listed are dequantized.
_KEPT_BITS = {2: 5.0, 3: 5.0, 7: 9.0, 8: 9.0, 9: 9.0, 14: 5.5, 15: 6.5} | dict.fromkeys(
    (10, 11, 12, 13, 16, 17, 18), 10.0
)


class _Truncated(Exception):
    pass


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, size: int) -> bytes:
        if self._at + size > len(self._data):
            raise _Truncated
        self._at += size
        return self._data[self._at - size : self._at]

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.scalar("<I"), self.scalar("<Q")
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"unknown GGUF value type {kind}")
        return self.scalar(_SCALARS[kind])


def read_header(data: bytes) -> dict[str, Any] | None:
    """Config entries from the first bytes of a file; None where they are no GGUF or lack the shape of the model.

    The metadata may go on beyond ``data`` (vocabularies do): what was read until then counts.
    """
    if data[:4] != b"GGUF":
        return None
    reader = _Reader(data[4:])
    found: dict[str, Any] = {}
    try:
        if reader.scalar("<I") not in (2, 3):
            return None
        reader.scalar("<Q")
        for _ in range(reader.scalar("<Q")):
            key = reader.text()
            found[key] = reader.value(reader.scalar("<I"))
    except _Truncated:
        pass
    except ValueError:
        return None
    return _as_config(found)


def _as_config(found: dict[str, Any]) -> dict[str, Any] | None:
    name = found.get("general.architecture")
    if not isinstance(name, str):
        return None
    heads = found.get(f"{name}.attention.head_count")
    kv_heads = found.get(f"{name}.attention.head_count_kv", heads)
    config = {
        "architectures": [_ARCHITECTURES.get(name, name)],
        "num_hidden_layers": found.get(f"{name}.block_count"),
        "hidden_size": found.get(f"{name}.embedding_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": max(kv_heads) if isinstance(kv_heads, list) and kv_heads else kv_heads,
        "head_dim": found.get(f"{name}.attention.key_length"),
        "max_position_embeddings": found.get(f"{name}.context_length"),
        "torch_dtype": "bfloat16",
        "intermediate_size": found.get(f"{name}.feed_forward_length"),
        "gguf_kept_bits": _KEPT_BITS.get(found.get("general.file_type", -1)),
        "gguf_bits": _BITS.get(found.get("general.file_type", -1), 4.5),
    }
    return {key: value for key, value in config.items() if value is not None}
