"""Times the GPU kernels against the card's own ceilings and prints one table.

    PYTHONPATH=runtime python3 benchmarks/kernels.py

Bandwidth is quoted as a share of a large device-to-device copy (bytes read plus written), measured in the same run;
attention prefill in TFLOP/s of the causal half. Every time is the median over runs with a cold L2 cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from triton.testing import do_bench

from kubeinfer.kernels.activation import silu_and_mul
from kubeinfer.kernels.attention import decode_workspace, paged_attention
from kubeinfer.kernels.batch_prep import prepare_decode, step_inputs, store_sampled
from kubeinfer.kernels.embedding import vocab_parallel_embedding
from kubeinfer.kernels.norm import fused_add_rms_norm, rms_norm
from kubeinfer.kernels.rope import rope_and_cache
from kubeinfer.kernels.sampling import apply_penalties, logprobs, sample

DEVICE = "cuda"
BF16 = torch.bfloat16


def microseconds(run: Callable[[], object]) -> float:
    return float(do_bench(run, warmup=10, rep=50, return_mode="median")) * 1e3


def copy_bandwidth() -> float:
    """Bytes a second of a 4 GiB device-to-device copy, read plus written."""
    source = torch.randn(1 << 30, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (microseconds(lambda: target.copy_(source)) * 1e-6)


def paged_cache(
    contexts: list[int], num_kv_heads: int, head_dim: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """A cache in which every sequence owns scattered blocks, and the block table."""
    blocks = [-(-n // block_size) for n in contexts]
    cache = torch.randn(2, sum(blocks) + 1, num_kv_heads, block_size, head_dim, device=DEVICE, dtype=BF16)
    order = (torch.randperm(sum(blocks)) + 1).int()
    table = torch.zeros(len(contexts), max(blocks), dtype=torch.int32)
    for i, part in enumerate(order.split(blocks)):
        table[i, : len(part)] = part
    return cache, table.to(DEVICE)


def decode_run(
    batch: int, context: int, hq: int, hk: int, d: int, block_size: int
) -> tuple[Callable[[], object], int]:
    """The decode attention of one layer, and the bytes of keys and values it must read."""
    cache, table = paged_cache([context] * batch, hk, d, block_size)
    q = torch.randn(batch, hq, d, device=DEVICE, dtype=BF16)
    out = torch.empty_like(q)
    start = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
    lens = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    workspace = decode_workspace(batch, hq, hk, d, DEVICE)

    def run() -> object:
        return paged_attention(
            q,
            cache,
            start,
            lens,
            table,
            out,
            scale=d**-0.5,
            max_query_len=1,
            max_seq_len=context,
            workspace=workspace,
        )

    return run, 2 * batch * context * hk * d * 2


def prefill_run(
    lengths: list[int], hq: int, hk: int, d: int, block_size: int
) -> tuple[Callable[[], object], float]:
    """The causal attention of whole prompts in one layer, and its floating-point operations."""
    cache, table = paged_cache(lengths, hk, d, block_size)
    q = torch.randn(sum(lengths), hq, d, device=DEVICE, dtype=BF16)
    out = torch.empty_like(q)
    lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    start = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()

    def run() -> object:
        return paged_attention(
            q, cache, start, lens, table, out, scale=d**-0.5, max_query_len=max(lengths), max_seq_len=max(lengths),
            num_decodes=0,
        )  # fmt: skip

    return run, sum(2.0 * n * n * hq * d for n in lengths)


def host_cost(run: Callable[[], object]) -> float:
    """Microseconds of host time a call takes while the device keeps up or queues."""
    for _ in range(20):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(200):
        run()
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return spent / 200 * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--block-size", type=int, default=16)
    block_size = parser.parse_args().block_size
    torch.manual_seed(0)
    ceiling = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {ceiling / 1e12:.2f} TB/s, block size {block_size}")

    print("\ndecode attention: sequences x context, heads, head size -> us, TB/s, share of copy")
    shapes = [(28, 4, 128), (14, 2, 64), (32, 8, 128), (32, 8, 64)]
    cases = [(64, 4096, *s) for s in shapes] + [
        (1, 4096, 28, 4, 128),
        (1, 512, 14, 2, 64),
        (256, 512, 28, 4, 128),
    ]
    for batch, context, hq, hk, d in cases:
        run, size = decode_run(batch, context, hq, hk, d, block_size)
        us = microseconds(run)
        print(
            f"{batch:4} x {context:5} {hq:3}:{hk} {d:4}  {us:8.1f} {size / us / 1e6:6.2f} {size / us * 1e6 / ceiling:7.1%}"
        )

    print("\nprefill attention: prompts, heads, head size -> us, TFLOP/s")
    for lengths in ([8192], [2048] * 4, [256] * 32):
        for hq, hk, d in shapes[:3]:
            run, work = prefill_run(lengths, hq, hk, d, block_size)
            us = microseconds(run)
            print(f"{len(lengths):3} x {lengths[0]:5} {hq:3}:{hk} {d:4}  {us:8.1f} {work / us / 1e6:7.1f}")

    print("\nothers: tokens -> us, share of copy")

    def row(name: str, size: int, run: Callable[[], object]) -> None:
        us = microseconds(run)
        print(f"{name:34} {us:8.1f} {size / us * 1e6 / ceiling:7.1%}")

    for tokens in (64, 8192):
        for width, inner in ((896, 4864), (3584, 18944)):
            x = torch.randn(tokens, width, device=DEVICE, dtype=BF16)
            residual, weight, out = (
                torch.randn_like(x),
                torch.ones(width, device=DEVICE, dtype=BF16),
                torch.empty_like(x),
            )
            row(
                f"rms_norm {tokens} x {width}",
                2 * x.nbytes,
                lambda x=x, w=weight, o=out: rms_norm(x, w, 1e-6, o),
            )  # type: ignore[misc]
            row(
                f"fused_add_rms_norm {tokens} x {width}",
                4 * x.nbytes,
                lambda x=x, r=residual, w=weight, o=out: fused_add_rms_norm(x, r, w, 1e-6, o),  # type: ignore[misc]
            )
            gate = torch.randn(tokens, 2 * inner, device=DEVICE, dtype=BF16)
            up = torch.empty(tokens, inner, device=DEVICE, dtype=BF16)
            row(
                f"silu_and_mul {tokens} x {inner}",
                gate.nbytes + up.nbytes,
                lambda g=gate, u=up: silu_and_mul(g, u),
            )  # type: ignore[misc]
        for hq, hk, d in shapes[:2]:
            cache, _ = paged_cache([tokens + 16], hk, d, block_size)
            qkv = torch.randn(tokens, hq + 2 * hk, d, device=DEVICE, dtype=BF16)
            q, k, v = qkv.split([hq, hk, hk], 1)
            positions = torch.arange(tokens, device=DEVICE)
            angles = torch.randn(tokens, d, device=DEVICE)
            slots = torch.randperm(tokens, device=DEVICE).int()
            row(
                f"rope_and_cache {tokens} x {hq}:{hk} {d}",
                2 * qkv.nbytes,
                lambda a=(q, k, v, positions, angles, slots, cache): rope_and_cache(*a),  # type: ignore[misc]
            )
        table = torch.randn(151936, 3584, device=DEVICE, dtype=BF16)
        ids = torch.randint(0, 151936, (tokens,), device=DEVICE)
        row(
            f"embedding {tokens} x 3584",
            2 * tokens * 3584 * 2,
            lambda i=ids: vocab_parallel_embedding(i, table),
        )  # type: ignore[misc]

    print("\nsampler, vocabulary 151,936: rows, dtype -> us, share of copy (one read of the logits)")
    vocab = 151936
    for batch in (1, 64, 256, 1024):
        ones, zeros = torch.ones(batch, device=DEVICE), torch.zeros(batch, device=DEVICE)
        seeds = torch.arange(batch, device=DEVICE)
        top_k = torch.full((batch,), 40, dtype=torch.int32, device=DEVICE)
        for dtype in (BF16, torch.float32):
            logits = torch.randn(batch, vocab, device=DEVICE).mul_(2).to(dtype)
            base = {"seeds": seeds, "positions": seeds, "min_p": zeros, "any_min_p": False}
            off = {"any_top_k": False, "any_top_p": False}

            def case(name: str, temperature: Tensor, p: float, **flags: bool) -> None:
                call = dict(base, temperature=temperature, top_k=top_k, top_p=ones * p, **flags)
                row(f"{name} {batch} {str(dtype)[6:]}", logits.nbytes, lambda: sample(logits, **call))  # noqa: B023

            case("greedy", zeros, 1.0, any_sampled=False, **off)
            case("temperature", ones, 1.0, **off)
            case("top-k 40", ones, 1.0, any_top_p=False)
            case("top-p 0.9", ones, 0.9, any_top_k=False)
            case("top-k 40, top-p 0.9", ones, 0.9)
        row(f"logprobs 5 {batch} float32", logits.nbytes, lambda: logprobs(logits, seeds, 5))  # noqa: B023
    rows = torch.arange(256, dtype=torch.int32, device=DEVICE)
    logits = torch.randn(256, vocab, device=DEVICE)
    mask = torch.rand(256, vocab, device=DEVICE) < 0.01
    counts = mask.int()
    half, two = torch.full((256,), 0.5, device=DEVICE), torch.full((256,), 2.0, device=DEVICE)
    row(
        "apply_penalties 256",
        2 * logits.nbytes + mask.nbytes + counts.nbytes,
        lambda: apply_penalties(logits, mask, counts, rows, half, half, two),
    )
    tables = torch.zeros(1024, 512, dtype=torch.int32, device=DEVICE)
    last, computed = (
        torch.zeros(1024, dtype=torch.int64, device=DEVICE),
        torch.zeros(1024, dtype=torch.int32, device=DEVICE),
    )
    inputs = step_inputs(256, 256, 512, DEVICE)
    row(
        "prepare_decode 256",
        2 * 256 * 512 * 4,
        lambda: prepare_decode(rows, last, tables, computed, block_size, inputs),
    )
    row("store_sampled 256", 256 * 24, lambda: store_sampled(rows, last[:256], last, computed))

    print("\nhost time of one call, us (launches queued, nothing waited for)")
    x = torch.randn(8, 896, device=DEVICE, dtype=BF16)
    weight, out = torch.ones(896, device=DEVICE, dtype=BF16), torch.empty_like(x)
    print(f"rms_norm {host_cost(lambda: rms_norm(x, weight, 1e-6, out)):.1f}")
    gate, up = (
        torch.randn(8, 9728, device=DEVICE, dtype=BF16),
        torch.empty(8, 4864, device=DEVICE, dtype=BF16),
    )
    print(f"silu_and_mul {host_cost(lambda: silu_and_mul(gate, up)):.1f}")
    run, _ = decode_run(8, 64, 14, 2, 64, block_size)
    print(f"paged_attention, decode {host_cost(run):.1f}")
    run, _ = prefill_run([64] * 2, 14, 2, 64, block_size)
    print(f"paged_attention, prefill {host_cost(run):.1f}")
    qkv = torch.randn(8, 18, 64, device=DEVICE, dtype=BF16)
    q, k, v = qkv.split([14, 2, 2], 1)
    cache, _ = paged_cache([64], 2, 64, block_size)
    positions, angles = torch.arange(8, device=DEVICE), torch.randn(64, 64, device=DEVICE)
    slots = torch.arange(8, dtype=torch.int32, device=DEVICE)
    print(f"rope_and_cache {host_cost(lambda: rope_and_cache(q, k, v, positions, angles, slots, cache)):.1f}")
    print(f"torch.add {host_cost(lambda: torch.add(x, x, out=out)):.1f}")


if __name__ == "__main__":
    main()
