"""Peer memory of a tensor-parallel group on the GPUs of one host: who may write where, and when.

After the counters of `kubeinfer.kernels.all_reduce` come slots of equal size, in each rank's memory at the same offsets:

- slots 0 and 1 take turns: a layer's partial result goes into one while slower peers may still read the other. Writing a
  slot again is safe once a later call is complete, because that call met all peers after they had completed the earlier one.
- slot 2 is for what a step does once (embedding, logits): those calls end with a closing meeting and begin the turns anew.
- the result of the two-shot method, which has a closing meeting too; it is written by peers only once they have met this
  rank in a later call, after this rank's readers of it are complete;
- the inboxes of `sum_packets`, which need no such care.

A CUDA graph replays the turns it was captured with. That is safe if calls on either side of a replay's edge use different
slots: either a once-a-step call stands between, or a step makes an even number of calls in turns (two a layer).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kubeinfer.distributed.shared_memory import SharedMemory
from kubeinfer.kernels.all_reduce import (
    ALIGNMENT,
    COUNTER_BYTES,
    MOST_PROGRAMS,
    Inboxes,
    Peers,
    gather_columns,
    sum_packets,
    sum_rows,
)

# Up to here every rank sums all rows (one-shot); beyond, each sums its share and passes it on (two-shot). With two ranks
# both move the same bytes.
ONE_SHOT_BYTES = {2: 1 << 40, 4: 512 * 1024, 8: 256 * 1024}
# Up to here parts are sent as packets; 0: never. They take twice the bytes on the link and save a meeting and a way.
PACKET_BYTES = 128 * 1024
_MOST_PACKET_ROWS = 64
_MOST_PACKET_ROW_BYTES = 64 * 1024  # of all ranks together; beyond it the kernel lacks registers
_MOST_SLOT_BYTES = 256 * 2**20
_LEAST_SLOT_BYTES = 8 * 2**20
# Of a rank for its peers' word before it gives up; a look takes about half a microsecond, so some nine minutes. A rank that died
# ends the engine at once; this is for one that is alive, and may be slow: it may compile kernels on a crowded machine.
_LOOKS = 1 << 30
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ONCE = 2


class PeerMemory:
    """Sums and gathers of one group. Every rank makes the same calls in the same order, on one stream.

    Args:
        memory: this rank's part, uint8: the counters (zero at first), three slots, the result and the inboxes.
        peers: where the other ranks' parts are.
        slot_bytes: of each slot and of the result; a multiple of ``ALIGNMENT``.
        inboxes: for packets.
        shared: whose part ``memory`` is, for `close`.
    """

    def __init__(
        self,
        memory: Tensor,
        peers: Peers,
        slot_bytes: int,
        inboxes: Inboxes,
        shared: SharedMemory | None = None,
    ):
        self.peers = peers
        self.slot_bytes = slot_bytes
        self.inboxes = inboxes
        self.packet_bytes = PACKET_BYTES
        self.one_shot_bytes = ONE_SHOT_BYTES.get(peers.size, min(ONE_SHOT_BYTES.values()))
        self._memory = memory
        self._result = COUNTER_BYTES + 3 * slot_bytes
        self._shared = shared
        self._turn = 0

    def close(self) -> None:
        """Give the memory back, once no rank calls any more."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def fits(self, rows: int, width: int, dtype: torch.dtype) -> bool:
        """Whether a slot holds ``[rows, width]``, and the kernels take it."""
        row = width * dtype.itemsize
        return dtype in _DTYPES and rows > 0 and row % 16 == 0 and rows * row <= self.slot_bytes

    def lend(self, rows: int, width: int, dtype: torch.dtype, once: bool = False) -> Tensor | None:
        """Where the next call's ``[rows, width]`` is to be written, so that it need not be copied.

        None if it does not fit, or is sent as packets from wherever it lies. ``once``: for `gather`; else for `sum`.
        """
        if not self.fits(rows, width, dtype) or (not once and self._in_packets(rows, width, dtype)):
            return None
        return self._view(self._offset(_ONCE if once else self._turn), rows, width, dtype)

    def holds(self, x: Tensor) -> bool:
        """Whether ``x`` lies where `lend` said, for `sum`."""
        return self._is_at(x, self._turn)

    def sum(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        weight: Tensor | None = None,
        eps: float = 0.0,
        two_shot: bool | None = None,
    ) -> Tensor:
        """The sum of all ranks' ``x [T, H]``, with residual and norm as in `sum_rows`; ``x`` fits.

        Two-shot (by default from a size on, and only with a residual) the result lies in peer memory until the next
        call, and of ``residual`` only this rank's rows are right.
        """
        rows, width = x.shape
        if two_shot is None and self._in_packets(rows, width, x.dtype):
            out = torch.empty_like(x)
            sum_packets(self.peers, self.inboxes, x, out, residual=residual, weight=weight, eps=eps)
            return out
        if two_shot is None:
            two_shot = residual is not None and x.numel() * x.element_size() > self.one_shot_bytes
        lent = self.holds(x)
        slot = self._offset(self._turn if lent else _ONCE)
        if not lent:
            self._view(slot, rows, width, x.dtype).copy_(x)
        result = self._result if two_shot else -1
        out = self._view(result, rows, width, x.dtype) if two_shot else torch.empty_like(x)
        sum_rows(
            self.peers, slot, rows, width, out, residual=residual, weight=weight, eps=eps, result=result,
            close=not lent,
        )  # fmt: skip
        self._turn = 1 - self._turn if lent else 0
        return out

    def gather(self, x: Tensor, out: Tensor) -> Tensor:
        """All ranks' ``x [N, K]`` side by side in ``out [N, <= size * K]``, rows contiguous; ``x`` fits."""
        rows, width = x.shape
        if not self._is_at(x, _ONCE):
            self._view(self._offset(_ONCE), rows, width, x.dtype).copy_(x)
        gather_columns(self.peers, self._offset(_ONCE), rows, width, out)
        self._turn = 0
        return out

    def _in_packets(self, rows: int, width: int, dtype: torch.dtype) -> bool:
        num_bytes = width * dtype.itemsize
        return (
            rows * num_bytes <= self.packet_bytes
            and rows <= self.inboxes.rows
            and num_bytes <= 4 * self.inboxes.words
            and num_bytes * self.peers.size <= _MOST_PACKET_ROW_BYTES
        )

    def _offset(self, slot: int) -> int:
        return COUNTER_BYTES + slot * self.slot_bytes

    def _view(self, offset: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        num_bytes = rows * width * dtype.itemsize
        return self._memory[offset : offset + num_bytes].view(dtype).view(rows, width)

    def _is_at(self, x: Tensor, slot: int) -> bool:
        return x.is_contiguous() and x.data_ptr() == self._memory.data_ptr() + self._offset(slot)


def allocate(
    rank: int,
    size: int,
    device: torch.device,
    rows: int,
    row_bytes: int,
    programs: int,
    exchange: Callable[[bytes], list[bytes]],
) -> PeerMemory:
    """Peer memory for up to ``rows`` of ``row_bytes``, within reason; all ranks of the group call it together.

    ``exchange`` as in `SharedMemory`. Raises RuntimeError or OSError where the GPUs cannot share memory.
    """
    most = min(_MOST_SLOT_BYTES, torch.cuda.get_device_properties(device).total_memory // 256)
    slot_bytes = -(-min(max(rows * row_bytes, _LEAST_SLOT_BYTES), most) // ALIGNMENT) * ALIGNMENT
    inboxes = Inboxes(
        offset=COUNTER_BYTES + 4 * slot_bytes,
        rows=_MOST_PACKET_ROWS,
        words=-(-row_bytes // 16) * 4,
        calls=torch.zeros(_MOST_PACKET_ROWS, dtype=torch.int32, device=device),
    )
    total = inboxes.offset + Inboxes.num_bytes(size, inboxes.rows, inboxes.words)
    # Every rank's counters and inboxes are zero before any rank knows where they are.
    shared = SharedMemory(total, rank, device, exchange)
    peers = Peers(
        rank=rank,
        size=size,
        addresses=torch.tensor(shared.addresses, dtype=torch.int64, device=device),
        meetings=torch.zeros(MOST_PROGRAMS, dtype=torch.int32, device=device),
        programs=min(programs, MOST_PROGRAMS),
        limit=_LOOKS,
    )
    torch.cuda.synchronize(device)
    return PeerMemory(shared.part, peers, slot_bytes, inboxes, shared)


def usable_programs(device: torch.device, size: int) -> int:
    """How many programs of a meeting of ``size`` ranks this GPU is sure to hold at once.

    They have 256 threads, which take up to 128 registers with four ranks and up to 255 with eight.
    """
    count = int(torch.cuda.get_device_properties(device).multi_processor_count)
    return min(MOST_PROGRAMS, 2 * count if size <= 4 else count)
