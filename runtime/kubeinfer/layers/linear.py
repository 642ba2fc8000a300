"""Linear layers, whole or split over a tensor-parallel group (Megatron-LM: columns first, rows second, one all-reduce)."""

from __future__ import annotations

from torch import Tensor

from kubeinfer.errors import OptionError
from kubeinfer.kernels.fused_linear import add_linear, gated_linear, norm_linear
from kubeinfer.kernels.linear import PackedWeight, linear, pack_weight
from kubeinfer.layers.norm import RMSNorm
from kubeinfer.layers.parameters import ParameterStore


class Linear:
    """``y = x W^T + b``; ``weight`` is this rank's shard ``[out, in]``."""

    def __init__(self, store: ParameterStore, out_features: int, in_features: int, bias: bool):
        self.weight = store.empty(out_features, in_features)
        self.bias = store.empty(out_features) if bias else None
        self.packed: PackedWeight | None = None

    def finish_loading(self) -> None:
        """Put the weight into the form its kernel reads fastest."""
        self.packed = pack_weight(self.weight)
        if self.packed is not None:
            self.weight = self.weight.new_empty(0)  # only the packed form is kept

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.packed)

    def after_norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """This layer of ``norm(x)``."""
        return norm_linear(x, norm.weight, norm.eps, self.weight, self.bias, self.packed)


class ReplicatedLinear(Linear):
    """The whole weight on every rank."""

    def __init__(self, store: ParameterStore, name: str, out_features: int, in_features: int, bias: bool):
        super().__init__(store, out_features, in_features, bias)
        store.expect(f"{name}.weight", self.weight)
        if self.bias is not None:
            store.expect(f"{name}.bias", self.bias)


class ColumnLinear(Linear):
    """Outputs split over the ranks; several checkpoint weights may be fused one under the other."""

    def __init__(
        self, store: ParameterStore, names: list[str], out_features: list[int], in_features: int, bias: bool
    ):
        rank, size = store.group.rank, store.group.size
        for total in out_features:
            check_divisible(total, size, f"{names[0]} outputs")
        shards = [total // size for total in out_features]
        super().__init__(store, sum(shards), in_features, bias)
        offset = 0
        for name, length in zip(names, shards):
            store.expect(f"{name}.weight", self.weight.narrow(0, offset, length), 0, rank * length, length)
            if self.bias is not None:
                store.expect(f"{name}.bias", self.bias.narrow(0, offset, length), 0, rank * length, length)
            offset += length


class GatedLinear(ColumnLinear):
    """``silu(gate(x)) * up(x)``, gate and up in one weight, outputs split over the ranks."""

    def __init__(
        self, store: ParameterStore, gate: str, up: str, out_features: int, in_features: int, bias: bool
    ):
        super().__init__(store, [gate, up], [out_features, out_features], in_features, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return gated_linear(x, self.weight, self.bias, self.packed)

    def after_norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return gated_linear(x, self.weight, self.bias, self.packed, norm.weight, norm.eps)


class QKVLinear(Linear):
    """Query, key and value projections in one weight. KV heads are replicated where there are fewer than ranks."""

    def __init__(
        self,
        store: ParameterStore,
        names: tuple[str, str, str],
        hidden: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
    ):
        rank, size = store.group.rank, store.group.size
        check_divisible(num_heads, size, "attention heads")
        if num_kv_heads >= size:
            check_divisible(num_kv_heads, size, "KV heads")
        else:
            check_divisible(size, num_kv_heads, "ranks per KV head")
        self.num_heads = num_heads // size
        self.num_kv_heads = max(1, num_kv_heads // size)
        q, kv = self.num_heads * head_dim, self.num_kv_heads * head_dim
        super().__init__(store, q + 2 * kv, hidden, bias)
        kv_start = (rank * num_kv_heads // size) * head_dim
        parts = ((0, q, rank * q), (q, kv, kv_start), (q + kv, kv, kv_start))
        for name, (offset, length, start) in zip(names, parts):
            store.expect(f"{name}.weight", self.weight.narrow(0, offset, length), 0, start, length)
            if self.bias is not None:
                store.expect(f"{name}.bias", self.bias.narrow(0, offset, length), 0, start, length)


class RowLinear(Linear):
    """Inputs split over the ranks; the partial results are summed. The bias is added once, on rank 0."""

    def __init__(self, store: ParameterStore, name: str, out_features: int, in_features: int, bias: bool):
        self.group = store.group
        rank, size = self.group.rank, self.group.size
        check_divisible(in_features, size, f"{name} inputs")
        shard = in_features // size
        self.out_features = out_features
        super().__init__(store, out_features, shard, bias)
        store.expect(f"{name}.weight", self.weight, 1, rank * shard, shard)
        if self.bias is not None:
            store.expect(f"{name}.bias", self.bias)

    def finish_loading(self) -> None:
        if self.bias is not None and self.group.rank > 0:
            self.bias.zero_()
        super().finish_loading()

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(self.partial(x))

    def partial(self, x: Tensor) -> Tensor:
        """This rank's part of the sum, where the group's next sum reads it best."""
        out = self.group.buffer(x.shape[0], self.out_features, x.dtype)
        return linear(x, self.weight, self.bias, self.packed, out)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual += self(x)`` in place; a group of one rank only."""
        return add_linear(residual, x, self.weight, self.bias, self.packed)


def check_divisible(total: int, parts: int, what: str) -> None:
    if total % parts:
        raise OptionError(
            f"tensor_parallel_size {parts} does not divide the model's {total} {what}; choose a divisor.",
            "tensor_parallel_size",
        )
