"""All-reduce and gather over peer memory: a part of every rank's memory that all ranks of the group can read and write.

Each rank leaves its part of a sum in its own peer memory, and one kernel meets the other ranks, adds the parts up, adds
the residual stream and norms the result (GPUs only: `kubeinfer.kernels.triton_all_reduce`, which also says why it is safe).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kubeinfer.kernels.norm import rms_norm_reference

MOST_PROGRAMS = 256
MOST_RANKS = 8
# Bytes at the start of every rank's peer memory that hold the counters of its meetings.
COUNTER_BYTES = MOST_PROGRAMS * MOST_RANKS * 4
# Places in peer memory begin at multiples of this many bytes.
ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class Peers:
    """One rank's view of its group's peer memory; offsets into it are in bytes and multiples of ``ALIGNMENT``."""

    rank: int
    size: int  # ranks, at most MOST_RANKS
    addresses: Tensor  # int64 [size]: where each rank's peer memory is in this process
    meetings: Tensor  # int32 [MOST_PROGRAMS], zero at first: how often each program has met its peers
    programs: int  # the most programs of a launch; equal on all ranks
    limit: int  # looks for a peer's word before the kernel gives up with a trap
    meet: bool = True  # False: the peers' parts are all there (tests in one process)


@dataclass(frozen=True, slots=True)
class Inboxes:
    """Where `sum_packets` leaves its packets of 8 bytes: ``[2, ranks, rows, words]`` of them, zero at first."""

    offset: int  # into peer memory, in bytes
    rows: int
    words: int  # the most words of 4 bytes a row; even
    calls: Tensor  # int32 [rows], zero at first: how many calls each row took part in

    @staticmethod
    def num_bytes(ranks: int, rows: int, words: int) -> int:
        return -(-2 * ranks * rows * words * 8 // ALIGNMENT) * ALIGNMENT


def sum_packets(
    peers: Peers,
    inboxes: Inboxes,
    x: Tensor,
    out: Tensor,
    *,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """`sum_rows` of all ranks' ``x [rows, width]``, wherever it lies, sent as packets: the fastest for a few rows.

    ``x``, ``out`` and ``residual`` are contiguous, with no more rows and words a row than ``inboxes`` hold.
    """
    from kubeinfer.kernels.triton_packets import sum_packets_triton

    sum_packets_triton(peers, inboxes, x, out, residual, weight, eps)


def sum_rows(
    peers: Peers,
    slot: int,
    rows: int,
    width: int,
    out: Tensor,
    *,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
    result: int = -1,
    close: bool = False,
) -> None:
    """The sum of all ranks' ``[rows, width]`` at ``slot``, in fp32 and in the order of the ranks.

    With a ``residual [rows, width]``: ``residual += sum`` in place, and its new value goes on; with a norm's ``weight
    [width]``: RMSNorm of that. Bit-equal on all ranks.

    Args:
        out: ``[rows, width]``, contiguous: where the result goes. Its dtype is that of all tensors.
        result: offset of a place in peer memory. Each rank then does an equal share of the rows, in order, and writes
            their results there for all ranks; ``out`` must be this rank's view of it, and of ``residual`` only the rank's
            own rows are updated (each rank always does the same rows of equally many).
        close: on return all ranks are done reading ``slot`` (always so with ``result``).
    """
    from kubeinfer.kernels.triton_all_reduce import sum_rows_triton

    sum_rows_triton(peers, slot, rows, width, out, residual, weight, eps, result, close)


def gather_columns(peers: Peers, slot: int, rows: int, width: int, out: Tensor) -> None:
    """All ranks' ``[rows, width]`` at ``slot`` side by side, as many columns as ``out [rows, <= size * width]`` has.

    On return all ranks are done reading ``slot``.
    """
    from kubeinfer.kernels.triton_all_reduce import gather_columns_triton

    gather_columns_triton(peers, slot, rows, width, out)


def sum_rows_reference(
    parts: list[Tensor], residual: Tensor | None = None, weight: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """`sum_rows` of the ranks' ``parts`` in torch; updates ``residual``."""
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part.float()
    if residual is not None:
        total += residual.float()
    result = total.to(parts[0].dtype)
    if residual is not None:
        residual.copy_(result)
    return result if weight is None else rms_norm_reference(result, weight, eps)
