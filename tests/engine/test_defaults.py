"""Options that a device does not have are said to be without effect, or refused."""

from __future__ import annotations

import logging

import pytest

from kubeinfer.engine.defaults import resolve_defaults
from kubeinfer.errors import OptionError
from kubeinfer.options import EngineOptions


def resolve(**options: object) -> EngineOptions:
    return resolve_defaults(EngineOptions(model="m", device="cpu", **options))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu_memory_utilization", 0.8),
        ("swap_space", 1),
        ("cpu_offload_gb", 2),
        ("enforce_eager", True),
        ("cudagraph_capture_sizes", [1, 2]),
        ("disable_custom_all_reduce", True),
    ],
)
def test_options_of_a_gpu_are_named_on_the_cpu(
    name: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        resolve(**{name: value})
    assert [r.getMessage().split()[0] for r in caplog.records] == [name]


def test_defaults_warn_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert resolve().block_size == 32
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distributed_executor_backend": "ray"}, "ray is not supported"),
        ({"distributed_executor_backend": "uni", "tensor_parallel_size": 2}, "use mp"),
        ({"kv_cache_dtype": "fp8"}, "not supported on the CPU"),
        ({"runner": "pooling"}, "not supported yet"),
        ({"convert": "reward"}, "not supported yet"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        resolve(**options)
