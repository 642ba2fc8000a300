"""Times the GPU kernels against the card's own ceilings and prints one table.

    PYTHONPATH=runtime python3 benchmarks/kernels.py
    PYTHONPATH=runtime python3 benchmarks/kernels.py --tensor-parallel 2

Bandwidth is quoted as a share of a large device-to-device copy (bytes read plus written), measured in the same run;
attention prefill in TFLOP/s of the causal half. Times are of replayed CUDA graphs of several calls, as the engine runs
them; decode attention takes turns over caches that together are several times the L2 cache. Small inputs stay in the L2
cache, as they do between the kernels of a step, so their share of the copy can exceed 100%.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

import all_reduce
from kubeinfer.kernels import triton_decode_attention
from kubeinfer.kernels.activation import silu_and_mul
from kubeinfer.kernels.attention import decode_workspace, paged_attention, plan_decodes
from kubeinfer.kernels.batch_prep import prepare_decode, step_inputs, store_sampled
from kubeinfer.kernels.embedding import vocab_parallel_embedding
from kubeinfer.kernels.linear import linear
from kubeinfer.kernels.norm import fused_add_rms_norm, rms_norm
from kubeinfer.kernels.rope import rope_and_cache
from kubeinfer.kernels.sampling import apply_penalties, logprobs, sample
from kubeinfer.kernels.shared_prefix import SharedPrefix
from kubeinfer.kernels.triton_launch import runs_gluon
from kubeinfer.kernels.triton_rope_decode import rope_decode_triton

DEVICE = "cuda"
BF16 = torch.bfloat16


def microseconds(*runs: Callable[[], object]) -> float:
    """Median time of one call; several calls take turns."""

    def turns() -> None:
        for run in runs:
            run()

    torch.cuda.synchronize()  # the graph is captured on another stream
    return float(do_bench_cudagraph(turns, rep=20, return_mode="median")) * 1e3 / len(runs)


def copy_bandwidth() -> float:
    """Bytes a second of a 4 GiB device-to-device copy, read plus written."""
    source = torch.randn(1 << 30, device=DEVICE)
    target = torch.empty_like(source)
    milliseconds = do_bench(lambda: target.copy_(source), warmup=20, rep=50, return_mode="median")
    return 2 * source.nbytes / (milliseconds * 1e-3)


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


def decode_run(contexts: list[int], hq: int, hk: int, d: int, block_size: int) -> Callable[[], object]:
    """The decode attention of one layer."""
    batch, context = len(contexts), max(contexts)
    cache, table = paged_cache(contexts, hk, d, block_size)
    q = torch.randn(batch, hq, d, device=DEVICE, dtype=BF16)
    out = torch.empty_like(q)
    start = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
    lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    workspace = decode_workspace(batch, hq, hk, d, DEVICE)
    units = plan_decodes(lens, batch, context, cache)  # once a step, not once a layer

    def run() -> object:
        return paged_attention(
            q, cache, start, lens, table, out, scale=d**-0.5, max_query_len=1, max_seq_len=context, workspace=workspace,
            units=units,
        )  # fmt: skip

    return run


def shared_prefix_runs(
    batch: int, prefix: int, own: int, hq: int, hk: int, d: int, block_size: int
) -> tuple[Callable[[], object], ...]:
    """The decode attention of one layer over contexts that begin alike: each row for itself, the same with the pass over
    shared blocks finding nothing, and with it reading the prefix once."""
    cache, tables = paged_cache([prefix, *[own] * batch], hk, d, block_size)
    blocks = prefix // block_size
    table = torch.cat(
        (tables[:1, :blocks].expand(batch, -1), tables[1:, : -(-own // block_size)]), 1
    ).contiguous()
    q = torch.randn(batch, hq, d, device=DEVICE, dtype=BF16)
    out = torch.empty_like(q)
    start = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
    lens = torch.full((batch,), prefix + own, dtype=torch.int32, device=DEVICE)
    workspace = decode_workspace(batch, hq, hk, d, DEVICE)
    nothing = SharedPrefix(torch.full_like(lens, -1), torch.zeros_like(lens))
    all_rows = SharedPrefix(start[:batch].clone(), torch.full_like(lens, prefix))

    def run(shared: SharedPrefix | None) -> object:
        return paged_attention(
            q, cache, start, lens, table, out, scale=d**-0.5, max_query_len=1, max_seq_len=prefix + own,
            workspace=workspace, shared=shared,
        )  # fmt: skip

    return partial(run, None), partial(run, nothing), partial(run, all_rows)


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


class Table:
    """Prints rows of name, time and share of the copy bandwidth."""

    def __init__(self, ceiling: float):
        self.ceiling = ceiling

    def row(self, name: str, size: int, *runs: Callable[[], object]) -> None:
        us = microseconds(*runs)
        print(f"{name:34} {us:8.1f} us {size / us * 1e6 / self.ceiling:7.1%}", flush=True)


def attention(table: Table, block_size: int) -> None:
    print("\ndecode attention: sequences x context, heads, head size -> us, share of copy")
    shapes = [(28, 4, 128), (14, 2, 64), (32, 8, 128), (32, 8, 64)]
    few = [(1, 512), (1, 4096), (8, 1024), (256, 512), (512, 385)]
    for batch, context, hq, hk, d in [
        *((64, 4096, *s) for s in shapes),
        *((*f, *s) for s in shapes[:2] for f in few),
    ]:
        size = 2 * batch * context * hk * d * 2
        turns = min(16, max(2, (400 << 20) // size))
        runs = [decode_run([context] * batch, hq, hk, d, block_size) for _ in range(turns)]
        table.row(f"{batch} x {context}, {hq}:{hk}, {d}", size, *runs)
    print(
        "\ndecode attention, contexts like ShareGPT's after some tokens: sequences, keys -> us, share of copy"
    )
    lengths = random.Random(0)
    for batch in (32, 64, 128, 256, 512, 896):
        contexts = [min(2000, 10 + int(lengths.lognormvariate(5.5, 0.8))) for _ in range(batch)]
        for hq, hk, d in shapes[:2]:
            size = 4 * sum(contexts) * hk * d
            runs = [
                decode_run(contexts, hq, hk, d, block_size) for _ in range(min(16, 2 + (400 << 20) // size))
            ]
            table.row(f"{batch}, {sum(contexts)}, {hq}:{hk}, {d}", size, *runs)
    print(
        "\ndecode attention, shared prefix + own tokens -> us: each row alone; nothing found shared; prefix read once"
    )
    for batch, prefix, hq, hk, d in [
        *((batch, 2048, *shapes[0]) for batch in (32, 64, 128, 256, 512)),
        (512, 512, *shapes[0]),
        *((batch, 2048, *shapes[1]) for batch in (64, 512)),
        (256, 2048, *shapes[2]),
    ]:
        runs = [shared_prefix_runs(batch, prefix, 192, hq, hk, d, block_size) for _ in range(2)]
        alone, nothing, once = (microseconds(*kind) for kind in zip(*runs))
        name = f"{batch} x {prefix} + 192, {hq}:{hk}, {d}"
        print(f"{name:34} {alone:8.1f} us {nothing:8.1f} us {once:8.1f} us {alone / once:6.2f}x", flush=True)
    print("\nprefill attention: prompts, heads, head size -> us, TFLOP/s")
    for lengths in ([8192], [2048] * 4, [256] * 32):
        for hq, hk, d in shapes[:3]:
            run, work = prefill_run(lengths, hq, hk, d, block_size)
            us = microseconds(run)
            name = f"{len(lengths)} x {lengths[0]}, {hq}:{hk}, {d}"
            print(f"{name:34} {us:8.1f} us {work / us / 1e6:7.1f}", flush=True)


def decode_kernels(block_size: int) -> None:
    """Both kernels for a list of tiles, heads 28:4 of 128; `takes_streams` says which of them serves what."""
    print(
        "\ndecode attention of one list: contexts -> us of triton_decode_runs; of gluon_decode_streams; its gain"
    )
    lengths = random.Random(5)
    uneven = [min(2000, max(20, int(lengths.lognormvariate(5.9, 0.8)))) for _ in range(512)]
    for name, contexts in {
        "512 x 384": [384] * 512,
        "256 x 512": [512] * 256,
        "512 x 442 to 458": [442 + lengths.randrange(17) for _ in range(512)],
        "512, lognormal": uneven,
        "256, lognormal": uneven[:256],
    }.items():
        runs = [decode_run(contexts, 28, 4, 128, block_size) for _ in range(2)]
        took = []
        for streams in (False, True):
            with patch.object(triton_decode_attention, "takes_streams", return_value=streams):
                took.append(microseconds(*runs))
        print(f"{name:34} {took[0]:8.1f} us {took[1]:8.1f} us {1 - took[1] / took[0]:7.1%}", flush=True)


def few_rows(block_size: int) -> None:
    """Rotation, cache write and attention of few rows of the 7B shape, by two kernels and by one: the engine takes one of up to
    four rows."""
    print("\nfew rows, 28:4 x 128, rotated, written and attended to -> us: two kernels, one")
    for rows, context in itertools.product((1, 4, 8, 16), (200, 700, 2500)):
        # Caches that together are larger than the L2 cache, as a step's weights would have it.
        count = max(2, min(64, (128 << 20) // (rows * context * 4 * 128 * 4)))
        runs = [few_rows_run([context] * rows, block_size) for _ in range(count)]
        two, one = microseconds(*(run[0] for run in runs)), microseconds(*(run[1] for run in runs))
        print(f"{rows:4} x {context:<5} {two:8.2f} {one:8.2f} {one / two - 1:+.1%}")


def few_rows_run(contexts: list[int], block_size: int) -> tuple[Callable[[], object], Callable[[], object]]:
    cache, table = paged_cache(contexts, 4, 128, block_size)
    lens = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    places = lens - 1
    start = torch.arange(len(contexts) + 1, dtype=torch.int32, device=DEVICE)
    blocks = table.gather(1, (places // block_size).long()[:, None])[:, 0]
    slots = (blocks * block_size + places % block_size).int()
    cos_sin = torch.randn(max(contexts), 128, device=DEVICE)
    q, k, v = torch.randn(len(contexts), 36, 128, device=DEVICE, dtype=BF16).split((28, 4, 4), 1)
    out = torch.empty(len(contexts), 28, 128, device=DEVICE, dtype=BF16)
    workspace = decode_workspace(len(contexts), 28, 4, 128, DEVICE)

    def two() -> None:
        rope_and_cache(q, k, v, places, cos_sin, slots, cache)
        paged_attention(
            q, cache, start, lens, table, out, scale=128**-0.5, max_query_len=1, max_seq_len=max(contexts),
            workspace=workspace,
        )  # fmt: skip

    def one() -> None:
        rope_decode_triton(
            q,
            k,
            v,
            places,
            cos_sin,
            slots,
            cache,
            lens,
            table,
            out,
            None,
            None,
            1e-6,
            128**-0.5,
            0,
            0.0,
            workspace,
        )

    return two, one


def pointwise(table: Table, tokens: int, block_size: int) -> None:
    for width, inner in ((896, 4864), (3584, 18944)):
        x = torch.randn(tokens, width, device=DEVICE, dtype=BF16)
        residual, weight, out = (
            torch.randn_like(x),
            torch.ones(width, device=DEVICE, dtype=BF16),
            torch.empty_like(x),
        )
        gate = torch.randn(tokens, 2 * inner, device=DEVICE, dtype=BF16)
        up = torch.empty(tokens, inner, device=DEVICE, dtype=BF16)
        table.row(f"rms_norm {tokens} x {width}", 2 * x.nbytes, partial(rms_norm, x, weight, 1e-6, out))
        added = partial(fused_add_rms_norm, x, residual, weight, 1e-6, out)
        table.row(f"fused_add_rms_norm {tokens} x {width}", 4 * x.nbytes, added)
        table.row(
            f"silu_and_mul {tokens} x {inner}", gate.nbytes + up.nbytes, partial(silu_and_mul, gate, up)
        )
    for hq, hk, d in ((28, 4, 128), (14, 2, 64)):
        qkv = torch.randn(tokens, hq + 2 * hk, d, device=DEVICE, dtype=BF16)
        table.row(
            f"rope_and_cache {tokens} x {hq}:{hk}, {d}", 2 * qkv.nbytes, rope_run(qkv, hq, hk, block_size)
        )
    weights = torch.randn(151936, 3584, device=DEVICE, dtype=BF16)
    ids = torch.randint(0, 151936, (tokens,), device=DEVICE)
    table.row(
        f"embedding {tokens} x 3584", 4 * tokens * 3584, partial(vocab_parallel_embedding, ids, weights)
    )


def rope_run(qkv: Tensor, hq: int, hk: int, block_size: int) -> Callable[[], object]:
    tokens, _, d = qkv.shape
    cache, _ = paged_cache([tokens + block_size], hk, d, block_size)
    q, k, v = qkv.split([hq, hk, hk], 1)
    positions, slots = torch.arange(tokens, device=DEVICE), torch.randperm(tokens, device=DEVICE).int()
    return partial(rope_and_cache, q, k, v, positions, torch.randn(tokens, d, device=DEVICE), slots, cache)


def sampler(table: Table, batch: int, vocab: int = 151936) -> None:
    ones, zeros = torch.ones(batch, device=DEVICE), torch.zeros(batch, device=DEVICE)
    seeds = torch.arange(batch, device=DEVICE)
    top_k = torch.full((batch,), 40, dtype=torch.int32, device=DEVICE)
    for dtype in (BF16, torch.float32):
        logits = torch.randn(batch, vocab, device=DEVICE).mul_(2).to(dtype)

        def case(
            name: str, temperature: Tensor, p: float, k: bool, sampled: bool = True, x: Tensor = logits
        ) -> None:
            run = partial(
                sample, x, temperature, top_k * int(k), ones * p, zeros, seeds, seeds, any_sampled=sampled, any_top_k=k,
                any_top_p=p < 1, any_min_p=False,
            )  # fmt: skip
            table.row(f"{name}, {batch} {str(x.dtype)[6:]}", x.nbytes, run)

        case("greedy", zeros, 1.0, False, sampled=False)
        case("temperature", ones, 1.0, False)
        case("top-k 40", ones, 1.0, True)
        case("top-p 0.9", ones, 0.9, False)
        case("top-k 40, top-p 0.9", ones, 0.9, True)
    logits = torch.randn(batch, vocab, device=DEVICE)
    table.row(f"logprobs 5, {batch} float32", logits.nbytes, partial(logprobs, logits, seeds, 5))
    mask = torch.rand(batch, vocab, device=DEVICE) < 0.01
    half, two = torch.full((batch,), 0.5, device=DEVICE), torch.full((batch,), 2.0, device=DEVICE)
    run = partial(apply_penalties, logits, mask, mask.int(), seeds.int(), half, half, two)
    table.row(f"apply_penalties, {batch}", 3 * logits.nbytes + mask.nbytes, run)


def one_token_linears(table: Table) -> None:
    print("\nlinear layers of one token: out x in -> us, share of copy; cuBLAS after it")
    small = [(1152, 896), (896, 896), (9728, 896), (896, 4864), (151936, 896)]
    for n, k in [*small, (4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944), (152064, 3584)]:
        x = torch.randn(1, k, device=DEVICE, dtype=BF16)
        weights = [
            torch.randn(n, k, device=DEVICE, dtype=BF16)
            for _ in range(max(2, min(64, (300 << 20) // (n * k * 2))))
        ]
        table.row(f"linear, one token, {n} x {k}", n * k * 2, *(partial(linear, x, w) for w in weights))
        table.row(
            f"cuBLAS {n} x {k}", n * k * 2, *(partial(torch.nn.functional.linear, x, w) for w in weights)
        )


def host_costs(block_size: int) -> None:
    x = torch.randn(8, 896, device=DEVICE, dtype=BF16)
    weight, out = torch.ones(896, device=DEVICE, dtype=BF16), torch.empty_like(x)
    gate, up = (
        torch.randn(8, 9728, device=DEVICE, dtype=BF16),
        torch.empty(8, 4864, device=DEVICE, dtype=BF16),
    )
    qkv = torch.randn(8, 18, 64, device=DEVICE, dtype=BF16)
    calls: dict[str, Callable[[], object]] = {
        "linear": partial(linear, x[:1], torch.randn(896, 896, device=DEVICE, dtype=BF16)),
        "torch.add": partial(torch.add, x, x, out=out),
        "rms_norm": partial(rms_norm, x, weight, 1e-6, out),
        "silu_and_mul": partial(silu_and_mul, gate, up),
        "rope_and_cache": rope_run(qkv, 14, 2, block_size),
        "paged_attention, decode": decode_run([64] * 8, 14, 2, 64, block_size),
        "paged_attention, prefill": prefill_run([64] * 2, 14, 2, 64, block_size)[0],
        "paged_attention, long prefill": prefill_run([600] * 2, 14, 2, 64, block_size)[0],
    }
    for name, run in calls.items():
        print(f"{name:34} {host_cost(run):8.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="time the sums over N GPUs instead"
    )
    asked = parser.parse_args()
    if asked.tensor_parallel > 1:
        sys.exit(all_reduce.spawn(asked.tensor_parallel))
    block_size = asked.block_size
    torch.manual_seed(0)
    table = Table(copy_bandwidth())
    print(f"{torch.cuda.get_device_name()}: copy {table.ceiling / 1e12:.2f} TB/s, block size {block_size}")
    attention(table, block_size)
    if runs_gluon():
        decode_kernels(block_size)
    few_rows(block_size)
    print("\nothers: tokens -> us, share of copy")
    for tokens in (64, 8192):
        pointwise(table, tokens, block_size)
    one_token_linears(table)
    print("\nsampler, vocabulary 151,936: rows -> us, share of copy (one read of the logits)")
    for batch in (1, 64, 256, 1024):
        sampler(table, batch)
    rows = torch.arange(256, dtype=torch.int32, device=DEVICE)
    tables = torch.zeros(1024, 512, dtype=torch.int32, device=DEVICE)
    last = torch.zeros(1024, dtype=torch.int64, device=DEVICE)
    starts = torch.zeros(256, dtype=torch.int32, device=DEVICE)
    inputs = step_inputs(256, 256, 512, DEVICE)
    prepare = partial(prepare_decode, rows, starts, last, tables, block_size, inputs)
    table.row("prepare_decode 256", 2 * 256 * 512 * 4, prepare)
    turn, sampled = (
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        torch.zeros(4, 256, dtype=torch.int64).pin_memory(),
    )
    store = partial(store_sampled, rows, last[:256], last, starts, 1023, turn, sampled)
    table.row("store_sampled 256", 256 * 36, store)
    print("\nhost time of one call (launches queued, nothing waited for)")
    host_costs(block_size)


if __name__ == "__main__":
    main()
