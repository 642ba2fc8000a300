"""Tensor parallelism between CPU processes: the same shards and collectives as between GPUs, over gloo."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fixtures.tiny_models import tiny_model
from kubeinfer.engine.client import make_client
from kubeinfer.engine.messages import EngineRequest
from kubeinfer.errors import OptionError
from kubeinfer.options import EngineOptions
from kubeinfer.sampling_params import SamplingParams

_SCRIPT = textwrap.dedent(
    """
    import json, random, sys
    from kubeinfer.engine.client import make_client
    from kubeinfer.engine.messages import EngineRequest
    from kubeinfer.options import EngineOptions
    from kubeinfer.sampling_params import SamplingParams

    client = make_client(EngineOptions(model=sys.argv[1], device="cpu", dtype="float32", tensor_parallel_size=int(sys.argv[2])))
    rng = random.Random(1)
    found = {}
    for i in range(12):
        prompt = [rng.randrange(5, 500) for _ in range(rng.randrange(1, 60))]
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        client.add_requests([EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params, seed=0, max_tokens=16)])
        found[str(i)] = []
    while client.has_unfinished_requests():
        for output in client.step().outputs:
            found[output.request_id] += output.new_token_ids
            if sys.argv[3:] == ["kill"]:
                client.core.executor._processes[0].kill()
    client.shutdown()
    print(json.dumps(found))
    """
)


def run(model: Path, size: int, *extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(model), str(size), *extra],
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_two_ranks_give_the_tokens_of_one(name: str) -> None:
    one, two = run(tiny_model(name), 1), run(tiny_model(name), 2)
    assert one.returncode == two.returncode == 0, two.stderr
    assert one.stdout == two.stdout


def test_a_killed_rank_ends_the_engine_with_its_reason_last() -> None:
    result = run(tiny_model("llama"), 2, "kill")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].endswith("the worker of rank 1 died: exit status -9")


def test_a_size_that_does_not_divide_the_heads_says_so() -> None:
    with pytest.raises(OptionError, match="tensor_parallel_size 3 does not divide"):
        make_client(
            EngineOptions(
                model=str(tiny_model("llama")), device="cpu", dtype="float32", tensor_parallel_size=3
            )
        )


def test_one_rank_needs_no_process() -> None:
    client = make_client(EngineOptions(model=str(tiny_model("llama")), device="cpu", dtype="float32"))
    rng = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=2)
    prompt = [rng.randrange(5, 500) for _ in range(5)]
    client.add_requests(
        [EngineRequest(request_id="a", prompt_token_ids=prompt, params=params, seed=0, max_tokens=2)]
    )
    tokens = 0
    while client.has_unfinished_requests():
        tokens += sum(len(o.new_token_ids) for o in client.step().outputs)
    assert 1 <= tokens <= 2
    client.shutdown()
