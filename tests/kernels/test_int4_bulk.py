"""4-bit weights that bulk copies bring into shared memory, against float64; what the kernel was compiled to, without a GPU."""

from __future__ import annotations

import json
import random
from importlib import resources
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lanes_in_numpy import Pointer, Program, import_with, instead, load_kernel, named
from references import EPS, error, gated, normed
from torch import Tensor

from kubeinfer.kernels import int4, tuned
from kubeinfer.kernels.int4 import Int4Weight, int4_add_before_norm, int4_linear, pack_int4
from kubeinfer.kernels.norm import NormBegun

# tiles, warps, slots, piece, programs a processor, held
FORMS = [
    ((1, 4, 7, 1, 0, 1), 3584),
    ((1, 4, 1, 7, 0, 1), 3584),
    ((1, 8, 1, 4, 0, 1), 3584),
    ((2, 4, 4, 1, 1, 1), 3584),
    ((2, 8, 2, 2, 1, 1), 3584),
    ((1, 8, 6, 1, 0, 0), 18944),
    ((1, 16, 3, 1, 1, 0), 4224),
    ((2, 8, 3, 1, 1, 0), 3584),
    ((1, 8, 3, 1, 0, 1), 128),
]


def random_weight(n: int, k: int) -> tuple[Int4Weight, Tensor]:
    """Packed, and in float64."""
    codes = torch.randint(0, 16, (k, n), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (k // 128, n), dtype=torch.uint8)
    scales = (torch.rand(k // 128, n) / k**0.5).half().float() / 4
    weight = pack_int4(codes, scales, zeros, 128, None)
    return weight, int4.dequantize_int4_reference(weight, torch.float32).double()


def begin(x: Tensor, weight: Tensor) -> NormBegun:
    """As a product leaves it: squares in parts, with room for more tokens."""
    squares = torch.full((7, 16), float("nan"))
    squares[:, : x.shape[0]] = torch.stack([part.float().pow(2).sum(1) for part in x.tensor_split(7, 1)])
    return NormBegun((x.float() * weight.float()).to(x.dtype), squares)


def on(begun: NormBegun, device: str) -> NormBegun:
    return NormBegun(begun.scaled.to(device), begun.squares.to(device))


def needs_bulk_copies(device: str) -> None:
    if not torch.zeros(1, device=device).is_cuda:
        pytest.skip("about Hopper's Gluon kernel")
    from kubeinfer.kernels.triton_launch import runs_gluon

    if not runs_gluon():
        pytest.skip("about Hopper's Gluon kernel")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("form", "k"), FORMS)
def test_products(
    device: str, form: tuple[int, ...], k: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a layer may ask, in more tiles than programs; with the same result every time."""
    needs_bulk_copies(device)
    from kubeinfer.kernels import triton_int4_bulk

    monkeypatch.setattr(triton_int4_bulk, "processors", lambda device: 5)
    check_products(triton_int4_bulk, device, form, 192, k, tokens)


@pytest.mark.parametrize(
    ("form", "k", "tokens"),
    [
        ((2, 4, 2, 1, 1, 1), 640, 1),  # warps that have fewer chunks than others
        ((2, 4, 1, 2, 0, 1), 1024, 3),  # all is asked for at once, two chunks at a time
        ((1, 4, 2, 1, 1, 0), 1280, 5),  # inputs are read as they are needed
        ((2, 8, 1, 1, 1, 0), 896, 8),
        # More than two tiles a program, of which some are asked for as others end.
        ((1, 4, 1, 2, 1, 1), 768, 2),
    ],
)
def test_products_in_numpy(form: tuple[int, ...], k: int, tokens: int) -> None:
    """The same, of the kernel's source as numpy runs it: without a GPU, and without Triton."""
    check_products(bulk_in_numpy(), "cpu", form, 160 if form[4] else 64, k, tokens)


def bulk_in_numpy() -> Any:
    """`kubeinfer.kernels.triton_int4_bulk`, whose kernel runs in numpy on three multiprocessors."""
    program = Program()
    kernel = load_kernel("gluon_int4", program)

    def launch(grid: Any, args: Any, constants: Any, num_warps: int, pdl: bool) -> None:
        pointers = [pointer_to(arg, kernel.gl.bfloat16) if isinstance(arg, Tensor) else arg for arg in args]
        weights = {id(pointer.array) for pointer in pointers[1:3]}
        for own in random.sample(range(grid[0]), grid[0]):
            program.begin(constants[-1], (own,), lambda source: id(source.array) in weights)
            kernel._bulk_kernel(*pointers, *constants)
            assert program.early_copies > 0

    scratch = SimpleNamespace(counters=torch.zeros(4, dtype=torch.int32))
    stand_ins = {
        "triton": named("triton", cdiv=lambda x, y: -(-x // y), next_power_of_2=lambda x: 1 << (x - 1).bit_length()),
        "kubeinfer.kernels.triton_launch": named("launch", processors=lambda device: 3),
        "kubeinfer.kernels.triton_split": named("split", scratch=lambda device: scratch),
        "kubeinfer.kernels.gluon_int4": named("int4", BULK=SimpleNamespace(launch=launch)),
    }  # fmt: skip
    module = import_with(stand_ins, "triton_int4_bulk")
    product = module.int4_bulk_triton

    def with_the_kernel(*args: Any) -> Any:
        with instead(stand_ins):  # it imports the kernel when it is called
            return product(*args)

    module.int4_bulk_triton = with_the_kernel
    return module


def pointer_to(tensor: Tensor, bfloat16: Any) -> Pointer:
    assert tensor.is_contiguous()
    if tensor.dtype == torch.bfloat16:
        return Pointer(tensor.view(torch.int16).numpy().view("uint16").reshape(-1), 0, bfloat16)
    return Pointer(tensor.numpy().reshape(-1))


def check_products(kernels: Any, device: str, form: tuple[int, ...], n: int, k: int, tokens: int) -> None:
    int4_bulk_triton = kernels.int4_bulk_triton
    torch.manual_seed(tokens + k)
    config = kernels.Int4BulkConfig(*form)
    if not kernels.fits(tokens, n, k, False, config):
        pytest.skip("has no room for so many tokens")
    packed, plain = random_weight(n, k)
    weight = int4.Int4Weight(packed.words.to(device), packed.meta.to(device), n, k, 128)
    x, scale, next_scale = (
        torch.randn(tokens, k).bfloat16(),
        torch.rand(k).bfloat16() + 0.5,
        torch.rand(n).bfloat16() + 0.5,
    )
    bias, residual = torch.randn(n).bfloat16(), torch.randn(tokens, n).bfloat16()

    def run(
        given: Tensor, add: bool, squares: Tensor | None = None, begins: bool = False, gate: bool = False
    ) -> Any:
        out = (
            residual.clone() if add else torch.full((tokens, n // 2 if gate else n), float("nan")).bfloat16()
        ).to(device)
        begun = int4_bulk_triton(
            given.to(device), weight, bias.to(device), gate, add, out, config, squares, EPS,
            next_scale.to(device) if begins else None,
        )  # fmt: skip
        assert not kernels.scratch(out.device).counters.any()
        return out, begun

    want = x.double() @ plain.T + bias.double()
    assert error(run(x, False)[0], want) < 1e-2
    begun = on(begin(x, scale), device)
    ended = normed(x, scale) @ plain.T + bias.double()
    assert error(run(begun.scaled, False, begun.squares)[0], ended) < 1e-2
    if config.tiles == 2:
        got = run(begun.scaled, False, begun.squares, gate=True)[0]
        assert error(got, gated(ended)) < 1e-2
        assert torch.equal(run(begun.scaled, False, begun.squares, gate=True)[0], got)
    got, left = run(x, True, begins=True)
    assert error(got, residual.double() + want) < 1e-2
    total = got.double().cpu()
    assert error(left.scaled, total * next_scale.double()) < 1e-2
    assert error(left.squares[:, :tokens].sum(0), total.pow(2).sum(1)) < 1e-3
    again, left_again = run(x, True, begins=True)
    assert torch.equal(again, got)
    assert torch.equal(left_again.squares[:, :tokens], left.squares[:, :tokens])


@pytest.mark.gpu
def test_rows_of_a_wider_tensor_and_captured(device: str) -> None:
    needs_bulk_copies(device)
    from kubeinfer.kernels.triton_int4_bulk import Int4BulkConfig, int4_bulk_triton

    packed, plain = random_weight(64, 512)
    weight = int4.Int4Weight(packed.words.to(device), packed.meta.to(device), 64, 512, 128)
    wide, out = torch.randn(3, 768).bfloat16().to(device), torch.zeros(3, 64).bfloat16().to(device)
    config = Int4BulkConfig(1, 4, 2, 1, 0, 1)

    def run() -> None:
        int4_bulk_triton(wide[:, 128:640], weight, None, False, False, out, config)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
        run()
    wide.normal_()
    graph.replay()
    assert error(out, wide[:, 128:640].double().cpu() @ plain.T) < 1e-2


@pytest.mark.parametrize("tokens", [1, 4, 12])
def test_one_layer_begins_the_norm_that_the_next_ends(
    device: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model's layers do; where a kernel cannot, the norm is computed."""
    is_cuda = torch.zeros(1, device=device).is_cuda
    if is_cuda:
        from kubeinfer.kernels import triton_int4
        from kubeinfer.kernels.triton_int4_bulk import Int4BulkConfig
        from kubeinfer.kernels.triton_launch import runs_gluon

        monkeypatch.setattr(
            triton_int4, "find_bulk_config", lambda m, n, k, kind: Int4BulkConfig(2, 4, 1, 1, 1, 1)
        )
    (first, plain1), (second, plain2) = random_weight(512, 640), random_weight(256, 512)
    first.words, first.meta = first.words.to(device), first.meta.to(device)
    second.words, second.meta = second.words.to(device), second.meta.to(device)
    x, residual = torch.randn(tokens, 640).bfloat16(), torch.randn(tokens, 512).bfloat16()
    scale = torch.rand(512).bfloat16() + 0.5
    total = residual.clone().to(device)
    begun = int4_add_before_norm(total, x.to(device), first, None, scale.to(device))
    assert (begun is not None) == (is_cuda and tokens <= 8 and runs_gluon())
    assert error(total, residual.double() + x.double() @ plain1.T) < 1e-2
    want = normed(total.cpu(), scale) @ plain2.T
    assert error(int4_linear(total, second, None, scale.to(device), EPS, begun=begun), want) < 1e-2
    got = int4_linear(total, second, None, scale.to(device), EPS, gated=True, begun=begun)
    assert error(got, gated(want)) < 1e-2


def test_tuned_forms_fit_their_shapes() -> None:
    pytest.importorskip("triton")
    from kubeinfer.kernels.triton_int4_bulk import Int4BulkConfig, fits

    table = json.loads((resources.files(tuned) / "int4.json").read_text())
    for key, entry in table.items():
        if key.endswith("/bulk"):
            kind, shape, tokens, _ = key.split("/")
            n, k = map(int, shape.split("x"))
            assert fits(int(tokens[1:]), n, k, kind == "gated", Int4BulkConfig(**entry)), key


@pytest.mark.parametrize(("form", "k"), FORMS[:4])
def test_compiled_without_a_gpu_the_kernel_has_the_shared_memory_that_it_numbers(
    form: tuple[int, ...], k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It addresses its one allocation by the symbol before it: there must be no other."""
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.6.") or triton.knobs.runtime.interpret:
        pytest.skip("about the compiler of one release")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from kubeinfer.kernels import triton_int4_bulk
    from kubeinfer.kernels.gluon_int4 import BULK

    noted: list[Any] = []

    def note(grid: Any, args: Any, constants: Any, num_warps: int, pdl: bool) -> None:
        noted.append((args, constants, num_warps))

    monkeypatch.setattr(BULK, "launch", note)
    monkeypatch.setattr(triton_int4_bulk, "processors", lambda device: 2)
    config = triton_int4_bulk.Int4BulkConfig(*form)
    packed, _ = random_weight(128, k)
    x, out = torch.zeros(1, k).bfloat16(), torch.zeros(1, 128).bfloat16()
    triton_int4_bulk.int4_bulk_triton(x, packed, None, False, True, out, config, next_norm=out[0])
    args, constants, num_warps = noted[0]
    function = BULK._function
    names = {torch.bfloat16: "*bf16", torch.int32: "*i32", torch.float32: "*fp32"}
    values = dict(zip(function.arg_names, (*args, *constants), strict=True))
    signature = {
        name: names[value.dtype] if isinstance(value, Tensor) else "fp32" if name == "eps" else "i32"
        for name, value in list(values.items())[: len(args)]
    }
    fixed = {name: value for name, value in values.items() if name not in signature}
    source = GluonASTSource(
        function,
        signature | dict.fromkeys(fixed, "constexpr"),
        {(function.arg_names.index(name),): value for name, value in fixed.items()},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "launch_pdl": True}
    )
    assert compiled.metadata.shared == constants[-1]
    ptx = compiled.asm["ptx"]
    assert "mov.u32 %" in ptx
    assert "global_smem;" in ptx
    assert "global_smem+" not in ptx
    assert "cp.async.bulk" in ptx
