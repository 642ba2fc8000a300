"""Tensor parallelism between CPU processes: the same shards and collectives as between GPUs, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from fixtures.engine_client import generate, make, random_prompts
from fixtures.tiny_models import tiny_model
from kubeinfer.distributed.uni_process import UniProcessExecutor
from kubeinfer.errors import OptionError

pytestmark = pytest.mark.usefixtures("forked_ranks")

PROMPTS = random_prompts(1, 12, 60)


def run(name: str, size: int) -> list[list[int]]:
    client = make(str(tiny_model(name)), "cpu", tensor_parallel_size=size)
    try:
        return generate(client, PROMPTS, 16)
    finally:
        client.shutdown()


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_two_ranks_give_the_tokens_of_one(name: str) -> None:
    assert run(name, 2) == run(name, 1)


def test_a_killed_rank_ends_the_engine_with_its_reason_last() -> None:
    """It ends this engine's process: one of its own."""
    script = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        from engine.test_tensor_parallel import PROMPTS, make, tiny_model
        from fixtures.engine_client import request

        client = make(str(tiny_model("llama")), "cpu", tensor_parallel_size=2)
        client.add_requests([request(str(i), prompt) for i, prompt in enumerate(PROMPTS)])
        while client.has_unfinished_requests():
            client.step()
            client.core.executor._processes[0].kill()
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parents[1])],
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].endswith("the worker of rank 1 died: exit status -9")


def test_a_rank_that_waits_for_ever_goes_with_its_core() -> None:
    rank = """if True:
        import os, threading
        from kubeinfer.distributed.worker_process import _end_with_parent

        threading.Thread(target=_end_with_parent, args=(os.getppid(),)).start()
        print(os.getpid(), flush=True)
        threading.Event().wait()
    """
    core = """if True:
        import os, signal, subprocess, sys

        child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
        print(child.stdout.readline().decode(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run(
        [sys.executable, "-c", core, rank], stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert result.returncode == -9
    left = [psutil.Process(pid) for pid in map(int, result.stdout.split()) if psutil.pid_exists(pid)]
    assert psutil.wait_procs(left, timeout=5)[1] == []


def test_after_a_rank_has_died_a_call_ends_at_once_and_nothing_stays(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        from engine.test_tensor_parallel import tiny_model
        from kubeinfer import LLM, SamplingParams
        from kubeinfer.distributed.multi_process import MultiProcessExecutor
        from kubeinfer.errors import EngineDeadError

        MultiProcessExecutor._watch = lambda self: None  # which would end this process first
        llm = LLM(str(tiny_model("llama")), dtype="float32", device="cpu", tensor_parallel_size=2)
        llm.generate("Hello", SamplingParams(max_tokens=2), use_tqdm=False)
        llm._client.core.executor._processes[0].kill()
        for _ in range(2):
            try:
                llm.generate("Hello", SamplingParams(max_tokens=2), use_tqdm=False)
            except EngineDeadError as error:
                print(error)
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parents[1])],
        capture_output=True, text=True, timeout=150, check=False, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert result.stdout.count("the worker of rank 1 died") == 2, result.stderr
    assert list(tmp_path.glob("kubeinfer-ranks-*")) == []


def test_a_size_that_does_not_divide_the_heads_says_so() -> None:
    with pytest.raises(OptionError, match="tensor_parallel_size 3 does not divide"):
        run("llama", 3)


def test_one_rank_needs_no_process() -> None:
    client = make(str(tiny_model("llama")), "cpu", tensor_parallel_size=1)
    assert isinstance(client.core.executor, UniProcessExecutor)
    client.shutdown()
