"""What a GPU needs before it serves: the size of its largest step, captured graphs, kernels compiled and loaded."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kubeinfer.engine.plan import NewRow, StepPlan
from kubeinfer.kernels.attention import decode_workspace, plan_decodes
from kubeinfer.kernels.batch_invariance import batch_invariant
from kubeinfer.kernels.compile_ahead import compile_ahead
from kubeinfer.kernels.fused_linear import MIN_MANY_ROWS
from kubeinfer.kernels.shared_prefix import SharedPrefix
from kubeinfer.layers.attention import StepContext, each_token_alone
from kubeinfer.layers.parallel import Group, Stage
from kubeinfer.options import EngineOptions
from kubeinfer.sampling_params import SamplingParams
from kubeinfer.worker.cuda_graph import Capture, DecodeGraphs, capture_sizes
from kubeinfer.worker.memory import free_host_bytes, usable_cpus
from kubeinfer.worker.mixed_graph import MixedGraphs
from kubeinfer.worker.model_runner import ModelRunner
from kubeinfer.worker.shared_prefix import MIN_BATCH, SharedPrefixFinder

_MOST_PROFILED_TOKENS = 65536
_WARM_TOKENS = (96, 160, 224, 288, 352, 448, 512, 576, 704, 896, 1152, 1408, 1792, 2048, 3072, 4096)


def processes(group: Group, stage: Stage) -> int:
    """That compile kernels: this rank's share of the processors, and of the memory, of which each may take a GiB."""
    ranks = group.size * stage.count
    return min(16, usable_cpus() // ranks, free_host_bytes() // (2**30 * ranks))


def dummy_step(
    kv_caches: list[Tensor], block_size: int, num_decodes: int, chunks: list[int], workspace: Any = None
) -> tuple[Tensor, StepContext]:
    """Token ids and context of a step that reads the dummy page only and writes nothing."""
    device = kv_caches[0].device
    lengths = [1] * num_decodes + chunks
    tokens, longest = sum(lengths), max(lengths)

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    width = -(-longest // block_size // 16) * 16 + 16
    seq_lens = ints(lengths)
    step = StepContext(
        positions=torch.zeros(tokens, dtype=torch.int32, device=device),
        slot_mapping=torch.full((tokens,), -1, dtype=torch.int32, device=device),
        query_start=ints(starts),
        seq_lens=seq_lens,
        block_table=torch.zeros(len(lengths), width, dtype=torch.int32, device=device),
        max_query_len=longest,
        max_seq_len=longest,
        num_decodes=num_decodes,
        kv_caches=kv_caches,
        workspace=workspace,
        prefill_kv_tokens=sum(chunks),
        units=plan_decodes(seq_lens, num_decodes, longest, kv_caches[0]),
    )
    return torch.zeros(tokens, dtype=torch.int32, device=device), step


@torch.inference_mode()
def profile_largest_step(
    model: Any,
    page: list[Tensor],
    block_size: int,
    max_tokens: int,
    max_num_seqs: int,
    stage: Stage,
    key: str,
    group: Group,
) -> int:
    """Bytes that the largest step needs beside weights and cache: it is run, on a cache of one page.

    So is the largest whose gates and ups are written to memory, where that may need more: up to three times its tokens.

    ``key`` says what model and options this is: kernels are compiled ahead once for each.
    """
    tokens = min(max_tokens, _MOST_PROFILED_TOKENS)
    # Of the next 63 tokens they are not, which are rounded up.
    sizes = [MIN_MANY_ROWS - 64, tokens] if MIN_MANY_ROWS <= tokens < 3 * MIN_MANY_ROWS else [tokens]
    steps = [dummy_step(page, block_size, 0, [n]) for n in sizes]
    device = page[0].device

    def whole() -> None:
        for ids, step in steps:
            _forward(model, ids, step, stage, max_num_seqs)

    compile_ahead(whole, f"profile {key}", processes(group, stage), group.smallest)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    whole()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    # Hidden states on their way to or from the stages beside this one, a step's in each.
    on_the_way = 0 if stage.count == 1 else (stage.count + 1) * max_tokens * model.config.hidden_size * 4
    return int(peak) + on_the_way


def _forward(model: Any, ids: Tensor, step: StepContext, stage: Stage, rows: int) -> None:
    """This stage's part of a step that makes logits of the first ``rows`` tokens; the results are dropped."""
    config = model.config
    dtype = getattr(torch, config.dtype)
    inputs = ids if stage.first else torch.zeros(len(ids), config.hidden_size, dtype=dtype, device=ids.device)
    if batch_invariant():
        step = each_token_alone(step)
    hidden = model.forward(inputs, step)
    if stage.last:
        model.logits(hidden[:rows])


@torch.inference_mode()
def prepare_gpu(runner: ModelRunner, options: EngineOptions, max_tokens: int, key: str, group: Group) -> None:
    """Scratch memory of the decode kernel, CUDA graphs unless ``enforce_eager``, and a first run of eager steps."""
    model, tables, config = runner.model, runner.tables, runner.model.config
    max_rows = tables.spare_row
    kv_heads, heads = runner.kv_caches[0].shape[2], model.layers[0].attention.num_heads
    dtype = runner.dtype
    runner.workspace = decode_workspace(max_rows, heads, kv_heads, config.head_dim, runner.device)
    shares = _shares_prefixes(runner, options)
    if shares:
        bytes_per_token = 2 * kv_heads * config.head_dim * runner.kv_caches[0].element_size()
        runner.shared_prefixes = SharedPrefixFinder(tables, runner.block_size, bytes_per_token)
    graphs: DecodeGraphs | None = None
    mixed: MixedGraphs | None = None
    if not options.enforce_eager:
        graphs = DecodeGraphs(
            model, tables, runner.kv_caches, runner.workspace, runner.block_size, config.vocab_size, dtype,
            capture_sizes(max_rows, options.cudagraph_capture_sizes), runner.stage, shares,
        )  # fmt: skip
    # Steps with prompts run eagerly in a pipeline, and where each of their tokens stands alone.
    if not (options.enforce_eager or runner.pipeline is not None or options.batch_invariant):
        mixed = MixedGraphs(
            model, tables, runner.kv_caches, runner.workspace, config.vocab_size, dtype, runner.block_size,
            max_rows, max_tokens, shares,
        )  # fmt: skip

    # Layers in host memory are brought in their order, all of them.
    shorten = partial(few_layers, model) if not options.cpu_offload_gb else nullcontext

    def steps() -> None:
        with shorten():
            for captured in (graphs, mixed):
                if captured is not None:
                    captured.run()
            warm_up(runner, max_tokens, noted=True)

    compile_ahead(steps, f"steps {key}", processes(group, runner.stage), group.smallest)
    capture = Capture(runner.device)
    with _no_collection():
        for captured in (graphs, mixed):
            if captured is not None:
                captured.capture(capture, shorten)
    runner.graphs, runner.mixed_graphs = graphs, mixed
    with shorten():
        warm_up(runner, max_tokens)


@contextmanager
def few_layers(model: Any) -> Iterator[None]:
    """``model`` with layers enough to launch every kernel: the first two of each kind of attention, and the last.

    For runs that only compile kernels and load them, whose results nobody reads.
    """
    layers, kinds = model.layers, Counter[int]()
    kept = []
    for layer in layers:
        kinds[layer.attention.window] += 1
        if kinds[layer.attention.window] <= 2 or layer is layers[-1]:
            kept.append(layer)
    model.layers = kept
    try:
        yield
    finally:
        model.layers = layers


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector might free graphs of an engine before this one, which CUDA forbids while a stream is captured."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _shares_prefixes(runner: ModelRunner, options: EngineOptions) -> bool:
    """Whether decode rows may ever hold the same blocks, and attention may read these once for several rows."""
    return (
        options.enable_prefix_caching
        and not options.batch_invariant  # what a row computes would depend on who shares with it
        and runner.pipeline is None
        and runner.tables.spare_row >= MIN_BATCH
        and 0 in runner.model.config.layer_windows
    )


def warm_up(runner: ModelRunner, max_tokens: int, noted: bool = False) -> None:
    """Run one eager step of each kind, so that no request waits for a kernel to be compiled or loaded.

    ``noted``: kernels are noted and not launched.
    """
    steps: list[tuple[int, list[int], bool]] = []  # decodes, chunks, whether decodes may share a prefix
    count = 1
    while count <= min(runner.tables.spare_row, 1024):
        steps.append((count, [min(17, max(2, (max_tokens - count) // count))] * count, False))
        if runner.graphs is None:  # captured decodes have been run
            steps.append((count, [], False))
        if runner.shared_prefixes is not None and count >= MIN_BATCH:
            steps.append((count, [2], True))
        count *= 2
    # cuBLAS chooses a kernel by the number of tokens, and loads it when it is first called: not while a request waits.
    steps += [(1, [tokens - 1], False) for tokens in _WARM_TOKENS]
    for decodes, chunks, shares in steps:
        if decodes + sum(chunks) > max_tokens:
            continue
        ids, step = dummy_step(runner.kv_caches, runner.block_size, decodes, chunks, runner.workspace)
        if shares:
            nobody = torch.full((decodes,), -1, dtype=torch.int32, device=runner.device)
            step.shared = SharedPrefix(nobody, torch.zeros_like(nobody))
        wanted = min(decodes + len(chunks), runner.tables.spare_row)
        if runner.stage.last and chunks:
            step.wanted = torch.arange(wanted, dtype=torch.int32, device=runner.device)
        _forward(runner.model, ids, step, runner.stage, wanted)
    if runner.stage.last:
        _warm_up_sampling(runner, noted)
    torch.cuda.synchronize(runner.device)


def _warm_up_sampling(runner: ModelRunner, noted: bool) -> None:
    """Sample once in each way that has kernels of its own, by the sampler's own path."""
    sampler, row = runner.sampler, np.zeros(1, np.int32)
    logits = torch.zeros(1, runner.model.config.vocab_size, dtype=runner.dtype, device=runner.device)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 20},
    ]
    # Edited logits are float32, and have variants of their own.
    ways = [{**kind, **edit} for kind in kinds for edit in ({}, {"logit_bias": {0: 0.0}})]
    if not noted:  # tokens that no kernel has written would be counted
        ways += [{"temperature": 1.0, "presence_penalty": 0.1}, {"temperature": 1.0, "logprobs": 1}]
    for way in ways:
        params = SamplingParams(**way)
        new = NewRow(0, [0], 1, params, seed=0, block_ids=[], eos_token_ids=[], max_total=2)
        plan = StepPlan(0, [0], [0], [1], 1, [0], [new], [], [])
        sampler.apply(plan)
        sampler.sample(logits, row, row + 1, plan)
        sampler.apply(StepPlan(0, [], [], [], 0, [], [], [], [0]))
    sampler.temperature[0] = 0.0
