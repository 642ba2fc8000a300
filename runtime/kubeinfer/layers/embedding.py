"""Token embedding and output head, split over the vocabulary."""

from __future__ import annotations

from torch import Tensor

from kubeinfer.kernels.embedding import vocab_parallel_embedding
from kubeinfer.kernels.linear import PackedWeight, linear, logits, pack_weight
from kubeinfer.layers.parameters import ParameterStore


class VocabEmbedding:
    """This rank's rows of the vocabulary; used as embedding, as output head, or as both (tied)."""

    def __init__(self, store: ParameterStore, name: str, vocab_size: int, hidden: int):
        store.begin_layer(None)
        self.group = store.group
        self.vocab_size = vocab_size
        shard = -(-vocab_size // self.group.size)
        self.start = self.group.rank * shard
        self.end = min(self.start + shard, vocab_size)
        # Every rank holds equally many rows, so that logits can be gathered; the last rank's spare rows stay zero.
        self.weight = store.empty(shard, hidden)
        length = max(0, self.end - self.start)
        if length < shard:
            self.weight.zero_()
        store.expect(
            f"{name}.weight", self.weight.narrow(0, 0, length), 0, self.start if length else 0, length
        )
        self._packed: PackedWeight | None = None

    def finish_loading(self) -> None:
        """As an output head: put the weight into the form its kernel reads fastest."""
        self._packed = pack_weight(self.weight)

    def embed(self, ids: Tensor) -> Tensor:
        """``ids [T]`` -> ``[T, hidden]``."""
        if self.group.size == 1:
            return vocab_parallel_embedding(ids, self.weight, 0, self.vocab_size)
        return self.group.all_reduce(vocab_parallel_embedding(ids, self.weight, self.start, self.end))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """``hidden [N, H]`` -> ``[N, vocab_size]``, on every rank; into ``out`` where given."""
        if self.group.size == 1:
            return logits(hidden, self.weight, self._packed, out)
        buffer = self.group.gather_buffer(hidden.shape[0], self.weight.shape[0], hidden.dtype)
        part = linear(hidden, self.weight, None, self._packed, buffer)
        return self.group.all_gather(part, self.vocab_size, out)
