# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Two programs of a cluster (Hopper) that read the same: either brings a half, and the copy engine puts it into both shared memories.

Triton compiles such a kernel as one of single programs; that two are a cluster only its launch knows (`Kernel.launch`'s ``cluster``).
So what they do for one another is in inline assembly. (PTX ISA 8.7, 9.7.13.15: mbarrier; 9.7.9.25: bulk copies.)
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def barriers_at(threads, BYTES: tl.constexpr):
    """The address of a kernel's barriers, the last BYTES of its shared memory: the compiler puts nothing but its own 8, rounded up to
    16, behind what is smallest."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 size;
        mov.u32 size, %dynamic_smem_size;
        mov.u32 $0, global_smem;
        add.u32 $0, $0, size;
        sub.u32 $0, $0, $2;
        }""",
        "=&r,r,r", [threads, BYTES], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def arrive_at_both(barrier, lane, wanted):
    """Where ``wanted``, each warp arrives at the barrier at ``barrier`` of either program. What it read before, through the copy engine
    or in products that have ended, may be written over then; what it stored is not made known."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 there;
        setp.ne.b32 p, $3, 0;
        setp.lt.and.u32 p, $2, 2, p;
        @p mapa.shared::cluster.u32 there, $1, $2;
        @p mbarrier.arrive.shared::cluster.b64 _, [there];
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r", [barrier, lane, wanted], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def meet(counter):
    """A warp of either program waits for the other's: then the other has begun, and what its program did before the meeting is done.

    ``counter``, int32 in memory, goes up by two at each meeting and is never set back. (The instruction made for this,
    ``barrier.cluster``, waits for all warps, also those that the compiler adds and that do nothing.)
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred lead, short;
        .reg .b32 who, odd, now;
        bar.warp.sync 0xFFFFFFFF;
        elect.sync who|lead, 0xFFFFFFFF;
        mov.b32 odd, 0;
        @lead atom.add.acq_rel.gpu.global.s32 odd, [$1], 1;
        shfl.sync.idx.b32 odd, odd, who, 0x1F, 0xFFFFFFFF;
        or.b32 odd, odd, 1;
        again:
        ld.acquire.gpu.global.s32 now, [$1];
        sub.s32 now, now, odd;
        setp.le.s32 short, now, 0;
        @short bra again;
        bar.warp.sync 0xFFFFFFFF;
        mov.u32 $0, 0;
        }""",
        "=r,l", [counter], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
