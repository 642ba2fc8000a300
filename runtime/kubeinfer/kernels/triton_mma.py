# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 - Triton's tuples are joined, not unpacked
"""What Triton kernels written thread by thread are made of: inline assembly on tensors with an element a thread.

Such tensors are ``[32 warps]``: element ``i`` is thread ``i``'s, so that what a warp's threads do together (products on the tensor
cores, which Ampere and later have; moves between threads) can be written down. Pairs of 16-bit numbers are int32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load4(pointers, wanted, ALWAYS: tl.constexpr):
    """Four words at ``pointers``, which are not read again soon; anything where not ``wanted``."""
    if ALWAYS:
        found = tl.inline_asm_elementwise(
            "ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l", [pointers],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.b32 p, $5, 0;
            @p ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4];
            }""",
            "=r,=r,=r,=r,l,r", [pointers, wanted],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return found


@triton.jit
def _in_place4(pointers, wanted, ALWAYS: tl.constexpr, LOAD: tl.constexpr):
    """Four words by the instruction LOAD, asked for where it is written; zeros where not ``wanted``."""
    if ALWAYS:
        found = tl.inline_asm_elementwise(
            LOAD + " {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l", [pointers],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.b32 p, $5, 0;
            mov.b32 $0, 0;
            mov.b32 $1, 0;
            mov.b32 $2, 0;
            mov.b32 $3, 0;
            @p """ + LOAD + """ {$0, $1, $2, $3}, [$4];
            }""",
            "=&r,=&r,=&r,=&r,l,r", [pointers, wanted],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    return found


@triton.jit
def stream4(pointers, wanted, ALWAYS: tl.constexpr):
    """Four words at ``pointers``, which are not read again soon; zeros where not ``wanted``. Asked for where it is written: before
    the wait for the kernel before, or after."""
    return _in_place4(pointers, wanted, ALWAYS, "ld.global.L1::no_allocate.L2::128B.v4.b32")


@triton.jit
def read4(pointers, wanted, ALWAYS: tl.constexpr):
    """Four words at ``pointers``, which other programs read too; zeros where not ``wanted``. Stays behind the wait for the kernel
    before."""
    return _in_place4(pointers, wanted, ALWAYS, "ld.global.v4.b32")


@triton.jit
def fresh4(pointers):
    """Four words at ``pointers`` that other multiprocessors may have written in the same launch."""
    return tl.inline_asm_elementwise(
        "ld.global.cg.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [pointers],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load2(pointers, wanted, ALWAYS: tl.constexpr):
    """Two words at ``pointers``; zeros where not ``wanted``. Stays behind the wait for the kernel before."""
    if ALWAYS:
        found = tl.inline_asm_elementwise(
            "ld.global.v2.b32 {$0, $1}, [$2];",
            "=r,=r,l", [pointers], dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.b32 p, $3, 0;
            mov.b32 $0, 0;
            mov.b32 $1, 0;
            @p ld.global.v2.b32 {$0, $1}, [$2];
            }""",
            "=&r,=&r,l,r", [pointers, wanted], dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    return found


@triton.jit
def write4(pointers, wanted, a, b, c, d):
    """Where ``wanted``, four words to ``pointers``."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.b32 p, $2, 0;
        @p st.global.v4.b32 [$1], {$3, $4, $5, $6};
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r,r,r,r", [pointers, wanted, a, b, c, d], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def pair(low, high, BF16: tl.constexpr):
    """Two fp32 numbers as a pair of 16 bits."""
    if BF16:
        found = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip
    return found


@triton.jit
def first_halves(a, b):
    """Pairs of the low numbers of two pairs."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def second_halves(a, b):
    """Pairs of the high numbers of two pairs."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def codes(words, BF16: tl.constexpr):
    """The codes in bits 0 to 3 and 16 to 19 of ``words`` as a pair of 16-bit numbers: in bfloat16 plus 128."""
    if BF16:
        found = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x000F000F, 0x43004300, 0xEA;",
            "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            """{
            .reg .b32 number, exponent;
            mov.b32 exponent, 0x64006400;
            lop3.b32 number, $1, 0x000F000F, exponent, 0xEA;
            sub.rn.f16x2 $0, number, exponent;
            }""",
            "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return found


@triton.jit
def times(x, y):
    """Products of pairs of bfloat16 numbers: ``x y - 0``, which older GPUs have too."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 zero;
        mov.b32 zero, 0x80008000;
        fma.rn.bf16x2 $0, $1, $2, zero;
        }""",
        "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def mma(a0, a1, a2, a3, b0, b1, c, BF16: tl.constexpr):
    """``c`` (four fp32 a thread) plus a product of 16 x 16 and 16 x 8 numbers, pairs of 16 bits."""
    if BF16:
        found = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    return found


@triton.jit
def add_squares(b0, b1, found):
    """Add to ``found`` the squares of tokens' bfloat16 inputs, for thread ``9 t + 4 e`` of token ``2 t + e``.

    They are on the diagonals of the inputs' products with each other: of the first's in numbers 0 and 1, of the second's in 6
    and 7. A left operand of 8 inputs is the two registers that were read together, so that neither is moved.
    """
    return tl.inline_asm_elementwise(
        """{
        mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$8, $9}, {$8}, {$10, $11, $12, $13};
        mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {$4, $5, $6, $7}, {$8, $9}, {$9}, {$14, $15, $16, $17};
        }""",
        "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,r,f,f,f,f,f,f,f,f",
        [b0, b1, found[0], found[1], found[2], found[3], found[4], found[5], found[6], found[7]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def from_thread(values, place):
    """Of fp32 ``values``, that of the thread at ``place`` in the same warp."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1F, 0xFFFFFFFF;",
        "=f,f,r", [values, place], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def sum_of_warps(values, WARPS: tl.constexpr):
    """``[32]`` of each of up to eight tensors ``[32 WARPS]``: what the warps' threads of one place have together."""
    COUNT: tl.constexpr = len(values)
    parts = ()
    for i in tl.static_range(2 if COUNT == 2 else 4 if COUNT <= 4 else 8):
        parts = parts + (tl.reshape(values[i if i < COUNT else 0], [WARPS, 32]),)
    if len(parts) == 2:
        sums = tl.reduce(parts, 0, _add2)
    elif len(parts) == 4:
        sums = tl.reduce(parts, 0, _add4)
    else:
        sums = tl.reduce(parts, 0, _add8)
    return sums[:COUNT]
