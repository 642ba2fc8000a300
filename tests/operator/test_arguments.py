"""From spec.engine to flags and back: what a pod gets is what the spec says."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kubeinfer.cli.flags import Parser, add_model_argument, add_option_flags, options_from
from kubeinfer.options import ServeOptions
from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec
from kubeinfer_operator.builders.arguments import serve_arguments

ENGINE = st.fixed_dictionaries(
    {},
    optional={
        "maxModelLen": st.integers(1, 100_000),
        "dtype": st.sampled_from(["auto", "bfloat16", "float32"]),
        "gpuMemoryUtilization": st.floats(0.1, 1),
        "enablePrefixCaching": st.booleans(),
        "enforceEager": st.booleans(),
        "blockSize": st.sampled_from([8, 16, 32]),
        "hfOverrides": st.dictionaries(st.text("abc", min_size=1), st.integers()),
        "cudagraphCaptureSizes": st.lists(st.integers(1, 64), min_size=1),
        "seed": st.integers(0, 9),
        "maxLogprobs": st.integers(-1, 5),
        "tokenizer": st.text("abc/", min_size=1),
    },
)


@given(ENGINE, st.integers(1, 4), st.integers(0, 600))
@settings(deadline=None)
def test_flags_say_what_the_spec_says(engine: dict[str, Any], count: int, drain: int) -> None:
    spec = InferenceModelSpec.model_validate(
        {
            "model": {"uri": "hf://a/b"},
            "engine": engine,
            "resources": {"count": count},
            "rollout": {"drainTimeout": drain},
            "servedNames": ["one", "two"],
        }
    )
    parser = Parser()
    add_model_argument(parser)
    add_option_flags(parser, ServeOptions)
    options = options_from(parser.parse_args(serve_arguments("x", spec, "/models/abc")), ServeOptions)
    assert options.model == "/models/abc"
    assert options.served_model_name == ["one", "two"]
    assert options.shutdown_timeout == drain
    assert options.tensor_parallel_size == count
    assert options.device == "cuda"
    for name, value in spec.engine.model_dump(exclude_none=True).items():
        assert getattr(options, name) == value, name
    given = set(spec.engine.model_dump(exclude_none=True)) | {
        "model", "port", "shutdown_timeout", "served_model_name", "device", "tensor_parallel_size",
    }  # fmt: skip
    plain = ServeOptions()
    for name in set(ServeOptions.model_fields) - given:
        assert getattr(options, name) == getattr(plain, name), name
