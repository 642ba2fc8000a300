"""Requests of the benchmarks, and the figures made of their results."""

from __future__ import annotations

import json
import statistics

import pytest

from kubeinfer.bench.figures import percentile, summary
from kubeinfer.bench.serving import Outcome, report
from kubeinfer.bench.workload import random_requests, sharegpt_requests
from kubeinfer.errors import OptionError


def test_random_requests():
    requests = random_requests(200, 50, 20, vocab_size=512, range_ratio=0.5, prefix_len=8, seed=1)
    assert requests == random_requests(200, 50, 20, vocab_size=512, range_ratio=0.5, prefix_len=8, seed=1)
    assert requests != random_requests(200, 50, 20, vocab_size=512, range_ratio=0.5, prefix_len=8, seed=2)
    prompts = [r.prompt for r in requests]
    assert len({tuple(p[:8]) for p in prompts}) == 1
    assert len({tuple(p) for p in prompts}) == 200
    lengths = [r.prompt_len for r in requests]
    assert lengths == [len(p) for p in prompts]
    assert min(lengths) >= 33
    assert max(lengths) <= 83
    assert abs(statistics.fmean(lengths) - 58) < 4
    assert 10 <= min(r.output_len for r in requests) < max(r.output_len for r in requests) <= 30
    assert all(10 <= token < 512 for p in prompts for token in p)
    assert all(r.prompt_len == 50 and r.output_len == 20 for r in random_requests(5, 50, 20, vocab_size=512))


def test_random_text():
    requests = random_requests(3, 30, 5, vocab_size=512, as_text=True, prefix_len=4)
    assert all(isinstance(r.prompt, str) and len(r.prompt.split()) == 34 for r in requests)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"count": 0}, "num_prompts"),
        ({"input_len": 0}, "random_input_len"),
        ({"range_ratio": 1.0}, "random_range_ratio"),
        ({"vocab_size": 5}, "vocab_size"),
    ],
)
def test_random_requests_that_cannot_be(changes, option):
    with pytest.raises(OptionError) as caught:
        random_requests(**({"count": 1, "input_len": 5, "output_len": 5, "vocab_size": 512} | changes))
    assert caught.value.option == option


def test_sharegpt(tmp_path):
    path = tmp_path / "talks.json"
    talks = [
        {"conversations": [{"value": f"question {i} " * 6}, {"value": "answer " * (5 + i)}]}
        for i in range(10)
    ]
    talks += [
        {"conversations": [{"value": "only one turn"}]},
        {"conversations": [{"value": "a"}, {"value": "b"}]},
    ]
    path.write_text(json.dumps(talks))
    requests = sharegpt_requests(str(path), 10, count_tokens=lambda text: len(text.split()))
    assert sorted(r.output_len for r in requests) == list(range(5, 15))
    assert all(r.prompt_len == 12 for r in requests)
    assert {r.output_len for r in sharegpt_requests(str(path), 4, output_len=7)} == {7}
    for arguments, what in (
        ({"count": 11, "count_tokens": lambda text: len(text.split())}, "only 10 usable"),
        ({"count": 1}, "sharegpt_output_len"),
    ):
        with pytest.raises(OptionError, match=what):
            sharegpt_requests(str(path), **arguments)
    with pytest.raises(OptionError, match="cannot read"):
        sharegpt_requests(str(tmp_path / "absent.json"), 1, output_len=5)


def test_percentiles():
    values = [float(v) for v in range(101)]
    assert percentile(values, 50) == 50
    assert percentile(values[::-1], 99) == 99
    assert percentile([1.0, 2.0], 25) == 1.25
    assert percentile([3.0], 99) == 3.0
    found = summary("ttft", [0.001, 0.003], [99])
    assert found["mean_ttft_ms"] == found["median_ttft_ms"] == 2.0
    assert found["std_ttft_ms"] == pytest.approx(1.0)
    assert found["p99_ttft_ms"] == pytest.approx(2.98)
    assert summary("itl", [], [50])["p50_itl_ms"] == 0.0


def test_report():
    good = Outcome(sent=10.0, first=10.5, end=12.5, gaps=[1.0, 1.0], prompt_tokens=7, output_tokens=5)
    quick = Outcome(sent=10.0, first=10.1, end=10.2, gaps=[0.1], prompt_tokens=3, output_tokens=2)
    bad = Outcome(sent=10.0, error="HTTP 500: oh")
    found = report([good, bad, quick], 4.0, [50.0], {"ttft": 200.0, "tpot": 150.0})
    assert (found["completed"], found["failed"], found["errors"]) == (2, 1, ["HTTP 500: oh"])
    assert found["output_throughput"] == 7 / 4
    assert found["total_token_throughput"] == 17 / 4
    assert found["request_goodput"] == 0.25
    assert found["mean_ttft_ms"] == pytest.approx(300)
    assert found["mean_tpot_ms"] == pytest.approx((500 + 100) / 2)
    assert found["p50_itl_ms"] == pytest.approx(1000)
    assert found["mean_e2el_ms"] == pytest.approx((2500 + 200) / 2)
