"""Several GPUs give one GPU's tokens: tensor and pipeline parallelism."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from fixtures.engine_client import generate, make, random_prompts
from fixtures.tiny_models import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_tensor_parallel_tokens_equal_one_gpus(name: str, size: int) -> None:
    import torch

    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    path = str(tiny_model(name))
    prompts = random_prompts(5, 16)
    one = make(path, "cuda", max_num_seqs=16)
    expected = generate(one, prompts, 16)
    one.shutdown()
    many = make(path, "cuda", max_num_seqs=16, tensor_parallel_size=size)
    assert generate(many, prompts, 16) == expected
    many.shutdown()


@pytest.mark.parametrize(
    ("name", "stages", "size"),
    [("llama-tied", 2, 1), ("opt", 2, 1), ("qwen2-sliding", 2, 1), ("qwen2-sliding", 2, 2), ("qwen2-sliding", 4, 1)],
)  # fmt: skip
def test_pipeline_parallel_tokens_equal_one_gpus(name: str, stages: int, size: int) -> None:
    """Graphs and eager steps, greedy and sampled, overlapped or not, chunks and a small cache."""
    import torch

    if torch.cuda.device_count() < stages * size:
        pytest.skip(f"needs {stages * size} GPUs")
    path = str(tiny_model(name))
    prompts = random_prompts(6, 24)
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "repetition_penalty": 1.2}
    one = make(path, "cuda", max_num_seqs=16)
    expected, sampled = generate(one, prompts, 16), generate(one, prompts, 16, **sampling)
    one.shutdown()
    small = {"max_num_batched_tokens": 32, "num_gpu_blocks_override": 30, "max_model_len": 128}
    for options in ({}, {"enforce_eager": True, "async_scheduling": False, **small}):
        many = make(
            path, "cuda", max_num_seqs=16, pipeline_parallel_size=stages, tensor_parallel_size=size, **options
        )
        assert generate(many, prompts, 16) == expected, options
        assert generate(many, prompts, 16, **sampling) == sampled, options
        many.core.check_integrity()
        many.shutdown()


def test_long_steps_of_four_gpus_give_one_gpus_tokens() -> None:
    """Steps of thousands of tokens, whose sums each rank makes for its share of the rows."""
    import torch

    if torch.cuda.device_count() < 4:
        pytest.skip("needs 4 GPUs")
    path = str(tiny_model("llama"))
    prompts = random_prompts(6, 60, longest=200)
    expected: list[list[int]] | None = None
    for size in (1, 4):
        client = make(path, "cuda", max_num_seqs=64, tensor_parallel_size=size)
        got = generate(client, prompts, 12)
        client.shutdown()
        assert expected is None or got == expected
        expected = got


def test_ranks_go_with_a_killed_core_though_their_gpus_wait_for_it() -> None:
    """Killed between two sums of a step that is under way: its peer's kernel waits for words that never come."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    script = textwrap.dedent(
        """
        import os, signal, sys, threading
        sys.path.insert(0, sys.argv[1])
        import psutil
        from engine.test_gpu_parallel import generate, make, random_prompts, tiny_model

        client = make(str(tiny_model("llama")), "cuda", max_num_seqs=16, tensor_parallel_size=2)
        generate(client, random_prompts(5, 16), 4)
        print(*(child.pid for child in psutil.Process().children()), flush=True)
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGKILL)).start()
        while True:
            generate(client, random_prompts(5, 16), 64)
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parents[1])],
        stdout=subprocess.PIPE, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert result.returncode == -9
    ranks = [psutil.Process(int(pid)) for pid in result.stdout.split() if psutil.pid_exists(int(pid))]
    assert psutil.wait_procs(ranks, timeout=5)[1] == []
