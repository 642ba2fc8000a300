"""The engine core as a process: its life, its death, and a hang."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from fixtures.tiny_models import tiny_model
from kubeinfer.async_llm import AsyncLLM
from kubeinfer.engine.process_client import ProcessClient
from kubeinfer.errors import EngineDeadError, ModelLoadError
from kubeinfer.model_config import load_model_config
from kubeinfer.options import EngineOptions
from kubeinfer.sampling_params import SamplingParams


def options(**changes: object) -> EngineOptions:
    return EngineOptions(model=str(tiny_model("llama")), device="cpu", cpu_kvcache_space=0.05, **changes)


async def collect(llm: AsyncLLM, count: int) -> list[int]:
    params = SamplingParams(max_tokens=count, ignore_eos=True, temperature=0)
    tokens: list[int] = []
    async for part in llm.generate([5, 6, 7], params, f"r{count}"):
        for output in part.outputs:
            tokens += output.token_ids
    return tokens


async def test_a_stopped_core_is_seen_as_silent_and_goes_on_afterwards() -> None:
    client = ProcessClient(options())
    llm = AsyncLLM(options(), client)
    try:
        assert len(await collect(llm, 4)) == 4
        assert llm.silent_for == 0.0
        os.kill(client.pid, signal.SIGSTOP)
        task = asyncio.create_task(collect(llm, 5))
        await asyncio.sleep(1.0)
        assert llm.silent_for >= 0.8
        os.kill(client.pid, signal.SIGCONT)
        assert len(await task) == 5
        assert llm.silent_for == 0.0
        await client.check_integrity()
        assert len(await collect(llm, 6)) == 6
    finally:
        os.kill(client.pid, signal.SIGCONT)
        llm.shutdown()


async def test_more_than_the_socket_holds_waits_for_a_core_that_is_stopped() -> None:
    client = ProcessClient(options())
    llm = AsyncLLM(options(), client)
    try:
        assert len(await collect(llm, 4)) == 4
        os.kill(client.pid, signal.SIGSTOP)
        for _ in range(8):
            await asyncio.wait_for(client.abort_requests(["x" * 100_000]), 1)
        task = asyncio.create_task(collect(llm, 5))
        await asyncio.sleep(0.1)
        os.kill(client.pid, signal.SIGCONT)
        assert len(await task) == 5
    finally:
        os.kill(client.pid, signal.SIGCONT)
        llm.shutdown()


async def test_a_killed_core_is_named_with_its_signal() -> None:
    client = ProcessClient(options())
    llm = AsyncLLM(options(), client)
    try:
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
            await collect(llm, 4)
    finally:
        llm.shutdown()
    with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
        await client.next_outputs()


async def test_a_client_that_was_shut_down_says_so() -> None:
    client = ProcessClient(options())
    llm = AsyncLLM(options(), client)
    assert len(await collect(llm, 4)) == 4
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(EngineDeadError, match="the engine was shut down"):
        await client.next_outputs()
    with pytest.raises(EngineDeadError, match="the engine was shut down"):
        await client.abort_requests(["r"])


def test_a_core_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 16)
    with pytest.raises(EngineDeadError, match="MambaForCausalLM is not supported"):
        ProcessClient(EngineOptions(model=str(tmp_path), device="cpu"))


def test_a_core_is_ended_where_a_check_fails() -> None:
    def check() -> None:
        raise ValueError("no tokenizer")

    started = time.monotonic()
    with pytest.raises(ValueError, match="no tokenizer"):
        ProcessClient(options(), check=check)
    assert time.monotonic() - started < 6
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    commands = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children]
    assert not any(b"kubeinfer.engine.core_process" in command for command in commands)


def test_a_config_that_says_nothing_is_not_one_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 16)
    for text, message in ((None, "has no config.json"), ("{}", "config.json says nothing")):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelLoadError, match=message):
            load_model_config(EngineOptions(model=str(tmp_path), device="cpu"))


def test_a_cache_larger_than_the_memory_names_the_option() -> None:
    with pytest.raises(EngineDeadError, match="--cpu-kvcache-space asks for 100000"):
        ProcessClient(EngineOptions(model=str(tiny_model("llama")), device="cpu", cpu_kvcache_space=100000))


@pytest.mark.parametrize("option", ["cpu_kvcache_space", "kv_cache_memory_bytes"])
def test_a_cache_of_less_than_two_blocks_names_the_option(option: str) -> None:
    given = {option: 1000 if option.endswith("bytes") else 1e-6}
    with pytest.raises(
        EngineDeadError, match=f"--{option.replace('_', '-')} gives 0.0 MiB, but .* at least two"
    ):
        ProcessClient(EngineOptions(model=str(tiny_model("llama")), device="cpu", **given))


def test_a_length_beyond_the_cache_names_what_fits() -> None:
    with pytest.raises(EngineDeadError, match="Lower --max-model-len to 64"):
        ProcessClient(
            EngineOptions(
                model=str(tiny_model("llama")), device="cpu", num_gpu_blocks_override=3, max_model_len=200
            )
        )
