# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""What Gluon kernels are made of that bring memory near by bulk copies: inline assembly as in `kubeinfer.kernels.triton_mma`.

A bulk copy (Hopper) is one instruction of one thread for kilobytes: the copy engine moves them into shared memory and counts
their bytes at a barrier there. Neither registers nor the units for loads have to do with them on the way.

Shared memory is addressed by number. Gluon has no operation for the address of what it allocated, but its allocations lie
behind a symbol: the only allocation of a kernel that lets the compiler use no other shared memory is at the symbol. (That there
is no other is seen in the compiled kernel's size of shared memory; a test looks at it.)
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shared_base(threads):
    """The address of the kernel's shared memory, for each of ``threads``."""
    return tl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r,r", [threads], dtype=tl.int32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def warp_of(threads):
    """The number of each thread's warp, in a way that tells the compiler that a warp's threads have the same."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 0x1F, 0xFFFFFFFF;", "=r,r", [threads // 32], dtype=tl.int32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def init_barrier(at, wanted):
    """Where ``wanted``, a barrier at ``at`` for the bytes that one thread expects. A warp's are there for all its threads then."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.b32 p, $2, 0;
        @p mbarrier.init.shared::cta.b64 [$1], 1;
        fence.mbarrier_init.release.cluster;
        fence.proxy.async.shared::cta;
        bar.warp.sync 0xFFFFFFFF;
        mov.u32 $0, 0;
        }""",
        "=r,r,r", [at, wanted], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def wait_barrier(at, phase):
    """Until the barrier at ``at`` has ended its ``phase`` (0 or 1, in turns)."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred done;
        again:
        mbarrier.try_wait.parity.shared::cta.b64 done, [$1], $2;
        @!done bra again;
        mov.u32 $0, 0;
        }""",
        "=r,r,r", [at, phase], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def copy2(leader, wanted, barrier, to, seen, words, metas, WORDS: tl.constexpr, METAS: tl.constexpr):
    """A warp's ``leader`` (1; others 0) has WORDS bytes from ``words`` and METAS from ``metas`` copied to ``to``.

    Before, what was there has arrived in the warp's registers: ``seen`` is made of it, and the copy waits for that number (of which
    nothing depends: a number times the next is even). It is not enough that the loads stand before the copy: they
    may wait in line for longer than a copy takes. Where not ``wanted`` the barrier's phase ends without a copy.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred lead, copy;
        .reg .b32 nothing, at, bytes;
        mad.lo.u32 nothing, $5, $5, $5;
        and.b32 nothing, nothing, 1;
        bar.warp.sync 0xFFFFFFFF;
        elect.sync _|lead, 0xFFFFFFFF;
        setp.ne.and.b32 lead, $1, 0, lead;
        setp.eq.and.b32 lead, nothing, 0, lead;
        setp.ne.and.b32 copy, $2, 0, lead;
        selp.b32 bytes, $10, 0, copy;
        add.u32 at, $4, $8;
        @lead mbarrier.arrive.expect_tx.shared::cta.b64 _, [$3], bytes;
        @copy cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$4], [$6], $8, [$3];
        @copy cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [at], [$7], $9, [$3];
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r,r,r,l,l,r,r,r", [leader, wanted, barrier, to, seen, words, metas, WORDS, METAS, WORDS + METAS],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def copy4(
    leader,
    wanted,
    barrier,
    to,
    seen,
    words0,
    words1,
    metas0,
    metas1,
    WORDS: tl.constexpr,
    METAS: tl.constexpr,
):
    """`copy2` of two places each: both WORDS bytes, then both METAS bytes."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred lead, copy;
        .reg .b32 nothing, at1, at2, at3, bytes;
        mad.lo.u32 nothing, $5, $5, $5;
        and.b32 nothing, nothing, 1;
        bar.warp.sync 0xFFFFFFFF;
        elect.sync _|lead, 0xFFFFFFFF;
        setp.ne.and.b32 lead, $1, 0, lead;
        setp.eq.and.b32 lead, nothing, 0, lead;
        setp.ne.and.b32 copy, $2, 0, lead;
        selp.b32 bytes, $12, 0, copy;
        add.u32 at1, $4, $10;
        add.u32 at2, at1, $10;
        add.u32 at3, at2, $11;
        @lead mbarrier.arrive.expect_tx.shared::cta.b64 _, [$3], bytes;
        @copy cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$4], [$6], $10, [$3];
        @copy cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [at1], [$7], $10, [$3];
        @copy cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [at2], [$8], $11, [$3];
        @copy cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [at3], [$9], $11, [$3];
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r,r,r,l,l,l,l,r,r,r",
        [leader, wanted, barrier, to, seen, words0, words1, metas0, metas1, WORDS, METAS, 2 * (WORDS + METAS)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def copy_page(wanted, barrier, to, seen, keys, values):
    """Where ``wanted``, one thread of a warp has 4 KB from ``keys`` copied to ``to``, and 4 KB from ``values`` behind them, of which the
    second 2 KB begin 64 bytes later in the banks. ``seen``: as of `copy2`."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred lead;
        .reg .b32 nothing;
        mad.lo.u32 nothing, $4, $4, $4;
        and.b32 nothing, nothing, 1;
        bar.warp.sync 0xFFFFFFFF;
        elect.sync _|lead, 0xFFFFFFFF;
        setp.ne.and.b32 lead, $1, 0, lead;
        setp.eq.and.b32 lead, nothing, 0, lead;
        @lead mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2], 8192;
        @lead cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$3], [$5], 4096, [$2];
        @lead cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$3+4096], [$6], 2048, [$2];
        @lead cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$3+6208], [$6+2048], 2048, [$2];
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r,r,l,l", [wanted, barrier, to, seen, keys, values], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def before_copies(threads):
    """What was stored in shared memory so far is there for the warp's threads, and comes before copies to the same place."""
    tl.inline_asm_elementwise(
        "bar.warp.sync 0xFFFFFFFF; fence.proxy.async.shared::cta; mov.u32 $0, 0;",
        "=r,r", [threads], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def wait_for_kernel_before(threads):
    """Until the kernel before has ended; then the next may get in place."""
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, 0;",
        "=r,r", [threads], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def count_up(counter):
    """What ``counter`` in memory was, to which a warp adds one. What its threads stored before is there for who finds it counted,
    and what others stored before they counted can be read then."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred lead;
        .reg .b32 who, old;
        bar.warp.sync 0xFFFFFFFF;
        elect.sync who|lead, 0xFFFFFFFF;
        mov.b32 old, 0;
        @lead atom.add.acq_rel.gpu.global.s32 old, [$1], 1;
        shfl.sync.idx.b32 $0, old, who, 0x1F, 0xFFFFFFFF;
        bar.warp.sync 0xFFFFFFFF;
        }""",
        "=r,l", [counter], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def next_number(counter, wanted, LAST: tl.constexpr):
    """Where ``wanted``, what ``counter`` in memory was, which then is one more, or after LAST zero again; else 0."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.b32 p, $2, 0;
        mov.b32 $0, 0;
        @p atom.global.inc.u32 $0, [$1], $3;
        }""",
        "=&r,l,r,r", [counter, wanted, LAST], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def all_threads(threads):
    """Wait for all threads of the program: what they stored in shared memory can be read then."""
    tl.inline_asm_elementwise(
        "bar.sync 0; mov.u32 $0, 0;", "=r,r", [threads], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def shared4(at):
    """Four words of shared memory."""
    return tl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", [at],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def shared2(at):
    """Two words of shared memory."""
    return tl.inline_asm_elementwise(
        "ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r", [at], dtype=(tl.int32, tl.int32), is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def shared_number(at):
    """An fp32 number of shared memory."""
    return tl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [at], dtype=tl.float32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def shared_word_of_warp(at):
    """A word of shared memory, in a way that tells the compiler that a warp's threads have the same."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 found;
        ld.shared.b32 found, [$1];
        shfl.sync.idx.b32 $0, found, 0, 0x1F, 0xFFFFFFFF;
        }""",
        "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def put4(at, wanted, a, b, c, d):
    """Where ``wanted``, four words into shared memory."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.b32 p, $2, 0;
        @p st.shared.v4.b32 [$1], {$3, $4, $5, $6};
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r,r,r,r", [at, wanted, a, b, c, d], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def put_word(at, wanted, a):
    """Where ``wanted``, a word into shared memory."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.b32 p, $2, 0;
        @p st.shared.b32 [$1], $3;
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r", [at, wanted, a], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def put_numbers2(at, wanted, a, b):
    """Where ``wanted``, two fp32 numbers into shared memory."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.b32 p, $2, 0;
        @p st.shared.v2.f32 [$1], {$3, $4};
        mov.u32 $0, 0;
        }""",
        "=r,r,r,f,f", [at, wanted, a, b], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def put_numbers4(at, wanted, a, b, c, d):
    """Where ``wanted``, four fp32 numbers into shared memory."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.b32 p, $2, 0;
        @p st.shared.v4.f32 [$1], {$3, $4, $5, $6};
        mov.u32 $0, 0;
        }""",
        "=r,r,r,f,f,f,f", [at, wanted, a, b, c, d], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
