"""Sampler, penalties and log-probabilities: against sort-based definitions, and for their statistics."""

from __future__ import annotations

import math
import os
import random

import pytest
import torch
from torch import Tensor

from kubeinfer.kernels.sampling import (
    NO_TOKEN,
    apply_penalties,
    count_tokens,
    exponential_noise,
    logprobs,
    sample,
    sample_reference,
    sampling_threshold,
)

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def kept_by_sorting(x: Tensor, k: int, p: float, min_p: float) -> Tensor:
    """The entries that stay, by the textbook's sort; ``x [V]`` are logits over temperature."""
    x = x.double()
    keep = torch.ones_like(x, dtype=torch.bool)
    if min_p > 0:
        keep &= x.exp() >= min_p * x.max().exp() * (1 - 1e-7)
    if 0 < k < x.numel():
        keep &= x >= x.sort(descending=True).values[k - 1]
    if p < 1:
        probability, order = torch.softmax(x.masked_fill(~keep, float("-inf")), 0).sort(descending=True)
        before = probability.cumsum(0) - probability
        stays = torch.zeros_like(keep)
        stays[order] = before < p
        # Entries equal to the last one that stays, stay.
        keep &= x >= x[stays & keep].min()
    return keep


def arguments(batch: int, vocab: int, device: str) -> dict[str, Tensor]:
    return {
        "temperature": torch.rand(batch) * 1.5 * (torch.rand(batch) < 0.8),
        "top_k": torch.randint(0, 60, (batch,), dtype=torch.int32) * (torch.rand(batch) < 0.7),
        "top_p": torch.where(torch.rand(batch) < 0.7, torch.rand(batch), 1.0),
        "min_p": torch.rand(batch) * 0.2 * (torch.rand(batch) < 0.5),
        "seeds": torch.randint(-(1 << 62), 1 << 62, (batch,)),
        "positions": torch.randint(0, 100000, (batch,)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [17, 1000, 5003])
def test_greedy(device: str, dtype: torch.dtype, vocab: int) -> None:
    """The largest logit; of equal ones (bf16 has many) the first; none of a row without one."""
    batch = 5
    logits = torch.randn(batch, vocab).to(dtype)
    logits[0, :] = 1.0
    logits[1, -1] = logits[1, 3] = 50.0
    logits[2, :] = float("-inf")
    logits[2, 7] = -3e4
    want = [int((row == row.max()).nonzero()[0]) for row in logits.float()]
    logits[3, :], logits[4, :] = float("-inf"), float("nan")
    want[3:] = [NO_TOKEN, NO_TOKEN]
    args = {name: value.to(device) for name, value in arguments(batch, vocab, device).items()}
    args["temperature"].zero_()
    for any_sampled in (False, True):
        got = sample(logits.to(device), **args, any_sampled=any_sampled)
        assert got.dtype == torch.int64
        assert got.tolist() == want


@pytest.mark.parametrize("filtered", [False, True])
def test_a_row_without_a_number_has_no_token(device: str, filtered: bool) -> None:
    batch, vocab = 6, 3000
    logits = torch.randn(batch, vocab)
    logits[1, :], logits[3, :] = float("nan"), float("-inf")
    args = {name: value.to(device) for name, value in arguments(batch, vocab, device).items()}
    args["temperature"].fill_(0.7)
    flags = dict.fromkeys(("any_top_k", "any_top_p", "any_min_p"), filtered)
    got = sample(logits.to(device), **args, **flags).tolist()
    assert got[1] == got[3] == NO_TOKEN
    assert all(0 <= got[i] < vocab for i in (0, 2, 4, 5))
    counts = torch.zeros(batch, vocab, dtype=torch.int32, device=device)
    count_tokens(counts, torch.arange(batch, device=device), torch.tensor(got, device=device))
    assert counts.sum(1).tolist() == [1, 0, 1, 0, 1, 1]


@pytest.mark.parametrize("kind", ["normal", "peaked", "flat", "ties", "masked"])
@pytest.mark.parametrize("vocab", [50, 3000] if INTERPRET else [50, 3000, 32001])
def test_thresholds_keep_what_sorting_keeps(device: str, kind: str, vocab: int) -> None:
    """Among what the filters keep, the winner of the same race; over many rows, so that every filter decides some."""
    torch.manual_seed(random.randrange(1 << 30))
    batch = 12 if INTERPRET else 48
    logits = torch.randn(batch, vocab)
    if kind == "peaked":
        logits *= 8
    elif kind == "flat":
        logits *= 1e-3
    elif kind == "ties":
        logits = (logits * 2).round() / 2
    elif kind == "masked":
        logits[torch.rand(batch, vocab) < 0.9] = float("-inf")
        logits[:, 5] = 1.0
    args = arguments(batch, vocab, device)
    args["temperature"].clamp_(min=0.1)
    got = sample(logits.to(device), **{name: value.to(device) for name, value in args.items()}).cpu()
    noise = exponential_noise(args["seeds"], args["positions"], vocab)
    wrong = 0
    for i in range(batch):
        x = logits[i] / args["temperature"][i]
        keep = kept_by_sorting(x, int(args["top_k"][i]), float(args["top_p"][i]), float(args["min_p"][i]))
        score = (x.double() - noise[i].double().log()).masked_fill(~keep, float("-inf"))
        # At a rounding's distance from top_p one entry more or less may stay, and near ties may fall either way.
        wrong += not (keep[got[i]] and score[got[i]] >= score.max() - 1e-4)
    assert wrong <= batch // 24
    if device == "cpu" and not INTERPRET:
        return
    again = sample_reference(logits, **args)
    assert (again != got).sum() <= batch // 24


def test_deep_thresholds_agree_with_sorting() -> None:
    """Nuclei wider than the candidates that the reference looks at first."""
    x = torch.randn(4, 20000) * 0.3
    k = torch.tensor([5000, 0, 19999, 3], dtype=torch.int32)
    p = torch.tensor([0.9, 0.97, 1.0, 0.5])
    got = sampling_threshold(x, k, p, None)
    assert got is not None
    for i in range(4):
        keep = kept_by_sorting(x[i], int(k[i]), float(p[i]), 0.0)
        assert abs(int((x[i] >= got[i]).sum()) - int(keep.sum())) <= 1


def test_random_numbers_are_the_documented_ones() -> None:
    """The formula in the module's text, in Python integers."""
    word = 0xFFFFFFFF

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x85EBCA6B & word
        x ^= x >> 13
        x = x * 0xC2B2AE35 & word
        return x ^ x >> 16

    for seed, position in ((0, 0), (1, 7), (-5, 123456), (1 << 61, 1 << 20)):
        got = exponential_noise(torch.tensor([seed]), torch.tensor([position]), 300)[0]
        key1 = mix((seed & word) + 0x9E3779B9 * position & word)
        key2 = mix(seed >> 32 & word ^ key1 ^ 0x85EBCA6B)
        for index in (0, 1, 2, 77, 299):
            x = 0x9E3779B9 * index + key1 & word
            x ^= x >> 16
            x = x * 0x21F0AAAD & word
            x ^= x >> 15
            x ^= key2
            x = x * 0x735A2D97 & word
            x ^= x >> 15
            want = -math.log1p(-(x + 0.5) / 2**32)
            assert float(got[index]) == pytest.approx(want, rel=2e-5, abs=1e-9)


def test_random_numbers_are_exponential_and_independent() -> None:
    noise = exponential_noise(torch.arange(400), torch.arange(400) % 20, 5000).double()
    assert abs(float(noise.mean()) - 1) < 0.005
    assert abs(float(noise.var()) - 1) < 0.02
    u = 1 - (-noise).exp()
    counts = torch.histc(u.float(), 256, 0, 1).double()
    chi = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert abs(chi - 255) < 5 * math.sqrt(2 * 255)
    for other in (u.roll(1, 0), u.roll(1, 1), u.roll(20, 0)):
        correlation = float(((u - 0.5) * (other - 0.5)).mean() * 12)
        assert abs(correlation) < 5 / math.sqrt(u.numel())


def test_frequencies_match_probabilities(device: str) -> None:
    """20,000 draws of one distribution, a position each."""
    batch = 500 if INTERPRET else 20000
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, float("-inf"), 2.5])
    got = sample(
        logits.expand(batch, 6).contiguous().to(device),
        torch.full((batch,), 0.7, device=device),
        torch.zeros(batch, dtype=torch.int32, device=device),
        torch.ones(batch, device=device),
        torch.zeros(batch, device=device),
        torch.full((batch,), 99, device=device),
        torch.arange(batch, device=device),
        any_top_k=False,
        any_top_p=False,
        any_min_p=False,
    ).cpu()
    want = torch.softmax(logits / 0.7, 0)
    share = torch.bincount(got, minlength=6) / batch
    assert float((share - want).abs().max()) < 4 * 0.5 / math.sqrt(batch)
    assert share[4] == 0


def test_a_row_does_not_depend_on_its_batch(device: str) -> None:
    vocab, batch = 700, 9
    logits = torch.randn(batch, vocab)
    args = arguments(batch, vocab, device)
    whole = sample(logits.to(device), **{k: v.to(device) for k, v in args.items()}).tolist()
    for i in (0, 4, 8):
        alone = {k: v[i : i + 1].to(device) for k, v in args.items()}
        assert sample(logits[i : i + 1].to(device), **alone).tolist() == [whole[i]]


def test_penalties(device: str) -> None:
    rows, vocab, batch = 7, 301, 5
    prompt = torch.rand(rows, vocab) < 0.3
    counts = torch.randint(0, 4, (rows, vocab), dtype=torch.int32) * (torch.rand(rows, vocab) < 0.3)
    logits = torch.randn(batch, vocab)
    index = torch.tensor([3, 0, -1, 6, 2], dtype=torch.int32)
    presence = torch.tensor([0.5, 0.0, 1.0, -0.5, 0.0])
    frequency = torch.tensor([0.1, 0.0, 1.0, 0.3, 0.0])
    repetition = torch.tensor([1.0, 1.3, 2.0, 0.8, 1.0])
    want = logits.clone()
    for i in (0, 1, 3, 4):
        for t in range(vocab):
            row, value = int(index[i]), float(logits[i, t])
            count = int(counts[row, t])
            if bool(prompt[row, t]) or count:
                value = value / float(repetition[i]) if value > 0 else value * float(repetition[i])
            want[i, t] = value - float(frequency[i]) * count - float(presence[i]) * (count > 0)
    got = logits.to(device, copy=True)
    moved = [x.to(device) for x in (prompt, counts, index, presence, frequency, repetition)]
    assert apply_penalties(got, *moved) is got
    torch.testing.assert_close(got.cpu(), want)


def test_count_tokens(device: str) -> None:
    counts = torch.zeros(4, 10, dtype=torch.int32, device=device)
    rows = torch.tensor([2, -1, 0], dtype=torch.int32, device=device)
    for _ in range(2):
        count_tokens(counts, rows, torch.tensor([9, 3, 0], device=device))
    want = torch.zeros(4, 10, dtype=torch.int32)
    want[2, 9] = want[0, 0] = 2
    assert torch.equal(counts.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs(device: str, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(6, 5001)).to(dtype)
    logits[1, 10:] = float("-inf")
    ids = torch.tensor([0, 5, 77, 5000, int(logits[4].argmax()), 9])
    want = torch.log_softmax(logits.double(), 1)
    chosen, rank, values, best = (x.cpu() for x in logprobs(logits.to(device), ids.to(device), 5))
    torch.testing.assert_close(chosen.double(), want.gather(1, ids[:, None])[:, 0], atol=2e-5, rtol=1e-5)
    assert rank.tolist() == [int((want[i] > want[i, t]).sum()) + 1 for i, t in enumerate(ids.tolist())]
    torch.testing.assert_close(values.double(), want.topk(5).values, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(want.gather(1, best), want.topk(5).values)
    none = logprobs(logits.to(device), ids.to(device), 0)
    assert none[2].shape == none[3].shape == (6, 0)
